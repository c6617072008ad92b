"""Calibrators in which scores do not weigh the same: by age, or by the problem they came from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt

from atts_engine.conformal.calibrator import Assessment, Calibrator, ColdStart, Common
from atts_engine.conformal.errors import CalibrationError
from atts_engine.conformal.pvalue import LEVEL_ONE, check_uniform, level_of
from atts_engine.conformal.store import as_score


class _Weighted(Calibrator):
    """Scores of a key in a ring, weighed anew for every test: O(n) a decision, on the host."""

    def __init__(self, alpha: float, **common: Unpack[Common]) -> None:
        super().__init__(alpha, **common)
        if self.cold.rule == "borrow":
            raise CalibrationError(f"the {self.name} calibrator does not pool keys; choose another cold start")

    def _held(self, key: int) -> npt.NDArray[np.float32]:
        return self.store.ring[key, : self.store.size[self.store.check_key(key)]]


class Weighted(_Weighted):
    """NexCP: the smoothed p-value with the weight rho**age, age 1 for the newest score of the key.

    Under drift P(p <= alpha) exceeds alpha by at most the weighted mean of the total-variation distances between the
    span and the scores (Barber, Candès, Ramdas, Tibshirani, arXiv 2202.13415, theorem 2); with rho = 1 it is Mondrian.
    """

    name = "weighted"

    def __init__(self, alpha: float, *, rho: float = 0.99, **common: Unpack[Common]) -> None:
        super().__init__(alpha, **common)
        if not 0.0 < rho <= 1.0:
            raise CalibrationError(f"rho must lie in (0, 1], not {rho}")
        self.rho = rho

    def assess(self, score: float, key: int, u: int, group: str = "") -> Assessment:
        held, value = self._held(key), as_score(score)
        n = held.size
        # The newest score lies just before the head, in a ring that may have wrapped.
        age = (int(self.store.head[key]) - 1 - np.arange(n)) % self.store.capacity + 1
        weight = self.rho ** age.astype(np.float64)
        greater, ties = held > value, held == value
        uniform = check_uniform(u) / LEVEL_ONE
        # One sum over all scores: summed apart, a higher score could round to a higher p-value.
        numerator = np.where(greater, weight, np.where(ties, uniform * weight, 0.0)).sum() + uniform
        p = float(numerator / (weight.sum() + 1.0))
        return Assessment(int(greater.sum()), int(ties.sum()), n, p)

    def options(self) -> dict[str, Any]:
        return super().options() | {"rho": self.rho}


class Hierarchical(_Weighted):
    """Hierarchical conformal prediction: every problem weighs the same, however many chains it has.

    With G problems other than the span's own, p = (1 + sum_i mean_j [score_ij >= score]) / (G + 1). For a span drawn
    from a new problem P(p <= alpha) <= alpha, where problems are exchangeable and chains exchangeable within a problem,
    at any correlation inside a problem. Nothing can be taken over before 1 / alpha problems are known: the cold
    start (a coin, unless another is named) is counted in problems. Sources: Lee, Barber, Willett, arXiv 2306.06342;
    Dunn, Wasserman, Ramdas, arXiv 1809.07441.
    """

    name = "hierarchical"

    def __init__(self, alpha: float, **common: Unpack[Common]) -> None:
        if common.get("cold") is None:
            common["cold"] = ColdStart("coin", -(-LEVEL_ONE // level_of(alpha)))
        super().__init__(alpha, **common)
        self.group: npt.NDArray[np.int64] = np.zeros(self.store.ring.shape, dtype=np.int64)

    def filled(self, key: int) -> int:
        return int(np.unique(self.group[key, : self._held(key).size]).size)

    def assess(self, score: float, key: int, u: int, group: str = "") -> Assessment:
        check_uniform(u)
        held, value = self._held(key), as_score(score)
        n = held.size
        others = self.group[key, :n] != group_of(group)
        _, index, chains = np.unique(self.group[key, :n][others], return_inverse=True, return_counts=True)
        at_least = held[others] >= value
        p = (1.0 + float((at_least / chains[index]).sum())) / (chains.size + 1.0)
        return Assessment(int((held > value).sum()), int((held == value).sum()), n, min(p, 1.0))

    def observe(
        self, score: float, key: int, takeover: bool | None = None, group: str = "", p_value: float | None = None
    ) -> None:
        at = int(self.store.head[self.store.check_key(key)])
        super().observe(score, key, takeover, group, p_value)
        if not self.frozen:
            self.group[key, at] = group_of(group)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        return super().arrays() | {"group": self.group}

    def restore(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        super().restore(arrays)
        group = arrays["group"]
        if group.dtype != np.int64 or group.shape != self.store.ring.shape:
            raise ValueError("its groups have the wrong shape or type")
        self.group = group.copy()


def group_of(name: str) -> int:
    """The problem's name as a signed 64-bit hash, which is what is stored."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)
