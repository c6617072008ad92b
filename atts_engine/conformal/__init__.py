"""Conformal calibration of the gate: numpy only, nothing of ours imported."""

from atts_engine.conformal.adaptive import Adaptive, AdaptiveConformalInference
from atts_engine.conformal.calibrator import (
    Assessment,
    Calibrator,
    ColdStart,
    GateRequest,
    Pending,
    Ruling,
)
from atts_engine.conformal.errors import CalibrationError, ScoreError, StateError
from atts_engine.conformal.monitor import ExchangeabilityMonitor
from atts_engine.conformal.monitored import Alarm, Monitored
from atts_engine.conformal.policies import POLICIES, ExactCount, Policy, Threshold, TopB, make_policy
from atts_engine.conformal.pvalue import LEVEL_ONE, decide, level_of, p_value
from atts_engine.conformal.reference import ReferenceATTS
from atts_engine.conformal.registry import (
    DEFAULT_CALIBRATOR,
    ONLINE_CALIBRATORS,
    load_calibrator,
    make_calibrator,
)
from atts_engine.conformal.rings import Mondrian, SlidingWindow, Split
from atts_engine.conformal.risk import ConformalRiskControl
from atts_engine.conformal.settled import lowest_score
from atts_engine.conformal.state import Meta
from atts_engine.conformal.store import RingStore
from atts_engine.conformal.tracker import QuantileTracker
from atts_engine.conformal.weighted import Hierarchical, Weighted

__all__ = [
    "DEFAULT_CALIBRATOR",
    "LEVEL_ONE",
    "ONLINE_CALIBRATORS",
    "POLICIES",
    "Adaptive",
    "AdaptiveConformalInference",
    "Alarm",
    "Assessment",
    "CalibrationError",
    "Calibrator",
    "ColdStart",
    "ConformalRiskControl",
    "ExactCount",
    "ExchangeabilityMonitor",
    "GateRequest",
    "Hierarchical",
    "Meta",
    "Mondrian",
    "Monitored",
    "Pending",
    "Policy",
    "QuantileTracker",
    "ReferenceATTS",
    "RingStore",
    "Ruling",
    "ScoreError",
    "SlidingWindow",
    "Split",
    "StateError",
    "Threshold",
    "TopB",
    "Weighted",
    "decide",
    "level_of",
    "load_calibrator",
    "lowest_score",
    "make_calibrator",
    "make_policy",
    "p_value",
]
