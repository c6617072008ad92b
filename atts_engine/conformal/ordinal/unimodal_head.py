"""A head whose class probabilities have one mode, whatever its parameters (COPOC)."""

from __future__ import annotations

from typing import Self

import numpy as np
import numpy.typing as npt

from atts_engine.conformal.errors import CalibrationError
from atts_engine.conformal.ordinal.checks import Floats, Ints, check_features, check_positive
from atts_engine.conformal.ordinal.predictor import Standardiser, training_data


def unimodal_probabilities(eta: npt.ArrayLike) -> Floats:
    """Softmax of z_k = -|r_k| with r_1 = eta_1, r_k = r_{k-1} + |eta_k|: float64 `[N, K]` of finite eta `[N, K]`.

    r increases, so |r| falls and then rises and the probabilities rise and then fall. `CalibrationError` for a bad
    shape, `ScoreError` for values that are not finite. Source: Dey, Merugu, Kaveri, "Conformal prediction sets for
    ordinal classification" (NeurIPS 2023).
    """
    x = check_features(eta)
    if x.shape[1] < 2:
        raise CalibrationError(f"eta must have shape [N, K] with K of 2 or more, not {list(x.shape)}")
    return _forward(x)[0]


def _forward(eta: Floats) -> tuple[Floats, Floats]:
    """(probabilities, r)."""
    r = np.cumsum(np.concatenate([eta[:, :1], np.abs(eta[:, 1:])], axis=1), axis=1)
    z = -np.abs(r)
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True), r


def loss_and_gradient(eta: Floats, labels: Ints) -> tuple[float, Floats]:
    """Mean cross-entropy (nats) of labels `[N]` and its gradient in eta `[N, K]`."""
    f, r = _forward(eta)
    rows = np.arange(len(labels))
    loss = -float(np.mean(np.log(np.maximum(f[rows, labels], 1e-300))))
    in_r = f.copy()
    in_r[rows, labels] -= 1.0
    in_r *= -np.sign(r) / len(labels)
    # eta_k enters r_k and all later ones.
    in_eta = np.cumsum(in_r[:, ::-1], axis=1)[:, ::-1].copy()
    in_eta[:, 1:] *= np.sign(eta[:, 1:])
    return loss, in_eta


class UnimodalHead:
    """eta = W x + b on standardised features, cross-entropy minimised by full-batch Adam from a start at the middle
    label; not convex, so the fit is a local minimum. Deterministic."""

    def __init__(self, steps: int = 200, rate: float = 0.05, ridge: float = 1e-3) -> None:
        if steps < 1:
            raise CalibrationError(f"steps must be 1 or more, not {steps}")
        self.steps = steps
        self.rate = check_positive(rate, "rate")
        self.ridge = check_positive(ridge, "ridge", zero=True)
        self._scale: Standardiser | None = None
        self._weights = np.empty((0, 0))

    def fit(self, features: npt.ArrayLike, labels: npt.ArrayLike, n_classes: int) -> Self:
        x, y = training_data(features, labels, n_classes)
        self._scale = Standardiser.fit(x)
        x = _with_bias(self._scale(x))
        weights = np.zeros((x.shape[1], n_classes))
        weights[-1] = 1.0
        weights[-1, 0] = -(n_classes - 1) / 2.0
        mean, square = np.zeros_like(weights), np.zeros_like(weights)
        for step in range(1, self.steps + 1):
            gradient = x.T @ loss_and_gradient(x @ weights, y)[1] + self.ridge * weights
            mean = 0.9 * mean + 0.1 * gradient
            square = 0.999 * square + 0.001 * gradient**2
            # Kingma and Ba, "Adam" (2015), algorithm 1.
            weights -= self.rate * (mean / (1.0 - 0.9**step)) / (np.sqrt(square / (1.0 - 0.999**step)) + 1e-8)
        self._weights = weights
        return self

    def predict(self, features: npt.ArrayLike) -> Floats:
        if self._scale is None:
            raise CalibrationError("the predictor was not fitted: call fit before predict")
        return unimodal_probabilities(_with_bias(self._scale(features)) @ self._weights)


def _with_bias(x: Floats) -> Floats:
    return np.concatenate([x, np.ones((len(x), 1))], axis=1)
