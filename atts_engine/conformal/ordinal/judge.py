"""Intervals of a judge's score on a scale of labels: clip, snap, take the midpoint.

Source: "Analyzing uncertainty of LLM-as-a-judge", arXiv 2509.18658: regression conformal prediction on a judge's
logits, clipped to [1, 5], endpoints near a label moved to it. Guarantee: that of the interval put in; snapping never
drops a label of the clipped interval and may add one.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from atts_engine.conformal.errors import CalibrationError
from atts_engine.conformal.ordinal.checks import Bools, Floats, check_finite, check_positive

_REACH = 0.1


def snap_interval(
    lower: npt.ArrayLike, upper: npt.ArrayLike, *, low: float = 1.0, high: float = 5.0, step: float = 1.0
) -> tuple[Floats, Floats]:
    """`(lower[N], upper[N])` clipped to [low, high]; an endpoint less than min(0.1, step / 2) from a label low, low +
    step, ..., high becomes that label: 3.93 -> 4, 3.85 stays.

    `CalibrationError` for lower > upper, shapes that differ, or a scale whose ends are not a whole number of steps
    apart; `ScoreError` for an endpoint that is not finite.
    """
    a, b = check_finite(lower, "lower ends"), check_finite(upper, "upper ends")
    if a.shape != b.shape:
        raise CalibrationError(f"there are {len(a)} lower ends and {len(b)} upper ends; give as many of each")
    if (a > b).any():
        raise CalibrationError("a lower end lies above its upper end")
    labels = _labels(low, high, step)
    return _snap(np.clip(a, low, high), labels, step), _snap(np.clip(b, low, high), labels, step)


def snapped_labels(
    lower: npt.ArrayLike, upper: npt.ArrayLike, *, low: float = 1.0, high: float = 5.0, step: float = 1.0
) -> Bools:
    """`[N, K]`: the labels inside the snapped interval; may be empty. Errors as `snap_interval`."""
    a, b = snap_interval(lower, upper, low=low, high=high, step=step)
    labels = _labels(low, high, step)
    return (a[:, None] <= labels) & (labels <= b[:, None])


def midpoint(lower: npt.ArrayLike, upper: npt.ArrayLike) -> Floats:
    """(lower + upper) / 2 `[N]`, the source's point estimate. Errors as `snap_interval`, order aside."""
    a, b = check_finite(lower, "lower ends"), check_finite(upper, "upper ends")
    if a.shape != b.shape:
        raise CalibrationError(f"there are {len(a)} lower ends and {len(b)} upper ends; give as many of each")
    return (a + b) / 2.0


def _labels(low: float, high: float, step: float) -> Floats:
    check_positive(step, "step")
    count = round((high - low) / step)
    if count < 1 or abs(low + count * step - high) > 1e-9 * step:
        raise CalibrationError(f"the scale {low} .. {high} must be one or more whole steps of {step}")
    return low + step * np.arange(count + 1, dtype=np.float64)


def _snap(ends: Floats, labels: Floats, step: float) -> Floats:
    nearest = labels[np.abs(ends[:, None] - labels).argmin(axis=1)]
    return np.where(np.abs(ends - nearest) < min(_REACH, step / 2.0), nearest, ends)
