"""The rates that the theory promises, with exact or five-sigma bounds and fixed seeds."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from atts_engine.conformal import LEVEL_ONE, Mondrian, ReferenceATTS, Split, decide, level_of

Ints = npt.NDArray[np.int64]


def _counts(calibration: np.ndarray, test: np.ndarray) -> tuple[Ints, Ints]:
    """Row by row: #{calibration > test} and #{calibration == test}."""
    greater = (calibration > test[:, None]).sum(axis=1)
    ties = (calibration == test[:, None]).sum(axis=1)
    return greater.astype(np.int64), ties.astype(np.int64)


def _uniforms(rng: np.random.Generator, n: int) -> Ints:
    return rng.integers(1, LEVEL_ONE, n, endpoint=True)


def test_online_smoothed_p_values_are_uniform_with_ties() -> None:
    rng = np.random.default_rng(1)
    n = 5000
    calibrator = Mondrian(0.4, keys=1, capacity=n)
    scores, uniforms = rng.normal(size=n).round(1), _uniforms(rng, n)
    p_values = []
    for score, u in zip(scores.tolist(), uniforms.tolist(), strict=True):
        p_values.append(calibrator.p_value(score, 0, u))
        calibrator.observe(score, 0)
    held = np.sort(p_values)
    steps = np.arange(n + 1) / n
    distance = max(np.max(steps[1:] - held), np.max(held - steps[:-1]))
    # Dvoretzky-Kiefer-Wolfowitz: sqrt(log(2e6) / 2n) at probability 1e-6.
    assert distance <= 0.0381


def test_split_rejections_follow_the_training_conditional_law() -> None:
    rng = np.random.default_rng(2)
    calibrator = Split(0.4)
    for score in rng.normal(size=999).tolist():
        calibrator.observe(score, 0)
    request = calibrator.request(0, 1)
    test = rng.normal(size=4000).tolist()
    rejected = sum(decide(*request.store.count(s, 0), request.level, request.u) for s in test)
    # BetaBinomial(4000, 400, 600) at 1e-6.
    assert 1270 <= rejected <= 1944


def test_split_rate_is_alpha_on_average_over_calibrations() -> None:
    rng = np.random.default_rng(3)
    level = level_of(0.4)
    rates = []
    for _ in range(500):
        calibration, test = np.sort(rng.normal(size=999)), rng.normal(size=4000)
        greater = 999 - np.searchsorted(calibration, test, side="right")
        rates.append(np.mean(decide(greater, 0, 999, level, LEVEL_ONE)))
    assert abs(np.mean(rates) - 0.4) <= 0.0039


@pytest.fixture(scope="module")
def one_question() -> tuple[np.ndarray, np.ndarray, Ints]:
    """200,000 trials of 16 calibration draws and one more of the same law, with a uniform each."""
    rng = np.random.default_rng(4)
    trials = 200_000
    return rng.normal(size=(trials, 16)), rng.normal(size=trials), _uniforms(rng, trials)


def test_rates_with_sixteen_draws_of_one_question(one_question: tuple[np.ndarray, np.ndarray, Ints]) -> None:
    calibration, test, u = one_question
    greater, ties = _counts(calibration, test)
    level = level_of(0.4)
    assert abs(np.mean(decide(greater, ties, 16, level, LEVEL_ONE)) - 6 / 17) <= 0.0054
    # Where u is an array the sum stays below 2**37 and the product below 2**37 too: no overflow in int64.
    assert abs(np.mean(decide(greater, ties, 16, level, u)) - 0.4) <= 0.0055


@pytest.mark.parametrize(("alpha", "rate"), [(0.4, 7 / 17), (0.25, 5 / 17)])
def test_reference_rule_over_rejects(
    one_question: tuple[np.ndarray, np.ndarray, Ints], alpha: float, rate: float
) -> None:
    calibration, test, _ = one_question
    lower = np.mean(calibration < test[:, None], axis=1)
    assert abs(np.mean(lower >= 1 - alpha) - rate) <= 0.0055
    for i in range(2000):
        reference = ReferenceATTS(np.exp(calibration[i]), alpha)
        assert reference.takeover(float(np.exp(test[i]))) == (lower[i] >= 1 - alpha)


def test_each_turn_holds_alpha_though_turns_differ() -> None:
    rng = np.random.default_rng(9)
    calibrator = Mondrian(0.3, keys=3, capacity=4000)
    taken = np.zeros(3)
    for _ in range(2000):
        for turn in range(3):
            score, u = float(rng.normal(loc=turn)), int(_uniforms(rng, 1)[0])
            taken[turn] += calibrator.p_value(score, turn, u) <= 0.3
            calibrator.observe(score, turn)
    # Online smoothed p-values are independent uniforms: five sigma of Binomial(2000, 0.3).
    assert np.all(np.abs(taken / 2000 - 0.3) <= 5 * np.sqrt(0.21 / 2000))
