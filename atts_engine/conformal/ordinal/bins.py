"""The ordinal label of a span: the rank bin of its full-span score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from atts_engine.conformal.errors import CalibrationError
from atts_engine.conformal.ordinal.checks import Ints, check_finite, rejection_rank


@dataclass(frozen=True, slots=True)
class RankBins:
    """Label k = #{edges < score}: 0 is the best bin, `len(edges)` the worst.

    takeover_from: first label on the far side of the takeover threshold. A score has a label >= takeover_from if and
    only if its plain p-value (1 + #{calibration >= score}) / (n + 1) against the scores of `fit` is at most alpha.
    """

    edges: tuple[float, ...]
    takeover_from: int

    @property
    def n_classes(self) -> int:
        return len(self.edges) + 1

    @classmethod
    def fit(cls, scores: npt.ArrayLike, alpha: float, n_classes: int = 5) -> Self:
        """Edges at order statistics of `scores` float[N]: one at the takeover threshold, the others splitting either
        side into bins of equal counts; about alpha * n_classes bins lie on the far side, one on each at least.

        Equal scores can make bins that stay empty. `CalibrationError` for n_classes < 2, alpha outside (0, 1) and fewer
        than 1/alpha - 1 scores (none could be taken over); `ScoreError` for a score that is not finite.
        """
        x = np.sort(check_finite(scores, "scores"))
        n, worst = len(x), rejection_rank(alpha, len(x))
        if n_classes < 2:
            raise CalibrationError(f"there must be 2 or more bins, not {n_classes}")
        if worst < 1:
            raise CalibrationError(f"{n} scores are too few for a takeover at alpha = {alpha}: 1/alpha - 1 are needed")
        far = min(max(round(n_classes * alpha), 1), n_classes - 1)
        near = n_classes - far
        # p <= alpha iff score > the worst-th largest, at place `at` of the sorted scores.
        at = n - worst
        below = [max(round(j * (at + 1) / near) - 1, 0) for j in range(1, near)]
        above = [min(at + round(j * (worst - 1) / far), n - 1) for j in range(1, far)]
        return cls(tuple(x[[*below, at, *above]].tolist()), near)

    def labels(self, scores: npt.ArrayLike) -> Ints:
        """int64[N] of `scores` float[N]; `ScoreError` for a score that is not finite."""
        return np.searchsorted(np.asarray(self.edges), check_finite(scores, "scores"), side="left").astype(np.int64)
