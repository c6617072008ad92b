"""What every calibrator does: assess a score, decide at a level, learn."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, Self, TypedDict, Unpack

import numpy as np
import numpy.typing as npt

from atts_engine.conformal.errors import CalibrationError
from atts_engine.conformal.pvalue import LEVEL_ONE, check_uniform, level_of
from atts_engine.conformal.state import Meta, checked_store, save_state, store_arrays
from atts_engine.conformal.store import RingStore

COLD_START_RULES = ("coin", "accept", "takeover", "borrow")


@dataclass(frozen=True, slots=True)
class ColdStart:
    """What is done while a key holds fewer than `minimum` scores.

    coin: a takeover with probability alpha, whatever the score; accept: none (the scores are only gathered:
    presampling); takeover: always; borrow: the span is compared with the scores of all keys pooled. With minimum 0 the
    p-value stands from the first span on; the smoothed p-value against no score is U, a coin.
    """

    rule: str = "coin"
    minimum: int = 0

    def __post_init__(self) -> None:
        if self.rule not in COLD_START_RULES:
            raise CalibrationError(f"no cold start {self.rule!r}; there are {', '.join(COLD_START_RULES)}")
        if self.minimum < 0:
            raise CalibrationError(f"the minimum of a cold start must be 0 or more, not {self.minimum}")


class Pending(NamedTuple):
    """Decisions that were asked for and are not observed yet: of this key, and of all keys."""

    key: int = 0
    total: int = 0


NOTHING_PENDING = Pending()


@dataclass(frozen=True, slots=True)
class GateRequest:
    """One test, as a lane runs it on its device.

    store: calibration scores, which a lane mirrors once at the first request and never writes; key: row of
    the store; level: 0 (never) .. 2**32 (always); u: uniform in 1 .. 2**32 (2**32: the plain p-value); insert:
    whether the score joins the store. most: of a span that was cut, the tokens that it could have had; its
    `lowest_score` is tested then, in place of its mean.
    """

    store: RingStore
    key: int
    level: int
    u: int
    insert: bool
    most: int | None = field(default=None, kw_only=True)


class Assessment(NamedTuple):
    """A score beside its calibration scores: greater = #{calibration > score}, ties = #{calibration == score}, n."""

    greater: int
    ties: int
    n: int
    p_value: float


class Ruling(NamedTuple):
    """A verdict and what it rests on. threshold: of a calibrator that tests the score itself, not a p-value."""

    takeover: bool
    assessment: Assessment
    level: int
    threshold: float | None = None


class Common(TypedDict, total=False):
    """Settings that every calibrator takes.

    keys, capacity: shape of its store, each calibrator with its own default; frozen: learn nothing; meta: the
    conditions the scores are taken under; cold: what is done before there are scores.
    """

    keys: int
    capacity: int
    frozen: bool
    meta: Meta | None
    cold: ColdStart | None


class Calibrator(ABC):
    """What a span's score is compared with, and at which level.

    With the same u, level and state a higher score never turns a takeover into a keep, rounding included.

    `observe` is called once for every verdict, in the order of the decisions; together with the arguments of `decide`
    it is all that moves the state. A `frozen` calibrator learns nothing: the same chains at any concurrency.
    """

    name: ClassVar[str]
    default_keys: ClassVar[int] = 64
    default_capacity: ClassVar[int] = 4096

    def __init__(self, alpha: float, **common: Unpack[Common]) -> None:
        self.alpha_level = level_of(alpha)
        self.alpha = alpha
        self.frozen = common.get("frozen", False)
        self.meta = common.get("meta") or Meta()
        self.cold = common.get("cold") or ColdStart()
        self.store = RingStore(common.get("keys", self.default_keys), common.get("capacity", self.default_capacity))

    @property
    def keys(self) -> int:
        return self.store.keys

    @property
    def on_device(self) -> bool:
        """Whether a lane can run the whole test from a `request`; if not, `decide` runs it on the host."""
        return False

    def key_of(self, turn: int) -> int:
        """The key that the turn (0, 1, ...) is calibrated within; late turns share the last key."""
        if turn < 0:
            raise CalibrationError(f"a turn must be 0 or more, not {turn}")
        return min(turn, self.keys - 1)

    @abstractmethod
    def assess(self, score: float, key: int, u: int, group: str = "") -> Assessment:
        """The score beside the calibration scores as they are now; nothing is learnt.

        u: uniform in 1 .. 2**32, ignored by a p-value that is not smoothed; group: the problem, where the calibrator
        minds it. `ScoreError` for a score that is NaN or infinite.
        """

    def p_value(self, score: float, key: int, u: int = LEVEL_ONE, group: str = "") -> float:
        """p-value of the score (float64), as `assess`."""
        return self.assess(score, key, u, group).p_value

    def p_values(
        self, scores: npt.ArrayLike, keys: Sequence[int], us: Sequence[int] | None = None
    ) -> npt.NDArray[np.float64]:
        """float64[N]: the p-value of each of N scores against the store as it is; none of them is learnt."""
        values = np.asarray(scores, dtype=np.float64).ravel()
        uniforms = [LEVEL_ONE] * values.size if us is None else us
        if not len(keys) == len(uniforms) == values.size:
            raise CalibrationError(f"{values.size} scores need as many keys and uniforms")
        triples = zip(values.tolist(), keys, uniforms, strict=True)
        return np.array([self.p_value(score, key, u) for score, key, u in triples], dtype=np.float64)

    def filled(self, key: int) -> int:
        """How much stands against a span of this key, in the unit of `ColdStart.minimum`: scores by default."""
        return int(self.store.size[self.store.check_key(key)])

    def level(self, key: int, pending: Pending = NOTHING_PENDING) -> int:
        """The integer level of the key's next test: 0 (never) .. 2**32 (always)."""
        self.store.check_key(key)
        if self.cold.minimum and self.cold.rule in ("accept", "takeover") and self.filled(key) < self.cold.minimum:
            return LEVEL_ONE if self.cold.rule == "takeover" else 0
        return self._warm_level(key, pending)

    def _warm_level(self, key: int, pending: Pending) -> int:
        return self.alpha_level

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
        """The verdict on the host: takeover iff p <= level. `level`: of a policy, in place of the calibrator's own."""
        tested = self.level(key, pending) if level is None else level
        assessment = self.assess(score, key, u, group)
        if self.cold.minimum and self.cold.rule == "coin" and self.filled(key) < self.cold.minimum:
            return Ruling(check_uniform(u) <= tested, assessment, tested)
        return Ruling(self._test(assessment, tested, u), assessment, tested)

    def _test(self, assessment: Assessment, level: int, u: int) -> bool:
        # Exact: multiplying by a power of two does not round.
        return assessment.p_value * LEVEL_ONE <= level

    def observe(
        self, score: float, key: int, takeover: bool | None = None, group: str = "", p_value: float | None = None
    ) -> None:
        """Learn a score. takeover: its verdict, None for a score that was only gathered; p_value: as it was decided
        with, for those who watch p-values. A frozen calibrator checks the score and learns nothing."""
        if self.frozen:
            self.store.count(score, key)
        else:
            self.store.insert(score, key)

    def request(self, key: int, u: int, pending: Pending = NOTHING_PENDING) -> GateRequest:
        """The test of one span, for a lane. `CalibrationError` where `on_device` is False."""
        raise CalibrationError(f"the {self.name} calibrator decides on the host, not in a lane")

    def options(self) -> dict[str, Any]:
        """Arguments of the constructor beside alpha, frozen and meta, as JSON."""
        return {"keys": self.keys, "capacity": self.store.capacity, "cold": [self.cold.rule, self.cold.minimum]}

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The state as arrays; what is not valid in them is zero."""
        return store_arrays(self.store)

    def restore(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take over a state that `arrays` gave. `ValueError` or `KeyError` for one that cannot be."""
        self.store = checked_store(arrays, self.keys, self.store.capacity)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write state and metadata as `.npz` without pickle. The format is described in docs/formats.md."""
        meta = replace(self.meta, alpha=self.alpha, keys=self.keys)
        save_state(path, self.name, self.options(), self.arrays(), meta)

    @classmethod
    def load(cls, path: str | os.PathLike[str], expect: Meta | None = None, *, frozen: bool = False) -> Self:
        """The calibrator that was saved, at its alpha. `StateError` names every field that differs from `expect`."""
        from atts_engine.conformal.registry import load_calibrator

        loaded = load_calibrator(path, expect, frozen=frozen, kind=cls.name)
        assert isinstance(loaded, cls)
        return loaded


def check_positive(what: str, value: float) -> float:
    """`value` itself if it is a finite number above 0; otherwise `CalibrationError`."""
    if not (math.isfinite(value) and value > 0):
        raise CalibrationError(f"{what} must be a finite number above 0, not {value}")
    return value
