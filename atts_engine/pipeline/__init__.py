"""The algorithm: chains, the gate, votes. Knows lanes only by protocol."""

from atts_engine.pipeline.answers import find_answer
from atts_engine.pipeline.chain import Prompts
from atts_engine.pipeline.completion import CompletionEvent, complete
from atts_engine.pipeline.events import ChainEvent, Event, Solution, SolutionEvent, TokensEvent, VerdictEvent
from atts_engine.pipeline.gate import ConformalGate, Gate, RankingGate
from atts_engine.pipeline.params import STRATEGIES, TAKEOVERS, ATTSParams
from atts_engine.pipeline.problem import Pair, run_problem
from atts_engine.pipeline.records import Chain, ChunkScore, Decision, Problem, Turn
from atts_engine.pipeline.scoring import PrefixStore, SpanScore
from atts_engine.pipeline.translation import Tongues, Words
from atts_engine.pipeline.voting import VOTES, tally, winner

__all__ = [
    "STRATEGIES",
    "TAKEOVERS",
    "VOTES",
    "ATTSParams",
    "Chain",
    "ChainEvent",
    "ChunkScore",
    "CompletionEvent",
    "ConformalGate",
    "Decision",
    "Event",
    "Gate",
    "Pair",
    "PrefixStore",
    "Problem",
    "Prompts",
    "RankingGate",
    "Solution",
    "SolutionEvent",
    "SpanScore",
    "TokensEvent",
    "Tongues",
    "Turn",
    "VerdictEvent",
    "Words",
    "complete",
    "find_answer",
    "run_problem",
    "tally",
    "winner",
]
