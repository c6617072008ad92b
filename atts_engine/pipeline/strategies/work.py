"""What a strategy is given: one problem, two lanes, and the means to write chains on them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from atts_engine.backends import Lane, Seq
from atts_engine.pipeline.events import ChainEvent, Event, Solution
from atts_engine.pipeline.gate import Gate
from atts_engine.pipeline.params import ATTSParams
from atts_engine.pipeline.records import Chain, Problem
from atts_engine.pipeline.task import Task
from atts_engine.pipeline.translation import Tongues
from atts_engine.pipeline.voting import tally, winner
from atts_engine.pipeline.writer import ChainSpec, Prompts


@dataclass(frozen=True, slots=True)
class Pair:
    """The two lanes and how they spell."""

    draft: Lane
    target: Lane
    tongues: Tongues


@dataclass(frozen=True, slots=True)
class Work:
    """One problem to solve.

    numbers: of the chains that are wanted. gate: tests at `params.alpha` by the request's calibrator. priority: see
    `Lane.open`. deadline: time of the event loop at which chains end where they are.
    """

    pair: Pair
    prompts: Prompts
    problem: Problem
    params: ATTSParams
    gate: Gate
    task: Task
    emit: Callable[[Event], None]
    numbers: tuple[int, ...]
    priority: int = 0
    deadline: float | None = None
    began: float = field(default_factory=time.perf_counter)

    def spec(self, chain: int) -> ChainSpec:
        return ChainSpec(self.problem, chain, self.params, self.pair.tongues, self.prompts, self.emit, self.deadline)

    def lane(self, author: str) -> tuple[Lane, tuple[int, ...]]:
        """The lane of the author "draft" or "target", and the prompt as its model wants it."""
        one = author == "draft"
        return (self.pair.draft, self.prompts.draft) if one else (self.pair.target, self.prompts.target)

    async def forks(self, stack: AsyncExitStack, author: str, n: int) -> list[Seq]:
        """`n` sequences that hold the prompt and share its pages, closed when `stack` is. `TimeoutError` where the
        deadline comes first."""
        lane, prompt = self.lane(author)
        async with asyncio.timeout_at(self.deadline):
            return await stack.enter_async_context(forked(lane, prompt, n, self.priority))

    async def write(self, runs: Iterable[Coroutine[Any, Any, Chain]]) -> list[Chain]:
        """Run chains side by side and announce each as it ends. All are cancelled when this is."""

        async def announce(run: Coroutine[Any, Any, Chain]) -> Chain:
            # The chain answers the timeout itself, with what it has written.
            async with asyncio.timeout_at(self.deadline):
                chain = await run
            self.emit(ChainEvent(chain))
            return chain

        tasks = [asyncio.ensure_future(announce(run)) for run in runs]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def solution(
        self, chains: Sequence[Chain], votes: Mapping[str, float] | None = None, **extra: int | float | str | None
    ) -> Solution:
        """The heaviest of `votes` is the answer; None: the vote that the parameters name. extra: what the strategy has
        to tell of the problem, such as why it stopped."""
        counted = tally(chains, self.params.vote, self.task.equal) if votes is None else dict(votes)
        took = time.perf_counter() - self.began
        return Solution(self.problem.id, winner(counted), counted, tuple(chains), took, extra)


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
