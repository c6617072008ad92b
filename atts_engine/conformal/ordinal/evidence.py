"""Evidence, belief and vacuity: how much of a prediction is knowledge (subjective logic).

With evidence e_k >= 0, alpha = e + 1 and S = sum(alpha): belief b_k = e_k / S and vacuity u = K / S, so sum(b) + u = 1
(Sensoy, Kaplan, Kandemir, "Evidential deep learning to quantify classification uncertainty", NeurIPS 2018). Nothing
here is calibrated and nothing is promised: vacuity is a signal for stopping early. These are components only of
evidential conformal prediction (arXiv 2406.10787), whose score was not recovered and is not claimed.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from atts_engine.conformal.errors import CalibrationError, ScoreError
from atts_engine.conformal.ordinal.checks import Floats, Ints
from atts_engine.conformal.ordinal.minimum_length import shortest_intervals


def evidence_of(logits: npt.ArrayLike) -> Floats:
    """max(logit, 0) `[N, K]`. `CalibrationError` for another shape, `ScoreError` for a logit that is not finite."""
    return np.maximum(_rows(logits, "logits"), 0.0)


def beliefs(evidence: npt.ArrayLike) -> tuple[Floats, Floats]:
    """(belief `[N, K]`, vacuity `[N]`) of evidence `[N, K]` >= 0: counts of votes, of a histogram's cell, or
    `evidence_of` logits. `CalibrationError` for a bad shape or negative evidence, `ScoreError` where not finite."""
    e = _rows(evidence, "evidence")
    if (e < 0.0).any():
        raise CalibrationError("evidence must be 0 or more")
    total = e.sum(axis=1) + e.shape[1]
    return e / total[:, None], e.shape[1] / total


def belief_intervals(evidence: npt.ArrayLike, mass: float) -> tuple[Ints, Ints]:
    """Shortest `(lower[N], upper[N])` around the most believed label that holds `mass` of belief, and all labels where
    vacuity leaves less than that. No coverage is promised. Errors as `beliefs`; 0 < mass < 1."""
    if not 0.0 < mass < 1.0:
        raise CalibrationError(f"mass must lie strictly between 0 and 1, not {mass}")
    return shortest_intervals(beliefs(evidence)[0], mass)


def _rows(values: npt.ArrayLike, what: str) -> Floats:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 2 or x.shape[1] < 2:
        raise CalibrationError(f"{what} must have shape [N, K] with K of 2 or more, not {list(x.shape)}")
    if not np.isfinite(x).all():
        raise ScoreError(f"{what} must be finite")
    return x
