"""The proportional odds model, fitted by Fisher scoring."""

from __future__ import annotations

from typing import Self

import numpy as np
import numpy.typing as npt

from atts_engine.conformal.errors import CalibrationError
from atts_engine.conformal.ordinal.checks import Floats, Ints, check_positive
from atts_engine.conformal.ordinal.predictor import Standardiser, training_data

_STEPS = 50
_HALVINGS = 30
_TOLERANCE = 1e-9


class OrdinalLogistic:
    """P(label <= k | x) = 1 / (1 + exp(-(cut_k - w x))), cuts increasing, x standardised features.

    Penalised likelihood: `ridge` / 2 * |w|^2 is taken off, and `pseudo` observations of each label at the mean features
    are added, so that a label that never occurs keeps a finite cut. Source: McCullagh, "Regression models for ordinal
    data", JRSS B 42 (1980).
    """

    def __init__(self, ridge: float = 1.0, pseudo: float = 0.5) -> None:
        self.ridge = check_positive(ridge, "ridge", zero=True)
        self.pseudo = check_positive(pseudo, "pseudo")
        self._scale: Standardiser | None = None
        self._parameters = np.empty(0)
        self._n_cuts = 0

    def fit(self, features: npt.ArrayLike, labels: npt.ArrayLike, n_classes: int) -> Self:
        x, y = training_data(features, labels, n_classes)
        self._scale = Standardiser.fit(x)
        self._n_cuts = n_classes - 1
        x = np.concatenate([self._scale(x), np.zeros((n_classes, x.shape[1]))])
        y = np.concatenate([y, np.arange(n_classes)])
        weight = np.concatenate([np.ones(len(x) - n_classes), np.full(n_classes, self.pseudo)])
        share = np.cumsum(np.bincount(y, weight, n_classes))[:-1] / weight.sum()
        parameters = np.concatenate([np.log(share / (1.0 - share)), np.zeros(x.shape[1])])
        value = self._objective(parameters, x, y, weight)
        for _ in range(_STEPS):
            step = self._step(parameters, x, y, weight)
            for _ in range(_HALVINGS):
                moved = self._objective(parameters + step, x, y, weight)
                if moved >= value:
                    break
                step = step / 2.0
            else:
                # Already at the maximum, as far as float64 can tell.
                break
            parameters, gain, value = parameters + step, moved - value, moved
            if gain <= _TOLERANCE * (1.0 + abs(value)):
                break
        self._parameters = parameters
        return self

    def predict(self, features: npt.ArrayLike) -> Floats:
        if self._scale is None:
            raise CalibrationError("the predictor was not fitted: call fit before predict")
        return np.diff(self._cumulative(self._parameters, self._scale(features)), axis=1)

    @property
    def weights(self) -> Floats:
        """w `[F]`, per standard deviation of a feature; positive: a larger feature makes higher (worse) labels."""
        return self._parameters[self._n_cuts :].copy()

    def _cumulative(self, parameters: Floats, x: Floats) -> Floats:
        """P(label <= k), k = -1 .. K - 1: `[N, K + 1]`."""
        logits = parameters[: self._n_cuts] - (x @ parameters[self._n_cuts :])[:, None]
        inner = 0.5 * (1.0 + np.tanh(0.5 * logits))
        ends = np.ones((len(x), 1))
        return np.concatenate([0.0 * ends, inner, ends], axis=1)

    def _objective(self, parameters: Floats, x: Floats, y: Ints, weight: Floats) -> float:
        if (np.diff(parameters[: self._n_cuts]) <= 0.0).any():
            return -np.inf
        f = np.diff(self._cumulative(parameters, x), axis=1)[np.arange(len(y)), y]
        if (f <= 0.0).any():
            return -np.inf
        w = parameters[self._n_cuts :]
        return float(weight @ np.log(f) - 0.5 * self.ridge * (w @ w))

    def _step(self, parameters: Floats, x: Floats, y: Ints, weight: Floats) -> Floats:
        """Inverse of the expected information times the gradient."""
        cumulative = self._cumulative(parameters, x)
        density = (cumulative * (1.0 - cumulative))[:, 1:-1]
        n, n_cuts = density.shape
        # d P(label <= k) / d parameters, k = -1 .. K - 1; differences over k give that of f_k.
        slope = np.zeros((n, n_cuts + 2, len(parameters)))
        index = np.arange(n_cuts)
        slope[:, index + 1, index] = density
        slope[:, 1:-1, n_cuts:] = -density[:, :, None] * x[:, None, :]
        slope = np.diff(slope, axis=1)
        f = np.maximum(np.diff(cumulative, axis=1), 1e-300)
        rows = np.arange(n)
        gradient = (weight / f[rows, y]) @ slope[rows, y]
        information = np.einsum("nkp,nk,nkq->pq", slope, weight[:, None] / f, slope, optimize=True)
        gradient[n_cuts:] -= self.ridge * parameters[n_cuts:]
        information[index + 0, index + 0] += 1e-12
        tail = np.arange(n_cuts, len(parameters))
        information[tail, tail] += self.ridge + 1e-12
        return np.linalg.solve(information, gradient)
