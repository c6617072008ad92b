"""All chains of one problem: the prompt is opened once per lane, forked, and every chain runs on its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from atts_engine.backends import Lane, Seq
from atts_engine.pipeline.chain import ChainSpec, Codec, run_chain, run_single
from atts_engine.pipeline.events import ChainEvent, Event, Solution, SolutionEvent
from atts_engine.pipeline.gate import Gate, RankingGate
from atts_engine.pipeline.params import ATTSParams
from atts_engine.pipeline.records import Chain, Problem
from atts_engine.pipeline.voting import tally, winner


@dataclass(frozen=True, slots=True)
class Pair:
    """The two lanes, the codec of their common tokenizer, and the token ids that end a text."""

    draft: Lane
    target: Lane
    codec: Codec
    ends: frozenset[int]


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompt of one problem as each lane's model wants it."""

    draft: tuple[int, ...]
    target: tuple[int, ...]


async def run_problem(
    pair: Pair,
    prompts: Prompts,
    problem: Problem,
    params: ATTSParams,
    conformal: Gate,
    emit: Callable[[Event], None],
    chains: Sequence[int] | None = None,
) -> Solution:
    """Write the chains (all of them, or those numbered in `chains`) and vote.

    Cancelling it cancels every chain and gives their pages back in both lanes. Only errors that concern the
    whole problem are raised (`InputError` for its prompt, `LaneError`); a single chain's failure is in its record.
    """
    began = time.perf_counter()
    numbers = list(range(params.chains)) if chains is None else list(chains)

    def spec(chain: int) -> ChainSpec:
        return ChainSpec(problem, chain, params, pair.codec, pair.ends, emit)

    async with AsyncExitStack() as stack:
        runs: list[Coroutine[Any, Any, Chain]]
        if params.strategy in ("draft", "target"):
            lane, prompt = (pair.draft, prompts.draft) if params.strategy == "draft" else (pair.target, prompts.target)
            seqs = await stack.enter_async_context(_forks(lane, prompt, len(numbers)))
            runs = [run_single(spec(c), lane, s, params.strategy) for c, s in zip(numbers, seqs, strict=True)]
        else:
            gate: Gate = RankingGate(numbers, params.alpha) if params.strategy == "atts-sync" else conformal
            gate.begin(problem.id, numbers)
            stack.callback(gate.end, problem.id)
            drafts = await stack.enter_async_context(_forks(pair.draft, prompts.draft, len(numbers)))
            targets = await stack.enter_async_context(_forks(pair.target, prompts.target, len(numbers)))
            runs = [
                run_chain(spec(c), pair.draft, d, pair.target, t, gate)
                for c, d, t in zip(numbers, drafts, targets, strict=True)
            ]
        finished = await _gather(runs, emit)
    votes = tally(finished, params.vote)
    solution = Solution(problem.id, winner(votes), votes, tuple(finished), time.perf_counter() - began)
    emit(SolutionEvent(solution))
    return solution


async def _gather(runs: list[Coroutine[Any, Any, Chain]], emit: Callable[[Event], None]) -> list[Chain]:
    async def announce(run: Coroutine[Any, Any, Chain]) -> Chain:
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
async def _forks(lane: Lane, prompt: Sequence[int], n: int) -> AsyncIterator[list[Seq]]:
    """`n` sequences that share the prompt's pages, closed at the end whatever happens."""
    root = await lane.open(prompt)
    try:
        children = await lane.fork(root, n)
    finally:
        await lane.close(root)
    try:
        yield children
    finally:
        for child in children:
            await lane.close(child)
