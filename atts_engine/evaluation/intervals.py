"""Intervals and tests for figures over problems (docs/evaluation.md).

Problems are the unit that is drawn again: chains, spans and tokens of one problem depend on each other, so a problem is
taken whole or not at all (the cluster bootstrap; Davison and Hinkley, "Bootstrap Methods and their Application", 1997,
section 3.8). All intervals are percentile intervals (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993,
chapter 13). One seed, one interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from atts_engine.errors import InputError

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

RESAMPLES = 10_000
_DRAWN_AT_ONCE = 1 << 21


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure over problems (`mean`, whatever kind of figure it is) and the ends of its bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class McNemar:
    """Problems that only the first strategy got right, only the second, and the exact two-sided p-value of
    "equally often"."""

    only_first: int
    only_second: int
    p_value: float


def bootstrap(values: npt.ArrayLike, *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Mean of one value per problem, `values` [problems]. `InputError` without a value, or a level outside (0, 1)."""
    sample = _per_problem(values)
    return _interval(
        float(sample.mean()), lambda drawn: sample[drawn].mean(axis=1), sample.size, level, resamples, seed
    )


def bootstrap_ratio(
    tops: npt.ArrayLike, bottoms: npt.ArrayLike, *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """sum(tops) / sum(bottoms) over problems, both [problems]: a rate whose problems count by their size, such as spans
    taken over out of spans. A resample whose bottoms sum to 0 is left out. `InputError` if all bottoms are 0."""
    top, bottom = _per_problem(tops), _per_problem(bottoms)
    if top.shape != bottom.shape:
        raise InputError(f"a ratio needs as many values above as below, not {top.size} and {bottom.size}")
    if not bottom.sum() > 0.0:
        raise InputError("a ratio needs something to divide by")

    def ratios(drawn: Indices) -> Floats:
        below = bottom[drawn].sum(axis=1)
        return np.divide(top[drawn].sum(axis=1), below, out=np.full(below.shape, np.nan), where=below > 0.0)

    return _interval(float(top.sum() / bottom.sum()), ratios, top.size, level, resamples, seed)


def bootstrap_quantile(
    values: npt.ArrayLike, q: float, *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """The q-quantile of one value per problem, interpolated as `numpy.quantile` does it."""
    sample = _per_problem(values)
    return _interval(
        float(np.quantile(sample, q)),
        lambda drawn: np.quantile(sample[drawn], q, axis=1),
        sample.size,
        level,
        resamples,
        seed,
    )


def wilson(right: int, seen: int, *, level: float = 0.95) -> Interval:
    """Share of `right` among `seen` problems that are right or wrong as a whole, with Wilson's score interval.

    Unlike a bootstrap's it has a width where all are right or none is, so it serves for few problems. `InputError`
    unless 0 <= right <= seen and seen is 1 or more. Source: E. B. Wilson, JASA 22 (1927).
    """
    if not 0 <= right <= seen or seen < 1:
        raise InputError(f"an interval of a share needs 0 <= right <= seen and seen >= 1, not {right} of {seen}")
    z = NormalDist().inv_cdf(0.5 + level / 2.0)
    share, shrink = right / seen, 1.0 + z * z / seen
    centre = (share + z * z / (2.0 * seen)) / shrink
    half = z / shrink * math.sqrt(share * (1.0 - share) / seen + z * z / (4.0 * seen * seen))
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half))


def paired_bootstrap(
    first: npt.ArrayLike,
    second: npt.ArrayLike,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """mean(first - second) and its bootstrap interval, both on the same problems in the same order."""
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape:
        raise InputError(f"a paired bootstrap needs as many values on both sides, not {a.size} and {b.size}")
    return bootstrap(a - b, level=level, resamples=resamples, seed=seed)


def mcnemar(first: npt.ArrayLike, second: npt.ArrayLike) -> McNemar:
    """Exact McNemar test on right/wrong per problem: the discordant problems against Binomial(n, 1/2),
    two-sided."""
    a, b = np.asarray(first, dtype=np.bool_), np.asarray(second, dtype=np.bool_)
    if a.shape != b.shape:
        raise InputError(f"McNemar's test needs as many problems on both sides, not {a.size} and {b.size}")
    only_first, only_second = int((a & ~b).sum()), int((b & ~a).sum())
    n = only_first + only_second
    tail = sum(math.comb(n, k) for k in range(min(only_first, only_second) + 1))
    return McNemar(only_first, only_second, min(1.0, 2 * tail / 2**n))


def auc(
    scores: npt.ArrayLike,
    wrong: npt.ArrayLike,
    groups: Sequence[Hashable],
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval | None:
    """How well a score tells what is wrong: P(score of a wrong one > score of a right one) + P(equal) / 2, the area
    under the ROC curve, by Mann and Whitney's statistic over all pairs; 0.5 is chance.

    scores, wrong: [items]; groups: the problem of each, drawn again whole (Obuchowski, Biometrics 53:567, 1997, on why
    clusters matter). Resamples that hold no wrong item, or no right one, are left out. None where the items do so
    themselves.
    """
    score, bad = np.asarray(scores, dtype=np.float64), np.asarray(wrong, dtype=np.bool_)
    if score.ndim != 1 or score.shape != bad.shape or len(groups) != score.size:
        raise InputError(
            f"an AUC needs one score, one label and one group an item, not {score.size}, {bad.size} and {len(groups)}"
        )
    if not np.isfinite(score).all():
        raise InputError("an AUC needs finite scores")
    if bad.all() or not bad.any():
        return None
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    group = np.array([numbers[g] for g in groups])
    n = len(numbers)
    wins = _wins(score, bad, group, n)
    wrongs, rights = (np.bincount(group[side], minlength=n).astype(np.float64) for side in (bad, ~bad))

    def areas(drawn: Indices) -> Floats:
        rows = drawn.shape[0]
        flat = drawn + n * np.arange(rows)[:, None]
        times = np.bincount(flat.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)
        pairs = (times @ wrongs) * (times @ rights)
        won = ((times @ wins) * times).sum(axis=1)
        return np.divide(won, pairs, out=np.full(rows, np.nan), where=pairs > 0.0)

    return _interval(float(wins.sum() / (wrongs.sum() * rights.sum())), areas, n, level, resamples, seed)


def _wins(score: Floats, bad: npt.NDArray[np.bool_], group: Indices, n: int) -> Floats:
    """[n, n]: over pairs of a wrong item of group i and a right one of group j, how many the wrong one wins; a tie is
    half a win."""
    wins = np.zeros((n, n))
    for j in range(n):
        right = np.sort(score[~bad & (group == j)])
        below, up_to = (np.searchsorted(right, score[bad], side) for side in ("left", "right"))
        wins[:, j] = np.bincount(group[bad], weights=(below + up_to) / 2.0, minlength=n)
    return wins


def _per_problem(values: npt.ArrayLike) -> Floats:
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or sample.size == 0:
        raise InputError("a bootstrap needs one value per problem and at least one problem")
    return sample


def _interval(
    figure: float, statistic: Callable[[Indices], Floats], n: int, level: float, resamples: int, seed: int
) -> Interval:
    """statistic: indices [rows, n] of resamples -> their figures [rows], NaN where there is none."""
    if not 0.0 < level < 1.0:
        raise InputError(f"the level of an interval must lie strictly between 0 and 1, not {level}")
    rng = np.random.default_rng(seed)
    rows = max(1, _DRAWN_AT_ONCE // n)
    found = [statistic(rng.integers(0, n, (min(rows, resamples - start), n))) for start in range(0, resamples, rows)]
    low, high = np.nanquantile(np.concatenate(found), [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return Interval(figure, float(low), float(high))
