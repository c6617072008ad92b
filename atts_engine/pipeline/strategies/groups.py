"""The confidence of a chain as DeepConf takes it from its tokens' (arXiv 2508.15260)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np


class GroupConfidence:
    """Lowest mean of `size` consecutive tokens so far; the mean of all as long as there are fewer.

    below: the place in the order of tokens, counted from 1, of the first that ended a whole group under the `bar`.
    """

    def __init__(self, size: int, bar: float | None = None) -> None:
        self._size, self._bar = size, bar
        self._group: deque[float] = deque()
        self._sum = 0.0
        self._lowest: float | None = None
        self.tokens = 0
        self.below: int | None = None

    def add(self, confidences: Iterable[float]) -> None:
        """Take further tokens; none behind the one that fell below the bar."""
        for confidence in confidences:
            if self.below is not None:
                return
            self.tokens += 1
            self._group.append(confidence)
            self._sum += confidence
            if len(self._group) > self._size:
                self._sum -= self._group.popleft()
            if len(self._group) == self._size:
                mean = self._sum / self._size
                self._lowest = mean if self._lowest is None else min(self._lowest, mean)
                if self._bar is not None and mean < self._bar:
                    self.below = self.tokens

    @property
    def lowest(self) -> float | None:
        """None without a token."""
        if self._lowest is not None or not self._group:
            return self._lowest
        return self._sum / len(self._group)


def bar_of(confidences: Sequence[float], keep: float) -> float:
    """The confidence that `keep` percent of the warm-up chains reach: their (100 - keep)th percentile, interpolated
    between neighbours as numpy does by default."""
    return float(np.percentile(confidences, 100.0 - keep))


def share_of_leader(votes: Iterable[float]) -> float:
    """The largest share of all votes; 0 without any."""
    weights = list(votes)
    return max(weights) / sum(weights) if sum(weights) > 0.0 else 0.0
