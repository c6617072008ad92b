"""The conformal gate against exact fractions, plain lists and crepes."""

from __future__ import annotations

import warnings
from collections import deque
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atts_engine.conformal import (
    LEVEL_ONE,
    CalibrationError,
    Mondrian,
    ReferenceATTS,
    RingStore,
    ScoreError,
    Split,
    decide,
    level_of,
    make_calibrator,
    p_value,
)

UNIFORMS = st.integers(1, LEVEL_ONE)
SCORES = st.floats(-10, 10, width=32)


@pytest.mark.parametrize("percent", [1, 5, 10, 29, 30, 40, 57, 58, 70, 90, 99])
def test_plain_decisions_equal_exact_fractions_of_the_decimal_level(percent: int) -> None:
    alpha, level = Fraction(percent, 100), level_of(percent / 100)
    for n in range(400):
        for count in range(n + 1):
            assert decide(count, 0, n, level, LEVEL_ONE) == (Fraction(count + 1, n + 1) <= alpha)


@given(st.integers(0, 5000), st.integers(0, 5000), st.integers(0, 5000), st.integers(1, LEVEL_ONE - 1), UNIFORMS)
def test_decision_and_p_value_are_those_of_the_formula(greater: int, ties: int, rest: int, level: int, u: int) -> None:
    n = greater + ties + rest
    exact = (greater + Fraction(u, LEVEL_ONE) * (1 + ties)) / (n + 1)
    assert decide(greater, ties, n, level, u) == (exact <= Fraction(level, LEVEL_ONE))
    assert p_value(greater, ties, n, u) == pytest.approx(float(exact), rel=1e-15)
    assert 0.0 < p_value(greater, ties, n, u) <= 1.0


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, 1.5, float("nan"), float("inf")])
def test_level_outside_the_open_interval_is_refused(alpha: float) -> None:
    with pytest.raises(CalibrationError, match="alpha must lie strictly between 0 and 1"):
        level_of(alpha)
    with pytest.raises(CalibrationError, match="alpha"):
        ReferenceATTS([1.0], alpha)


@given(st.lists(st.tuples(st.integers(0, 2), SCORES), max_size=40), SCORES, st.integers(1, 7))
def test_ring_counts_like_a_list_of_the_last_scores(
    observed: list[tuple[int, float]], score: float, capacity: int
) -> None:
    store = RingStore(3, capacity)
    oracle = [deque[float](maxlen=capacity) for _ in range(3)]
    for key, value in observed:
        store.insert(value, key)
        oracle[key].append(value)
    for key, held in enumerate(oracle):
        expected = (sum(v > score for v in held), sum(v == score for v in held), len(held))
        assert store.count(score, key) == expected
        assert sorted(store.ring[key, : store.size[key]].tolist()) == sorted(held)


def test_scores_are_compared_as_float32() -> None:
    store = RingStore(1, 4)
    store.insert(0.1, 0)
    assert store.count(0.1 + 1e-12, 0) == (0, 1, 1)
    assert store.count(float(np.float32(0.1)), 0) == (0, 1, 1)


def test_copy_is_independent() -> None:
    store = RingStore(2, 3)
    store.insert(1.0, 1)
    twin = store.copy()
    assert twin.same_as(store)
    twin.insert(2.0, 1)
    assert not twin.same_as(store)
    assert store.count(0.0, 1) == (1, 0, 1)


@pytest.mark.parametrize("score", [float("nan"), float("inf"), float("-inf"), 1e39])
def test_scores_that_are_not_finite_float32_are_refused(score: float) -> None:
    calibrator = Mondrian(0.4)
    for attempt in (calibrator.observe, calibrator.store.count, calibrator.store.insert):
        with pytest.raises(ScoreError, match="score must"):
            attempt(score, 0)
    assert calibrator.store.same_as(Mondrian(0.4).store)
    with pytest.raises(ScoreError):
        Mondrian(0.4, frozen=True).observe(score, 0)


@pytest.mark.parametrize("key", [-1, 4])
def test_unknown_key_is_refused(key: int) -> None:
    calibrator = Mondrian(0.4, keys=4)
    for attempt in (calibrator.observe, calibrator.store.count):
        with pytest.raises(CalibrationError, match=f"unknown calibration key {key}"):
            attempt(0.5, key)
    with pytest.raises(CalibrationError, match="unknown calibration key"):
        calibrator.request(key, 1)


def test_other_settings_that_cannot_be_used_are_refused() -> None:
    for keys, capacity in ((0, 1), (1, 0)):
        with pytest.raises(CalibrationError, match="needs"):
            RingStore(keys, capacity)
    for u in (0, LEVEL_ONE + 1):
        with pytest.raises(CalibrationError, match="u must lie in"):
            Mondrian(0.4).p_value(0.5, 0, u)
        with pytest.raises(CalibrationError, match="u must lie in"):
            Mondrian(0.4).request(0, u)
    with pytest.raises(CalibrationError, match="a turn must be 0 or more"):
        Mondrian(0.4).key_of(-1)
    with pytest.raises(CalibrationError, match="no calibrator 'best'; there are adaptive, aci, mondrian"):
        make_calibrator("best", 0.4)
    with pytest.raises(CalibrationError, match="not empty"):
        ReferenceATTS([], 0.4)
    with pytest.raises(CalibrationError, match="not finite"):
        ReferenceATTS([1.0, float("nan")], 0.4)
    with pytest.raises(ScoreError):
        ReferenceATTS([1.0], 0.4).percentile(float("nan"))


def test_late_turns_share_the_last_key() -> None:
    calibrator = Mondrian(0.4, keys=4)
    assert [calibrator.key_of(turn) for turn in range(7)] == [0, 1, 2, 3, 3, 3, 3]
    assert Split(0.4).key_of(9) == 0


@given(UNIFORMS)
def test_cold_start_takes_over_with_probability_alpha(u: int) -> None:
    calibrator = Mondrian(0.4)
    assert calibrator.p_value(0.7, 0, u) == u / LEVEL_ONE
    request = calibrator.request(0, u)
    assert decide(*request.store.count(0.7, 0), request.level, request.u) == (u <= request.level)


def test_frozen_calibrator_learns_nothing_and_says_so_to_the_lane() -> None:
    calibrator = Mondrian(0.4, frozen=True)
    calibrator.observe(0.3, 0)
    assert calibrator.store.size.sum() == 0
    assert calibrator.request(0, 1).insert is False
    assert Mondrian(0.4).request(0, 1).insert is True


def test_split_asks_for_the_plain_p_value() -> None:
    calibrator = Split(0.4)
    for score in (0.1, 0.2, 0.3):
        calibrator.observe(score, 0)
    assert calibrator.request(0, 17).u == LEVEL_ONE
    assert calibrator.p_value(0.2, 0, 17) == 3 / 4


def _crepes_p_values(*args: object, **settings: object) -> np.ndarray:
    pytest.importorskip("sklearn", reason="crepes needs scikit-learn")
    base = pytest.importorskip("crepes.base", reason="the oracle crepes is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.asarray(base.p_values_batch(*args, **settings))


def _tied_scores(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.normal(size=n).round(1).astype(np.float32).astype(np.float64)


@pytest.mark.parametrize("n", [1, 10, 500])
def test_plain_p_values_equal_crepes_exactly(n: int) -> None:
    rng = np.random.default_rng(n)
    calibration, test = _tied_scores(rng, n), _tied_scores(rng, 200)
    calibrator = Split(0.4)
    for score in calibration:
        calibrator.observe(score, 0)
    expected = _crepes_p_values(calibration, test, smoothing=False)
    assert [calibrator.p_value(score, 0, 1) for score in test] == expected.tolist()


def test_smoothed_p_values_equal_crepes_within_the_resolution_of_the_uniform() -> None:
    rng = np.random.default_rng(5)
    calibration, test = _tied_scores(rng, 300), _tied_scores(rng, 200)
    calibrator = Mondrian(0.4)
    for score in calibration:
        calibrator.observe(score, 0)
    expected = _crepes_p_values(calibration, test, smoothing=True, seed=7)
    thetas = np.random.RandomState(7).rand(200)
    for score, theta, p in zip(test, thetas, expected, strict=True):
        u = max(1, round(theta * LEVEL_ONE))
        _, ties, n = calibrator.store.count(score, 0)
        assert abs(calibrator.p_value(score, 0, u) - p) <= (1 + ties) / (n + 1) / LEVEL_ONE + 1e-12


def test_p_values_within_a_key_equal_crepes_within_a_bin() -> None:
    rng = np.random.default_rng(6)
    calibration, test = _tied_scores(rng, 400), _tied_scores(rng, 100)
    keys, test_keys = rng.integers(0, 5, 400), rng.integers(0, 5, 100)
    calibrator = Mondrian(0.4, keys=5)
    for score, key in zip(calibration, keys, strict=True):
        calibrator.observe(score, int(key))
    expected = _crepes_p_values(calibration, test, keys, test_keys, smoothing=False)
    found = [calibrator.p_value(s, int(k), LEVEL_ONE) for s, k in zip(test, test_keys, strict=True)]
    assert found == expected.tolist()


def test_reference_is_the_mean_of_lower_perplexities() -> None:
    rng = np.random.default_rng(8)
    calibration = rng.uniform(1, 3, (20, 16)).round(2)
    reference = ReferenceATTS(calibration, 0.4)
    for ppl in rng.uniform(1, 3, 300).round(2):
        percentile = np.mean(calibration < ppl)
        assert reference.percentile(ppl) == percentile
        assert reference.takeover(ppl) == (percentile >= 1 - 0.4)
