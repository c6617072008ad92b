"""What every method has in common: class probabilities and labels in, intervals of labels out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from atts_engine.conformal.errors import CalibrationError
from atts_engine.conformal.ordinal.checks import (
    Bools,
    Floats,
    Ints,
    check_labels,
    check_probabilities,
    hull,
    threshold,
    worst_by_span,
)
from atts_engine.conformal.pvalue import level_of


class OrdinalSets(Protocol):
    """A calibrated map from class probabilities to intervals of labels.

    alpha: nominal miscoverage of the sets (not the takeover rate).

    fit(probabilities float[N, K], labels int[N], spans=None): calibrate, and return self. Rows must come from
    problems on which the probabilities' predictor was not fitted. With `spans` `[N]`, rows are prefixes of spans and a
    span counts once, by its strangest prefix: then the sets of all prefixes of a new span hold its label *at the same
    time* with the method's coverage, so a verdict may stop at any prefix. Without it the coverage is that of one
    prefix fixed in advance.

    predict(probabilities float[N, K]) -> (lower int64[N], upper int64[N]): inclusive, never empty, holding the most
    probable label.

    Both raise `CalibrationError` for bad shapes, NaN, rows that are not distributions, labels out of range, an empty
    calibration, and prediction before fitting.
    """

    alpha: float

    def fit(self, probabilities: npt.ArrayLike, labels: npt.ArrayLike, spans: npt.ArrayLike | None = None) -> Self: ...

    def predict(self, probabilities: npt.ArrayLike) -> tuple[Ints, Ints]: ...


class ScoredSets(ABC):
    """Split conformal prediction: the labels whose strangeness does not exceed the threshold of calibration, widened
    to an interval that holds the most probable label.

    Guarantee: P(label in set) >= 1 - alpha for exchangeable rows (spans, where those are given), whatever the
    predictor; nested in alpha. Source: Vovk, Gammerman, Shafer, "Algorithmic Learning in a Random World" (2005),
    chapter 4.
    """

    def __init__(self, alpha: float) -> None:
        level_of(alpha)
        self.alpha = alpha
        self._threshold: float | None = None
        self._n_classes = 0

    @abstractmethod
    def strangeness(self, probabilities: Floats) -> Floats:
        """`[N, K]`: how strange each label would be; a function of its own row only."""

    def fit(self, probabilities: npt.ArrayLike, labels: npt.ArrayLike, spans: npt.ArrayLike | None = None) -> Self:
        f = check_probabilities(probabilities)
        y = check_labels(labels, *f.shape)
        scores, _ = worst_by_span(self.strangeness(f)[np.arange(len(y)), y], y, spans)
        self._set_calibration(scores, f.shape[1])
        return self

    def predict(self, probabilities: npt.ArrayLike) -> tuple[Ints, Ints]:
        f = check_probabilities(probabilities, self._n_classes or None)
        return hull(self.members(f), f.argmax(axis=1))

    def members(self, probabilities: Floats) -> Bools:
        """`[N, K]`: the calibrated set before it is widened to an interval."""
        return self.strangeness(probabilities) <= self.threshold

    @property
    def threshold(self) -> float:
        """Largest strangeness that is kept; infinite below 1/alpha - 1 calibration rows."""
        if self._threshold is None:
            raise CalibrationError("the sets are not calibrated: call fit before predict")
        return self._threshold

    def _set_calibration(self, scores: Floats, n_classes: int) -> None:
        self._threshold = threshold(scores, self.alpha)
        self._n_classes = n_classes
