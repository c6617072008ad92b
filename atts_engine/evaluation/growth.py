"""Which law a time follows as one quantity, or two, are raised: linear, a power, or exponential."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from atts_engine.errors import InputError

Array = npt.NDArray[np.float64]

_AXES: Mapping[str, Callable[[Array], Array]] = {"power": np.log, "exponential": lambda x: x}
"""What log y is linear in."""


@dataclass(frozen=True, slots=True)
class Law:
    """log y = intercept + sum of slope * f(x), f being log ("power") or x itself ("exponential") for each quantity.

    slopes: exponents of a power law, rates of an exponential one; errors: their standard errors. r2: share of the
    variance of log y that the law explains. aic: Akaike's criterion of a normal error of log y (Akaike 1974), lower is
    better; laws of the same data alone can be compared by it. doubling: by what y is multiplied as each quantity is
    doubled from its smallest value to twice that, and from half its largest to the largest.
    """

    kinds: tuple[str, ...]
    intercept: float
    slopes: tuple[float, ...]
    errors: tuple[float, ...]
    r2: float
    aic: float
    doubling: tuple[tuple[float, float], ...]

    def predict(self, *x: float) -> float:
        parts = (
            b * float(_AXES[k](np.array(v, dtype=np.float64)))
            for k, b, v in zip(self.kinds, self.slopes, x, strict=True)
        )
        return float(np.exp(self.intercept + sum(parts)))


def fit(kinds: Sequence[str], x: npt.ArrayLike, y: npt.ArrayLike) -> Law:
    """Least squares on log y. x: [N] of one quantity or [N, Q] of several, above 0; y: [N], above 0.

    Raises `InputError` where there are too few different points for the law, or a value that has no logarithm.
    """
    xs, ys = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    xs = xs[:, None] if xs.ndim == 1 else xs
    if not (xs > 0).all() or not (ys > 0).all():
        raise InputError("a law of growth needs times and quantities above 0")
    columns = [_AXES[kind](xs[:, i]) for i, kind in enumerate(kinds)]
    design = np.column_stack([np.ones(len(ys)), *columns])
    spare = len(ys) - design.shape[1]
    if spare < 1 or np.linalg.matrix_rank(design) < design.shape[1]:
        raise InputError(f"{len(ys)} points are too few, or too alike, for a law of {len(columns)} quantities")
    logs = np.log(ys)
    coefficients, *_ = np.linalg.lstsq(design, logs, rcond=None)
    residual = float(((logs - design @ coefficients) ** 2).sum())
    total = float(((logs - logs.mean()) ** 2).sum())
    covariance = np.linalg.inv(design.T @ design) * residual / spare
    slopes = coefficients[1:]
    # A perfect fit has no finite likelihood; the smallest float stands for its residual.
    aic = len(ys) * np.log(max(residual, np.finfo(np.float64).tiny) / len(ys)) + 2 * (design.shape[1] + 1)
    return Law(
        tuple(kinds),
        float(coefficients[0]),
        tuple(float(b) for b in slopes),
        tuple(float(e) for e in np.sqrt(np.diag(covariance))[1:]),
        1.0 - residual / total if total > 0 else 1.0,
        float(aic),
        tuple(_doubling(kind, float(b), xs[:, i]) for i, (kind, b) in enumerate(zip(kinds, slopes, strict=True))),
    )


def _doubling(kind: str, slope: float, x: Array) -> tuple[float, float]:
    low, high = float(x.min()), float(x.max())
    if kind == "power":
        return (2.0**slope, 2.0**slope)
    return (float(np.exp(slope * low)), float(np.exp(slope * high / 2)))
