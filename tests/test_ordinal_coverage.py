"""Coverage that the theory promises: exact laws, fixed seeds, bounds at about 1e-6."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import beta, betabinom

from atts_engine.conformal.ordinal import (
    SET_METHODS,
    ExpandingPrefix,
    FixedSequence,
    NormalisedSets,
    OrdinalSets,
    ProbabilityThreshold,
    RegularisedWindow,
    ScoredSets,
    make_sets,
)
from tests.test_ordinal_sets import problem

ALPHA, N, TEST = 0.2, 499, 20_000
PER_CLASS = ("fixed-sequence-class", "expanding-prefix")


def missed(sets: OrdinalSets, f: np.ndarray, y: np.ndarray) -> np.ndarray:
    lower, upper = sets.predict(f)
    return (y < lower) | (y > upper)


@pytest.mark.parametrize("name", SET_METHODS)
def test_misses_are_not_more_than_the_law_allows(name: str) -> None:
    f, y = problem(20, N)
    test, truth = problem(21, TEST)
    miss = missed(make_sets(name, ALPHA).fit(f, y), test, truth)
    if name in PER_CLASS:
        for k in range(5):
            n, m = int((y == k).sum()), int((truth == k).sum())
            r = int(ALPHA * (n + 1) + 1e-9)
            assert miss[truth == k].sum() <= betabinom.isf(1e-6, m, r, n + 1 - r)
    else:
        # r = floor(0.2 * 500) = 100; widening to an interval only lowers the count.
        assert miss.sum() <= betabinom.isf(1e-6, TEST, 100, 400)


@pytest.mark.parametrize(
    "sets",
    [ProbabilityThreshold(ALPHA), RegularisedWindow(ALPHA), NormalisedSets(ALPHA)],
    ids=lambda s: type(s).__name__,
)
def test_sets_of_continuous_scores_miss_exactly_as_often(sets: ScoredSets) -> None:
    f, y = problem(22, N)
    test, truth = problem(23, TEST)
    members = sets.fit(f, y).members(test)
    misses = (~members[np.arange(TEST), truth]).sum()
    assert betabinom.ppf(1e-6, TEST, 100, 400) <= misses <= betabinom.isf(1e-6, TEST, 100, 400)


def test_share_rejected_in_a_cell_is_beta() -> None:
    # Two classes whose probability is uniform: the share rejected in a cell is the cell's threshold itself.
    rng = np.random.default_rng(24)
    replicates, n, prefixes = 400, 24, 2
    grid = (np.arange(4_000) + 0.5) / 4_000
    shares: dict[tuple[int, int], list[float]] = {(p, k): [] for p in range(prefixes) for k in (0, 1)}
    y, at = np.tile([0, 1], n * prefixes), np.repeat(np.arange(prefixes), 2 * n)
    for _ in range(replicates):
        own = rng.random(2 * n * prefixes)
        f = np.stack([np.where(y == 0, own, 1 - own), np.where(y == 1, own, 1 - own)], axis=1)
        sets = ExpandingPrefix(ALPHA).fit(f, y, prefix=at)
        for p, k in shares:
            assert sets.rejection_law(k, p) == (5, 20)
            accepted = sets.cell(p).accepted(np.stack([grid, 1 - grid], axis=1))
            shares[p, k].append(1.0 - float(accepted[:, k].mean()))
    for held in shares.values():
        cdf = beta(5, 20).cdf(np.sort(held))
        steps = np.arange(replicates + 1) / replicates
        # Dvoretzky-Kiefer-Wolfowitz at 1e-6 for all cells together, and the grid's step times the density (below 8).
        bound = np.sqrt(np.log(2 * len(shares) / 1e-6) / (2 * replicates)) + 8 / 4_000
        assert max((steps[1:] - cdf).max(), (cdf - steps[:-1]).max()) <= bound


def spans(seed: int, n: int, prefixes: int = 6) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """n spans: f `[n * prefixes, 5]`, labels and span ids; later prefixes see more of the label."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=n)
    y = np.digitize(hidden, [-0.84, -0.25, 0.25, 0.84])
    noise = np.cumsum(rng.normal(size=(n, prefixes)), axis=1) / np.arange(1, prefixes + 1)
    seen = hidden[:, None] + noise
    logits = -((seen[..., None] - np.array([-1.4, -0.5, 0.0, 0.5, 1.4])) ** 2)
    f = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    return f.reshape(-1, 5), np.repeat(y, prefixes), np.repeat(np.arange(n), prefixes)


@pytest.mark.parametrize("name", SET_METHODS)
def test_with_spans_all_prefixes_are_covered_at_the_same_time(name: str) -> None:
    f, y, ids = spans(25, N)
    test, truth, _ = spans(26, 4000)
    miss = missed(make_sets(name, ALPHA).fit(f, y, ids), test, truth).reshape(4000, 6).any(axis=1)
    label = truth.reshape(4000, 6)[:, 0]
    if name in PER_CLASS:
        for k in range(5):
            n, m = int((y == k).sum()) // 6, int((label == k).sum())
            r = int(ALPHA * (n + 1) + 1e-9)
            assert miss[label == k].sum() <= betabinom.isf(1e-6, m, r, n + 1 - r)
    else:
        assert miss.sum() <= betabinom.isf(1e-6, 4000, 100, 400)


def test_prefix_by_prefix_calibration_does_not_cover_them_at_the_same_time() -> None:
    f, y, _ = spans(27, N)
    test, truth, _ = spans(28, 4000)
    miss = np.zeros((4000, 6), dtype=bool)
    for p in range(6):
        sets = FixedSequence(ALPHA).fit(f[p::6], y[p::6])
        miss[:, p] = missed(sets, test[p::6], truth[p::6])
        assert miss[:, p].sum() <= betabinom.isf(1e-6, 4000, 100, 400)
    # Why a verdict that may stop at any prefix needs `spans`.
    assert miss.any(axis=1).sum() > betabinom.isf(1e-6, 4000, 100, 400)
