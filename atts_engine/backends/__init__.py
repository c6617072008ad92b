"""Lanes: what the pipeline talks to."""

from atts_engine.backends.inprocess import InProcessLane
from atts_engine.backends.protocol import Lane, Seq, Verifier

__all__ = ["InProcessLane", "Lane", "Seq", "Verifier"]
