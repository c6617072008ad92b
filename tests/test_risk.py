"""Conformal risk control and e-values: their guarantees, with exact or five-sigma bounds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atts_engine.conformal.errors import CalibrationError, ScoreError
from atts_engine.conformal.evalues import backward_set, e_values
from atts_engine.conformal.risk import ConformalRiskControl

GRID = np.linspace(0.0, 1.0, 1001)


def _curve(u: float) -> np.ndarray:
    """Loss 1 while lambda < u."""
    return (u > GRID).astype(np.float64)


def test_expected_loss_is_alpha_for_99_items() -> None:
    """With L_i = 1{u_i > lambda}, lambda^ is the 10th largest u, rounded up to the grid, and the risk 1 - lambda^."""
    u = np.random.default_rng(13).random((20_000, 99))
    tenth = np.sort(u, axis=1)[:, -10]
    risks = 1.0 - GRID[np.searchsorted(GRID, tenth, side="left")]
    assert 0.08 - 0.001 <= risks.mean() <= 0.1 + 0.001
    for row in range(100):
        control = ConformalRiskControl(0.1, GRID)
        for value in u[row]:
            control.observe(_curve(value))
        assert control.value == pytest.approx(1.0 - risks[row], abs=0)


def test_late_losses_do_not_spoil_the_guarantee() -> None:
    """The large losses come last. Counting what is pending keeps E L <= alpha; leaving it out would not."""
    rng = np.random.default_rng(14)
    u = np.sort(rng.random((1000, 99)), axis=1)
    careful, careless = [], []
    for row in u:
        control = ConformalRiskControl(0.1, GRID[::10])
        for _ in row:
            control.begin()
        for value in row[:-4]:
            control.observe((value > GRID[::10]).astype(np.float64))
        careful.append(1.0 - control.value)
        for _ in range(4):
            control.withdraw()
        careless.append(1.0 - control.value)
    assert np.mean(careful) <= 0.1
    assert np.mean(careless) > 0.1 + 5 * np.std(careless) / np.sqrt(1000)


def test_alpha_of_few_items_and_of_decimals() -> None:
    control = ConformalRiskControl(0.1, [0.0, 0.5, 1.0])
    for _ in range(8):
        control.observe([0.0, 0.0, 0.0])
        # (0 + 1) / (n + 1) > 0.1: nothing is known to be safe.
        assert control.value == 1.0
    control.observe([0.0, 0.0, 0.0])
    assert control.value == 0.0
    for _ in range(9):
        control.observe([0.0, 0.0, 0.0])
    control.observe([1.0, 0.0, 0.0])
    # (1 + 1) / 20 = 0.1 exactly.
    assert (control.n, control.value) == (19, 0.0)
    control.begin()
    # With one pending, (1 + 2) / 21 at 0 and (0 + 2) / 21 at 0.5.
    assert control.value == 0.5
    control.observe([0.0, 0.0, 0.0])
    assert (control.n, control.pending, control.value) == (20, 0, 0.0)


def test_losses_beyond_one() -> None:
    control = ConformalRiskControl(2.0, [0.0, 1.0], max_loss=10.0)
    for _ in range(4):
        control.observe([0.0, 0.0])
    assert control.value == 0.0
    control.observe([5.0, 2.0])
    # (5 + 10) / 6 > 2, (2 + 10) / 6 = 2.
    assert control.value == 1.0


@given(st.lists(st.lists(st.floats(0.0, 1.0), min_size=3, max_size=3), max_size=20))
def test_order_of_losses_does_not_matter_to_the_bit(rows: list[list[float]]) -> None:
    curves = [[*sorted(row, reverse=True), 0.0] for row in rows]
    order = np.random.default_rng(len(rows)).permutation(len(curves))
    one, other = (ConformalRiskControl(0.3, [0.0, 1.0, 2.0, 3.0]) for _ in range(2))
    for curve in curves:
        one.observe(curve)
    for i in order:
        other.observe(curves[i])
    for name, array in one.state().items():
        np.testing.assert_array_equal(array, other.state()[name])
    twin = ConformalRiskControl.from_state(one.state())
    one.begin()
    twin.begin()
    assert (one.index, one.n, one.pending) == (twin.index, twin.n, twin.pending)


def test_bad_losses_and_states_are_refused() -> None:
    control = ConformalRiskControl(0.1, [0.0, 1.0])
    for losses, why in (
        ([0.5], "shape"),
        ([1.5, 0.0], "lie in"),
        ([-0.5, -0.5], "lie in"),
        ([np.nan, 0.0], "lie in"),
        ([0.0, 0.05], "not increase"),
        ([0.5, 0.2], "above alpha"),
    ):
        with pytest.raises(CalibrationError, match=why):
            control.observe(losses)
    assert control.n == 0
    with pytest.raises(CalibrationError, match="no item is pending"):
        control.withdraw()
    for alpha in (0.0, 1.0, np.nan):
        with pytest.raises(CalibrationError, match="alpha"):
            ConformalRiskControl(alpha, [0.0, 1.0])
    for grid in ([], [1.0, 0.0], [0.0, 0.0], [0.0, np.inf], [[0.0]]):
        with pytest.raises(CalibrationError, match="grid"):
            ConformalRiskControl(0.1, grid)
    with pytest.raises(CalibrationError, match="largest loss"):
        ConformalRiskControl(0.1, [0.0], max_loss=np.inf)
    good = control.state()
    for change, why in (
        ({"sums": np.array([1, 0])}, "sums"),
        ({"sums": np.array([0.0, 0.0])}, "sums"),
        ({"counts": np.array([-1, 0])}, "counts"),
        ({"counts": np.array([1])}, "counts"),
        ({"grid": np.array([1.0, np.nan])}, "grid"),
    ):
        with pytest.raises(CalibrationError, match=why):
            ConformalRiskControl.from_state({**good, **change})
    with pytest.raises(CalibrationError, match="lacks sums"):
        ConformalRiskControl.from_state({k: v for k, v in good.items() if k != "sums"})


@given(st.lists(st.floats(0.0, 1e300), min_size=1, max_size=50).filter(any))
def test_e_values_sum_to_their_number(scores: list[float]) -> None:
    values = e_values(scores)
    assert abs(values.sum() / len(scores) - 1.0) <= 1e-12
    assert np.all(values >= 0.0)


def test_sum_of_e_values_of_common_scores() -> None:
    values = e_values(np.random.default_rng(15).exponential(size=100))
    assert abs(values.sum() - 100) <= 1e-12 * 100
    # Markov, and how far from tight it is: the rate at level 0.4 is about 0.08.
    many = np.random.default_rng(16).exponential(size=(20_000, 100))
    rate = np.mean(100 * many[:, 0] / many.sum(axis=1) >= 2.5)
    assert abs(rate - 0.08) <= 5 * np.sqrt(0.08 * 0.92 / 20_000)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_backward_set_keeps_its_size_and_its_post_hoc_guarantee(size: int) -> None:
    rng = np.random.default_rng(17)
    trials, inflated = 10_000, np.empty(10_000)
    for i in range(trials):
        scores = rng.exponential(size=21)
        # The first candidate is exchangeable with the calibration; the others would score higher.
        others = rng.exponential(2.0, size=9)
        found = backward_set(scores[:20], np.concatenate((scores[20:], others)), size)
        assert found.members.sum() <= size
        inflated[i] = (not found.members[0]) / found.level
    assert inflated.mean() <= 1.0 + 5 * inflated.std() / np.sqrt(trials)


def test_backward_set_is_the_definition() -> None:
    rng = np.random.default_rng(18)
    for _ in range(200):
        calibration, candidates = rng.exponential(size=10), rng.exponential(size=6).round(1) + 0.1
        e = np.array([e_values(np.append(calibration, s))[-1] for s in candidates])
        for size in range(6):
            found = backward_set(calibration, candidates, size)
            assert np.array_equal(found.members, e < 1 / found.level * (1 - 1e-12))
            # Any smaller level would leave more than `size`.
            assert np.count_nonzero(e < 1 / found.level * (1 + 1e-9)) > size
        assert backward_set(calibration, candidates, 6).level == 0.0
        assert backward_set(calibration, candidates, 6).members.all()


def test_bad_scores_of_e_values_are_refused() -> None:
    for scores in ([1.0, np.nan], [1.0, np.inf], [1.0, -1.0], [0.0, 0.0]):
        with pytest.raises(ScoreError):
            e_values(scores)
        with pytest.raises(ScoreError):
            backward_set(scores, [1.0], 0)
    with pytest.raises(ScoreError, match="candidates must be finite"):
        backward_set([1.0], [np.nan], 0)
    with pytest.raises(CalibrationError, match="one score or more"):
        e_values([])
    with pytest.raises(CalibrationError, match="vector"):
        e_values([[1.0]])
    for size in (-1, 3):
        with pytest.raises(CalibrationError, match="cannot be had of 2"):
            backward_set([1.0], [1.0, 2.0], size)
    with pytest.raises(ScoreError, match="score 0"):
        backward_set([1.0], [0.0, 0.0], 1)
