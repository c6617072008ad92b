"""Conformal calibration of the gate: numpy only, nothing of ours imported."""

from atts_engine.conformal.calibrators import Calibrator, GateRequest, MondrianSmoothed, Split
from atts_engine.conformal.errors import CalibrationError, ScoreError, StateError
from atts_engine.conformal.pvalue import LEVEL_ONE, decide, level_of, p_value
from atts_engine.conformal.reference import ReferenceATTS
from atts_engine.conformal.registry import ONLINE_CALIBRATORS, load_calibrator, make_calibrator
from atts_engine.conformal.state import Meta
from atts_engine.conformal.store import RingStore

__all__ = [
    "LEVEL_ONE",
    "ONLINE_CALIBRATORS",
    "CalibrationError",
    "Calibrator",
    "GateRequest",
    "Meta",
    "MondrianSmoothed",
    "ReferenceATTS",
    "RingStore",
    "ScoreError",
    "Split",
    "StateError",
    "decide",
    "level_of",
    "load_calibrator",
    "make_calibrator",
    "p_value",
]
