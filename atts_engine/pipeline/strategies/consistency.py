"""Self-consistency and its early stops: chains of one model vote."""

from __future__ import annotations

from collections.abc import Sequence

from atts_engine.pipeline.events import Solution
from atts_engine.pipeline.records import Chain
from atts_engine.pipeline.settings.sampling import AdaptiveConsistency, EarlyStoppingConsistency, SelfConsistency
from atts_engine.pipeline.single import whole
from atts_engine.pipeline.strategies.likelihood import LIKELIHOOD, with_own_likelihood
from atts_engine.pipeline.strategies.rounds import all_at_once, answers_of, in_rounds, why
from atts_engine.pipeline.strategies.stopping import to_majority, to_unanimous, unanimous
from atts_engine.pipeline.strategies.work import Work
from atts_engine.pipeline.voting import weigh


async def vote_of_all(work: Work, settings: SelfConsistency) -> Solution:
    body = with_own_likelihood if settings.weighted else whole
    chains = await in_rounds(work, settings.author, all_at_once(work), body)
    weights = [chain.extra.get(LIKELIHOOD, 0.0) if settings.weighted else 1.0 for chain in chains]
    return work.solution(chains, weigh(answers_of(work, chains), weights), stopped=why(work, chains, None))


async def until_majority(work: Work, settings: AdaptiveConsistency) -> Solution:
    def more(chains: Sequence[Chain]) -> int:
        return to_majority(answers_of(work, chains), settings.threshold)

    chains = await in_rounds(work, settings.author, more)
    reason = why(work, chains, "majority" if more(chains) == 0 else None)
    return work.solution(chains, weigh(answers_of(work, chains), [1.0] * len(chains)), stopped=reason)


async def until_unanimous(work: Work, settings: EarlyStoppingConsistency) -> Solution:
    def more(chains: Sequence[Chain]) -> int:
        return to_unanimous(answers_of(work, chains), settings.window)

    chains = await in_rounds(work, settings.author, more)
    answers = answers_of(work, chains)
    agreed = unanimous(answers, settings.window)
    if agreed is not None:
        return work.solution(chains, {agreed: float(settings.window)}, stopped="unanimous")
    return work.solution(chains, weigh(answers, [1.0] * len(chains)), stopped=why(work, chains, None))
