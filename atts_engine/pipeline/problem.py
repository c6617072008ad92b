"""All chains of one problem: the prompt is opened once per lane, forked, and every chain runs on its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from atts_engine.backends import Lane, Seq
from atts_engine.pipeline.chain import ChainSpec, Prompts, run_chain, run_single, unwritten
from atts_engine.pipeline.events import ChainEvent, Event, Solution, SolutionEvent
from atts_engine.pipeline.gate import Gate, RankingGate
from atts_engine.pipeline.params import ATTSParams
from atts_engine.pipeline.records import Chain, Problem
from atts_engine.pipeline.translation import Tongues
from atts_engine.pipeline.voting import tally, winner


@dataclass(frozen=True, slots=True)
class Pair:
    """The two lanes and how they spell."""

    draft: Lane
    target: Lane
    tongues: Tongues


async def run_problem(
    pair: Pair,
    prompts: Prompts,
    problem: Problem,
    params: ATTSParams,
    conformal: Gate,
    emit: Callable[[Event], None],
    chains: Sequence[int] | None = None,
    priority: int = 0,
    deadline_s: float | None = None,
) -> Solution:
    """Write the chains (all of them, or those numbered in `chains`) and vote. Those that still run `deadline_s` seconds
    after the call end where they are, with `finish` "deadline". priority: see `Lane.open`.

    Cancelling it cancels every chain and gives their pages back in both lanes. Only errors that concern the
    whole problem are raised (`InputError` for its prompt, `LaneError`); a single chain's failure is in its record.
    """
    began = time.perf_counter()
    numbers = list(range(params.chains)) if chains is None else list(chains)
    deadline = None if deadline_s is None else asyncio.get_running_loop().time() + deadline_s

    def spec(chain: int) -> ChainSpec:
        return ChainSpec(problem, chain, params, pair.tongues, prompts, emit, deadline)

    async def forks(stack: AsyncExitStack, lane: Lane, prompt: Sequence[int]) -> list[Seq]:
        async with asyncio.timeout_at(deadline):
            return await stack.enter_async_context(forked(lane, prompt, len(numbers), priority))

    async with AsyncExitStack() as stack:
        runs: list[Coroutine[Any, Any, Chain]]
        try:
            if params.strategy in ("draft", "target"):
                one = params.strategy == "draft"
                lane, prompt = (pair.draft, prompts.draft) if one else (pair.target, prompts.target)
                seqs = await forks(stack, lane, prompt)
                runs = [run_single(spec(c), lane, s, params.strategy) for c, s in zip(numbers, seqs, strict=True)]
            else:
                gate: Gate = RankingGate(numbers, params.alpha) if params.strategy == "atts-sync" else conformal
                gate.begin(problem.id, numbers)
                stack.callback(gate.end, problem.id)
                drafts = await forks(stack, pair.draft, prompts.draft)
                targets = await forks(stack, pair.target, prompts.target)
                runs = [
                    run_chain(spec(c), pair.draft, d, pair.target, t, gate)
                    for c, d, t in zip(numbers, drafts, targets, strict=True)
                ]
        except TimeoutError:
            if not spec(0).expired:
                raise
            runs = [unwritten(spec(c)) for c in numbers]
        finished = await _gather(runs, deadline, emit)
    votes = tally(finished, params.vote)
    solution = Solution(problem.id, winner(votes), votes, tuple(finished), time.perf_counter() - began)
    emit(SolutionEvent(solution))
    return solution


async def _gather(
    runs: list[Coroutine[Any, Any, Chain]], deadline: float | None, emit: Callable[[Event], None]
) -> list[Chain]:
    async def announce(run: Coroutine[Any, Any, Chain]) -> Chain:
        # The chain answers the timeout itself, with what it has written.
        async with asyncio.timeout_at(deadline):
            chain = await run
        emit(ChainEvent(chain))
        return chain

    tasks = [asyncio.ensure_future(announce(run)) for run in runs]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def forked(lane: Lane, prompt: Sequence[int], n: int, priority: int) -> AsyncIterator[list[Seq]]:
    """`n` sequences that share the prompt's pages, closed at the end whatever happens."""
    root = await lane.open(prompt, priority=priority)
    try:
        children = await lane.fork(root, n)
    finally:
        await lane.close(root)
    try:
        yield children
    finally:
        for child in children:
            await lane.close(child)
