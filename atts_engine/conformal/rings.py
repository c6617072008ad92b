"""Calibrators that count a score against the ring of its key: split, Mondrian, and a sliding window."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt

from atts_engine.conformal.calibrator import NOTHING_PENDING, Assessment, Calibrator, Common, GateRequest, Pending
from atts_engine.conformal.errors import CalibrationError
from atts_engine.conformal.pvalue import LEVEL_ONE, check_uniform, decide, p_value


class Mondrian(Calibrator):
    """Smoothed p-values within a key: exactly uniform, online too, where the scores of a key are exchangeable.

    Keys are turns unless the caller chooses others; turns keys - 1 and later share the last key. Source: Vovk,
    Gammerman, Shafer, "Algorithmic Learning in a Random World" (2005), sections 2.3 and 4.5.
    """

    name = "mondrian"
    smoothed = True

    @property
    def on_device(self) -> bool:
        """A lane counts one row of the store; pooled scores, and a coin in place of a count, are the host's."""
        return self.cold.minimum == 0 or self.cold.rule in ("accept", "takeover")

    def uniform(self, u: int) -> int:
        """The uniform that the test uses, given the chain's own draw u in 1 .. 2**32: 2**32 for a plain p-value."""
        check_uniform(u)
        return u if self.smoothed else LEVEL_ONE

    def assess(self, score: float, key: int, u: int, group: str = "") -> Assessment:
        if self.cold.minimum and self.cold.rule == "borrow" and self.filled(key) < self.cold.minimum:
            counts = [self.store.count(score, k) for k in range(self.keys) if self.store.size[k]]
            greater, ties, n = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0, 0)
        else:
            greater, ties, n = self.store.count(score, key)
        return Assessment(greater, ties, n, p_value(greater, ties, n, self.uniform(u)))

    def p_values(
        self, scores: npt.ArrayLike, keys: Sequence[int], us: Sequence[int] | None = None
    ) -> npt.NDArray[np.float64]:
        if self.cold.rule == "borrow":
            return super().p_values(scores, keys, us)
        values = np.asarray(scores, dtype=np.float32).ravel()
        rows = np.asarray(keys, dtype=np.int64)
        draws = [LEVEL_ONE] * values.size if us is None else us
        if not rows.size == len(draws) == values.size:
            raise CalibrationError(f"{values.size} scores need as many keys and uniforms")
        uniforms = np.array([self.uniform(u) for u in draws], dtype=np.float64) / LEVEL_ONE
        found = np.empty(values.size, dtype=np.float64)
        for key in np.unique(rows).tolist():
            at = np.flatnonzero(rows == key)
            greater, ties, n = self.store.count_many(values[at], key)
            found[at] = (greater + uniforms[at] * (1 + ties)) / (n + 1)
        return found

    def _test(self, assessment: Assessment, level: int, u: int) -> bool:
        return decide(assessment.greater, assessment.ties, assessment.n, level, self.uniform(u))

    def request(self, key: int, u: int, pending: Pending = NOTHING_PENDING) -> GateRequest:
        if not self.on_device:
            return super().request(key, u, pending)
        row = self.store.check_key(key)
        return GateRequest(self.store, row, self.level(key, pending), self.uniform(u), not self.frozen)


class SlidingWindow(Mondrian):
    """Smoothed p-values against the last 512 scores of the turn: follows drift, at the price of a coarser p-value.

    Exact under exchangeability within the window; under drift the error is at most the mean total-variation distance
    between the span and the window's scores (Barber, Candès, Ramdas, Tibshirani, arXiv 2202.13415, theorem 2).
    """

    name = "window"
    default_capacity = 512


class Split(Mondrian):
    """Split conformal: the plain p-value (1 + #{calibration >= score}) / (n + 1) over one pool of scores.

    P(p <= alpha) <= alpha for exchangeable scores; nothing is said of a turn or a problem by itself, and the realised
    rate of one calibration is Beta(k, n + 1 - k) with k = floor(alpha (n + 1)). pac: with probability 1 - pac over the
    calibration that rate is at most alpha; the level is then k / (n + 1) for the largest k with
    P(Beta(k, n + 1 - k) > alpha) <= pac (Vovk, "Conditional validity of inductive conformal predictors", 2012).
    """

    name = "split"
    default_keys = 1
    default_capacity = 65536

    def __init__(
        self, alpha: float, *, smoothed: bool = False, pac: float | None = None, **common: Unpack[Common]
    ) -> None:
        super().__init__(alpha, **common)
        if pac is not None and not 0.0 < pac < 1.0:
            raise CalibrationError(f"pac must lie strictly between 0 and 1, not {pac}")
        self.smoothed = smoothed
        self.pac = pac

    def _warm_level(self, key: int, pending: Pending) -> int:
        if self.pac is None:
            return self.alpha_level
        n = self.filled(key)
        return -(-pac_rank(n, self.alpha, self.pac) * LEVEL_ONE // (n + 1))

    def options(self) -> dict[str, Any]:
        return super().options() | {"smoothed": self.smoothed, "pac": self.pac}


def pac_rank(n: int, alpha: float, delta: float) -> int:
    """The largest k with P(Beta(k, n + 1 - k) > alpha) <= delta, 0 if there is none.

    P(Beta(k, n + 1 - k) > alpha) = P(Binomial(n, alpha) < k).
    """
    log_pmf = -math.inf if n == 0 else n * math.log1p(-alpha)
    odds = math.log(alpha) - math.log1p(-alpha)
    below, k = 0.0, 0
    while k < n:
        below += math.exp(log_pmf)
        if below > delta:
            return k
        k += 1
        log_pmf += math.log((n - k + 1) / k) + odds
    return k
