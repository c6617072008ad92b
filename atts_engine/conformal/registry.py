"""Calibrators by name."""

from __future__ import annotations

import os

from atts_engine.conformal.calibrators import MondrianSmoothed, Split
from atts_engine.conformal.errors import CalibrationError, StateError
from atts_engine.conformal.state import Meta, load_state

_BY_NAME: dict[str, type[MondrianSmoothed]] = {c.name: c for c in (MondrianSmoothed, Split)}

ONLINE_CALIBRATORS = tuple(_BY_NAME)
"""Names of the calibrators that a lane can run."""


def make_calibrator(name: str, alpha: float, *, frozen: bool = False, meta: Meta | None = None) -> MondrianSmoothed:
    """An empty calibrator by name; `CalibrationError` lists the names there are."""
    if name not in _BY_NAME:
        raise CalibrationError(f"no calibrator {name!r} in this version; there are {', '.join(_BY_NAME)}")
    return _BY_NAME[name](alpha, frozen=frozen, meta=meta)


def load_calibrator(
    path: str | os.PathLike[str], expect: Meta | None = None, *, frozen: bool = False
) -> MondrianSmoothed:
    """The calibrator that was saved at `path`, of whichever kind it is; `StateError` as `load_state`."""
    _, name, _ = load_state(path)
    if name not in _BY_NAME:
        raise StateError(f"{path} holds a calibration of {name!r}; this version has {', '.join(_BY_NAME)}")
    return _BY_NAME[name].load(path, expect, frozen=frozen)
