"""Calibrators: what a span's score is compared with, and at which level."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Protocol, Self

from atts_engine.conformal.errors import CalibrationError, StateError
from atts_engine.conformal.pvalue import LEVEL_ONE, check_uniform, level_of, p_value
from atts_engine.conformal.state import Meta, load_state, save_state
from atts_engine.conformal.store import RingStore


@dataclass(frozen=True, slots=True)
class GateRequest:
    """One test, as a lane runs it on its device.

    store: calibration scores, which a lane mirrors once at the first request and never writes; key: row of
    the store; level: ceil(alpha * 2**32); u: uniform in 1 .. 2**32 (2**32: the plain p-value); insert:
    whether the score joins the store.
    """

    store: RingStore
    key: int
    level: int
    u: int
    insert: bool


class Calibrator(Protocol):
    """What the pipeline knows of a calibrator. `observe` is called in the order of decisions, which keeps the
    store on the host equal to the one on the lane's device."""

    name: str
    alpha: float
    frozen: bool

    def key_of(self, turn: int) -> int: ...

    def request(self, key: int, u: int) -> GateRequest: ...

    def p_value(self, score: float, key: int, u: int) -> float: ...

    def observe(self, score: float, key: int) -> None: ...

    def save(self, path: str | os.PathLike[str]) -> None: ...

    @classmethod
    def load(cls, path: str | os.PathLike[str], expect: Meta | None = None, *, frozen: bool = False) -> Self: ...


class MondrianSmoothed:
    """Smoothed p-values within a turn: exactly uniform, online too, where the scores of a turn are
    exchangeable.

    Keys are turns; turns keys - 1 and later share the last key. Before the first score of a key p = U, so a
    span is taken over with probability alpha. A frozen calibrator learns nothing: the same chains at any
    concurrency. Source: Vovk, Gammerman, Shafer, "Algorithmic Learning in a Random World" (2005), sections
    2.3 and 4.5.
    """

    name = "mondrian"

    def __init__(
        self,
        alpha: float,
        keys: int = 64,
        capacity: int = 4096,
        frozen: bool = False,
        meta: Meta | None = None,
    ) -> None:
        self.level = level_of(alpha)
        self.alpha = alpha
        self.frozen = frozen
        self.meta = Meta() if meta is None else meta
        self.store = RingStore(keys, capacity)

    def key_of(self, turn: int) -> int:
        """The key that the turn (0, 1, ...) is calibrated within."""
        if turn < 0:
            raise CalibrationError(f"a turn must be 0 or more, not {turn}")
        return min(turn, self.store.keys - 1)

    def uniform(self, u: int) -> int:
        """The uniform that the test uses, given the chain's own draw u in 1 .. 2**32."""
        return check_uniform(u)

    def request(self, key: int, u: int) -> GateRequest:
        """The test of one span, for a lane."""
        return GateRequest(self.store, self.store.check_key(key), self.level, self.uniform(u), not self.frozen)

    def p_value(self, score: float, key: int, u: int) -> float:
        """p-value of the score against the store as it is now (float64). `ScoreError` for NaN or infinity."""
        greater, ties, n = self.store.count(score, key)
        return p_value(greater, ties, n, self.uniform(u))

    def observe(self, score: float, key: int) -> None:
        """Learn a score that was decided on. A frozen calibrator checks it and learns nothing."""
        if self.frozen:
            self.store.count(score, key)
        else:
            self.store.insert(score, key)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write scores and metadata as `.npz` without pickle. The format is described in
        docs/calibration.md."""
        save_state(path, self.store, self.name, replace(self.meta, alpha=self.alpha, keys=self.store.keys))

    @classmethod
    def load(cls, path: str | os.PathLike[str], expect: Meta | None = None, *, frozen: bool = False) -> Self:
        """A calibrator with the saved scores, at the saved alpha. `StateError` names every field that differs
        from `expect`."""
        store, name, meta = load_state(path, expect)
        if name != cls.name:
            raise StateError(f"{path} holds a calibration of {name!r}, not of {cls.name!r}")
        if meta.alpha is None:
            raise StateError(f"{path} is corrupt: it names no alpha")
        calibrator = cls(meta.alpha, frozen=frozen, meta=meta)
        calibrator.store = store
        return calibrator


class Split(MondrianSmoothed):
    """Split conformal: the plain p-value (1 + #{calibration >= score}) / (n + 1) over one pool of scores.

    P(p <= alpha) <= alpha for exchangeable scores; nothing is said of a turn or a problem by itself.
    """

    name = "split"

    def __init__(
        self,
        alpha: float,
        keys: int = 1,
        capacity: int = 65536,
        frozen: bool = False,
        meta: Meta | None = None,
    ) -> None:
        super().__init__(alpha, keys, capacity, frozen, meta)

    def uniform(self, u: int) -> int:
        """2**32 whatever the draw: the plain p-value has no tie-breaking."""
        check_uniform(u)
        return LEVEL_ONE
