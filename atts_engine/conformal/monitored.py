"""Any calibrator with a watch on its p-values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from atts_engine.conformal.calibrator import NOTHING_PENDING, Assessment, Calibrator, GateRequest, Pending, Ruling
from atts_engine.conformal.errors import CalibrationError
from atts_engine.conformal.monitor import ExchangeabilityMonitor


@dataclass(frozen=True, slots=True)
class Alarm:
    """The martingale reached its threshold at this decision (1, 2, ...); log10_martingale: how far it went."""

    decision: int
    log10_martingale: float

    def __str__(self) -> str:
        return (
            f"scores drift: at decision {self.decision:,} the p-values stopped looking uniform "
            f"(martingale 10^{self.log10_martingale:.1f}); calibrate anew, or choose window, weighted or adaptive"
        )


class Monitored(Calibrator):
    """`inner`, unchanged in every verdict, with an `ExchangeabilityMonitor` over the p-values that it decides with.

    on_alarm: called with each `Alarm`; the monitor then begins a new martingale, so a drift that goes on raises further
    alarms. It watches a frozen calibration too: there an alarm says that the saved scores are not like these. Chains
    of one problem resemble each other, so a cold start on problems that come one after another raises it as well.
    """

    # A wrapper has no name of its own: files and figures speak of what it wraps.
    name = "monitored"

    def __init__(
        self,
        inner: Calibrator,
        monitor: ExchangeabilityMonitor | None = None,
        on_alarm: Callable[[Alarm], None] | None = None,
    ) -> None:
        super().__init__(inner.alpha, keys=1, capacity=1, frozen=inner.frozen, meta=inner.meta, cold=inner.cold)
        # One and the same store: what is learnt inside is seen from outside.
        self.store = inner.store
        self.inner = inner
        self.name = inner.name  # type: ignore[misc]
        self.monitor = ExchangeabilityMonitor() if monitor is None else monitor
        self.on_alarm = on_alarm
        self.alarms: list[Alarm] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Calibrator:
        # A copy is made to replay a log: it must not raise alarms, nor take the listener's objects with it.
        return deepcopy(self.inner, memo)

    @property
    def on_device(self) -> bool:
        return self.inner.on_device

    def key_of(self, turn: int) -> int:
        return self.inner.key_of(turn)

    def filled(self, key: int) -> int:
        return self.inner.filled(key)

    def level(self, key: int, pending: Pending = NOTHING_PENDING) -> int:
        return self.inner.level(key, pending)

    def assess(self, score: float, key: int, u: int, group: str = "") -> Assessment:
        return self.inner.assess(score, key, u, group)

    def p_values(self, scores: npt.ArrayLike, keys: Sequence[int], us: Sequence[int] | None = None) -> npt.NDArray[Any]:
        return self.inner.p_values(scores, keys, us)

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
        return self.inner.decide(score, key, u, group, pending=pending, level=level)

    def request(self, key: int, u: int, pending: Pending = NOTHING_PENDING) -> GateRequest:
        return self.inner.request(key, u, pending)

    def observe(
        self, score: float, key: int, takeover: bool | None = None, group: str = "", p_value: float | None = None
    ) -> None:
        self.inner.observe(score, key, takeover, group, p_value)
        if p_value is None:
            return
        if self.monitor.update(p_value):
            alarm = Alarm(self.monitor.steps, self.monitor.log_value / math.log(10.0))
            self.alarms.append(alarm)
            self.monitor.reset()
            if self.on_alarm is not None:
                self.on_alarm(alarm)

    def options(self) -> dict[str, Any]:
        return self.inner.options()

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        return self.inner.arrays()

    def restore(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        raise CalibrationError("a monitor is not saved: load the calibrator and wrap it anew")
