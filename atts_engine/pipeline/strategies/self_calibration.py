"""Voters and stops that go by the author's own confidence (Self-Calibration, arXiv 2503.00031)."""

from __future__ import annotations

from collections.abc import Sequence

from atts_engine.pipeline.events import Solution
from atts_engine.pipeline.records import Chain
from atts_engine.pipeline.settings.sampling import AdaptiveConfidence, ConfidentVote, EarlyStoppingBest
from atts_engine.pipeline.strategies.rounds import all_at_once, answers_of, in_rounds, why
from atts_engine.pipeline.strategies.self_check import CONFIDENCE, with_confidence
from atts_engine.pipeline.strategies.stopping import first_sure, to_share
from atts_engine.pipeline.strategies.work import Work
from atts_engine.pipeline.voting import weigh


async def vote_by_confidence(work: Work, settings: ConfidentVote) -> Solution:
    chains = await in_rounds(work, settings.author, all_at_once(work), with_confidence(work, settings))
    return work.solution(chains, weigh(answers_of(work, chains), _weights(chains)), stopped=why(work, chains, None))


async def until_share(work: Work, settings: AdaptiveConfidence) -> Solution:
    def more(chains: Sequence[Chain]) -> int:
        return to_share(answers_of(work, chains), _weights(chains), settings.tau)

    chains = await in_rounds(work, settings.author, more, with_confidence(work, settings))
    reason = why(work, chains, "share" if more(chains) == 0 else None)
    return work.solution(chains, weigh(answers_of(work, chains), _weights(chains)), stopped=reason)


async def until_sure(work: Work, settings: EarlyStoppingBest) -> Solution:
    def sure(chains: Sequence[Chain]) -> int | None:
        return first_sure(answers_of(work, chains), _confidences(chains), settings.tau)

    chains = await in_rounds(work, settings.author, lambda c: int(sure(c) is None), with_confidence(work, settings))
    answers, at = answers_of(work, chains), sure(chains)
    reason = why(work, chains, "confidence" if at is not None else None)
    if at is None:
        at = next((i for i in reversed(range(len(chains))) if answers[i] is not None), None)
    chosen = None if at is None else answers[at]
    votes = {} if at is None or chosen is None else {chosen: _weights(chains)[at]}
    return work.solution(chains, votes, stopped=reason)


def _confidences(chains: Sequence[Chain]) -> list[float | None]:
    return [chain.extra.get(CONFIDENCE) for chain in chains]


def _weights(chains: Sequence[Chain]) -> list[float]:
    """A chain that could not be asked has no weight."""
    return [confidence or 0.0 for confidence in _confidences(chains)]
