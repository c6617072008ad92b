"""Predictors of a span's label: gradients, optima and shapes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import minimize

from atts_engine.conformal import CalibrationError
from atts_engine.conformal.ordinal import (
    PREDICTORS,
    OrdinalLogistic,
    PrefixTable,
    ProbabilityThreshold,
    UnimodalHead,
    make_predictor,
    unimodal_probabilities,
)
from atts_engine.conformal.ordinal.unimodal_head import loss_and_gradient


def ordinal_data(seed: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 2)) * [3.0, 0.1] + [1.0, -5.0]
    hidden = (x - [1.0, -5.0]) @ [0.7, -6.0] + rng.logistic(size=n)
    return x, np.digitize(hidden, [-2.0, -0.5, 0.8, 3.0])


@pytest.mark.parametrize("name", PREDICTORS)
def test_predictors_learn_and_their_rows_are_distributions(name: str) -> None:
    x, y = ordinal_data(1, 2000)
    test, truth = ordinal_data(2, 2000)
    f = make_predictor(name).fit(x, y, 5).predict(test)
    assert f.shape == (2000, 5) and (f > 0).all() and np.allclose(f.sum(axis=1), 1.0)
    shares = np.bincount(y, minlength=5) / len(y)
    log_loss = -np.log(f[np.arange(2000), truth]).mean()
    assert log_loss < -np.log(shares[truth]).mean() - 0.15


@pytest.mark.parametrize("name", PREDICTORS)
def test_labels_that_never_occur_keep_some_probability(name: str) -> None:
    x, y = ordinal_data(3, 100)
    f = make_predictor(name).fit(x, np.where(y > 2, 2, 1), 5).predict(x)
    assert np.isfinite(f).all() and (f > 0).all()
    constant = make_predictor(name).fit(np.ones((10, 1)), np.full(10, 3), 5).predict(np.ones((2, 1)))
    assert (constant.argmax(axis=1) == 3).all()


def test_ordinal_logistic_reaches_the_maximum_of_its_likelihood() -> None:
    x, y = ordinal_data(4, 400)
    model = OrdinalLogistic(ridge=0.7, pseudo=0.5).fit(x, y, 5)
    z = (x - x.mean(axis=0)) / x.std(axis=0)

    def loss(p: np.ndarray) -> float:
        cuts, w = np.cumsum([p[0], *np.exp(p[1:4])]), p[4:]
        cdf = np.concatenate([[0.0], 1 / (1 + np.exp(-cuts)), [1.0]])
        pseudo = -0.5 * np.log(np.diff(cdf)).sum()
        inner = 1 / (1 + np.exp(-(cuts - (z @ w)[:, None])))
        f = np.diff(np.concatenate([np.zeros((400, 1)), inner, np.ones((400, 1))], axis=1), axis=1)
        return pseudo + 0.35 * w @ w - np.log(f[np.arange(400), y]).sum()

    best = minimize(loss, np.zeros(6), method="BFGS", options={"gtol": 1e-7})
    assert model.weights == pytest.approx(best.x[4:], abs=1e-4)
    assert model.weights[0] > 0 > model.weights[1]


@given(arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(2, 8)), elements=st.floats(-20, 20)))
def test_the_unimodal_head_has_one_mode_for_any_eta(eta: np.ndarray) -> None:
    f = unimodal_probabilities(eta)
    assert np.allclose(f.sum(axis=1), 1.0)
    for row in f:
        signs = np.sign(np.diff(row))
        signs = signs[signs != 0]
        # Up, then down.
        assert (np.diff(signs) <= 0).all()
    rng = np.random.default_rng(0)
    sets = ProbabilityThreshold(0.3).fit(f[rng.integers(0, len(f), 20)], rng.integers(0, f.shape[1], 20))
    edges = np.diff(np.pad(sets.members(f), ((0, 0), (1, 1))).astype(int), axis=1)
    assert ((edges == 1).sum(axis=1) <= 1).all()


def test_gradient_of_the_unimodal_head_is_that_of_finite_differences() -> None:
    rng = np.random.default_rng(5)
    eta, y = rng.normal(size=(6, 5)), rng.integers(0, 5, 6)
    _, gradient = loss_and_gradient(eta, y)
    for i, k in np.ndindex(6, 5):
        step = np.zeros((6, 5))
        step[i, k] = 1e-6
        slope = (loss_and_gradient(eta + step, y)[0] - loss_and_gradient(eta - step, y)[0]) / 2e-6
        assert gradient[i, k] == pytest.approx(slope, abs=1e-7)


def test_the_table_counts_its_cells() -> None:
    x = np.array([[0.0], [1.0], [2.0], [3.0]])
    table = PrefixTable(n_bins=2, strength=2.0).fit(x, [0, 0, 1, 2], 3)
    assert table.evidence([[0.5], [9.0]]).tolist() == [[2, 0, 0], [0, 1, 1]]
    prior = np.array([3, 2, 2]) / 7
    assert table.predict([[0.5]])[0] == pytest.approx((np.array([2, 0, 0]) + 2 * prior) / 4)


@pytest.mark.parametrize("name", PREDICTORS)
def test_bad_input_is_refused(name: str) -> None:
    with pytest.raises(CalibrationError, match="call fit before predict"):
        make_predictor(name).predict([[1.0]])
    x, y = ordinal_data(6, 20)
    for args, message in [
        ((x[:, 0], y, 5), "features must have shape"),
        ((np.where(x > 0, np.nan, x), y, 5), "features must be finite"),
        ((x, y[:5], 5), "labels must have shape"),
        ((x, y, 2), "labels must lie in 0 .. 1"),
        ((x, y, 1), "2 or more classes"),
        ((x[:0], y[:0], 5), "empty"),
    ]:
        with pytest.raises(CalibrationError, match=message):
            make_predictor(name).fit(*args)
    with pytest.raises(CalibrationError, match="fitted on 2 features"):
        make_predictor(name).fit(x, y, 5).predict(x[:, :1])


def test_settings_out_of_range_are_refused() -> None:
    for make in (
        lambda: PrefixTable(0),
        lambda: PrefixTable(strength=0.0),
        lambda: OrdinalLogistic(ridge=-1.0),
        lambda: OrdinalLogistic(pseudo=0.0),
        lambda: UnimodalHead(steps=0),
        lambda: UnimodalHead(rate=float("nan")),
        lambda: make_predictor("oracle"),
        lambda: unimodal_probabilities([[1.0]]),
    ):
        with pytest.raises(CalibrationError):
            make()
