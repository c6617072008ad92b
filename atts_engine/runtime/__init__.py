"""The in-process lane's loop: schedule, run, commit."""

from atts_engine.runtime.lane import DecisionListener, LaneCore
from atts_engine.runtime.loop import EngineLoop, Mailbox
from atts_engine.runtime.memory import available_bytes, kv_bytes_per_token, pool_tokens
from atts_engine.runtime.probe import Rates, probe
from atts_engine.runtime.records import Alternatives, GateOutcome, Proposal, SamplingParams, SpanResult, TokenChunk
from atts_engine.runtime.stats import LaneStats

__all__ = [
    "Alternatives",
    "DecisionListener",
    "EngineLoop",
    "GateOutcome",
    "LaneCore",
    "LaneStats",
    "Mailbox",
    "Proposal",
    "Rates",
    "SamplingParams",
    "SpanResult",
    "TokenChunk",
    "available_bytes",
    "kv_bytes_per_token",
    "pool_tokens",
    "probe",
]
