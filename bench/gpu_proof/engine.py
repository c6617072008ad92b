"""Part 5: lanes with random weights at the shapes of Qwen2.5: decoding, verification, and the two together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import torch

from atts_engine import ops
from atts_engine.backends import InProcessLane, Seq
from atts_engine.config import SamplingParams
from atts_engine.models import Model
from bench.gpu_proof.context import Context, Found, Line, OutOfTime, free_memory, one_line, share
from bench.gpu_proof.lanes import (
    closed,
    decode_rows,
    least_seconds,
    median,
    open_lanes,
    opened,
    seconds,
    step_seconds,
    verify_rows,
    write,
)
from bench.gpu_proof.models import CONFIGS, TINY, random_model
from bench.kernels.devices import bytes_allocated


@dataclass(frozen=True, slots=True)
class Work:
    """How much of each: chains of a decode, prompt tokens, tokens of a timed decode, chains and tokens of spans."""

    chains: tuple[int, ...] = (1, 16, 64, 256)
    prompt: int = 512
    tokens: int = 64
    spans: int = 16
    span: int = 500
    chunk: int = 64
    rounds: int = 3


DRY = Work(chains=(1, 2), prompt=4, tokens=3, spans=2, span=6, chunk=2, rounds=1)


def measure(ctx: Context, found: Found) -> None:
    work = DRY if ctx.dry else Work()
    found |= {"work": {"prompt": work.prompt, "tokens": work.tokens, "spans": work.spans, "span": work.span}}
    for name in CONFIGS:
        if (cell := _cell(ctx, found, name)) is not None:
            model = make(ctx, name)
            cell |= {"weights_bytes": weights_bytes(model), "decode": {}}
            _run(_one_model(ctx, model, work, cell), cell)
            ended(ctx, cell)
            del model
            free_memory(ctx.device)
    if (cell := _cell(ctx, found, "pair")) is not None:
        cell |= {"draft": "1.5B", "target": "14B"}
        _run(_pair(ctx, (make(ctx, "1.5B"), make(ctx, "14B")), work, cell), cell)
        ended(ctx, cell)
    failed = [f"{name}: {cell['error']}" for name, cell in found.items() if "error" in cell]
    if failed:
        raise RuntimeError("; ".join(failed))


def _cell(ctx: Context, found: Found, name: str) -> Found | None:
    """Where to put what is found of a model; None where there is nothing to do. What an earlier process had found of a
    model when the device was lost stays."""
    if (lost := ctx.begin(name)) is not None:
        found.setdefault(name, {})["error"] = lost
    return None if name in found else found.setdefault(name, {})


def ended(ctx: Context, cell: Found) -> None:
    if "error" in cell:
        ctx.survived()


def _run(work: Coroutine[Any, Any, None], cell: Found) -> None:
    """What one model stumbles over is noted, and the next one is measured all the same."""
    try:
        asyncio.run(work)
    except OutOfTime:
        raise
    except Exception as error:
        cell["error"] = one_line(error)


def make(ctx: Context, name: str) -> Model:
    """bf16 on a GPU; a dry run's CPU is quickest in fp32."""
    config, dtype = (TINY[name], torch.float32) if ctx.dry else (CONFIGS[name], torch.bfloat16)
    return random_model(name, config, ctx.device, dtype)


def weights_bytes(model: Model) -> int:
    w = model.decoder.weights
    layers = [m for layer in w.layers for m in layer.matrices]
    return sum(m.nbytes for m in [*layers, w.embed, *([] if w.lm_head is w.embed else [w.lm_head])])


async def _one_model(ctx: Context, model: Model, work: Work, cell: Found) -> None:
    length = work.prompt + 1 + work.rounds * work.tokens
    room = max(max(work.chains) * (length + 32), work.spans * (work.prompt + work.span + 32))
    async with open_lanes([model], ctx.device, room) as lanes:
        (lane,) = lanes(work.chunk)
        for n in work.chains:
            ctx.check()
            step_s = median(await step_seconds(lane, n, work.prompt, work.tokens, work.rounds))
            # The middle round's mean length; the median is of rounds.
            bound_s = least_seconds(model, ctx.limits(), decode_rows(n, (work.prompt + length) // 2))
            cell["decode"][str(n)] = {"tokens_per_s": n / step_s, "bound_tokens_per_s": n / bound_s}
        ctx.check()
        verified = await _verify(lane, work)
        bound_s = least_seconds(model, ctx.limits(), verify_rows(work.spans, work.prompt, work.span))
        tokens = work.spans * work.span
        cell["verify"] = {"tokens_per_s": tokens / verified, "bound_tokens_per_s": tokens / bound_s}
    ctx.check()
    cell["score_memory"] = _score_memory(model, ctx.device, work.spans * work.span)


async def _verify(lane: InProcessLane, work: Work) -> float:
    """Seconds from giving the lane all spans to their verdicts; median of rounds."""
    found = []
    for round_ in range(work.rounds):
        seqs = await opened(lane, work.spans, work.prompt, first=1000 * round_)
        spans = [[(7 * i + j) % 40_000 for j in range(work.span)] for i in range(work.spans)]
        found.append(await seconds(asyncio.gather(*(judge(lane, s, t) for s, t in zip(seqs, spans, strict=True)))))
        await closed(lane, seqs)
    return median(found)


async def judge(lane: InProcessLane, seq: Seq, tokens: list[int]) -> float:
    await lane.append(seq, tokens, score=True)
    return (await lane.verdict(seq, None)).score


@torch.inference_mode()
def _score_memory(model: Model, device: torch.device, rows: int) -> dict[str, int]:
    """Bytes at the peak (on a CPU: bytes allocated) of scoring `rows` hidden states, without and with logits."""
    g = torch.Generator(device).manual_seed(0)
    head = model.decoder.lm_head
    hidden = torch.randn(rows, head.shape[1], generator=g, device=device, dtype=head.dtype)
    ids = torch.randint(0, head.shape[0], (rows,), generator=g, device=device)

    def peak(call: Any) -> int:
        if device.type != "cuda":
            return bytes_allocated(device, call)
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before

    return {
        "rows": rows,
        "without_logits": peak(lambda: ops.score_tokens(hidden, head, ids)),
        "with_logits": peak(lambda: ops.score_logits(ops.linear(hidden, head), ids)),
    }


async def _pair(ctx: Context, models: tuple[Model, Model], work: Work, found: Found) -> None:
    """Drafting and verifying `spans` spans apart and together, streamed and not, in turns; then takeovers.

    hidden share of verify = (draft alone + verify alone - together) / verify alone, at most
    min(1, draft alone / verify alone); negative where the two disturb each other more than they overlap.
    Verdict delay = from a chain's last draft token to its verdict, over a decode step of the target at as many rows.
    """
    room = work.spans * (work.prompt + work.span + 2 * work.tokens + 64)
    async with open_lanes(models, ctx.device, room) as lanes:
        passes = await step_seconds(lanes(work.chunk)[1], work.spans, work.prompt, work.tokens, work.rounds)
        forward_s = median(passes)
        runs: dict[str, list[dict[str, float]]] = {"apart": [], "streamed": [], "whole": []}
        for round_ in range(work.rounds):
            ctx.check()
            runs["apart"].append(await _apart(lanes(work.chunk), work, round_))
            runs["streamed"].append(await _together(lanes(work.chunk), work, round_))
            runs["whole"].append(await _together(lanes(work.span), work, round_))
    of = {mode: {key: median([r[key] for r in rs]) for key in rs[0]} for mode, rs in runs.items()}
    draft_s, verify_s = of["apart"]["draft_s"], of["apart"]["verify_s"]
    found |= {
        "target_forward_s": forward_s,
        "draft_alone_s": draft_s,
        "verify_alone_s": verify_s,
        "together_s": of["streamed"]["seconds"],
        "hidden_share": (draft_s + verify_s - of["streamed"]["seconds"]) / verify_s,
        "hidden_share_at_most": min(1.0, draft_s / verify_s),
        "verdict_delay_passes": {mode: of[mode]["delay_s"] / forward_s for mode in ("streamed", "whole")},
        "takeover_passes": of["streamed"]["takeover_s"] / forward_s,
        "takeover_tokens_forwarded": of["streamed"]["forwarded"],
    }


async def _apart(lanes: list[InProcessLane], work: Work, round_: int) -> dict[str, float]:
    draft, target = lanes
    d, t = [await opened(lane, work.spans, work.prompt, first=1000 * round_) for lane in lanes]
    began = time.perf_counter()
    spans = await asyncio.gather(*(write(draft, seq, work.span, i) for i, seq in enumerate(d)))
    drafted = time.perf_counter()
    await asyncio.gather(*(judge(target, seq, span) for seq, span in zip(t, spans, strict=True)))
    judged = time.perf_counter()
    await closed(draft, d)
    await closed(target, t)
    return {"draft_s": drafted - began, "verify_s": judged - drafted}


async def _together(lanes: list[InProcessLane], work: Work, round_: int) -> dict[str, float]:
    draft, target = lanes
    d, t = [await opened(lane, work.spans, work.prompt, first=1000 * round_) for lane in lanes]

    async def chain(number: int) -> float:
        """Seconds from the last draft token to the verdict."""
        sampling = SamplingParams(temperature=0.8, seed=number, ignore_eos=True)
        async with aclosing(draft.decode(d[number], work.span, sampling)) as chunks:
            async for chunk in chunks:
                came = time.perf_counter()
                await target.append(t[number], chunk.tokens, score=True)
        await target.verdict(t[number], None)
        return time.perf_counter() - came

    began = time.perf_counter()
    delays = await asyncio.gather(*(chain(i) for i in range(work.spans)))
    whole = time.perf_counter() - began
    before = target.core.stats.computed_tokens
    takeover_s = await seconds(asyncio.gather(*(write(target, seq, 1, i) for i, seq in enumerate(t))))
    forwarded = (target.core.stats.computed_tokens - before) / work.spans
    await closed(draft, d)
    await closed(target, t)
    return {"seconds": whole, "delay_s": median(delays), "takeover_s": takeover_s, "forwarded": forwarded}


def lines(found: Found) -> list[Line]:
    told = []
    for name in (n for n in CONFIGS if n in found):
        for n, cell in found[name].get("decode", {}).items():
            bound = f"{share(cell['tokens_per_s'], cell['bound_tokens_per_s'])} of the bound by weights and KV"
            bound += "; aim 80%" if n == "16" else ""
            told.append((f"decode {name}, {n} chains", f"{cell['tokens_per_s']:,.0f} tokens/s", bound))
        if verify := found[name].get("verify"):
            bound = f"{share(verify['tokens_per_s'], verify['bound_tokens_per_s'])} of the bound"
            told.append((f"verify {name}", f"{verify['tokens_per_s']:,.0f} tokens/s", bound))
        if memory := found[name].get("score_memory"):
            with_logits = f"{memory['with_logits'] / 2**20:,.0f} MiB with logits"
            told.append((f"memory of scoring, {name}", f"{memory['without_logits'] / 2**20:,.1f} MiB", with_logits))
    pair = found.get("pair", {})
    if "hidden_share" in pair:
        delay = pair["verdict_delay_passes"]
        most = f"at most {100 * pair['hidden_share_at_most']:.0f}% with this pair; aim 85%"
        told += [
            ("verify hidden by overlap", f"{100 * pair['hidden_share']:.0f}%", most),
            ("verdict after the last draft token", f"{delay['streamed']:.2f} target passes",
             f"{delay['whole']:.2f} without streaming; aim 1.5"),
            ("takeover's first token", f"{pair['takeover_passes']:.2f} target passes",
             f"{pair['takeover_tokens_forwarded']:g} tokens forwarded a chain: 1 is no prefill"),
        ]  # fmt: skip
    return told
