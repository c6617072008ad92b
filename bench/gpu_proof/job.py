"""Part 6: a whole job, 8 problems x 16 chains, with recorded turn lengths and takeovers: the target alone,
synchronous ranking, ATTS. One run of each, as long as the time allows: each is thousands of steps.

All three write the same number of tokens. Target alone: the target writes all of a chain's tokens in one span.
Synchronous: the chains of a problem wait for each other before each verdict's consequence (`bench.e2e.barrier`).
Half the takeovers: the same chains, of whose takeovers the draft writes every second one itself; a higher ceiling.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from atts_engine.backends import InProcessLane
from atts_engine.evaluation.lanes import LaneUse, lane_figures
from atts_engine.evaluation.simulation import Job, LaneModel, LinearCost, Machine, Rules, TurnWork, simulate
from atts_engine.evaluation.simulation.work import alone, cut, load_turns, tokens_of
from atts_engine.runtime import Rates, available_bytes, kv_bytes_per_token, pool_tokens
from bench.e2e.barrier import run_job
from bench.gpu_proof import turns
from bench.gpu_proof.context import Context, Found, Line
from bench.gpu_proof.engine import make
from bench.gpu_proof.lanes import closed, median, open_lanes, pair_of, prompt, step_seconds, write

PAPER = {"latency": 56.7, "throughput": 4.14}
"""arXiv 2509.15148, abstract: at most 56.7 times in latency and 4.14 times in throughput, on other models and work."""
GRID = ((1, 1), (4, 1), (16, 1), (16, 2), (16, 4))
"""(chains, turns) of the runs that tell T_c, T_m, T_s and r."""
PROMPT_TOKENS = 32
ALONE, SYNC, ATTS, FEWER = "target alone", "synchronous ranking", "ATTS", "ATTS, half the takeovers"


def measure(ctx: Context, found: Found) -> None:
    recorded = load_turns()
    job = cut(recorded.job, problems=2, chains=2, turns=2, scale=100.0) if ctx.dry else recorded.job
    found |= {
        "paper": PAPER,
        "takeover_rate": recorded.takeover_rate,
        "ceiling_recorded": turns.ceiling(recorded.draft_tokens, recorded.target_tokens),
    }
    asyncio.run(_measure(ctx, job, found))


async def _measure(ctx: Context, job: Job, found: Found) -> None:
    models = [make(ctx, name) for name in ("1.5B", "14B")]
    room = 4096
    if ctx.device.type == "cuda":
        sizes = [kv_bytes_per_token(model) for model in models]
        room = min(pool_tokens([ctx.device] * 2, sizes, [available_bytes(ctx.device)] * 2, 0.85))
    async with open_lanes(models, ctx.device, room) as open_:
        lanes = open_(64 if not ctx.dry else 2)
        draft, target = [await _lane_model(lane, sum(map(len, job)), ctx.dry) for lane in lanes]
        job, scale = _fitted(job, draft, target, ctx.left())
        work = tokens_of(job)
        found |= {
            "scale": scale,
            "kv_tokens": room,
            "draft_tokens": work[0],
            "target_tokens": work[1],
            "ceiling": {
                ATTS: turns.ceiling(*work),
                FEWER: turns.ceiling(*tokens_of(turns.fewer_takeovers(job))),
            },
            "lane_models": {"draft": asdict(draft), "target": asdict(target)},
            "predicted_s": _predicted(job, draft, target),
            "runs": {},
            "grid": [],
        }
        async with asyncio.timeout(ctx.left()):
            for name in (ALONE, SYNC, ATTS, FEWER):
                ctx.begin(name)
                run = await _run(lanes, turns.fewer_takeovers(job) if name == FEWER else job, name, ctx)
                found["runs"][name] = run
                _ratios(found)
            for chains, most in GRID:
                ctx.check()
                part = cut(job, problems=len(job), chains=chains, turns=most)
                if chains <= len(job[0]) and most <= max(len(c) for p in job for c in p):
                    cell = {"chains": chains, "turns": most}
                    found["grid"].append(cell | await _run(lanes, part, ATTS, ctx))


async def _lane_model(lane: InProcessLane, rows: int, dry: bool) -> LinearCost:
    """Step times at one row and at as many as the job has chains, and a line between."""
    one, many = [median(await step_seconds(lane, n, PROMPT_TOKENS, 2 if dry else 32, 1)) for n in (1, max(2, rows))]
    row_s = max(0.0, (many - one) / (max(2, rows) - 1))
    return LinearCost(max(0.0, one - row_s), row_s)


def _predicted(job: Job, draft: LinearCost, target: LinearCost) -> dict[str, float]:
    """Seconds by `evaluation.simulation` from step times alone; verification is taken to cost one step a span."""
    both = Machine(LaneModel(draft), LaneModel(target), shared=True)
    free, sync = (Rules(scope, verification="step") for scope in ("none", "problem"))
    outcomes = {
        ALONE: simulate(alone(job), Machine(LaneModel(target)), Rules()),
        SYNC: simulate(job, both, sync),
        ATTS: simulate(job, both, free),
        FEWER: simulate(turns.fewer_takeovers(job), both, free),
    }
    return {name: outcome.seconds for name, outcome in outcomes.items()}


def _fitted(job: Job, draft: LinearCost, target: LinearCost, seconds: float) -> tuple[Job, float]:
    """The job, with spans cut to 1/scale where its runs would take more than two thirds of the time left."""
    wanted = 1.5 * sum(_predicted(job, draft, target).values())
    scale = max(1.0, wanted / max(seconds, 1e-9))
    most = max(len(chain) for problem in job for chain in problem)
    return cut(job, problems=len(job), chains=len(job[0]), turns=most, scale=scale), scale


async def _run(lanes: Sequence[InProcessLane], job: Job, name: str, ctx: Context) -> dict[str, Any]:
    """seconds: of the whole job; latency_s: mean of a chain; lanes: docs/intensity.md's figures of either."""
    before = [asdict(lane.core.stats) | asdict(lane.core.meter.totals) for lane in lanes]
    if name == ALONE:
        seconds, latency = await _target_alone(lanes[1], job)
        barrier = 0.0
    else:
        run = await run_job(pair_of(lanes), job, len(job), "problem" if name == SYNC else "none")
        seconds, latency = run.seconds, run.chain_s / sum(map(len, job))
        barrier = run.barrier_s / run.chain_s
    rates = Rates(flop_s=ctx.limits().peak, bytes_s=ctx.limits().bandwidth)
    use = {
        lane.core.name: lane_figures(
            LaneUse.between(old, asdict(lane.core.stats) | asdict(lane.core.meter.totals), rates)
        )
        for lane, old in zip(lanes, before, strict=True)
    }
    tokens = sum(tokens_of(job))
    return {
        "seconds": seconds,
        "latency_s": latency,
        "tokens_per_s": tokens / seconds,
        "at_barriers": barrier,
        "lanes": use,
    }


async def _target_alone(target: InProcessLane, job: Job) -> tuple[float, float]:
    """(seconds of the job, mean seconds of a chain) with every chain's tokens written by the target."""
    took: list[float] = []

    async def problem(number: int, chains: Sequence[Sequence[TurnWork]]) -> None:
        root = await target.open(prompt(number, PROMPT_TOKENS))
        seqs = await target.fork(root, len(chains))
        await target.close(root)
        began = time.perf_counter()

        async def chain(index: int) -> None:
            await write(target, seqs[index], chains[index][0].draft, index)
            took.append(time.perf_counter() - began)

        try:
            await asyncio.gather(*(chain(i) for i in range(len(chains))))
        finally:
            await closed(target, seqs)

    began = time.perf_counter()
    await asyncio.gather(*(problem(i, chains) for i, chains in enumerate(alone(job))))
    return time.perf_counter() - began, sum(took) / len(took)


def _ratios(found: Found) -> None:
    """Of each form of ATTS over those that do the same work: a chain's latency, and throughput, which is that of
    seconds. `of_ceiling`: throughput over the target alone, as a share of what the target's own tokens allow."""
    runs = found["runs"]
    found["ratios"] = {
        form: {
            base: {
                "latency": runs[base]["latency_s"] / runs[form]["latency_s"],
                "throughput": runs[base]["seconds"] / runs[form]["seconds"],
            }
            for base in ((ALONE, SYNC) if form == ATTS else (ALONE,))
        }
        for form in (ATTS, FEWER)
        if form in runs
    }
    found["of_ceiling"] = {
        form: ratio[ALONE]["throughput"] / found["ceiling"][form] for form, ratio in found["ratios"].items()
    }


def lines(found: Found) -> list[Line]:
    told = []
    for name, run in found.get("runs", {}).items():
        beside = f"predicted {found['predicted_s'][name]:.3g} s; chain {run['latency_s']:.3g} s"
        told.append((f"job, {name}", f"{run['seconds']:.3g} s", beside))
    for form, ratios in found.get("ratios", {}).items():
        for base, ratio in ratios.items():
            measured = f"latency {ratio['latency']:.2f}x, throughput {ratio['throughput']:.2f}x"
            paper = "paper {latency} and {throughput}, on other models".format(**PAPER)
            ceiling = f"{100 * found['of_ceiling'][form]:.0f}% of the ceiling {found['ceiling'][form]:.2f}, aim 80%"
            told.append((f"{form}, over {base}", measured, f"{ceiling}; {paper}" if base == ALONE else ""))
    for cell in found.get("grid", ()):
        use = [(name, lane["r"]) for name, lane in cell["lanes"].items() if lane["r"] is not None]
        r = ", ".join(f"{name} {value:.3g}" for name, value in use)
        told.append((f"r, {cell['chains']} chains x {cell['turns']} turns", r, f"{cell['seconds']:.3g} s"))
    return told
