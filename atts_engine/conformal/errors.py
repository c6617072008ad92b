"""Errors of the calibrators. Each message is one line that names the thing and the mend."""

from __future__ import annotations


class CalibrationError(ValueError):
    """A level, key, capacity or calibration array that cannot be used as given."""


class ScoreError(CalibrationError):
    """A score that is NaN or infinite: the chain it belongs to has no verdict."""


class StateError(CalibrationError):
    """A saved calibration that is missing, corrupt, foreign, or made under other conditions."""
