"""Calibrators by name."""

from __future__ import annotations

import os
from typing import Any

from atts_engine.conformal.adaptive import Adaptive, AdaptiveConformalInference
from atts_engine.conformal.calibrator import Calibrator, ColdStart
from atts_engine.conformal.errors import CalibrationError, StateError
from atts_engine.conformal.rings import Mondrian, SlidingWindow, Split
from atts_engine.conformal.state import Meta, load_state
from atts_engine.conformal.tracker import QuantileTracker
from atts_engine.conformal.weighted import Hierarchical, Weighted

_BY_NAME: dict[str, Any] = {
    c.name: c
    for c in (
        Adaptive,
        AdaptiveConformalInference,
        Mondrian,
        SlidingWindow,
        Weighted,
        Hierarchical,
        QuantileTracker,
        Split,
    )
}

ONLINE_CALIBRATORS = tuple(_BY_NAME)
"""Names of the calibrators that learn as they decide; the first is the default."""

DEFAULT_CALIBRATOR = Adaptive.name


def make_calibrator(
    name: str,
    alpha: float,
    *,
    frozen: bool = False,
    meta: Meta | None = None,
    cold: ColdStart | None = None,
    **options: Any,
) -> Calibrator:
    """An empty calibrator by name; `CalibrationError` lists the names there are."""
    if name not in _BY_NAME:
        raise CalibrationError(f"no calibrator {name!r}; there are {', '.join(_BY_NAME)}")
    made: Calibrator = _BY_NAME[name](alpha, frozen=frozen, meta=meta, cold=cold, **options)
    return made


def load_calibrator(
    path: str | os.PathLike[str], expect: Meta | None = None, *, frozen: bool = False, kind: str | None = None
) -> Calibrator:
    """The calibrator that was saved at `path`; `StateError` as `load_state`, and where it is not of that `kind`."""
    state = load_state(path, expect)
    if kind is not None and state.calibrator != kind:
        raise StateError(f"{path} holds a calibration of {state.calibrator!r}, not of {kind!r}")
    if state.calibrator not in _BY_NAME:
        raise StateError(f"{path} holds a calibration of {state.calibrator!r}; there are {', '.join(_BY_NAME)}")
    if state.meta.alpha is None:
        raise StateError(f"{path} is corrupt: it names no alpha")
    try:
        options = dict(state.options)
        rule, minimum = options.pop("cold")
        cold = ColdStart(rule, minimum)
        made = make_calibrator(state.calibrator, state.meta.alpha, frozen=frozen, meta=state.meta, cold=cold, **options)
        made.restore(state.arrays)
    except (KeyError, TypeError, ValueError) as error:
        raise StateError(f"{path} is corrupt: {error}") from error
    return made
