"""Calibrators whose level follows the verdicts, so that the rate is held without any assumption on the scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt

from atts_engine.conformal.calibrator import Common, Pending, check_positive
from atts_engine.conformal.pvalue import LEVEL_ONE
from atts_engine.conformal.rings import Mondrian

_ROUNDING = 1e-6
"""An excess that is 1 on paper may lie a little beside it."""


class _Levelled(Mondrian):
    """Smoothed p-values by turn and a count of verdicts: taken[key] takeovers among decided[key] decisions.

    Levels are a function of those counts alone, so neither the order in which verdicts are observed nor a restart
    changes them.
    """

    def __init__(self, alpha: float, **common: Unpack[Common]) -> None:
        super().__init__(alpha, **common)
        # Sums over keys are carried and all are plain integers: a level is asked for at every decision.
        self.taken, self.decided = [0] * self.keys, [0] * self.keys
        self._all_taken = self._all_decided = 0

    def observe(
        self, score: float, key: int, takeover: bool | None = None, group: str = "", p_value: float | None = None
    ) -> None:
        super().observe(score, key, takeover, group, p_value)
        if takeover is not None and not self.frozen:
            self.taken[key] += takeover
            self.decided[key] += 1
            self._all_taken += takeover
            self._all_decided += 1

    def excess(self, key: int) -> float:
        """Takeovers of the key beyond alpha times its decisions (spans)."""
        return self.taken[key] - self.alpha * self.decided[key]

    def total_excess(self) -> float:
        """Takeovers of all keys beyond alpha times their decisions (spans)."""
        return self._all_taken - self.alpha * self._all_decided

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        counts = {"taken": np.array(self.taken, np.int64), "decided": np.array(self.decided, np.int64)}
        return super().arrays() | counts

    def restore(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        super().restore(arrays)
        taken, decided = arrays["taken"], arrays["decided"]
        if not taken.dtype == decided.dtype == np.int64 or not taken.shape == decided.shape == (self.keys,):
            raise ValueError("its counts of verdicts have the wrong shapes or types")
        if (taken < 0).any() or (taken > decided).any():
            raise ValueError("it counts more takeovers than decisions")
        self.taken, self.decided = taken.tolist(), decided.tolist()
        self._all_taken, self._all_decided = sum(self.taken), sum(self.decided)


class AdaptiveConformalInference(_Levelled):
    """ACI: the level moves by `step` towards alpha with every verdict, alpha_t = alpha + step * sum(alpha - takeover).

    For any scores, in any order, with at most D decisions outstanding (the current one included) and for every prefix
    of observed verdicts of a key, |sum(takeover - alpha)| <= max(alpha, 1 - alpha) / step + D max(alpha, 1 - alpha).
    A level at or below 0 never takes over, one at or above 1 always does. Source: Gibbs and Candès, arXiv 2106.00170;
    with delayed verdicts: docs/calibration.md.
    """

    name = "aci"

    def __init__(self, alpha: float, *, step: float = 0.05, **common: Unpack[Common]) -> None:
        super().__init__(alpha, **common)
        self.step = check_positive("the step", step)

    def _warm_level(self, key: int, pending: Pending) -> int:
        return _level(self.alpha - self.step * self.excess(key))

    def options(self) -> dict[str, Any]:
        return super().options() | {"step": self.step}


class Adaptive(_Levelled):
    """Smoothed p-values by turn, tested at a level that keeps every turn's takeovers in a band around alpha.

    The excess S = takeovers - alpha * decisions of a turn may roam inside max(1, tolerance * n), n its decisions with
    the current one, so that a run of hard problems may be taken over more often than alpha and a run of easy ones
    less, as long as the band lasts. The level falls linearly with S (a proportional controller whose gain shrinks as
    1 / band) and a little with the excess over all turns; where a takeover would leave the band the level is 0, where
    a keep would, it is 1.

    For any scores, and with at most D decisions outstanding (the current one included) in any order of arrival, every
    prefix of observed verdicts of a turn has |S| <= max(1, tolerance * n) + 2 (D - 1): with D = 1 every turn is at
    every moment within max(1 / n, tolerance) of alpha. This holds by construction, not by statistics, and not under a
    cold start that accepts or takes over. Derivation, and what it costs in selection: docs/calibration.md. The band is
    the saturation of conformal PID control (Angelopoulos, Candès, Tibshirani, arXiv 2307.16895) with an exact edge.
    """

    name = "adaptive"
    gain = 0.5
    total_gain = 0.2
    total_band = 20.0
    total_tolerance = 0.005

    def __init__(self, alpha: float, *, tolerance: float = 0.02, **common: Unpack[Common]) -> None:
        super().__init__(alpha, **common)
        self.tolerance = check_positive("the tolerance", tolerance)

    def _warm_level(self, key: int, pending: Pending) -> int:
        if self.frozen:
            return self.alpha_level
        alpha, decided = self.alpha, self.decided[key]
        excess = self.taken[key] - alpha * decided
        # Verdicts on their way may move the excess by as much as their number: without the wider band a burst of
        # requests would all be pushed the same way.
        band = self.tolerance * (decided + 1)
        band = (band if band > 1.0 else 1.0) + pending.key + _ROUNDING
        if excess + 1.0 - alpha > band:
            return 0
        if excess - alpha < -band:
            return LEVEL_ONE
        total_band = self.total_tolerance * (self._all_decided + 1)
        total_band = (total_band if total_band > self.total_band else self.total_band) + pending.total
        share = excess / band
        push = self.gain * (1.0 if share > 1.0 else -1.0 if share < -1.0 else share)
        share = (self._all_taken - alpha * self._all_decided) / total_band
        push += self.total_gain * (1.0 if share > 1.0 else -1.0 if share < -1.0 else share)
        return int((alpha - push * (alpha if push > 0.0 else 1.0 - alpha)) * LEVEL_ONE)

    def options(self) -> dict[str, Any]:
        return super().options() | {"tolerance": self.tolerance}


def _level(alpha: float) -> int:
    return min(LEVEL_ONE, max(0, round(alpha * LEVEL_ONE)))
