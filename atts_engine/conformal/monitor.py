"""Is the calibration still exchangeable with what arrives? A conformal test martingale that raises an alarm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from atts_engine.conformal.errors import CalibrationError

_EPSILONS = (-1.0, 0.0, 1.0)


class ExchangeabilityMonitor:
    """Simple Jumper martingale over smoothed p-values, in logarithms.

    Capital 1 is spread over three bets eps in {-1, 0, 1}; each p-value multiplies a bet's capital by
    1 + eps (p - 1/2), and a share `jump` of the total is then spread anew. M is the total.

    Guarantee (Ville): while the p-values are independent and uniform (scores exchangeable, smoothed p-values
    online), P(sup M >= threshold) <= 1 / threshold, over all time since the last reset. An alarm says that scores
    drift, not where to; p-values that are right on the whole and dependent raise it too, as do those of a frozen
    calibration that is merely small. Source: Vovk, Gammerman, Shafer, "Algorithmic Learning in a Random World"
    (2nd edition, 2022), algorithm 8.1.
    """

    def __init__(self, threshold: float = 100.0, jump: float = 0.01) -> None:
        if not (math.isfinite(threshold) and threshold > 1.0):
            raise CalibrationError(f"the threshold of an alarm must be finite and above 1, not {threshold}")
        self.threshold = threshold
        self.jump = _check_jump(jump)
        self.steps = 0
        self.alarms: list[int] = []
        self.reset()

    def reset(self) -> None:
        """Start a new martingale at 1. `steps` and `alarms` go on: they count from the first p-value ever."""
        self._log_capital = [-math.log(3.0)] * 3
        self.log_value = 0.0
        self.log_max = 0.0
        self.alarmed = False

    def update(self, p: float) -> bool:
        """Learn one p-value. True at the step that raises the alarm, once until `reset`; its number (1, 2, ...)
        joins `alarms`. `CalibrationError` unless 0 <= p <= 1."""
        if not 0.0 <= p <= 1.0:
            raise CalibrationError(f"a p-value must lie in 0 .. 1, not {p}")
        self.steps += 1
        bets = [c + math.log1p(e * (p - 0.5)) for c, e in zip(self._log_capital, _EPSILONS, strict=True)]
        top = max(bets)
        shares = [math.exp(b - top) for b in bets]
        total = sum(shares)
        self.log_value = top + math.log(total)
        self._log_capital = [top + math.log((1.0 - self.jump) * s + self.jump / 3.0 * total) for s in shares]
        self.log_max = max(self.log_max, self.log_value)
        raised = not self.alarmed and self.log_value >= math.log(self.threshold)
        if raised:
            self.alarmed = True
            self.alarms.append(self.steps)
        return raised

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Arrays that `from_state` goes on from: settings float64[2], log_capital float64[3], log_value and log_max
        float64[], alarmed bool[], steps int64[], alarms int64[A]."""
        return {
            "settings": np.array([self.threshold, self.jump]),
            "log_capital": np.array(self._log_capital),
            "log_value": np.array(self.log_value),
            "log_max": np.array(self.log_max),
            "alarmed": np.array(self.alarmed),
            "steps": np.array(self.steps, dtype=np.int64),
            "alarms": np.array(self.alarms, dtype=np.int64),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, npt.NDArray[Any]]) -> Self:
        """The monitor that `state` was taken of. `CalibrationError` if an array is missing or not finite."""
        names = ("settings", "log_capital", "log_value", "log_max", "alarmed", "steps", "alarms")
        missing = [name for name in names if name not in state]
        if missing:
            raise CalibrationError(f"a monitor's state lacks {', '.join(missing)}")
        if state["settings"].shape != (2,) or state["log_capital"].shape != (3,):
            raise CalibrationError("a monitor's state needs settings[2] and log_capital[3]")
        if not all(np.isfinite(state[name]).all() for name in names[:4]):
            raise CalibrationError("a monitor's state holds a value that is not finite")
        threshold, jump = state["settings"].tolist()
        monitor = cls(threshold, jump)
        monitor._log_capital = state["log_capital"].tolist()
        monitor.log_value, monitor.log_max = float(state["log_value"]), float(state["log_max"])
        monitor.alarmed, monitor.steps = bool(state["alarmed"]), int(state["steps"])
        monitor.alarms = state["alarms"].tolist()
        return monitor


def log_simple_jumper(p_values: npt.ArrayLike, jump: float = 0.01) -> npt.NDArray[np.float64]:
    """log M after each p-value: float64[..., N] for p-values [..., N], one martingale per row; what a monitor that is
    never reset would hold. `CalibrationError` unless all p-values lie in 0 .. 1."""
    p = np.asarray(p_values, dtype=np.float64)
    if p.ndim == 0 or not ((p >= 0.0) & (p <= 1.0)).all():
        raise CalibrationError("p-values must be an array of numbers in 0 .. 1")
    _check_jump(jump)
    bets = 1.0 + np.array(_EPSILONS) * (p[..., None] - 0.5)
    shares = np.full((*p.shape[:-1], 3), 1.0 / 3.0)
    log_value = np.zeros(p.shape[:-1])
    path = np.empty(p.shape)
    for i in range(p.shape[-1]):
        # Shares are kept summing to 1, so that no stream overflows; the total lives in log_value.
        shares = shares * bets[..., i, :]
        total = shares.sum(axis=-1)
        log_value = log_value + np.log(total)
        path[..., i] = log_value
        shares = (1.0 - jump) * shares / total[..., None] + jump / 3.0
    return path


def _check_jump(jump: float) -> float:
    if not 0.0 < jump < 1.0:
        raise CalibrationError(f"the jumping rate must lie strictly between 0 and 1, not {jump}")
    return jump
