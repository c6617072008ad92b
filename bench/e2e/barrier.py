"""What a barrier per turn costs: predicted from recorded turn lengths, then measured on the same work.

    python -m bench.e2e.barrier --traces FILE --out bench/results/e2e_barrier_cpu.json

FILE: a trace file (docs/formats.md). A schedule that ranks a problem's chains cannot judge any of them before the last
has drafted; one that judges each alone can. The lengths of the recorded spans and the recorded takeovers say what that
costs: for the recorded job on two GPUs by `evaluation.simulation` alone, and for an excerpt of it, cut down in scale,
by the same with step times measured here first, and then by running it. Both schedules write the same tokens, which is
checked, and take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from atts_engine import ops
from atts_engine.backends import Lane, Seq
from atts_engine.config import SamplingParams, dtype_of
from atts_engine.evaluation.files import write_text
from atts_engine.evaluation.simulation import Job, LaneModel, LinearCost, Machine, Rules, Scope, TurnWork, simulate
from atts_engine.evaluation.simulation.work import estimated_tokens
from atts_engine.evaluation.traces import read_chains
from atts_engine.models import load_model
from atts_engine.pipeline import Chain, Pair
from atts_engine.pipeline.streams import stream_key
from bench.e2e.pair import open_pair, prompt_of
from bench.output import out_file
from bench.provenance import provenance

SCOPES: tuple[Scope, ...] = ("none", "problem", "all")
PROMPT_TOKENS = 32
HBM_BYTES_S = 3.35e12
"""Of an H100 SXM: a decode step reads the weights once, so it takes weight bytes / this, whatever rows it has."""
GPU_DRAFT, GPU_TARGET = LinearCost(2 * 8.03e9 / HBM_BYTES_S), LinearCost(2 * 32.8e9 / HBM_BYTES_S)
"""bf16 weights of the recorded pair, R1-Distill-Llama-8B and QwQ-32B, each on a GPU of its own."""


def job_of(chains: Sequence[Chain], chars_per_token: float, problems: int, width: int, turns: int) -> Job:
    """The first `width` chains of the first `problems` problems, at most `turns` turns each, lengths in tokens."""
    by_problem: dict[str, list[list[TurnWork]]] = {}
    for chain in chains:
        found = by_problem.setdefault(chain.problem_id, [])
        if len(found) < width:
            lengths = [
                [estimated_tokens(len(text or ""), chars_per_token) for text in (t.draft, t.target)]
                for t in chain.turns[:turns]
            ]
            found.append([TurnWork(max(1, draft), target) for draft, target in lengths])
    return list(by_problem.values())[:problems]


class Barrier:
    """Every group's living members wait for each other. Belongs to one event loop."""

    def __init__(self) -> None:
        self._living: dict[Hashable, int] = {}
        self._waiting: dict[Hashable, list[asyncio.Future[None]]] = {}
        self.waited_s = 0.0

    def join(self, group: Hashable, members: int) -> None:
        self._living[group] = self._living.get(group, 0) + members

    async def arrive(self, group: Hashable) -> None:
        began = time.perf_counter()
        released: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(group, []).append(released)
        self._release(group)
        await released
        self.waited_s += time.perf_counter() - began

    def leave(self, group: Hashable) -> None:
        self._living[group] -= 1
        self._release(group)

    def _release(self, group: Hashable) -> None:
        waiting = self._waiting.get(group, [])
        if len(waiting) == self._living[group]:
            self._waiting[group] = []
            for future in waiting:
                future.set_result(None)


@dataclass(frozen=True, slots=True)
class Written:
    """Of one chain: its tokens in order and the score of each draft span."""

    tokens: tuple[int, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """cpu_s: of all threads of this process; unlike `seconds` it hardly knows what else the machine does."""

    seconds: float
    cpu_s: float
    chain_s: float
    barrier_s: float
    written: dict[tuple[int, int], Written]


async def run_job(pair: Pair, job: Job, in_flight: int, scope: Scope) -> Run:
    """Write the job's turns on the lanes, with the barrier that `scope` names before every verdict's consequence."""
    barrier = Barrier()
    written: dict[tuple[int, int], Written] = {}
    chain_s = 0.0
    waiting = deque(range(len(job)))

    async def one(problem: int, number: int, d: Seq, t: Seq, group: Hashable) -> None:
        nonlocal chain_s
        began = time.perf_counter()

        async def arrive() -> None:
            if scope != "none":
                await barrier.arrive(group)

        turns = job[problem][number]
        written[problem, number] = await write_chain(pair, d, t, turns, f"{problem}", number, arrive)
        barrier.leave(group)
        chain_s += time.perf_counter() - began

    async def worker() -> None:
        while waiting:
            problem = waiting.popleft()
            group: Hashable = "all" if scope == "all" else problem
            n = len(job[problem])
            barrier.join(group, n)
            async with AsyncExitStack() as stack:
                prompt = prompt_of(problem, PROMPT_TOKENS)
                drafts, targets = [await _forks(stack, lane, prompt, n) for lane in (pair.draft, pair.target)]
                await asyncio.gather(
                    *(one(problem, c, d, t, group) for c, (d, t) in enumerate(zip(drafts, targets, strict=True)))
                )

    began, cpu_began = time.perf_counter(), time.process_time()
    await asyncio.gather(*(worker() for _ in range(in_flight)))
    seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu_began
    return Run(seconds, cpu_s, chain_s, barrier.waited_s, written)


async def _forks(stack: AsyncExitStack, lane: Lane, prompt: Sequence[int], n: int) -> list[Seq]:
    root = await lane.open(prompt)
    children = await lane.fork(root, n)
    await lane.close(root)
    for child in children:
        stack.push_async_callback(lane.close, child)
    return children


async def write_chain(
    pair: Pair,
    d: Seq,
    t: Seq,
    turns: Sequence[TurnWork],
    problem: str,
    chain: int,
    arrive: Callable[[], Awaitable[None]],
) -> Written:
    """The turns of a chain as `pipeline.run_chain` writes them, but with spans of the lengths that `turns` say."""

    def sampling(author: str) -> SamplingParams:
        return SamplingParams(0.8, seed=stream_key(0, problem, chain, author), ignore_eos=True)

    tokens: list[int] = []
    scores: list[float] = []
    for work in turns:
        tokens += await _span(pair.draft, d, work.draft, sampling("draft"), pair.target, t, score=True)
        scores.append((await pair.target.verdict(t, None)).score)
        await arrive()
        if work.target:
            tokens += await _span(pair.target, t, work.target, sampling("target"), pair.draft, d, score=False)
    return Written(tuple(tokens), tuple(scores))


async def _span(
    lane: Lane, seq: Seq, n: int, sampling: SamplingParams, other: Lane, follower: Seq, *, score: bool
) -> list[int]:
    """Tokens of one lane's span, which the other lane follows chunk by chunk."""
    tokens: list[int] = []
    async with aclosing(lane.decode(seq, n, sampling)) as chunks:
        async for chunk in chunks:
            await other.append(follower, chunk.tokens, score=score)
            tokens += chunk.tokens
    if len(tokens) != n:
        raise SystemExit(f"a span of {n} tokens was asked for and {len(tokens)} came")
    return tokens


async def calibrate(pair: Pair, rows: Sequence[int], tokens: int) -> tuple[LinearCost, LinearCost]:
    """Step times of either lane by least squares over jobs of 1 problem with as many chains as `rows` says: one turn of
    draft tokens, scored, and the same with as many target tokens after them, in which the draft follows."""

    async def seconds(n: int, work: TurnWork) -> float:
        return statistics.median([(await run_job(pair, [[[work]] * n], 1, "none")).seconds for _ in range(3)])

    models: list[LinearCost] = []
    for author in ("draft", "target"):
        step_s = []
        for n in rows:
            if author == "draft":
                short, long = TurnWork(1), TurnWork(1 + tokens)
            else:
                short, long = TurnWork(1, 1), TurnWork(1, 1 + tokens)
            step_s.append((await seconds(n, long) - await seconds(n, short)) / tokens)
        # Where noise is more than what rows cost, they are taken to cost nothing.
        row_s = max(0.0, statistics.linear_regression(rows, step_s).slope)
        models.append(LinearCost(statistics.mean(step_s) - row_s * statistics.mean(rows), row_s))
    return models[0], models[1]


def predict(job: Job, machine: Machine, in_flight: int) -> dict[str, Any]:
    """For each scope the job's seconds, how many times the asynchronous schedule's that is, and the share of the
    chains' time that is spent at barriers and before a step holds what they wait for."""
    found = {scope: simulate(job, machine, Rules(scope, in_flight, verification="step")) for scope in SCOPES}
    return {
        scope: {
            "seconds": o.seconds,
            "times_async": o.seconds / found["none"].seconds,
            "barrier_share": o.barrier_s / o.chain_s,
            "queued_share": o.queued_s / o.chain_s,
        }
        for scope, o in found.items()
    }


def predict_recorded(chains: Sequence[Chain], chars_per_token: float) -> list[dict[str, Any]]:
    """The whole recorded job on two GPUs, at several numbers of problems in flight, with a slot for every chain and
    with 32 slots a lane."""
    job = job_of(chains, chars_per_token, len(chains), 16, 15)
    found = []
    for in_flight in (1, 4, 16):
        for slots in (None, 32):
            machine = Machine(LaneModel(GPU_DRAFT, slots=slots), LaneModel(GPU_TARGET, slots=slots))
            scopes = predict(job, machine, in_flight)
            found.append({"in_flight": in_flight, "slots": slots, "scopes": scopes})
    return found


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    chains = read_chains(args.traces)
    recorded = predict_recorded(chains, args.chars_per_token)
    scaled = args.chars_per_token * args.scale
    job = job_of(chains, scaled, args.problems, args.chains, args.turns)
    longest = PROMPT_TOKENS + max(sum(w.draft + w.target for w in turns) for p in job for turns in p)
    kv_tokens = (longest + 32) * args.chains * args.in_flight
    model = load_model(args.model, "cpu", dtype_of(args.dtype))
    runs: list[dict[str, Any]] = []
    load = os.getloadavg()
    async with open_pair(model, kv_tokens) as pair:
        most = args.chains * args.in_flight
        await run_job(pair, [[[TurnWork(2, 2)]] * most], 1, "none")
        draft, target = await calibrate(pair, sorted({1, max(2, most // 2), most}), args.calibration_tokens)
        machine = Machine(LaneModel(draft), LaneModel(target), shared=True)
        predicted = predict(job, machine, args.in_flight)
        print(table("predicted", predicted), flush=True)
        first: dict[tuple[int, int], Written] | None = None
        for round_ in range(args.rounds):
            # The order turns about, so that a drift of the machine's speed favours neither.
            for scope in SCOPES if round_ % 2 == 0 else SCOPES[::-1]:
                run = await run_job(pair, job, args.in_flight, scope)
                first = run.written if first is None else first
                if run.written != first:
                    raise SystemExit(f"scope {scope!r}: other tokens or scores than the first run's")
                share = run.barrier_s / run.chain_s
                costs = {"seconds": run.seconds, "cpu_s": run.cpu_s, "barrier_share": share}
                runs.append({"scope": scope, "round": round_, "load": os.getloadavg()[0]} | costs)
                print(
                    f"round {round_} {scope:8} {run.seconds:7.2f} s, CPU {run.cpu_s:7.2f} s, at barriers {share:.3f}, "
                    f"load {os.getloadavg()[0]:.1f}",
                    flush=True,
                )
    found = measured(runs)
    print(table("measured", found))
    return {
        "provenance": provenance("python -m bench.e2e.barrier"),
        "settings": {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items() if name != "traces"},
        "threads": torch.get_num_threads(),
        "load_before": load,
        "linear": ops.chosen("linear", "cpu"),
        "recorded_job_predicted": recorded,
        "work": {
            "chains": sum(map(len, job)),
            "draft_tokens": sum(w.draft for p in job for turns in p for w in turns),
            "target_tokens": sum(w.target for p in job for turns in p for w in turns),
            "turns": sum(len(turns) for p in job for turns in p),
        },
        "lane_models": {"draft": asdict(draft), "target": asdict(target)},
        "predicted": predicted,
        "measured": found,
        "same_tokens_and_scores": True,
        "runs": runs,
    }


def measured(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over rounds; `times_async`, and the same of CPU time, are medians of the ratios within each round."""
    by_scope = {scope: [r for r in runs if r["scope"] == scope] for scope in SCOPES}
    alone = {r["round"]: r for r in by_scope["none"]}
    return {
        scope: {
            "seconds": statistics.median(r["seconds"] for r in rows),
            "times_async": statistics.median(r["seconds"] / alone[r["round"]]["seconds"] for r in rows),
            "times_async_cpu": statistics.median(r["cpu_s"] / alone[r["round"]]["cpu_s"] for r in rows),
            "barrier_share": statistics.median(r["barrier_share"] for r in rows),
        }
        for scope, rows in by_scope.items()
    }


def table(title: str, found: dict[str, Any]) -> str:
    rows = [
        f"{scope:10} {o['seconds']:8.2f} {o['times_async']:12.3f} {o['barrier_share']:12.3f}"
        for scope, o in found.items()
    ]
    return "\n".join([f"{title:10} {'seconds':>8} {'times async':>12} {'at barriers':>12}", *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--traces", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m", help="both halves of the pair")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--problems", type=int, default=8)
    parser.add_argument("--chains", type=int, default=8)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--in-flight", type=int, default=2)
    parser.add_argument("--chars-per-token", type=float, default=3.0)
    parser.add_argument("--scale", type=float, default=16.0, help="recorded spans are this many times longer")
    parser.add_argument("--calibration-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=out_file)
    args = parser.parse_args()
    found = asyncio.run(measure(args))
    if args.out:
        write_text(args.out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
