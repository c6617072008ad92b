"""The shape of ordinal sets: intervals, nesting, and each method against a plain oracle."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from atts_engine.conformal import CalibrationError
from atts_engine.conformal.ordinal import (
    SET_METHODS,
    ExpandingPrefix,
    FixedSequence,
    MinimumLength,
    NormalisedSets,
    OrdinalAPS,
    ProbabilityThreshold,
    RegularisedWindow,
    make_sets,
    mass_before,
    minimum_length_interval,
    regularised_scores,
)
from atts_engine.conformal.ordinal.minimum_length import heaviest_intervals

NOT_NESTED = np.array([[0.21, 0.30, 0.20, 0.25, 0.04]])


def problem(seed: int, n: int, n_classes: int = 5, sharpness: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    """Distributions with any number of modes, and labels drawn from sharper ones: the predictor is wrong."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, n_classes))
    f = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    truth = np.exp(sharpness * logits)
    truth /= truth.sum(axis=1, keepdims=True)
    labels = (rng.random((n, 1)) > np.cumsum(truth, axis=1)).sum(axis=1)
    return f, np.minimum(labels, n_classes - 1)


def intervals_around(f: np.ndarray) -> list[tuple[int, int]]:
    top, n_classes = int(f.argmax()), len(f)
    return [(a, b) for a in range(top + 1) for b in range(top, n_classes)]


distributions = (
    arrays(np.float64, st.integers(2, 7), elements=st.floats(0.01, 1.0)).map(lambda e: (e / e.sum())[None])
    # Few distinct values: ties.
    | arrays(np.int64, st.integers(2, 7), elements=st.integers(1, 3)).map(lambda e: (e / e.sum())[None])
)


@pytest.mark.parametrize("name", SET_METHODS)
@pytest.mark.parametrize("n_classes", [2, 3, 5, 8])
def test_sets_are_intervals_that_hold_the_most_probable_label(name: str, n_classes: int) -> None:
    f, y = problem(1, 200, n_classes)
    test, _ = problem(2, 500, n_classes)
    for alpha in (0.02, 0.1, 0.4, 0.9):
        lower, upper = make_sets(name, alpha).fit(f, y).predict(test)
        assert lower.dtype == upper.dtype == np.int64 and lower.shape == upper.shape == (500,)
        top = test.argmax(axis=1)
        assert (lower >= 0).all() and (lower <= top).all() and (top <= upper).all() and (upper < n_classes).all()


@pytest.mark.parametrize("name", SET_METHODS)
def test_sets_are_nested_in_alpha(name: str) -> None:
    f, y = problem(3, 300)
    test, _ = problem(4, 500)
    previous = None
    for alpha in (0.6, 0.4, 0.2, 0.1, 0.05, 0.01):
        lower, upper = make_sets(name, alpha).fit(f, y).predict(test)
        if previous is not None:
            assert (lower <= previous[0]).all() and (upper >= previous[1]).all()
        previous = lower, upper
    few = make_sets(name, 0.1).fit(f[:8], np.full(8, 2)).predict(test)
    # 8 scores are fewer than 1/alpha - 1: nothing may be rejected.
    assert (few[0] == 0).all() and (few[1] == 4).all()


@pytest.mark.parametrize("name", SET_METHODS)
def test_a_span_counts_once_by_its_strangest_prefix(name: str) -> None:
    f, y = problem(5, 120)
    if name == "eraps":
        sets, same = RegularisedWindow(0.2, seed=7), RegularisedWindow(0.2, seed=7)
    else:
        sets, same = make_sets(name, 0.2), make_sets(name, 0.2)
    test, _ = problem(6, 300)
    # One row for each span: the same as no spans.
    a = sets.fit(f, y, np.arange(120)[::-1]).predict(test)
    b = same.fit(f, y).predict(test)
    assert (a[0] == b[0]).all() and (a[1] == b[1]).all()
    with pytest.raises(CalibrationError, match="must all have its label"):
        make_sets(name, 0.2).fit(f[:2], [0, 1], ["s", "s"])
    with pytest.raises(CalibrationError, match="spans must have shape"):
        make_sets(name, 0.2).fit(f, y, np.arange(3))


def test_spans_calibrate_on_the_worst_row() -> None:
    f, y = problem(7, 200)
    y = np.repeat(y[::2], 2)
    sets = ProbabilityThreshold(0.25).fit(f, y, np.repeat(np.arange(100), 2))
    worst = -f[np.arange(200), y].reshape(100, 2).min(axis=1)
    # r = floor(0.25 * 101) = 25: the 25th largest.
    assert sets.threshold == np.sort(worst)[75]


@given(distributions)
def test_adaptive_mass_grows_by_the_more_probable_neighbour(f: np.ndarray) -> None:
    row = f[0].tolist()
    lower = upper = int(np.argmax(row))
    expected, mass = {lower: 0.0}, row[lower]
    while len(expected) < len(row):
        below = row[lower - 1] if lower > 0 else -1.0
        above = row[upper + 1] if upper + 1 < len(row) else -1.0
        if below > above:
            lower -= 1
            label = lower
        else:
            upper += 1
            label = upper
        expected[label] = mass
        mass += row[label]
    assert mass_before(f)[0].tolist() == [expected[k] for k in range(len(row))]


@given(distributions, st.floats(0.0, 1.2), st.sampled_from([0.0, 0.03, 0.2]))
def test_minimum_length_is_that_of_brute_force(f: np.ndarray, q: float, penalty: float) -> None:
    lower, upper = (int(end[0]) for end in minimum_length_interval(f, q, penalty))
    top = int(f[0].argmax())
    running = np.concatenate([[0.0], np.cumsum(f[0])])

    def value(a: int, b: int) -> float:
        return (running[b + 1] - running[a]) - penalty * (abs(top - a) + abs(b - top))

    enough = [(b - a, a, b) for a, b in intervals_around(f[0]) if value(a, b) >= q]
    if not enough:
        assert (lower, upper) == (0, f.shape[1] - 1)
    else:
        assert upper - lower == min(enough)[0] and lower <= top <= upper
        assert value(lower, upper) == max(value(a, b) for length, a, b in enough if length == min(enough)[0])


def test_bare_minimum_length_sets_are_not_nested_and_their_hulls_are() -> None:
    at = {q: [int(end[0]) for end in minimum_length_interval(NOT_NESTED, q)] for q in (0.51, 0.73)}
    # The larger mass drops label 0.
    assert at == {0.51: [0, 1], 0.73: [1, 3]}
    strangeness = MinimumLength(0.1).strangeness(NOT_NESTED)[0]
    held = {q: [k for k in range(5) if strangeness[k] < q] for q in at}
    assert held == {0.51: [0, 1], 0.73: [0, 1, 2, 3]}


@given(distributions, st.sampled_from([0.0, 0.03, 0.2]))
def test_minimum_length_strangeness_is_that_of_the_nested_hull(f: np.ndarray, penalty: float) -> None:
    strangeness = MinimumLength(0.1, penalty=penalty).strangeness(f)[0]
    values = heaviest_intervals(f)[1][0] - penalty * np.arange(f.shape[1])
    # Every threshold at which the shortest interval can change, and the gaps between them.
    points = np.unique(values)
    thresholds = np.sort(np.concatenate([points, (points[1:] + points[:-1]) / 2, [points[-1] + 1.0, points[0] - 1.0]]))
    union: set[int] = set()
    for q in thresholds:
        lower, upper = minimum_length_interval(f, q, penalty)
        union |= set(range(int(lower[0]), int(upper[0]) + 1))
        assert {k for k in range(f.shape[1]) if strangeness[k] < q} == union
        assert union == set(range(min(union), max(union) + 1))


@pytest.mark.parametrize("per_class", [False, True])
@settings(max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from([0.05, 0.1, 0.3, 0.5]), st.booleans())
def test_fixed_sequence_holds_all_labels_that_are_not_rejected(
    per_class: bool, seed: int, alpha: float, ties: bool
) -> None:
    f, y = problem(seed, 60, 4)
    test, _ = problem(seed + 1, 40, 4)
    if ties:
        f, test = (np.round(8 * p / p.max(axis=1, keepdims=True)) + 1 for p in (f, test))
        f, test = f / f.sum(axis=1, keepdims=True), test / test.sum(axis=1, keepdims=True)
    sets = FixedSequence(alpha, per_class=per_class).fit(f, y)
    p_values = sets.p_values(test)
    lower, upper = sets.predict(test)
    true = f[np.arange(60), y]
    for row, k in itertools.product(range(40), range(4)):
        compared = true[y == k] if per_class else true
        assert p_values[row, k] == (1 + (compared <= test[row, k]).sum()) / (len(compared) + 1)
        assert sets.accepted(test)[row, k] == (p_values[row, k] > alpha + 1e-9)
        if p_values[row, k] > alpha + 1e-9:
            assert lower[row] <= k <= upper[row]
    kept = p_values > alpha + 1e-9
    kept[np.arange(40), test.argmax(axis=1)] = True
    # Tight: the ends are labels that are not rejected, or the most probable one.
    assert kept[np.arange(40), lower].all() and kept[np.arange(40), upper].all()


def test_expanding_prefix_is_the_class_specific_sequence_of_each_prefix() -> None:
    f, y = problem(8, 400)
    prefix = np.arange(400) % 3
    sets = ExpandingPrefix(0.15).fit(f, y, prefix=prefix)
    test, _ = problem(9, 90)
    at = np.arange(90) % 3
    lower, upper = sets.predict(test, prefix=at)
    for p in range(3):
        own = FixedSequence(0.15, per_class=True).fit(f[prefix == p], y[prefix == p])
        expected = own.predict(test[at == p])
        assert (lower[at == p] == expected[0]).all() and (upper[at == p] == expected[1]).all()
        assert (sets.members(test, prefix=at)[at == p] == own.accepted(test[at == p])).all()
    n = int((y[prefix == 1] == 2).sum())
    r = int(0.15 * (n + 1) + 1e-9)
    assert sets.rejection_law(2, 1) == (r, n + 1 - r)
    with pytest.raises(CalibrationError, match="prefix 3 was not calibrated"):
        sets.predict(test, prefix=at + 1)
    with pytest.raises(CalibrationError, match="prefix must be integers"):
        sets.predict(test, prefix=at[:5])


def randomised_aps(f: np.ndarray, u: float, k: int) -> float:
    """Romano, Sesia, Candès: mass of the strictly more probable labels and a share of the label's own."""
    return float(f[f > f[k]].sum() + u * f[k])


def test_regularised_sets_without_penalty_and_slide_are_randomised_aps() -> None:
    f, y = problem(10, 300)
    test, _ = problem(11, 200)
    alpha, seed = 0.17, 3
    rng = np.random.default_rng(seed)
    u, v = rng.random(300), rng.random(200)
    calibration = np.sort([randomised_aps(f[i], u[i], y[i]) for i in range(300)])
    # ceil((n + 1)(1 - alpha)) = 250.
    quantile = calibration[250 - 1]
    sets = RegularisedWindow(alpha, penalty=0.0, seed=seed).fit(f, y)
    assert sets.threshold == pytest.approx(quantile, abs=1e-12)
    members = sets.members(test)
    expected = [[randomised_aps(test[i], v[i], k) <= quantile for k in range(5)] for i in range(200)]
    assert (members == np.array(expected)).all()


def test_regularised_scores_charge_ranks_as_the_source_does() -> None:
    f = np.array([[0.1, 0.5, 0.25, 0.15]])
    u = np.array([0.5])
    plain = np.array([[0.95, 0.25, 0.625, 0.825]])
    assert regularised_scores(f, u, 0.0, 2) == pytest.approx(plain)
    # Ranks 4, 1, 2, 3 and (rank - 2 + 1)_+.
    assert regularised_scores(f, u, 0.1, 2) == pytest.approx(plain + 0.1 * np.array([[3, 0, 1, 2]]))


def test_window_slides_by_its_stride() -> None:
    f, y = problem(12, 500)
    slid = RegularisedWindow(0.2, window=100, stride=10, seed=5).fit(f[:100], y[:100])
    before = slid.threshold
    slid.update(f[100:109], y[100:109])
    assert slid.threshold == before
    slid.update(f[109:500], y[109:500])
    slid_scores = np.random.default_rng(5).random(500)
    true = regularised_scores(f, slid_scores, 0.01, 2)[np.arange(500), y]
    # Last refreshed at 500: the last 100 scores, r = floor(0.2 * 101) = 20.
    assert slid.threshold == np.sort(true[400:])[100 - 20]
    with pytest.raises(CalibrationError, match="call fit before update"):
        RegularisedWindow(0.2).update(f, y)


def test_normalised_with_constant_spread_is_not_normalised() -> None:
    # Shifts of one shape: the spread is the same in every row.
    shape = np.array([0.25, 0.5, 0.25])
    f = np.zeros((6, 8))
    for row in range(6):
        f[row, row : row + 3] = shape
    y = np.array([1, 2, 5, 4, 7, 6])
    plain = np.abs(np.arange(8) - (np.arange(6) + 1.0)[:, None])
    for beta in (0.01, 1.0):
        sets = NormalisedSets(0.4, beta=beta).fit(f, y)
        residuals = np.sort(plain[np.arange(6), y])
        # r = floor(0.4 * 7) = 2.
        assert (sets.members(f) == (plain <= residuals[6 - 2])).all()


def test_snapping_only_adds_labels() -> None:
    f, y = problem(13, 400)
    test, _ = problem(14, 2000)
    plain, snapped = (NormalisedSets(0.2, snap=snap).fit(f, y).members(test) for snap in (False, True))
    assert (snapped >= plain).all() and (snapped & ~plain).any()


def test_adaptive_sets_have_no_gaps_before_widening() -> None:
    f, y = problem(15, 300)
    test, _ = problem(16, 1000)
    for sets in (OrdinalAPS(0.2), MinimumLength(0.2), MinimumLength(0.2, penalty=0.05), NormalisedSets(0.2)):
        members = sets.fit(f, y).members(test)
        assert (np.abs(np.diff(members.astype(int), axis=1)).sum(axis=1) + members[:, 0] + members[:, -1] <= 2).all()
