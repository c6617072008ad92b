"""Chains of one model in rounds: each round is as many chains as are needed in any case, written side by side."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from atts_engine.backends import Seq
from atts_engine.pipeline.records import Chain
from atts_engine.pipeline.single import Body, run_single, unwritten, whole
from atts_engine.pipeline.strategies.work import Work
from atts_engine.pipeline.voting import one_spelling

More = Callable[[Sequence[Chain]], int]
"""How many chains to write next, given all so far in the order of their numbers; 0: no more."""


async def in_rounds(work: Work, author: str, more: More, body: Body = whole) -> list[Chain]:
    """Chains by the numbers of `work`, until `more` wants none or they are used up.

    What is decided depends on whole rounds alone, so the chains are the same at any concurrency, and each that was
    launched is among them. A deadline ends the round that it falls into, and there is no further one.
    """
    lane, _ = work.lane(author)
    chains: list[Chain] = []
    try:
        async with held_prompt(work, author) as root:
            while numbers := work.numbers[len(chains) :][: more(chains)]:
                async with asyncio.timeout_at(work.deadline):
                    seqs = await lane.fork(root, len(numbers))
                specs = [work.spec(number) for number in numbers]
                try:
                    runs = [run_single(spec, lane, s, author, body) for spec, s in zip(specs, seqs, strict=True)]
                    chains += await work.write(runs)
                finally:
                    for seq in seqs:
                        await lane.close(seq)
    except TimeoutError:
        if not chains:
            chains = await work.write([unwritten(work.spec(number)) for number in work.numbers[: more([])]])
    return chains


@asynccontextmanager
async def held_prompt(work: Work, author: str) -> AsyncIterator[Seq]:
    """A sequence that holds the problem's prompt, to fork from; closed at the end. `TimeoutError` where the deadline
    comes before it is open."""
    lane, prompt = work.lane(author)
    async with asyncio.timeout_at(work.deadline):
        root = await lane.open(prompt, priority=work.priority)
    try:
        yield root
    finally:
        await lane.close(root)


def all_at_once(work: Work) -> More:
    """One round of all chains."""
    return lambda chains: len(work.numbers) - len(chains)


def answers_of(work: Work, chains: Sequence[Chain]) -> list[str | None]:
    """Final answers by chain, each in its first spelling; none of a chain that its strategy gave up."""
    return one_spelling((None if c.finish == "stopped" else c.final_answer for c in chains), work.task.equal)


def why(work: Work, chains: Sequence[Chain], reason: str | None) -> str:
    """What ended the sampling: the rule, by its `reason`, or else the deadline or the number of chains."""
    if reason is not None:
        return reason
    return "deadline" if any(c.finish == "deadline" for c in chains) else "chains"
