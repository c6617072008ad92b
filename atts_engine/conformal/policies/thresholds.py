"""Optimal thresholds of sequential selection."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from atts_engine.conformal.errors import CalibrationError
from atts_engine.conformal.pvalue import LEVEL_ONE


class OptimalThresholds:
    """Derman, Lieberman and Ross, "A Sequential Stochastic Assignment Problem" (Management Science 18, 1972).

    Of r values to come, independent and uniform on (0, 1), exactly b are to be chosen, each when it is seen. With
    V(r, b) the largest expected sum of strangeness 1 - p, the best rule takes p iff 1 - p >= c, where

        c = V(r - 1, b) - V(r - 1, b - 1),        V(r, b) = (1 - c^2) / 2 + (1 - c) V(r - 1, b - 1) + c V(r - 1, b).

    Rows of V (float64[r + 1]) are made once, when a larger r is asked for.
    """

    def __init__(self) -> None:
        self._values: list[npt.NDArray[np.float64]] = [np.zeros(1)]

    def level(self, left: int, quota: int) -> int:
        """ceil((1 - c) * 2**32) for 0 < quota < left; `CalibrationError` otherwise."""
        if not 0 < quota < left:
            raise CalibrationError(f"a threshold needs 0 < quota < left, not quota {quota} of {left}")
        while len(self._values) < left:
            self._values.append(_next_row(self._values[-1]))
        row = self._values[left - 1]
        return int(np.ceil((1.0 - (row[quota] - row[quota - 1])) * LEVEL_ONE))


def _next_row(row: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """V(r, 0 .. r) from V(r - 1, 0 .. r - 1)."""
    c = np.diff(row)
    inner = (1.0 - c * c) / 2.0 + (1.0 - c) * row[:-1] + c * row[1:]
    return np.concatenate(([0.0], inner, [row[-1] + 0.5]))
