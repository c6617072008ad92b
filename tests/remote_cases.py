"""What a remote lane is asked for in tests, and what the local model says to the same."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any

import torch

from atts_engine import ops
from atts_engine.backends.remote.connect import connect
from atts_engine.backends.remote.lane import RemoteLane
from atts_engine.models import load_model
from atts_engine.runtime.records import SamplingParams, TokenChunk
from tests.fake_vllm import FakeVllm, serving

MODEL = load_model("tiny-target")
PROMPT = MODEL.tokenizer.encode("<bos>Q: a = 85; b = a-43; c = b+11; c?\n\n")
STEP = MODEL.tokenizer.encode("b = a-43 = 85-43 = 42\n\n")
WRONG = MODEL.tokenizer.encode("c = b+11 = 42+11 = 57\n\n")
GREEDY = SamplingParams(temperature=0.0)
WARM = SamplingParams(temperature=5.0, seed=3)


async def span(lane: RemoteLane, seq: Any, n: int, sampling: SamplingParams, **more: Any) -> list[TokenChunk]:
    async with aclosing(lane.decode(seq, n, sampling, **more)) as chunks:
        return [chunk async for chunk in chunks]


def tokens_of(chunks: Sequence[TokenChunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.tokens]


def logprobs_of(tokens: Sequence[int], start: int) -> list[float]:
    """Of tokens[start:] under the local model."""
    rows = FakeVllm(MODEL).rows(tokens)[start - 1 : -1]
    return ops.score_logits(rows, torch.tensor(tokens[start:])).tolist()


def greedy(tokens: Sequence[int], n: int) -> list[int]:
    fake, found = FakeVllm(MODEL), list(tokens)
    for _ in range(n):
        found.append(int(fake.rows(found)[-1].argmax()))
        if found[-1] in MODEL.eos_token_ids:
            break
    return found[len(tokens) :]


def asked(body: Callable[[RemoteLane, FakeVllm], Awaitable[Any]], *, patience_s: float = 5.0, **flags: Any) -> Any:
    """What `body` gives on a lane whose server is a fake with these flags. No request is left behind."""

    async def run() -> Any:
        fake = FakeVllm(MODEL, **flags)
        async with serving(fake) as place:
            lane = await connect(
                f"vllm://{place}/tiny", lane="target", tokenizer="tiny-target", patience_s=patience_s, chunk_tokens=8
            )
            fake.heard.clear()
            try:
                answer = await body(lane, fake)
                await until(lambda: fake.open == 0)
                assert lane.stats()["in_flight"] == 0
                return answer
            finally:
                await lane.aclose()

    return asyncio.run(run())


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.002)
