"""E-values: for a level that is chosen after looking, such as the one that yields a set of at most B."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from atts_engine.conformal.errors import CalibrationError, ScoreError


def e_values(scores: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """float64[n + 1]: e_i = (n + 1) s_i / sum_j s_j for the scores (float[n + 1]) of n calibration points and one
    more, in any order. They sum to n + 1.

    Guarantee: E e_{n+1} <= 1 if the scores are exchangeable (= 1 unless all can be 0), so P(e >= 1 / alpha) <= alpha
    by Markov. Far from tight for a rate (P(e >= 2.5) is about 0.08 for exponential scores, not 0.4). Source: Gauthier,
    Bach, Jordan, "E-values expand the scope of conformal prediction" (2503.13050); "Backward conformal prediction"
    (2505.13732). `ScoreError` unless the scores are finite, not negative and not all 0.
    """
    values = _check(scores, "scores")
    if values.size == 0:
        raise CalibrationError("e-values need one score or more")
    # Divided by the largest first: the sum of finite scores may overflow.
    top = values.max()
    if top == 0.0:
        raise ScoreError("e-values need one score above 0")
    shares = values / top
    return values.size * (shares / shares.sum())


@dataclass(frozen=True, slots=True)
class BackwardSet:
    """level: alpha~, chosen by the data (above 1: it promises nothing); members: bool[K], candidates in the set."""

    level: float
    members: npt.NDArray[np.bool_]


def backward_set(calibration: npt.ArrayLike, candidates: npt.ArrayLike, size: int) -> BackwardSet:
    """The candidates whose e-value is below 1 / alpha~, at the least level alpha~ that leaves `size` of them or fewer.

    calibration: float[n] scores of what is true; candidates: float[K] scores, each compared with the calibration on
    its own: e_k = (n + 1) s_k / (sum_i s_i + s_k). alpha~ is 1 over the (size + 1)-th smallest e_k, and 0 for
    size = K: then all are in the set.

    Guarantee (backward conformal prediction, 2505.13732): for the true candidate, E[1{miss} / alpha~] <= 1, though
    alpha~ depends on all scores: a miss means 1 / alpha~ <= e. To first order P(miss) <= E alpha~. It says nothing of
    one realised alpha~. `CalibrationError` for size outside 0 .. K; `ScoreError` for scores that are negative, not
    finite, or all 0 in the calibration.
    """
    known, asked = _check(calibration, "calibration scores"), _check(candidates, "candidates")
    if not 0 <= size <= asked.size:
        raise CalibrationError(f"a set of {size} cannot be had of {asked.size} candidates")
    if known.size == 0 or known.max() == 0.0:
        raise ScoreError("e-values need one calibration score above 0")
    top = max(known.max(), asked.max(initial=0.0))
    e = (known.size + 1) * (asked / top) / ((known / top).sum() + asked / top)
    if size == asked.size:
        return BackwardSet(0.0, np.ones(asked.size, dtype=np.bool_))
    bar = float(np.partition(e, size)[size])
    if bar == 0.0:
        raise ScoreError(f"more than {size} candidates score 0: no level leaves {size} of them or fewer")
    return BackwardSet(1.0 / bar, e < bar)


def _check(scores: npt.ArrayLike, what: str) -> npt.NDArray[np.float64]:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1:
        raise CalibrationError(f"{what} must be a vector, not of shape {values.shape}")
    if not (np.isfinite(values) & (values >= 0.0)).all():
        raise ScoreError(f"{what} must be finite and not negative")
    return values
