"""Shortest intervals that hold a given mass, and their calibration by nested hulls."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from atts_engine.conformal.errors import CalibrationError
from atts_engine.conformal.ordinal.checks import Floats, Ints, check_positive, check_probabilities
from atts_engine.conformal.ordinal.sets import ScoredSets


def heaviest_intervals(f: Floats) -> tuple[Ints, Floats]:
    """For each length L = 1 .. K the interval around the most probable label that holds most of `f` `[N, K]`, the
    lowest of equals: its lower end `[N, K]` and its mass `[N, K]`, column L - 1."""
    n, n_classes = f.shape
    top = f.argmax(axis=1)
    running = np.concatenate([np.zeros((n, 1)), np.cumsum(f, axis=1)], axis=1)
    starts = np.zeros((n, n_classes), dtype=np.int64)
    masses = np.zeros((n, n_classes))
    for length in range(1, n_classes + 1):
        lower = np.arange(n_classes - length + 1)
        held = running[:, lower + length] - running[:, lower]
        around = (lower <= top[:, None]) & (top[:, None] < lower + length)
        held = np.where(around, held, -np.inf)
        starts[:, length - 1] = held.argmax(axis=1)
        masses[:, length - 1] = held.max(axis=1)
    return starts, masses


def shortest_intervals(f: Floats, q: float, penalty: float = 0.0) -> tuple[Ints, Ints]:
    """Shortest `(lower[N], upper[N])` around the most probable label with sum(f[lower..upper]) - penalty * (upper -
    lower) >= q, of equal lengths the heaviest; all labels where no interval reaches q. `f` `[N, K]` need not sum to 1.

    Not nested in q: f = (.21, .30, .20, .25, .04) gives 0..1 at q = .51 and 1..3 at q = .73. Searching q by bisection
    over the coverage of these sets is therefore unsound; `MinimumLength` calibrates their nested hulls. The distance
    penalty of the source, |top - lower| + |upper - top|, is upper - lower. Source: arXiv 2511.16845.
    """
    starts, masses = heaviest_intervals(f)
    n_classes = f.shape[1]
    enough = masses - penalty * np.arange(n_classes) >= q
    found = enough.any(axis=1)
    last = np.where(found, enough.argmax(axis=1), n_classes - 1)
    lower = np.where(found, starts[np.arange(len(f)), last], 0)
    return lower.astype(np.int64), (lower + last).astype(np.int64)


def minimum_length_interval(probabilities: npt.ArrayLike, q: float, penalty: float = 0.0) -> tuple[Ints, Ints]:
    """`shortest_intervals` of checked class probabilities `[N, K]`; `CalibrationError` for a bad row or a q that is
    not finite."""
    if not np.isfinite(q):
        raise CalibrationError(f"q must be finite, not {q}")
    return shortest_intervals(check_probabilities(probabilities), q, check_positive(penalty, "penalty", zero=True))


class MinimumLength(ScoredSets):
    """Nested hulls of the shortest intervals: the set at q is the union of the shortest intervals of all thresholds
    up to q, which is an interval, because all of them hold the most probable label, and grows with q.

    A label's strangeness is the threshold above which the hull holds it. Guarantee: as `ScoredSets`. penalty 0 is
    min-CPS, above 0 min-RCPS of the source (arXiv 2511.16845), both with the hull in place of the bare intervals, which
    are not nested; so a set can be longer than the shortest one.
    """

    def __init__(self, alpha: float, *, penalty: float = 0.0) -> None:
        super().__init__(alpha)
        self.penalty = check_positive(penalty, "penalty", zero=True)

    def strangeness(self, probabilities: Floats) -> Floats:
        starts, masses = heaviest_intervals(probabilities)
        n, n_classes = probabilities.shape
        labels = np.arange(n_classes)
        values = masses - self.penalty * labels
        reached = np.full(n, -np.inf)
        scores = np.empty((n, n_classes))
        held = np.zeros((n, n_classes), dtype=np.bool_)
        for last in range(n_classes):
            # With a penalty a longer interval can be worth less than a shorter one: no threshold selects it then.
            selected = values[:, last] > reached
            lower = starts[:, last, None]
            new = selected[:, None] & ~held & (labels >= lower) & (labels <= lower + last)
            scores = np.where(new, reached[:, None], scores)
            held |= new
            reached = np.maximum(reached, values[:, last])
        # No interval reaches a higher threshold: all labels.
        return np.where(held, scores, reached[:, None])
