"""Calibration scores, one ring buffer per key."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from atts_engine.conformal.errors import CalibrationError, ScoreError


def as_score(score: float) -> np.float32:
    """The score as the float32 that is compared and stored; `ScoreError` if it is not finite (in float32)."""
    if not math.isfinite(score):
        raise ScoreError(f"a score must be finite, not {score}")
    if abs(score) > float(np.finfo(np.float32).max):
        raise ScoreError(f"a score must fit in float32, not {score}")
    return np.float32(score)


class RingStore:
    """The last `capacity` scores of each of `keys` keys.

    ring: float32[K, C], valid in [:size[key]]; size: int64[K]; head: int64[K], where the next score goes. A
    full ring overwrites its oldest score. The layout is the `gate` kernel's, so mirroring to a device is a
    plain copy.
    """

    def __init__(self, keys: int, capacity: int) -> None:
        if keys < 1:
            raise CalibrationError(f"a calibration store needs 1 key or more, not {keys}")
        if capacity < 1:
            raise CalibrationError(f"a calibration store needs a capacity of 1 score or more, not {capacity}")
        self.ring: npt.NDArray[np.float32] = np.zeros((keys, capacity), dtype=np.float32)
        self.size: npt.NDArray[np.int64] = np.zeros(keys, dtype=np.int64)
        self.head: npt.NDArray[np.int64] = np.zeros(keys, dtype=np.int64)

    @property
    def keys(self) -> int:
        return int(self.ring.shape[0])

    @property
    def capacity(self) -> int:
        return int(self.ring.shape[1])

    def check_key(self, key: int) -> int:
        """`key` itself if it is one of this store's; otherwise `CalibrationError`."""
        if not 0 <= key < self.keys:
            raise CalibrationError(f"unknown calibration key {key}: this store has keys 0 .. {self.keys - 1}")
        return key

    def count(self, score: float, key: int) -> tuple[int, int, int]:
        """(#{calibration > score}, #{calibration == score}, n) for the key, compared in float32."""
        value = as_score(score)
        n = int(self.size[self.check_key(key)])
        held = self.ring[key, :n]
        return int(np.count_nonzero(held > value)), int(np.count_nonzero(held == value)), n

    def insert(self, score: float, key: int) -> None:
        """Store one score under the key, in place of the oldest when the ring is full."""
        value = as_score(score)
        at = int(self.head[self.check_key(key)])
        self.ring[key, at] = value
        self.head[key] = (at + 1) % self.capacity
        self.size[key] = min(int(self.size[key]) + 1, self.capacity)

    def copy(self) -> RingStore:
        """An independent store with the same contents."""
        twin = RingStore(1, 1)
        twin.ring, twin.size, twin.head = self.ring.copy(), self.size.copy(), self.head.copy()
        return twin

    def same_as(self, other: RingStore) -> bool:
        """The same scores in the same places; what lies in `ring` beyond `size` does not count. Equality and
        hash stay those of identity, so that a lane can key its mirror by the store."""
        return (
            self.ring.shape == other.ring.shape
            and np.array_equal(self.size, other.size)
            and np.array_equal(self.head, other.head)
            and all(np.array_equal(self.ring[k, :n], other.ring[k, :n]) for k, n in enumerate(self.size))
        )
