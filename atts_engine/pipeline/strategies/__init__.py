"""Ways to turn a problem into chains and an answer, all behind one interface: `solve(work)`.

A strategy is a class of settings (pipeline/settings/) and a coroutine that is given a problem's `Work` and these.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from atts_engine.pipeline.events import Solution
from atts_engine.pipeline.settings import (
    Asynchronous,
    CoinToss,
    DraftAlone,
    LatestTurns,
    LongestSpans,
    Lookahead,
    RewardGuided,
    Settings,
    SpecReason,
    Speculative,
    SpeculativeThinking,
    Synchronous,
    TargetAlone,
)
from atts_engine.pipeline.settings.sampling import (
    AdaptiveConfidence,
    AdaptiveConsistency,
    BestOfN,
    ConfidentVote,
    DeepConf,
    EarlyStoppingBest,
    EarlyStoppingConsistency,
    Probing,
    SelfConsistency,
)
from atts_engine.pipeline.strategies.alone import write_alone
from atts_engine.pipeline.strategies.best_of_n import best_of_n
from atts_engine.pipeline.strategies.consistency import until_majority, until_unanimous, vote_of_all
from atts_engine.pipeline.strategies.deep_confidence import deep_confidence
from atts_engine.pipeline.strategies.lookahead import look_ahead
from atts_engine.pipeline.strategies.probing import until_settled
from atts_engine.pipeline.strategies.self_calibration import until_share, until_sure, vote_by_confidence
from atts_engine.pipeline.strategies.speculative import propose_and_verify
from atts_engine.pipeline.strategies.speculative_thinking import think_speculatively
from atts_engine.pipeline.strategies.takeover import judge_alone, judge_by_rank
from atts_engine.pipeline.strategies.work import Pair, Work

__all__ = ["Pair", "Work", "solve"]

_SOLVERS: Mapping[type[Settings], Callable[[Work, Any], Awaitable[Solution]]] = {
    Asynchronous: judge_alone,
    **dict.fromkeys((CoinToss, LatestTurns, LongestSpans, RewardGuided, SpecReason), judge_alone),
    Lookahead: look_ahead,
    SpeculativeThinking: think_speculatively,
    Synchronous: judge_by_rank,
    DraftAlone: write_alone,
    TargetAlone: write_alone,
    Speculative: propose_and_verify,
    SelfConsistency: vote_of_all,
    BestOfN: best_of_n,
    AdaptiveConsistency: until_majority,
    EarlyStoppingConsistency: until_unanimous,
    DeepConf: deep_confidence,
    Probing: until_settled,
    EarlyStoppingBest: until_sure,
    ConfidentVote: vote_by_confidence,
    AdaptiveConfidence: until_share,
}


async def solve(work: Work) -> Solution:
    """Chains and answer of a problem by the strategy that its parameters name.

    Only errors that concern the whole problem are raised (`InputError` for its prompt or for a strategy that its models
    or its task cannot serve, `LaneError`); a single chain's failure is in its record.
    """
    settings = work.params.settings
    return await _SOLVERS[type(settings)](work, settings)
