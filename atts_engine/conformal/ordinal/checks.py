"""Input of the ordinal sets, checked once at the door, and the shapes they share."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from atts_engine.conformal.errors import CalibrationError, ScoreError
from atts_engine.conformal.pvalue import LEVEL_ONE, level_of

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_SUM_TOLERANCE = 1e-6


def check_probabilities(probabilities: npt.ArrayLike, n_classes: int | None = None) -> Floats:
    """`probabilities` as float64 `[N, K]`, K >= 2 and equal to `n_classes` if that is given.

    `CalibrationError` for another shape, NaN, a value outside [0, 1] or a row that does not sum to 1 within 1e-6.
    """
    f = np.asarray(probabilities, dtype=np.float64)
    if f.ndim != 2 or f.shape[1] < 2:
        raise CalibrationError(f"class probabilities must have shape [N, K] with K of 2 or more, not {list(f.shape)}")
    if n_classes is not None and f.shape[1] != n_classes:
        raise CalibrationError(f"the sets were fitted on {n_classes} classes, the probabilities have {f.shape[1]}")
    # Written so that NaN fails as well.
    if not ((f >= 0.0) & (f <= 1.0 + _SUM_TOLERANCE)).all():
        raise CalibrationError("class probabilities must be finite and lie in [0, 1]")
    if not (np.abs(f.sum(axis=1) - 1.0) <= _SUM_TOLERANCE).all():
        raise CalibrationError("each row of class probabilities must sum to 1")
    return f


def check_labels(labels: npt.ArrayLike, n: int, n_classes: int) -> Ints:
    """`labels` as int64 `[n]`, each in 0 .. n_classes - 1, n >= 1; otherwise `CalibrationError`."""
    y = np.asarray(labels)
    if y.shape != (n,):
        raise CalibrationError(f"labels must have shape [{n}], one for each row, not {list(y.shape)}")
    if n == 0:
        raise CalibrationError("calibration is empty: give at least one labelled row")
    if not np.issubdtype(y.dtype, np.integer):
        raise CalibrationError(f"labels must be integers, not {y.dtype}")
    if y.min() < 0 or y.max() >= n_classes:
        raise CalibrationError(f"labels must lie in 0 .. {n_classes - 1}, found {y.min()} .. {y.max()}")
    return y.astype(np.int64)


def check_finite(values: npt.ArrayLike, what: str) -> Floats:
    """`values` as float64 `[N]`; `ScoreError` for NaN or infinity, `CalibrationError` for another shape."""
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1:
        raise CalibrationError(f"{what} must have shape [N], not {list(x.shape)}")
    if not np.isfinite(x).all():
        raise ScoreError(f"{what} must be finite")
    return x


def check_features(features: npt.ArrayLike, n_features: int | None = None) -> Floats:
    """`features` as finite float64 `[N, F]`, F equal to `n_features` if that is given; otherwise
    `CalibrationError`."""
    x = np.asarray(features, dtype=np.float64)
    if x.ndim != 2 or x.shape[1] < 1:
        raise CalibrationError(f"features must have shape [N, F] with F of 1 or more, not {list(x.shape)}")
    if n_features is not None and x.shape[1] != n_features:
        raise CalibrationError(f"the predictor was fitted on {n_features} features, not {x.shape[1]}")
    if not np.isfinite(x).all():
        raise ScoreError("features must be finite")
    return x


def check_positive(value: float, what: str, *, zero: bool = False) -> float:
    """`value` itself if it is finite and above 0 (or 0 where `zero`); otherwise `CalibrationError`."""
    if not np.isfinite(value) or value < 0.0 or (value == 0.0 and not zero):
        raise CalibrationError(f"{what} must be finite and {'0 or more' if zero else 'above 0'}, not {value}")
    return value


def rejection_rank(alpha: float, n: int) -> int:
    """r = floor(alpha (n + 1)): a score is rejected iff fewer than r of n calibration scores are as strange.

    In integers, as the gate does it (`pvalue.level_of`). Given iid continuous calibration scores the rejection rate
    of a fresh one is Beta(r, n + 1 - r). `CalibrationError` unless 0 < alpha < 1.
    """
    return level_of(alpha) * (n + 1) // LEVEL_ONE


def threshold(scores: Floats, alpha: float) -> float:
    """The largest strangeness `[n]` whose p-value (1 + #{calibration >= s}) / (n + 1) exceeds alpha: the r-th largest
    score, r = `rejection_rank`; infinity, so that nothing is rejected, where n < 1/alpha - 1 (r = 0)."""
    r = rejection_rank(alpha, len(scores))
    return float(np.sort(scores)[len(scores) - r]) if r > 0 else float("inf")


def worst_by_span(scores: Floats, labels: Ints, spans: npt.ArrayLike | None) -> tuple[Floats, Ints]:
    """The largest score `[S]` and the label `[S]` of each span; the rows themselves where `spans` is None.

    `CalibrationError` if `spans` is not `[N]` or a span has two labels.
    """
    if spans is None:
        return scores, labels
    ids = np.asarray(spans)
    if ids.shape != labels.shape:
        raise CalibrationError(f"spans must have shape [{len(labels)}], one for each row, not {list(ids.shape)}")
    _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    if (labels[first][inverse] != labels).any():
        raise CalibrationError("the rows of a span must all have its label")
    worst = np.full(len(first), -np.inf)
    np.maximum.at(worst, inverse, scores)
    return worst, labels[first]


def hull(members: Bools, inside: Ints) -> tuple[Ints, Ints]:
    """Smallest intervals `(lower[N], upper[N])` that hold the members `[N, K]` of each row and the label `inside[N]`.
    A superset, so coverage is kept."""
    n_classes = members.shape[1]
    held = members.copy()
    held[np.arange(len(held)), inside] = True
    lower = held.argmax(axis=1)
    upper = n_classes - 1 - held[:, ::-1].argmax(axis=1)
    return lower.astype(np.int64), upper.astype(np.int64)
