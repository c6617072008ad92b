"""Regularised randomised sets over a sliding window (the calibration of ERAPS)."""

from __future__ import annotations

from typing import Self

import numpy as np
import numpy.typing as npt

from atts_engine.conformal.errors import CalibrationError
from atts_engine.conformal.ordinal.checks import (
    Floats,
    check_labels,
    check_positive,
    check_probabilities,
    worst_by_span,
)
from atts_engine.conformal.ordinal.sets import ScoredSets


def regularised_scores(probabilities: Floats, u: Floats, penalty: float, free_ranks: int) -> Floats:
    """`[N, K]`: tau = (mass of the more probable labels) + u f_k + penalty (rank - free_ranks + 1)_+, with rank 1 for
    the most probable label and u `[N]` in [0, 1]; of equally probable labels the lower comes first.

    penalty 0 gives the scores of randomised APS (Romano, Sesia, Candès, NeurIPS 2020). The `+ 1` is that of the code
    of arXiv 2206.07851: the penalty begins at rank `free_ranks`, where RAPS (Angelopoulos et al., ICLR 2021) begins
    one later.
    """
    order = np.argsort(-probabilities, axis=1, kind="stable")
    sorted_f = np.take_along_axis(probabilities, order, axis=1)
    rank = np.arange(1, probabilities.shape[1] + 1)
    tau = np.cumsum(sorted_f, axis=1) - sorted_f + u[:, None] * sorted_f
    tau += penalty * np.maximum(rank - free_ranks + 1, 0)
    scores = np.empty_like(tau)
    np.put_along_axis(scores, order, tau, axis=1)
    return scores


class RegularisedWindow(ScoredSets):
    """Labels whose regularised score (`regularised_scores`) is at most the (1 - alpha) quantile of the last `window`
    scores (None: all), taken anew after every `stride` observed labels.

    Guarantee: asymptotic, under mixing and a consistent predictor; without `update` that of `ScoredSets`. Widened to
    intervals. Randomised: every row of `fit`, `predict` and `update` draws its own uniform from a generator keyed by
    `seed`, so a second call differs from the first; nested in alpha for equal draws. Source: ERAPS, arXiv 2206.07851;
    its leave-one-out bootstrap ensemble is a matter of the predictor and is not built here.

    A verdict reached early leaves its label unknown, so a window that slides over early verdicts sees a biased sample:
    slide only where labels are observed whatever the verdict.
    """

    def __init__(
        self,
        alpha: float,
        *,
        penalty: float = 0.01,
        free_ranks: int = 2,
        window: int | None = None,
        stride: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(alpha)
        if window is not None and window < 1:
            raise CalibrationError(f"window must be 1 or more, not {window}")
        if stride < 1:
            raise CalibrationError(f"stride must be 1 or more, not {stride}")
        if free_ranks < 0:
            raise CalibrationError(f"free_ranks must be 0 or more, not {free_ranks}")
        self.penalty = check_positive(penalty, "penalty", zero=True)
        self.free_ranks = free_ranks
        self.window = window
        self.stride = stride
        self._rng = np.random.default_rng(seed)
        self._scores = np.empty(0)
        self._since = 0

    def strangeness(self, probabilities: Floats) -> Floats:
        u = self._rng.random(len(probabilities))
        return regularised_scores(probabilities, u, self.penalty, self.free_ranks)

    def fit(self, probabilities: npt.ArrayLike, labels: npt.ArrayLike, spans: npt.ArrayLike | None = None) -> Self:
        """As `OrdinalSets`; rows in their order of time, of which the last `window` are kept."""
        f = check_probabilities(probabilities)
        scores = self._true_scores(f, labels, spans)
        self._scores = scores if self.window is None else scores[-self.window :]
        self._since = 0
        self._set_calibration(self._scores, f.shape[1])
        return self

    def update(self, probabilities: npt.ArrayLike, labels: npt.ArrayLike) -> None:
        """Take in observed rows, oldest first; the threshold moves after every `stride` of them. A window of None
        keeps its size, as the source's does: the oldest rows leave."""
        if self._threshold is None:
            raise CalibrationError("the sets are not calibrated: call fit before update")
        f = check_probabilities(probabilities, self._n_classes)
        size = self.window or len(self._scores)
        for score in self._true_scores(f, labels, None):
            self._scores = np.append(self._scores, score)[-size:]
            self._since += 1
            if self._since == self.stride:
                self._since = 0
                self._set_calibration(self._scores, self._n_classes)

    def _true_scores(self, f: Floats, labels: npt.ArrayLike, spans: npt.ArrayLike | None) -> Floats:
        y = check_labels(labels, *f.shape)
        return worst_by_span(self.strangeness(f)[np.arange(len(y)), y], y, spans)[0]
