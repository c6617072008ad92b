"""The exchangeability monitor against crepes, Ville's bound, and a shift that it has to see."""

from __future__ import annotations

import math

import numpy as np
import pytest
from crepes.martingales import EpsilonBettingFunction, SimpleJumper

from atts_engine.conformal.errors import CalibrationError
from atts_engine.conformal.monitor import ExchangeabilityMonitor, log_simple_jumper


@pytest.mark.parametrize("jump", [0.01, 0.1, 0.9])
@pytest.mark.parametrize("power", [1.0, 0.5, 2.0])
def test_martingale_equals_that_of_crepes(jump: float, power: float) -> None:
    rng = np.random.default_rng(3)
    p = rng.random(500) ** power
    p[:3] = [0.0, 1.0, 0.5]
    # crepes has five bets by default; the book's algorithm and this one have three.
    expected = SimpleJumper(J=jump, bf=EpsilonBettingFunction([-1, 0, 1])).apply(p)
    monitor = ExchangeabilityMonitor(jump=jump)
    values = []
    for x in p.tolist():
        monitor.update(x)
        values.append(monitor.log_value)
    np.testing.assert_allclose(np.exp(values), expected, rtol=1e-9)
    np.testing.assert_allclose(np.exp(log_simple_jumper(p, jump)), expected, rtol=1e-9)
    assert monitor.log_max == pytest.approx(max(0.0, *values))
    assert monitor.steps == 500
    first = np.flatnonzero(expected >= 100.0)
    assert monitor.alarms == ([int(first[0]) + 1] if first.size else [])


def test_alarms_of_exchangeable_streams_keep_to_villes_bound() -> None:
    p = np.random.default_rng(11).random((1000, 2000))
    # Binomial(1000, 1 / 100) at 1e-6.
    assert np.count_nonzero(log_simple_jumper(p).max(axis=-1) >= math.log(100.0)) <= 28


def _online_p_values(scores: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Smoothed p-values of continuous scores [S, N], each against those before it."""
    p = np.empty(scores.shape)
    for i in range(scores.shape[1]):
        greater = np.count_nonzero(scores[:, :i] > scores[:, i : i + 1], axis=1)
        p[:, i] = (greater + rng.random(len(scores))) / (i + 1)
    return p


def test_half_a_deviation_of_shift_is_seen() -> None:
    rng = np.random.default_rng(12)
    scores = rng.normal(size=(200, 1500))
    scores[:, 1000:] += 0.5
    p = _online_p_values(scores, rng)
    paths = log_simple_jumper(p)[:, 1000:] >= math.log(100.0)
    delays = np.where(paths.any(axis=1), paths.argmax(axis=1) + 1, 10_000)
    assert np.median(delays) <= 250


def test_alarm_is_raised_once_until_reset() -> None:
    monitor = ExchangeabilityMonitor(threshold=20.0)
    raised = [i for i in range(1, 101) if monitor.update(0.01)]
    assert len(raised) == 1
    assert monitor.alarmed
    assert monitor.log_value > math.log(20.0)
    monitor.reset()
    assert (monitor.log_value, monitor.log_max, monitor.alarmed) == (0.0, 0.0, False)
    raised += [i for i in range(101, 201) if monitor.update(0.99)]
    assert monitor.alarms == raised
    assert len(raised) == 2
    assert monitor.steps == 200


def test_long_streams_neither_overflow_nor_vanish() -> None:
    monitor = ExchangeabilityMonitor()
    for _ in range(5000):
        monitor.update(0.0)
    assert monitor.log_value > math.log(1e300)
    for _ in range(5000):
        monitor.update(0.5)
    assert math.isfinite(monitor.log_value)
    assert np.isfinite(log_simple_jumper(np.zeros(5000))).all()


def test_state_goes_on_where_it_was_taken() -> None:
    rng = np.random.default_rng(4)
    monitor = ExchangeabilityMonitor(threshold=5.0, jump=0.02)
    for p in (rng.random(300) ** 2).tolist():
        monitor.update(p)
    twin = ExchangeabilityMonitor.from_state(monitor.state())
    assert monitor.alarms
    for p in rng.random(100).tolist():
        assert monitor.update(p) == twin.update(p)
    for name, array in monitor.state().items():
        np.testing.assert_array_equal(array, twin.state()[name])


def test_bad_input_is_refused() -> None:
    monitor = ExchangeabilityMonitor()
    for p in (-0.1, 1.1, math.nan, math.inf):
        with pytest.raises(CalibrationError, match="p-value must lie"):
            monitor.update(p)
        with pytest.raises(CalibrationError, match="p-values must be"):
            log_simple_jumper([0.5, p])
    assert monitor.steps == 0
    with pytest.raises(CalibrationError, match="p-values must be"):
        log_simple_jumper(0.5)
    for threshold in (1.0, 0.0, math.nan, math.inf):
        with pytest.raises(CalibrationError, match="threshold"):
            ExchangeabilityMonitor(threshold)
    for jump in (0.0, 1.0, math.nan):
        with pytest.raises(CalibrationError, match="jumping rate"):
            ExchangeabilityMonitor(jump=jump)
    good = monitor.state()
    with pytest.raises(CalibrationError, match="lacks alarms"):
        ExchangeabilityMonitor.from_state({k: v for k, v in good.items() if k != "alarms"})
    with pytest.raises(CalibrationError, match="not finite"):
        ExchangeabilityMonitor.from_state({**good, "log_capital": np.array([0.0, np.nan, 0.0])})
    with pytest.raises(CalibrationError, match="log_capital"):
        ExchangeabilityMonitor.from_state({**good, "log_capital": np.zeros(2)})
