"""Lanes: what the pipeline talks to."""

from atts_engine.backends.inprocess import InProcessLane
from atts_engine.backends.protocol import EngineLane, Lane, ModelInfo, Seq, Verifier

__all__ = ["EngineLane", "InProcessLane", "Lane", "ModelInfo", "Seq", "Verifier"]
