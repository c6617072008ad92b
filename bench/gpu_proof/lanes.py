"""Lanes as the engine makes them, around models that have no files."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager

import torch

from atts_engine.backends import InProcessLane, Seq
from atts_engine.config import SamplingParams
from atts_engine.models import Model
from atts_engine.pipeline import Pair, Tongues, Words
from atts_engine.runtime import EngineLoop, LaneCore, Mailbox
from atts_engine.runtime.meters import ModelCost, StepRows
from bench.kernels.devices import Facts

MAX_BATCH_TOKENS = 8192


@asynccontextmanager
async def open_lanes(
    models: Sequence[Model], device: torch.device, kv_tokens: int
) -> AsyncIterator[Callable[[int], list[InProcessLane]]]:
    """Cores around the models, on one thread. What comes is a function: chunk_tokens -> a lane on each core. All
    sequences of such lanes must be closed before it is called again, as they number theirs alike."""
    names = ("draft", "target") if len(models) == 2 else ("target",)
    cores = [
        LaneCore(
            name,
            model,
            kv_tokens=kv_tokens,
            page_size=16,
            max_batch_tokens=MAX_BATCH_TOKENS if device.type == "cuda" else 256,
            device=device,
            stream_priority=-1 if name == "draft" else 0,
        )
        for name, model in zip(names, models, strict=True)
    ]
    for core in cores:
        core.warm_up()
    loop, mailbox = EngineLoop([(core, lambda *_: None) for core in cores]), Mailbox(asyncio.get_running_loop())
    loop.start()
    try:
        yield lambda chunk: [InProcessLane(core, loop, mailbox, chunk_tokens=chunk) for core in cores]
    finally:
        await asyncio.to_thread(loop.stop)


def pair_of(lanes: Sequence[InProcessLane]) -> Pair:
    words = Words(lanes[0].core.model.tokenizer, frozenset())
    return Pair(lanes[0], lanes[1], Tongues(words, words))


def prompt(number: int, tokens: int) -> list[int]:
    """Token ids of no text in particular, another for each number."""
    return [100 + (7919 * number + 37 * i) % 40_000 for i in range(tokens)]


async def write(lane: InProcessLane, seq: Seq, tokens: int, seed: int) -> list[int]:
    """Have the lane decode exactly so many tokens."""
    written: list[int] = []
    sampling = SamplingParams(temperature=0.8, seed=seed, ignore_eos=True)
    async with aclosing(lane.decode(seq, tokens, sampling)) as chunks:
        async for chunk in chunks:
            written += chunk.tokens
    if len(written) != tokens:
        raise RuntimeError(f"a span of {tokens} tokens was asked for and {len(written)} came")
    return written


async def opened(lane: InProcessLane, n: int, tokens: int, first: int = 0) -> list[Seq]:
    """n sequences behind prompts of their own, computed."""
    seqs: list[Seq] = [await lane.open(prompt(first + i, tokens)) for i in range(n)]
    await asyncio.gather(*(write(lane, seq, 1, i) for i, seq in enumerate(seqs)))
    return seqs


async def closed(lane: InProcessLane, seqs: Sequence[Seq]) -> None:
    for seq in seqs:
        await lane.close(seq)


async def seconds(work: Awaitable[object]) -> float:
    began = time.perf_counter()
    await work
    return time.perf_counter() - began


async def step_seconds(lane: InProcessLane, n: int, prompt_tokens: int, tokens: int, rounds: int) -> list[float]:
    """Seconds of a decode step of n sequences, once a round; contexts grow by `tokens` each."""
    seqs = await opened(lane, n, prompt_tokens)
    found = []
    for _ in range(rounds):
        work = asyncio.gather(*(write(lane, seq, tokens, i) for i, seq in enumerate(seqs)))
        found.append(await seconds(work) / tokens)
    await closed(lane, seqs)
    return found


def least_seconds(model: Model, facts: Facts, rows: StepRows) -> float:
    """No step can be quicker than max(bytes / bandwidth, operations / peak), both as docs/intensity.md counts them:
    weights once, keys and values of each sequence once, LM head, logits."""
    cost = ModelCost.of_model(model)
    return max(cost.bytes(rows) / facts.bandwidth, cost.operations(rows) / facts.peak)


def decode_rows(n: int, length: int) -> StepRows:
    """A decode step of n sequences of `length` tokens each."""
    return StepRows(rows=n, attended=n * length, cached=n * length, scored=0, sampled=n)


def verify_rows(n: int, before: int, span: int) -> StepRows:
    """n spans behind `before` tokens each, all scored in one step."""
    attended = span * before + span * (span + 1) // 2
    return StepRows(n * span, n * attended, n * (before + span), n * span, 0)


def median(values: Sequence[float]) -> float:
    return statistics.median(values)
