"""The draft writes every chain, and the target takes over those that a gate singles out."""

from __future__ import annotations

from contextlib import AsyncExitStack

from atts_engine.pipeline.chain import run_chain
from atts_engine.pipeline.events import Solution
from atts_engine.pipeline.gate import Gate, RankingGate
from atts_engine.pipeline.settings import Asynchronous, Synchronous
from atts_engine.pipeline.single import unwritten
from atts_engine.pipeline.strategies.work import Work


async def judge_alone(work: Work, settings: Asynchronous) -> Solution:
    return await gated(work, work.gate)


async def judge_by_rank(work: Work, settings: Synchronous) -> Solution:
    return await gated(work, RankingGate(work.numbers, work.params.alpha))


async def gated(work: Work, gate: Gate) -> Solution:
    pair = work.pair
    async with AsyncExitStack() as stack:
        gate.begin(work.problem.id, work.numbers)
        stack.callback(gate.end, work.problem.id)
        try:
            drafts = await work.forks(stack, "draft", len(work.numbers))
            targets = await work.forks(stack, "target", len(work.numbers))
        except TimeoutError:
            runs = [unwritten(work.spec(c)) for c in work.numbers]
        else:
            runs = [
                run_chain(work.spec(c), pair.draft, d, pair.target, t, gate)
                for c, d, t in zip(work.numbers, drafts, targets, strict=True)
            ]
        return work.solution(await work.write(runs))
