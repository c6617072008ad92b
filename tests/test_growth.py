"""Laws of growth against data that follow them, and against numpy's own polynomial fit."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from atts_engine.errors import InputError
from atts_engine.evaluation.growth import fit
from atts_engine.evaluation.sweep import LAWS

GRID = list(itertools.product((1, 2, 4, 8, 16), (2, 4, 8, 12)))
TRUE = {
    "power": lambda x, b: x**b,
    "exponential": lambda x, b: math.exp(b * x),
}


@pytest.mark.parametrize("kinds", LAWS)
def test_a_law_is_found_again_among_the_others(kinds: tuple[str, str]) -> None:
    rng = np.random.default_rng(0)
    y = [0.3 * TRUE[kinds[0]](c, 0.2) * TRUE[kinds[1]](t, 0.15) * math.exp(0.01 * rng.normal()) for c, t in GRID]
    found = min((fit(k, GRID, y) for k in LAWS), key=lambda law: law.aic)
    assert found.kinds == kinds
    for slope, error, true in zip(found.slopes, found.errors, (0.2, 0.15)):
        assert abs(slope - true) < 5 * error
    assert found.predict(*GRID[7]) == pytest.approx(y[7], rel=0.05)
    assert found.r2 > 0.99


def test_one_quantity_is_a_straight_line_on_logarithms() -> None:
    x, y = np.array([1.0, 2.0, 4.0, 8.0]), np.array([0.5, 0.9, 2.3, 3.6])
    law = fit(("power",), x, y)
    (slope, intercept), covariance = np.polyfit(np.log(x), np.log(y), 1, cov="unscaled")
    residual = np.log(y) - slope * np.log(x) - intercept
    assert law.slopes[0] == pytest.approx(slope)
    assert law.intercept == pytest.approx(intercept)
    assert law.errors[0] == pytest.approx(math.sqrt(covariance[0, 0] * (residual**2).sum() / 2))
    assert law.doubling[0] == pytest.approx((2**slope, 2**slope))


def test_doubling_of_an_exponential_depends_on_where() -> None:
    x = np.array([1.0, 2.0, 3.0, 10.0])
    law = fit(("exponential",), x, np.exp(0.3 * x))
    assert law.doubling[0] == pytest.approx((math.exp(0.3), math.exp(1.5)))


@pytest.mark.parametrize(
    ("x", "y", "says"),
    [
        ([1, 2], [1, 2], "too few"),
        ([2, 2, 2], [1, 2, 3], "too alike"),
        ([1, 2, 3], [1, 0, 3], "above 0"),
        ([0, 2, 3], [1, 1, 3], "above 0"),
    ],
)
def test_what_cannot_be_fitted_is_refused(x: list[float], y: list[float], says: str) -> None:
    with pytest.raises(InputError, match=says):
        fit(("power",), x, y)
