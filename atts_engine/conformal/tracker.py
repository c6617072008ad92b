"""A threshold on the score itself, moved after every verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt

from atts_engine.conformal.calibrator import NOTHING_PENDING, Assessment, Common, Pending, Ruling, check_positive
from atts_engine.conformal.errors import CalibrationError
from atts_engine.conformal.pvalue import LEVEL_ONE
from atts_engine.conformal.rings import Mondrian
from atts_engine.conformal.store import as_score


class QuantileTracker(Mondrian):
    """Takeover iff the score, clipped to [low, high], is above a threshold q of its turn; then
    q += step_t (takeover - alpha), with step_t = step * t**-decay.

    For any scores, verdicts observed one by one, every prefix of T verdicts of a turn that began with q inside
    [low, high] has |sum(takeover - alpha)| <= (high - low + step) / step with decay = 0, and
    (high - low + step) / step_T otherwise. With decay in (1/2, 1) and exchangeable scores q converges to the quantile.
    The first threshold of a turn is its first score, which is kept. The p-value is reported, not used. Sources:
    Angelopoulos, Candès, Tibshirani, arXiv 2307.16895; Angelopoulos, Barber, Bates, arXiv 2402.01139.
    """

    name = "tracker"

    def __init__(
        self,
        alpha: float,
        *,
        step: float = 0.02,
        decay: float = 0.0,
        low: float = 0.0,
        high: float = 20.0,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(alpha, **common)
        self.step = check_positive("the step", step)
        if not 0.0 <= decay < 1.0:
            raise CalibrationError(f"the decay must lie in [0, 1), not {decay}")
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise CalibrationError(f"the range of scores must be finite and not empty, not {low} .. {high}")
        self.decay, self.low, self.high = decay, low, high
        self.threshold: npt.NDArray[np.float64] = np.full(self.keys, np.nan)
        self.decided: npt.NDArray[np.int64] = np.zeros(self.keys, dtype=np.int64)

    @property
    def on_device(self) -> bool:
        return False

    def clipped(self, score: float) -> float:
        """The score inside [low, high], as it is compared."""
        return min(self.high, max(self.low, as_score(score)))

    def decide(
        self,
        score: float,
        key: int,
        u: int,
        group: str = "",
        *,
        pending: Pending = NOTHING_PENDING,
        level: int | None = None,
    ) -> Ruling:
        own = self.level(key, pending) if level is None else level
        assessment: Assessment = self.assess(score, key, u, group)
        value = self.clipped(score)
        threshold = value if math.isnan(self.threshold[key]) else float(self.threshold[key])
        if own in (0, LEVEL_ONE):
            return Ruling(own > 0, assessment, own, threshold)
        if own != self.alpha_level:
            raise CalibrationError("the tracker has no p-value to test at another level: use the threshold policy")
        return Ruling(value > threshold, assessment, own, threshold)

    def observe(
        self, score: float, key: int, takeover: bool | None = None, group: str = "", p_value: float | None = None
    ) -> None:
        super().observe(score, key, takeover, group, p_value)
        if self.frozen:
            return
        if math.isnan(self.threshold[key]):
            self.threshold[key] = self.clipped(score)
        if takeover is not None:
            self.decided[key] += 1
            step = self.step * int(self.decided[key]) ** -self.decay
            self.threshold[key] += step * (takeover - self.alpha)

    def options(self) -> dict[str, Any]:
        own = {"step": self.step, "decay": self.decay, "low": self.low, "high": self.high}
        return super().options() | own

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        return super().arrays() | {"threshold": self.threshold, "decided": self.decided}

    def restore(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        super().restore(arrays)
        threshold, decided = arrays["threshold"], arrays["decided"]
        if threshold.dtype != np.float64 or decided.dtype != np.int64 or threshold.shape != (self.keys,):
            raise ValueError("its thresholds have the wrong shapes or types")
        if decided.shape != threshold.shape or (decided < 0).any() or np.isinf(threshold).any():
            raise ValueError("a threshold or a count of verdicts is out of range")
        self.threshold, self.decided = threshold.copy(), decided.copy()
