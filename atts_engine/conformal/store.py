"""Calibration scores, one ring buffer per key."""

from __future__ import annotations

import math
import struct
from array import array
from bisect import bisect_left, bisect_right

import numpy as np
import numpy.typing as npt

from atts_engine.conformal.errors import CalibrationError, ScoreError

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_FLOAT32 = struct.Struct("=f")


def as_score(score: float) -> float:
    """The score rounded to float32, which is what is compared and stored; `ScoreError` if it is not finite there."""
    if -_FLOAT32_MAX <= score <= _FLOAT32_MAX:
        rounded: float = _FLOAT32.unpack(_FLOAT32.pack(score))[0]
        return rounded
    if not math.isfinite(score):
        raise ScoreError(f"a score must be finite, not {score}")
    raise ScoreError(f"a score must fit in float32, not {score}")


class RingStore:
    """The last `capacity` scores of each of `keys` keys.

    ring: float32[K, C], valid in [:size[key]]; size: int64[K]; head: int64[K], where the next score goes. A
    full ring overwrites its oldest score. The layout is the `gate` kernel's, so mirroring to a device is a
    plain copy. A sorted copy of each key that was counted makes a count two binary searches, O(log n).
    """

    def __init__(self, keys: int, capacity: int) -> None:
        if keys < 1:
            raise CalibrationError(f"a calibration store needs 1 key or more, not {keys}")
        if capacity < 1:
            raise CalibrationError(f"a calibration store needs a capacity of 1 score or more, not {capacity}")
        self.ring: npt.NDArray[np.float32] = np.zeros((keys, capacity), dtype=np.float32)
        self.size: npt.NDArray[np.int64] = np.zeros(keys, dtype=np.int64)
        self.head: npt.NDArray[np.int64] = np.zeros(keys, dtype=np.int64)
        self._sorted: dict[int, array[float]] = {}

    @classmethod
    def of(cls, ring: npt.NDArray[np.float32], size: npt.NDArray[np.int64], head: npt.NDArray[np.int64]) -> RingStore:
        """A store that owns these arrays from now on."""
        store = cls(1, 1)
        store.ring, store.size, store.head = ring, size, head
        return store

    @property
    def keys(self) -> int:
        return int(self.ring.shape[0])

    @property
    def capacity(self) -> int:
        return int(self.ring.shape[1])

    def check_key(self, key: int) -> int:
        """`key` itself if it is one of this store's; otherwise `CalibrationError`."""
        if not 0 <= key < self.ring.shape[0]:
            raise CalibrationError(f"unknown calibration key {key}: this store has keys 0 .. {self.keys - 1}")
        return key

    def _sorted_of(self, key: int) -> array[float]:
        held = self._sorted.get(key)
        if held is None:
            held = self._sorted[self.check_key(key)] = array("f")
            held.frombytes(np.sort(self.ring[key, : self.size[key]]).tobytes())
        return held

    def count(self, score: float, key: int) -> tuple[int, int, int]:
        """(#{calibration > score}, #{calibration == score}, n) for the key, compared in float32."""
        value = as_score(score)
        held = self._sorted.get(key) or self._sorted_of(key)
        n = len(held)
        upper = bisect_right(held, value)
        # Most scores tie with none: the second search is only made where there is something to find.
        tied = upper > 0 and held[upper - 1] == value
        return n - upper, upper - bisect_left(held, value, 0, upper) if tied else 0, n

    def count_many(
        self, scores: npt.NDArray[np.float32], key: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], int]:
        """`count` for float32[N] scores of one key: (greater int64[N], ties int64[N], n)."""
        if not np.isfinite(scores).all():
            raise ScoreError("every score must be finite, and one is not")
        held = np.array(self._sorted_of(key), dtype=np.float32)
        upper = np.searchsorted(held, scores, side="right")
        lower = np.searchsorted(held, scores, side="left")
        return held.size - upper, upper - lower, held.size

    def insert(self, score: float, key: int) -> None:
        """Store one score under the key, in place of the oldest when the ring is full."""
        value = as_score(score)
        held = self._sorted_of(key)
        at = int(self.head[key])
        if len(held) == self.ring.shape[1]:
            del held[bisect_left(held, float(self.ring[key, at]))]
        else:
            self.size[key] += 1
        held.insert(bisect_right(held, value), value)
        self.ring[key, at] = value
        self.head[key] = (at + 1) % self.ring.shape[1]

    def copy(self) -> RingStore:
        """An independent store with the same contents."""
        return RingStore.of(self.ring.copy(), self.size.copy(), self.head.copy())

    def same_as(self, other: RingStore) -> bool:
        """The same scores in the same places; what lies in `ring` beyond `size` does not count. Equality and
        hash stay those of identity, so that a lane can key its mirror by the store."""
        return (
            self.ring.shape == other.ring.shape
            and np.array_equal(self.size, other.size)
            and np.array_equal(self.head, other.head)
            and all(np.array_equal(self.ring[k, :n], other.ring[k, :n]) for k, n in enumerate(self.size))
        )
