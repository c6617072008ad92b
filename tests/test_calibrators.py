"""Calibrators against plain loops, crepes and the bounds that hold for any scores."""

from __future__ import annotations

import math
import warnings
from collections import Counter, deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atts_engine.conformal import (
    LEVEL_ONE,
    ONLINE_CALIBRATORS,
    Adaptive,
    AdaptiveConformalInference,
    CalibrationError,
    Calibrator,
    ColdStart,
    Hierarchical,
    Mondrian,
    Pending,
    QuantileTracker,
    ScoreError,
    SlidingWindow,
    Split,
    Weighted,
    level_of,
    make_calibrator,
)
from atts_engine.conformal.rings import pac_rank

SCORES = st.floats(-10, 10, width=32)
UNIFORMS = st.integers(1, LEVEL_ONE)


# -- what all of them promise --


@pytest.mark.parametrize("name", ONLINE_CALIBRATORS)
def test_bad_input_is_refused_by_every_calibrator(name: str) -> None:
    calibrator = make_calibrator(name, 0.4)
    for score in (float("nan"), float("inf"), 1e39):
        with pytest.raises(ScoreError):
            calibrator.decide(score, 0, 1)
        with pytest.raises(ScoreError):
            calibrator.observe(score, 0, True)
    with pytest.raises(CalibrationError, match="unknown calibration key"):
        calibrator.decide(0.5, 64, 1)
    with pytest.raises(CalibrationError, match="u must lie in"):
        calibrator.decide(0.5, 0, 0)
    for alpha in (0.0, 1.0, math.nan):
        with pytest.raises(CalibrationError, match="alpha"):
            make_calibrator(name, alpha)
    assert all(not a.any() or np.isnan(a).all() for a in calibrator.arrays().values())


@pytest.mark.parametrize("name", ONLINE_CALIBRATORS)
@given(st.lists(st.tuples(SCORES, st.integers(0, 5), UNIFORMS), max_size=30))
def test_batched_p_values_are_the_single_ones(name: str, rows: list[tuple[float, int, int]]) -> None:
    calibrator = make_calibrator(name, 0.4, capacity=8)
    for i, (score, turn, _) in enumerate(rows):
        calibrator.observe(score, calibrator.key_of(turn), None, f"p{i % 3}")
    scores, us = [r[0] for r in rows], [r[2] for r in rows]
    keys = [calibrator.key_of(r[1]) for r in rows]
    expected = [calibrator.p_value(s, k, u) for s, k, u in zip(scores, keys, us, strict=True)]
    assert calibrator.p_values(scores, keys, us).tolist() == expected
    with pytest.raises(CalibrationError, match="as many keys"):
        calibrator.p_values([0.5], [0, 0])


@pytest.mark.parametrize("name", ONLINE_CALIBRATORS)
def test_where_a_lane_can_decide_it_decides_like_the_host(name: str) -> None:
    calibrator = make_calibrator(name, 0.4)
    rng = np.random.default_rng(0)
    if not calibrator.on_device:
        with pytest.raises(CalibrationError, match="decides on the host"):
            calibrator.request(0, 1)
        return
    for _ in range(300):
        score, key, u = (
            round(float(rng.normal()), 1),
            calibrator.key_of(int(rng.integers(3))),
            int(rng.integers(1, 2**32)),
        )
        request = calibrator.request(key, u)
        greater, ties, n = request.store.count(score, request.key)
        ruling = calibrator.decide(score, key, u)
        assert ruling.takeover == (greater * LEVEL_ONE + request.u * (1 + ties) <= request.level * (n + 1))
        assert ruling.level == request.level
        calibrator.observe(score, key, ruling.takeover)


# -- cold start --


@pytest.mark.parametrize("name", ["mondrian", "adaptive", "window", "split"])
def test_cold_start_rules(name: str) -> None:
    def verdicts(cold: ColdStart, n: int = 12) -> list[bool]:
        calibrator = make_calibrator(name, 0.4, cold=cold)
        rng = np.random.default_rng(1)
        found = []
        for _ in range(n):
            score = float(rng.normal())
            ruling = calibrator.decide(score, 0, int(rng.integers(1, LEVEL_ONE)))
            calibrator.observe(score, 0, ruling.takeover)
            found.append(ruling.takeover)
        return found

    assert not any(verdicts(ColdStart("accept", 12)))
    assert all(verdicts(ColdStart("takeover", 12)))
    assert verdicts(ColdStart("accept", 5), 5) == [False] * 5


def test_the_coin_of_a_cold_start_minds_no_score() -> None:
    calibrator = Mondrian(0.4, cold=ColdStart("coin", 4))
    for score in (0.1, 0.2, 0.3):
        calibrator.observe(score, 0)
    for u in (1, level_of(0.4), level_of(0.4) + 1, LEVEL_ONE):
        assert calibrator.decide(-5.0, 0, u).takeover == calibrator.decide(5.0, 0, u).takeover == (u <= level_of(0.4))
    calibrator.observe(0.4, 0)
    assert calibrator.decide(5.0, 0, LEVEL_ONE).takeover
    assert not calibrator.on_device


def test_a_small_cell_borrows_the_pool() -> None:
    calibrator = Mondrian(0.4, keys=4, cold=ColdStart("borrow", 3))
    held = {0: [0.1, 0.5, 0.9, 0.9], 1: [0.2, 0.8]}
    for key, scores in held.items():
        for score in scores:
            calibrator.observe(score, key)
    pool = held[0] + held[1]
    for score in (0.15, 0.85, 0.9, 2.0):
        for key in (1, 2):
            at_least = sum(np.float32(s) >= np.float32(score) for s in pool)
            assert calibrator.p_value(score, key) == (1 + at_least) / (len(pool) + 1)
        own = sum(np.float32(s) >= np.float32(score) for s in held[0])
        assert calibrator.p_value(score, 0) == (1 + own) / 5


def test_cold_starts_that_cannot_be_are_refused() -> None:
    with pytest.raises(CalibrationError, match="there are coin, accept, takeover, borrow"):
        ColdStart("guess", 3)
    with pytest.raises(CalibrationError, match="0 or more"):
        ColdStart("coin", -1)
    with pytest.raises(CalibrationError, match="does not pool"):
        Weighted(0.4, cold=ColdStart("borrow", 3))


# -- split with a PAC level --


def test_pac_level_of_the_training_conditional_law() -> None:
    assert pac_rank(999, 0.4, 0.05) == 374
    assert pac_rank(0, 0.4, 0.05) == 0
    assert pac_rank(3, 0.4, 0.05) == 0
    rng = np.random.default_rng(6)
    violations = 0
    for _ in range(500):
        calibration = np.sort(rng.uniform(size=999))
        split = Split(0.4, pac=0.05)
        split.store.ring[0, :999], split.store.size[0] = calibration, 999
        # Take over iff 1 + #{calibration >= score} <= 374: the rate over fresh uniforms is exact.
        assert split.level(0) * 1000 >= 374 * LEVEL_ONE > (split.level(0) - 1) * 1000
        violations += 1.0 - calibration[999 - 373 - 1] > 0.4
    # Binomial(500, 0.05) at 1e-6.
    assert violations <= 51


def test_split_smoothed_equals_mondrian_with_one_key() -> None:
    split, mondrian = Split(0.4, smoothed=True), Mondrian(0.4, keys=1)
    rng = np.random.default_rng(2)
    for _ in range(200):
        score, u = round(float(rng.normal()), 1), int(rng.integers(1, LEVEL_ONE))
        assert split.decide(score, 0, u) == mondrian.decide(score, 0, u)
        split.observe(score, 0)
        mondrian.observe(score, 0)


def test_window_forgets() -> None:
    window = SlidingWindow(0.4, keys=1, capacity=5)
    held: deque[float] = deque(maxlen=5)
    for score in np.random.default_rng(0).normal(size=40).tolist():
        at_least = sum(np.float32(s) >= np.float32(score) for s in held)
        assert window.p_value(score, 0) == (1 + at_least) / (len(held) + 1)
        window.observe(score, 0)
        held.append(score)


# -- weights --


def test_weighted_with_rho_1_is_mondrian_to_the_bit() -> None:
    weighted, mondrian = Weighted(0.4, rho=1.0, capacity=50), Mondrian(0.4, capacity=50)
    rng = np.random.default_rng(3)
    for _ in range(200):
        score, u = round(float(rng.normal()), 1), int(rng.integers(1, LEVEL_ONE))
        assert weighted.p_value(score, 0, u) == mondrian.p_value(score, 0, u)
        weighted.observe(score, 0)
        mondrian.observe(score, 0)


def test_weighted_p_value_is_the_sum_by_age() -> None:
    weighted = Weighted(0.4, rho=0.9, capacity=7)
    held: deque[float] = deque(maxlen=7)
    rng = np.random.default_rng(4)
    for _ in range(40):
        score, u = float(np.float32(round(rng.normal(), 1))), int(rng.integers(1, LEVEL_ONE))
        weights = [0.9 ** (len(held) - i) for i in range(len(held))]
        greater = sum(w for w, s in zip(weights, held, strict=True) if s > score)
        ties = sum(w for w, s in zip(weights, held, strict=True) if s == score)
        expected = (greater + u / LEVEL_ONE * (1 + ties)) / (1 + sum(weights))
        assert weighted.p_value(score, 0, u) == pytest.approx(expected, rel=1e-12)
        weighted.observe(score, 0)
        held.append(score)


def test_weights_follow_a_late_shift_better_than_split() -> None:
    rng = np.random.default_rng(5)
    weighted, mondrian = Weighted(0.4, rho=0.99), Mondrian(0.4)
    for score in rng.normal(size=2000).tolist() + rng.normal(1.0, size=300).tolist():
        weighted.observe(score, 0)
        mondrian.observe(score, 0)
    test = rng.normal(1.0, size=2000).tolist()
    rates = [np.mean([c.p_value(s, 0, 1 << 31) <= 0.4 for s in test]) for c in (weighted, mondrian)]
    assert abs(rates[0] - 0.4) < abs(rates[1] - 0.4) - 0.1


@pytest.mark.parametrize("icc", [0.0, 0.6, 1.0])
def test_hierarchical_is_valid_for_a_new_problem_where_pooling_is_not(icc: float) -> None:
    """n = 20 problems x m = 16 chains, Gaussian scores, intra-class correlation `icc`, one span of a new problem."""
    rng = np.random.default_rng(7)
    trials, n, m = 4000, 20, 16
    problem = rng.normal(size=(trials, n + 1))
    noise = rng.normal(size=(trials, n, m))
    calibration = math.sqrt(icc) * problem[:, :n, None] + math.sqrt(1 - icc) * noise
    test = math.sqrt(icc) * problem[:, n] + math.sqrt(1 - icc) * rng.normal(size=trials)
    at_least = calibration >= test[:, None, None]
    hierarchical = (1 + at_least.mean(axis=2).sum(axis=1)) / (n + 1)
    for alpha in (0.05, 0.1, 0.4):
        assert np.mean(hierarchical <= alpha) <= alpha + 5 * math.sqrt(alpha * (1 - alpha) / trials)
    if icc == 1.0:
        pooled = (1 + at_least.sum(axis=(1, 2))) / (n * m + 1)
        # All 320 scores are below as soon as all 20 problems are: 1/21 instead of 1/321.
        smallest = np.mean(pooled <= 1 / (n * m + 1))
        assert abs(smallest - 1 / 21) <= 5 * math.sqrt(20 / 441 / trials)
    calibrator = Hierarchical(0.4)
    for i in range(n):
        for j in range(m):
            calibrator.observe(float(calibration[0, i, j]), 0, None, f"p{i}")
    assert calibrator.p_value(float(test[0]), 0, 1, "new") == pytest.approx(
        (1 + (calibration[0].astype(np.float32) >= np.float32(test[0])).mean(axis=1).sum()) / (n + 1), rel=1e-12
    )


def test_hierarchical_leaves_the_spans_own_problem_out() -> None:
    calibrator = Hierarchical(0.4)
    for score, problem in ((1.0, "a"), (2.0, "a"), (3.0, "b"), (0.5, "c")):
        calibrator.observe(score, 0, None, problem)
    assert calibrator.p_value(1.5, 0, 1, "b") == (1 + 0.5 + 0) / 3
    assert calibrator.p_value(1.5, 0, 1, "z") == (1 + 0.5 + 1 + 0) / 4
    assert calibrator.filled(0) == 3


# -- levels that follow the verdicts: bounds that hold for any scores --


def _adversary(calibrator: Calibrator, outstanding: int, seed: int, n: int = 4000) -> list[tuple[int, int, bool]]:
    """Verdicts in the order of their observation, (key, n of the key so far, takeover), for scores that jump between
    regimes, sit where they hurt most, and are resolved in a random order with at most `outstanding` in flight."""
    rng = np.random.default_rng(seed)
    in_flight: list[tuple[float, int, bool]] = []
    by_key: Counter[int] = Counter()
    observed: list[tuple[int, int, bool]] = []
    counts: Counter[int] = Counter()
    for i in range(n):
        while len(in_flight) >= outstanding or (in_flight and rng.random() < 0.3):
            score, key, taken = in_flight.pop(int(rng.integers(len(in_flight))))
            by_key[key] -= 1
            calibrator.observe(score, key, taken)
            counts[key] += 1
            observed.append((key, counts[key], taken))
        key = int(rng.choice(3, p=[0.6, 0.35, 0.05]))
        regime = (i // int(rng.integers(40, 400))) % 3
        # Always the worst so far, always the best so far, or anything.
        score = [float(i), -float(i), float(rng.normal())][regime]
        ruling = calibrator.decide(
            score, key, int(rng.integers(1, LEVEL_ONE)), pending=Pending(by_key[key], len(in_flight))
        )
        in_flight.append((score, key, ruling.takeover))
        by_key[key] += 1
    return observed


@pytest.mark.parametrize("outstanding", [1, 16, 128])
@pytest.mark.parametrize("alpha", [0.1, 0.4, 0.7])
def test_aci_bound_on_every_prefix(outstanding: int, alpha: float) -> None:
    for seed in range(3):
        step = (0.01, 0.05, 0.2)[seed]
        calibrator = AdaptiveConformalInference(alpha, step=step, capacity=64)
        bound = max(alpha, 1 - alpha) / step + outstanding * max(alpha, 1 - alpha)
        excess: Counter[int] = Counter()
        for key, _, taken in _adversary(calibrator, outstanding, seed):
            excess[key] += taken - alpha
            assert abs(excess[key]) <= bound + 1e-6


@pytest.mark.parametrize("outstanding", [1, 2, 16, 128])
@pytest.mark.parametrize("alpha", [0.05, 0.4, 0.5, 0.7])
def test_adaptive_band_on_every_prefix(outstanding: int, alpha: float) -> None:
    for seed in range(3):
        calibrator = Adaptive(alpha, capacity=64)
        excess: Counter[int] = Counter()
        for key, n, taken in _adversary(calibrator, outstanding, seed):
            excess[key] += taken - alpha
            assert abs(excess[key]) <= max(1.0, 0.02 * n) + 2 * (outstanding - 1) + 1e-5


def test_adaptive_holds_a_steady_stream_without_being_pushed() -> None:
    rng = np.random.default_rng(8)
    calibrator = Adaptive(0.4)
    ranks = []
    for _ in range(4000):
        score = float(rng.normal())
        ruling = calibrator.decide(score, 0, int(rng.integers(1, LEVEL_ONE)))
        calibrator.observe(score, 0, ruling.takeover)
        if ruling.takeover:
            ranks.append(0.5 * (1 + math.erf(score / math.sqrt(2))))
    # The best 40% in hindsight have mean rank 0.80; the mean of 1,600 ranks has a standard error of 0.003.
    assert np.mean(ranks) >= 0.77


def test_frozen_adaptive_tests_at_alpha() -> None:
    calibrator = Adaptive(0.4)
    for score in np.random.default_rng(0).normal(size=50).tolist():
        calibrator.observe(score, 0, True)
    assert calibrator.level(0) == 0
    calibrator.frozen = True
    assert calibrator.level(0) == level_of(0.4)


@pytest.mark.parametrize("decay", [0.0, 0.6])
def test_tracker_bound_on_every_prefix(decay: float) -> None:
    for seed in range(3):
        low, high, step = -2.0, 2.0, 0.1
        calibrator = QuantileTracker(0.4, step=step, decay=decay, low=low, high=high, capacity=64)
        excess: Counter[int] = Counter()
        for key, n, taken in _adversary(calibrator, 1, seed):
            excess[key] += taken - 0.4
            smallest = step * n**-decay
            assert abs(excess[key]) <= (high - low + step) / smallest + 1e-6


def test_decaying_tracker_finds_the_quantile() -> None:
    rng = np.random.default_rng(9)
    calibrator = QuantileTracker(0.4, step=1.0, decay=0.6, low=-5.0, high=5.0)
    for score in rng.normal(size=20_000).tolist():
        calibrator.observe(score, 0, calibrator.decide(score, 0, 1).takeover)
    assert abs(float(calibrator.threshold[0]) - 0.2533) < 0.05


def test_a_tracker_takes_no_level_of_a_policy() -> None:
    calibrator = QuantileTracker(0.4)
    with pytest.raises(CalibrationError, match="use the threshold policy"):
        calibrator.decide(0.5, 0, 1, level=level_of(0.3))
    assert calibrator.decide(0.5, 0, 1, level=LEVEL_ONE).takeover
    assert not calibrator.decide(0.5, 0, 1, level=0).takeover


@pytest.mark.parametrize(
    "make",
    [
        lambda: AdaptiveConformalInference(0.4, step=0.0),
        lambda: Adaptive(0.4, tolerance=-1.0),
        lambda: QuantileTracker(0.4, step=math.nan),
        lambda: QuantileTracker(0.4, decay=1.0),
        lambda: QuantileTracker(0.4, low=1.0, high=1.0),
        lambda: Weighted(0.4, rho=0.0),
        lambda: Split(0.4, pac=1.0),
    ],
)
def test_settings_outside_their_range_are_refused(make: object) -> None:
    with pytest.raises(CalibrationError, match="must"):
        make()  # type: ignore[operator]


# -- the index behind a count --


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 1), SCORES), max_size=60), st.integers(1, 9))
def test_a_saved_copy_counts_like_the_store_it_came_from(rows: list[tuple[int, float]], capacity: int) -> None:
    calibrator = Mondrian(0.4, keys=2, capacity=capacity)
    for key, score in rows:
        calibrator.observe(score, key)
    twin = calibrator.store.copy()
    for _, score in rows:
        for key in range(2):
            assert twin.count(score, key) == calibrator.store.count(score, key)


def test_plain_weights_equal_crepes() -> None:
    base = pytest.importorskip("crepes.base", reason="the oracle crepes is not installed")
    rng = np.random.default_rng(11)
    calibration, test = rng.normal(size=400).round(1), rng.normal(size=100).round(1)
    weighted = Weighted(0.4, rho=1.0)
    for score in calibration.astype(np.float32).tolist():
        weighted.observe(score, 0)
    held, asked = (a.astype(np.float32).astype(np.float64) for a in (calibration, test))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = np.asarray(base.p_values_batch(held, asked, smoothing=False))
    assert weighted.p_values(test, [0] * 100) == pytest.approx(expected, rel=1e-12)


class _CountedList(list[float]):
    """Counts how often it is looked into."""

    def __init__(self, values: list[float]) -> None:
        super().__init__(values)
        self.looks = 0

    def __getitem__(self, at: object) -> float:  # type: ignore[override]
        self.looks += 1
        return super().__getitem__(at)  # type: ignore[index]


def test_a_p_value_looks_at_a_logarithm_of_the_scores() -> None:
    looks = {}
    for n in (10**3, 10**6):
        calibrator = Mondrian(0.4, keys=1, capacity=1)
        held = _CountedList([i / n for i in range(n)])
        calibrator.store._sorted[0] = held  # type: ignore[assignment]
        assert calibrator.p_value(0.25, 0) == (1 + 3 * n // 4) / (n + 1)
        looks[n] = held.looks
        assert held.looks <= 2 * math.log2(n) + 4
    assert looks[10**6] <= 10 * looks[10**3]
