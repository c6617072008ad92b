"""Class probabilities from the features of a prefix. No predictor promises anything: the sets do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from atts_engine.conformal.errors import CalibrationError
from atts_engine.conformal.ordinal.checks import Floats, Ints, check_features, check_labels, check_positive


class Predictor(Protocol):
    """fit(features float[N, F], labels int[N], n_classes) learns and returns self; predict(features float[N, F])
    gives float64[N, n_classes], rows summing to 1. `CalibrationError` for bad shapes, an empty input, labels out of
    range, values that are not finite, and prediction before fitting."""

    def fit(self, features: npt.ArrayLike, labels: npt.ArrayLike, n_classes: int) -> Self: ...

    def predict(self, features: npt.ArrayLike) -> Floats: ...


@dataclass(frozen=True, slots=True)
class Standardiser:
    """(x - mean) / scale by feature, frozen; a constant feature has scale 1."""

    mean: Floats
    scale: Floats

    @classmethod
    def fit(cls, features: Floats) -> Self:
        spread = features.std(axis=0)
        return cls(features.mean(axis=0), np.where(spread > 0.0, spread, 1.0))

    def __call__(self, features: npt.ArrayLike) -> Floats:
        return (check_features(features, len(self.mean)) - self.mean) / self.scale


def training_data(features: npt.ArrayLike, labels: npt.ArrayLike, n_classes: int) -> tuple[Floats, Ints]:
    """Checked features `[N, F]` and labels `[N]`; `CalibrationError` as `Predictor`."""
    if n_classes < 2:
        raise CalibrationError(f"there must be 2 or more classes, not {n_classes}")
    x = check_features(features)
    return x, check_labels(labels, len(x), n_classes)


class PrefixTable:
    """A histogram: each feature is cut at its quantiles into `n_bins`, a cell of the grid counts labels, and f_k =
    (count_k + strength * share_k) / (count + strength), share being the labels' smoothed shares over all cells.

    Source: posterior mean under a Dirichlet prior. `evidence` gives the counts themselves.
    """

    def __init__(self, n_bins: int = 6, strength: float = 5.0) -> None:
        if n_bins < 1:
            raise CalibrationError(f"n_bins must be 1 or more, not {n_bins}")
        self.n_bins = n_bins
        self.strength = check_positive(strength, "strength")
        self._cuts: list[Floats] = []
        self._counts = np.empty((0, 0))
        self._prior = np.empty(0)

    def fit(self, features: npt.ArrayLike, labels: npt.ArrayLike, n_classes: int) -> Self:
        x, y = training_data(features, labels, n_classes)
        quantiles = np.arange(1, self.n_bins) / self.n_bins
        self._cuts = [np.quantile(column, quantiles) for column in x.T]
        self._counts = np.zeros((self.n_bins ** x.shape[1], n_classes))
        np.add.at(self._counts, (self._cells(x), y), 1.0)
        totals = self._counts.sum(axis=0) + 1.0
        self._prior = totals / totals.sum()
        return self

    def predict(self, features: npt.ArrayLike) -> Floats:
        counts = self.evidence(features)
        return (counts + self.strength * self._prior) / (counts.sum(axis=1, keepdims=True) + self.strength)

    def evidence(self, features: npt.ArrayLike) -> Floats:
        """`[N, K]`: labels counted in each row's cell."""
        if not self._cuts:
            raise CalibrationError("the predictor was not fitted: call fit before predict")
        return self._counts[self._cells(check_features(features, len(self._cuts)))]

    def _cells(self, x: Floats) -> Ints:
        cell = np.zeros(len(x), dtype=np.int64)
        for column, cuts in zip(x.T, self._cuts):
            cell = cell * self.n_bins + np.searchsorted(cuts, column, side="right")
        return cell
