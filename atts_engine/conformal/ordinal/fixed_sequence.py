"""Fixed-sequence testing from both ends of the scale."""

from __future__ import annotations

from typing import Self

import numpy as np
import numpy.typing as npt

from atts_engine.conformal.errors import CalibrationError
from atts_engine.conformal.ordinal.checks import (
    Bools,
    Floats,
    Ints,
    check_labels,
    check_probabilities,
    rejection_rank,
    worst_by_span,
)
from atts_engine.conformal.pvalue import level_of


class FixedSequence:
    """Tests the labels upwards from 0 and downwards from K - 1, each chain stopping at its first non-rejection L, U;
    the set is L .. U.

    The p-value of label k is p_k = (1 + #{calibration probability of the true label <= f_k}) / (n + 1), over all
    calibration rows, or with per_class over those whose label is k (p_k = 1 where there are none). Only the hypothesis
    of the true label is true, so no correction for the K tests is due.

    Guarantee: P(label in set) >= 1 - alpha for exchangeable rows; per_class: for every label of its own. Nested in
    alpha. As an interval it is the hull of {k: p_k > alpha}. Source: "Distribution-free conformal prediction for
    ordinal classification", arXiv 2404.16610. Where every label is rejected the set is the most probable label.
    """

    def __init__(self, alpha: float, *, per_class: bool = False) -> None:
        level_of(alpha)
        self.alpha = alpha
        self.per_class = per_class
        self._calibration: list[Floats] = []

    def fit(self, probabilities: npt.ArrayLike, labels: npt.ArrayLike, spans: npt.ArrayLike | None = None) -> Self:
        f = check_probabilities(probabilities)
        y = check_labels(labels, *f.shape)
        strangest, classes = worst_by_span(-f[np.arange(len(y)), y], y, spans)
        conformity = -strangest
        everything = np.sort(conformity)
        self._calibration = [
            np.sort(conformity[classes == k]) if self.per_class else everything for k in range(f.shape[1])
        ]
        return self

    def predict(self, probabilities: npt.ArrayLike) -> tuple[Ints, Ints]:
        f = self._checked(probabilities)
        rejected = self._rejected(f)
        top = f.argmax(axis=1)
        # A run of rejections from an end: the labels before the first non-rejection.
        lower = np.logical_and.accumulate(rejected, axis=1).sum(axis=1)
        upper = f.shape[1] - 1 - np.logical_and.accumulate(rejected[:, ::-1], axis=1).sum(axis=1)
        return np.minimum(lower, top).astype(np.int64), np.maximum(upper, top).astype(np.int64)

    def p_values(self, probabilities: npt.ArrayLike) -> Floats:
        """`[N, K]`: the p-value of each label."""
        f = self._checked(probabilities)
        return (1 + self._counts(f)) / (1 + self._sizes())

    def accepted(self, probabilities: npt.ArrayLike) -> Bools:
        """`[N, K]`: p_k > alpha, each label by itself; may be empty, may have gaps."""
        return ~self._rejected(self._checked(probabilities))

    def rejection_law(self, label: int) -> tuple[int, int]:
        """(a, b): the share of rows with this label whose own test is rejected, given iid continuous calibration, is
        Beta(r, n + 1 - r), n being the number of calibration scores that the label is compared with. r = 0: never."""
        n = int(self._sizes()[label])
        r = rejection_rank(self.alpha, n)
        return r, n + 1 - r

    def _checked(self, probabilities: npt.ArrayLike) -> Floats:
        return check_probabilities(probabilities, len(self._sizes()))

    def _rejected(self, f: Floats) -> Bools:
        # The gate's test, in integers (pvalue.decide): (1 + count) / (n + 1) <= alpha.
        return (1 + self._counts(f)) <= np.asarray([rejection_rank(self.alpha, int(n)) for n in self._sizes()])

    def _counts(self, f: Floats) -> Ints:
        counts = [np.searchsorted(scores, f[:, k], side="right") for k, scores in enumerate(self._calibration)]
        return np.stack(counts, axis=1).astype(np.int64)

    def _sizes(self) -> Ints:
        if not self._calibration:
            raise CalibrationError("the sets are not calibrated: call fit before predict")
        return np.asarray([len(scores) for scores in self._calibration], dtype=np.int64)
