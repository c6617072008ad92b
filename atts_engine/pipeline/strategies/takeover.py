"""The draft writes every chain, and the target takes over those that a gate singles out."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

from atts_engine.backends import Seq
from atts_engine.pipeline.chain import run_chain
from atts_engine.pipeline.events import Solution
from atts_engine.pipeline.gate import Gate
from atts_engine.pipeline.records import Chain
from atts_engine.pipeline.scorers import Scorer, make_scorer
from atts_engine.pipeline.settings import Gated, Synchronous
from atts_engine.pipeline.single import unwritten
from atts_engine.pipeline.strategies.work import Work
from atts_engine.pipeline.uncalibrated import RankingGate, ThresholdGate
from atts_engine.pipeline.writer import ChainSpec


async def judge_alone(work: Work, settings: Gated) -> Solution:
    params = work.params
    scorer = make_scorer(settings.scorer, work.pair.tongues.target.codec, work.task)
    gate = work.gate if settings.calibrated else ThresholdGate(settings.worst(params.alpha))
    own = replace(work, params=replace(params, takeover=settings.takeover or params.takeover))
    return await gated(own, gate, scorer, step=settings.span == "step")


async def judge_by_rank(work: Work, settings: Synchronous) -> Solution:
    return await gated(work, RankingGate(work.numbers, work.params.alpha))


async def gated(work: Work, gate: Gate, scorer: Scorer | None = None, *, step: bool = False) -> Solution:
    """Every chain by `run_chain`. step: spans are reasoning steps."""
    pair = work.pair

    def run(spec: ChainSpec, d: Seq, t: Seq) -> Coroutine[Any, Any, Chain]:
        return run_chain(replace(spec, step=step), pair.draft, d, pair.target, t, gate, scorer)

    gate.begin(work.problem.id, work.numbers)
    try:
        return await in_pairs(work, run)
    finally:
        gate.end(work.problem.id)


async def in_pairs(work: Work, run: Callable[[ChainSpec, Seq, Seq], Coroutine[Any, Any, Chain]]) -> Solution:
    """Chains that both lanes hold: `run` is given a sequence with the prompt on either."""
    async with AsyncExitStack() as stack:
        try:
            drafts = await work.forks(stack, "draft", len(work.numbers))
            targets = await work.forks(stack, "target", len(work.numbers))
        except TimeoutError:
            runs = [unwritten(work.spec(c)) for c in work.numbers]
        else:
            runs = [run(work.spec(c), d, t) for c, d, t in zip(work.numbers, drafts, targets, strict=True)]
        return work.solution(await work.write(runs))
