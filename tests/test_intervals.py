"""Bootstraps and AUC: against scipy, against plain loops, and by how often an interval holds what it should."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from atts_engine.errors import InputError
from atts_engine.evaluation.intervals import Interval, auc, bootstrap, bootstrap_quantile, bootstrap_ratio

RUNS = 300


def draws(n: int, resamples: int, seed: int) -> np.ndarray:
    """The resamples that a seed stands for, [resamples, n]."""
    return np.random.default_rng(seed).integers(0, n, (resamples, n))


def quantiles(found: list[float]) -> list[float]:
    return np.quantile(found, [0.025, 0.975]).tolist()


def ends(interval: Interval) -> list[float]:
    return [interval.low, interval.high]


def test_resamples_do_not_depend_on_how_many_are_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random(37)
    whole = bootstrap(values, resamples=501, seed=3)
    monkeypatch.setattr("atts_engine.evaluation.intervals._DRAWN_AT_ONCE", 100)
    assert bootstrap(values, resamples=501, seed=3) == whole
    assert ends(whole) == pytest.approx(quantiles([values[i].mean() for i in draws(37, 501, 3)]), rel=1e-12)
    assert ends(bootstrap(values, resamples=501, seed=4)) != ends(whole)


def test_ratio_and_quantile_are_those_of_each_resample() -> None:
    rng = np.random.default_rng(1)
    bottoms = rng.integers(0, 9, 20)
    tops = rng.binomial(bottoms, 0.4)
    found = bootstrap_ratio(tops, bottoms, resamples=400, seed=2)
    assert found.mean == tops.sum() / bottoms.sum()
    assert ends(found) == pytest.approx(quantiles([tops[i].sum() / bottoms[i].sum() for i in draws(20, 400, 2)]))
    values = rng.exponential(size=20)
    spread = bootstrap_quantile(values, 0.95, resamples=400, seed=2)
    assert spread.mean == np.quantile(values, 0.95)
    assert ends(spread) == pytest.approx(quantiles([np.quantile(values[i], 0.95) for i in draws(20, 400, 2)]))


def test_a_resample_without_anything_below_is_left_out() -> None:
    found = bootstrap_ratio([1.0, 0.0], [2.0, 0.0], resamples=200)
    assert (found.mean, found.low, found.high) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("step", [None, 0.5])
def test_auc_is_mann_and_whitneys_u(step: float | None) -> None:
    """step: scores are rounded to it, so that many are equal."""
    stats = pytest.importorskip("scipy.stats", reason="the oracle scipy is not installed")
    rng = np.random.default_rng(5)
    wrong = rng.random(400) < 0.3
    scores = rng.normal(size=400) + wrong
    scores = scores if step is None else np.round(scores / step) * step
    found = auc(scores, wrong, list(rng.integers(0, 40, 400)), resamples=10)
    assert found is not None
    expected = stats.mannwhitneyu(scores[wrong], scores[~wrong]).statistic / (wrong.sum() * (~wrong).sum())
    assert found.mean == pytest.approx(expected, rel=1e-12)


def test_auc_of_a_resample_is_that_of_its_problems_put_together() -> None:
    rng = np.random.default_rng(6)
    groups = rng.integers(0, 12, 90)
    wrong = rng.random(90) < 0.3
    scores = np.round(rng.normal(size=90) + wrong, 1)
    order = list(dict.fromkeys(groups.tolist()))
    areas = []
    for drawn in draws(len(order), 200, 9):
        items = np.concatenate([np.flatnonzero(groups == order[g]) for g in drawn])
        bad, good = scores[items][wrong[items]], scores[items][~wrong[items]]
        if bad.size and good.size:
            pairs = bad[:, None] - good[None, :]
            areas.append(float((pairs > 0).mean() + (pairs == 0).mean() / 2))
    found = auc(scores, wrong, [f"problem {g}" for g in groups], resamples=200, seed=9)
    assert found is not None
    assert ends(found) == pytest.approx(quantiles(areas), rel=1e-12)


def test_auc_needs_both_kinds() -> None:
    assert auc([1.0, 2.0], [True, True], ["a", "b"]) is None
    assert auc([], [], []) is None
    with pytest.raises(InputError, match="one score, one label and one group an item"):
        auc([1.0], [True], ["a", "b"])
    with pytest.raises(InputError, match="finite scores"):
        auc([float("nan"), 1.0], [True, False], ["a", "b"])


def test_what_no_ratio_can_be_of() -> None:
    with pytest.raises(InputError, match="as many values above as below"):
        bootstrap_ratio([1.0], [1.0, 2.0])
    with pytest.raises(InputError, match="something to divide by"):
        bootstrap_ratio([0.0], [0.0])


def covered(truth: float, experiment: Callable[[np.random.Generator, int], Interval | None]) -> int:
    """In how many of `RUNS` fresh samples the interval holds the truth."""
    found = [experiment(np.random.default_rng([11, run]), run) for run in range(RUNS)]
    return sum(i is not None and i.low <= truth <= i.high for i in found)


def share(count: int) -> tuple[float, float]:
    """Exact (Clopper and Pearson) interval of the coverage at 99.9%."""
    stats = pytest.importorskip("scipy.stats", reason="the oracle scipy is not installed")
    exact = stats.binomtest(count, RUNS).proportion_ci(0.999, method="exact")
    return float(exact.low), float(exact.high)


def clustered(rng: np.random.Generator, problems: int = 80, chains: int = 8) -> np.ndarray:
    """Right or wrong, [problems, chains]: a problem's chains share its difficulty, Beta(2, 1) with mean 2/3."""
    return rng.random((problems, chains)) < rng.beta(2.0, 1.0, (problems, 1))


def test_the_interval_of_an_accuracy_covers_as_often_as_it_says() -> None:
    count = covered(2 / 3, lambda rng, run: bootstrap(clustered(rng).mean(axis=1), resamples=500, seed=run))
    low, high = share(count)
    assert low <= 0.95 <= high
    # Chains drawn one by one, as if a problem's were independent: the very mistake that the clusters avoid.
    naive = covered(2 / 3, lambda rng, run: bootstrap(clustered(rng).ravel().astype(float), resamples=500, seed=run))
    assert share(naive)[1] < 0.9


@pytest.mark.parametrize(
    ("problems", "accuracy", "coverage"), [(30, 0.3, 0.953), (30, 0.8, 0.946), (30, 0.95, 0.782), (100, 0.9, 0.966)]
)
def test_the_coverage_of_a_vote_is_what_the_docs_say(problems: int, accuracy: float, coverage: float) -> None:
    """Exact but for the resamples: the interval depends on the number of right problems alone, which is binomial."""
    stats = pytest.importorskip("scipy.stats", reason="the oracle scipy is not installed")
    chances = stats.binom.pmf(np.arange(problems + 1), problems, accuracy)
    held = 0.0
    for right, chance in enumerate(chances):
        found = bootstrap([1.0] * right + [0.0] * (problems - right), resamples=4000)
        held += chance * (found.low <= accuracy <= found.high)
    assert held == pytest.approx(coverage, abs=0.001)


def test_the_interval_of_a_rate_covers_as_often_as_it_says() -> None:
    """Problems of 2 to 40 decisions, the longer ones with the higher rate: 0.2 and 0.6 by halves."""

    def experiment(rng: np.random.Generator, run: int) -> Interval:
        hard = rng.random(100) < 0.5
        n = np.where(hard, 20, 2) + rng.integers(0, 21, 100) * hard
        return bootstrap_ratio(rng.binomial(n, np.where(hard, 0.6, 0.2)), n, resamples=500, seed=run)

    low, high = share(covered((30 * 0.6 + 2 * 0.2) / 32, experiment))
    assert low <= 0.95 <= high


def test_the_interval_of_an_auc_covers_as_often_as_it_says() -> None:
    """Scores are N(wrong, 1) plus N(0, 1) of the problem, so over pairs of two problems the AUC is Phi(1 / 2); pairs
    within a problem, Phi(1 / sqrt 2), are one in sixty."""

    def experiment(rng: np.random.Generator, run: int) -> Interval | None:
        groups = np.repeat(np.arange(60), 10)
        wrong = rng.random(600) < 0.3
        scores = rng.normal(size=600) + rng.normal(size=60)[groups] + wrong
        return auc(scores, wrong, groups.tolist(), resamples=500, seed=run)

    phi = [0.5 * (1 + math.erf(x / math.sqrt(2))) for x in (0.5, math.sqrt(0.5))]
    low, high = share(covered(59 / 60 * phi[0] + 1 / 60 * phi[1], experiment))
    assert low <= 0.95 <= high
