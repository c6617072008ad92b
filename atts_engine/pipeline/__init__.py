"""The algorithm: chains, the gate, votes. Knows lanes only by protocol."""

from atts_engine.pipeline.answers import find_answer
from atts_engine.pipeline.completion import CompletionEvent, complete
from atts_engine.pipeline.events import ChainEvent, Event, Solution, SolutionEvent, TokensEvent, VerdictEvent
from atts_engine.pipeline.gate import ConformalGate, Gate
from atts_engine.pipeline.params import TAKEOVERS, ATTSParams
from atts_engine.pipeline.problem import run_problem
from atts_engine.pipeline.records import Chain, ChunkScore, Decision, Problem, Turn
from atts_engine.pipeline.scoring import PrefixStore, SpanScore
from atts_engine.pipeline.settings import STRATEGIES, parse_strategy, strategy_text
from atts_engine.pipeline.strategies import Pair
from atts_engine.pipeline.task import PlainTask, Task
from atts_engine.pipeline.translation import Tongues, Words
from atts_engine.pipeline.uncalibrated import RankingGate
from atts_engine.pipeline.voting import VOTES, tally, winner
from atts_engine.pipeline.writer import Prompts

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
    "PlainTask",
    "PrefixStore",
    "Problem",
    "Prompts",
    "RankingGate",
    "Solution",
    "SolutionEvent",
    "SpanScore",
    "Task",
    "TokensEvent",
    "Tongues",
    "Turn",
    "VerdictEvent",
    "Words",
    "complete",
    "find_answer",
    "parse_strategy",
    "run_problem",
    "strategy_text",
    "tally",
    "winner",
]
