"""Rank bins, early verdicts, a judge's intervals, evidence, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atts_engine.conformal import LEVEL_ONE, CalibrationError, ScoreError, decide, level_of
from atts_engine.conformal.ordinal import (
    SET_METHODS,
    EarlyVerdict,
    GroupNormaliser,
    MinimumLength,
    NormalisedSets,
    RankBins,
    RegularisedWindow,
    belief_intervals,
    beliefs,
    early_verdict,
    evidence_of,
    make_sets,
    midpoint,
    minimum_length_interval,
    side,
    snap_interval,
    snapped_labels,
)


@given(
    st.lists(st.integers(0, 30).map(lambda i: i / 8), min_size=10, max_size=60),
    st.sampled_from([0.1, 0.25, 0.3, 0.4, 0.75, 0.9]),
    st.integers(2, 7),
)
def test_the_takeover_edge_is_the_gates_own_test(scores: list[float], alpha: float, n_classes: int) -> None:
    bins = RankBins.fit(scores, alpha, n_classes)
    assert bins.n_classes == n_classes and 1 <= bins.takeover_from < n_classes
    assert list(bins.edges) == sorted(bins.edges)
    held = np.asarray(scores)
    for score in [*scores, -1.0, 99.0, 1.0625]:
        greater, ties = int((held > score).sum()), int((held == score).sum())
        taken = decide(greater, ties, len(scores), level_of(alpha), LEVEL_ONE)
        label = int(bins.labels([score])[0])
        assert (label >= bins.takeover_from) == taken
        assert label == sum(edge < score for edge in bins.edges)


def test_bins_hold_equal_counts_on_either_side() -> None:
    bins = RankBins.fit(np.random.default_rng(0).permutation(999).astype(float), 0.4, 5)
    assert bins.takeover_from == 3
    counts = np.bincount(bins.labels(np.arange(999.0)), minlength=5)
    assert counts.tolist() == [200, 200, 200, 200, 199]


def test_a_verdict_stops_at_the_first_prefix_on_one_side() -> None:
    assert [side(0, 2, 3), side(3, 4, 3), side(2, 3, 3)] == ["keep", "takeover", "undecided"]
    assert early_verdict([0, 1, 3, 0], [4, 3, 4, 0], 3) == EarlyVerdict("takeover", 2)
    assert early_verdict([0, 0], [4, 2], 3) == EarlyVerdict("keep", 1)
    assert early_verdict([0, 2], [4, 3], 3) == EarlyVerdict("undecided", None)
    assert early_verdict([], [], 3) == EarlyVerdict("undecided", None)
    with pytest.raises(CalibrationError, match="must not be empty"):
        side(2, 1, 3)
    with pytest.raises(CalibrationError, match="shape"):
        early_verdict([0, 1], [2], 3)


def test_a_judges_endpoints_snap_to_near_labels() -> None:
    lower, upper = snap_interval([2.05, 2.2, -3.0, 1.0], [3.93, 3.85, 9.0, 1.04])
    assert lower.tolist() == [2.0, 2.2, 1.0, 1.0] and upper.tolist() == [4.0, 3.85, 5.0, 1.0]
    # min(0.1, half a step): with steps of 0.1 the reach is 0.05.
    assert snap_interval([0.0], [0.46], low=0.0, high=1.0, step=0.1)[1].tolist() == pytest.approx([0.5])
    assert midpoint([1.0], [4.0]).tolist() == [2.5]


@given(st.floats(-1, 7), st.floats(0, 5))
def test_snapping_drops_no_label(lower: float, width: float) -> None:
    labels = np.arange(1, 6)
    inside = (lower <= labels) & (labels <= lower + width)
    snapped = snapped_labels([lower], [lower + width])[0]
    assert (snapped >= inside).all() and snapped.sum() <= inside.sum() + 2


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=6))
def test_belief_and_vacuity_add_up_to_one(logits: list[float]) -> None:
    belief, vacuity = beliefs(evidence_of([logits]))
    assert belief.sum() + vacuity[0] == pytest.approx(1.0, abs=1e-12)
    assert (belief >= 0).all() and 0 < vacuity[0] <= 1
    if max(logits) <= 0:
        assert vacuity[0] == 1.0


def test_vacuity_holds_a_set_open() -> None:
    # Three votes of three classes: belief 1/2, vacuity 1/2; thirty: 10/11.
    assert beliefs([[0, 3, 0]])[0].tolist() == [[0, 0.5, 0]]
    lower, upper = belief_intervals([[0, 3, 0], [0, 30, 0], [0, 40, 10]], 0.9)
    assert (lower.tolist(), upper.tolist()) == ([0, 1, 1], [2, 1, 2])


def test_scores_are_normalised_with_frozen_moments() -> None:
    normaliser = GroupNormaliser.fit([1.0, 3.0, 10.0, 30.0], ["a", "a", "b", "b"], beta=0.5)
    spread = np.sqrt(2.0)
    expected = [(5.0 - 2.0) / (spread + 0.5), (20.0 - 20.0) / (10 * spread + 0.5)]
    assert normaliser([5.0, 20.0], ["a", "b"]) == pytest.approx(expected)
    with pytest.raises(CalibrationError, match="'c' has no frozen moments"):
        normaliser([1.0], ["c"])
    with pytest.raises(CalibrationError, match="needs 2 or more"):
        GroupNormaliser.fit([1.0], ["a"])
    with pytest.raises(CalibrationError, match="0 scores"):
        GroupNormaliser.fit([], [])
    with pytest.raises(ScoreError):
        normaliser([float("nan")], ["a"])


F = np.full((12, 4), 0.25)
Y = np.arange(12) % 4


@pytest.mark.parametrize("name", SET_METHODS)
@pytest.mark.parametrize(
    ("f", "y", "message"),
    [
        (F[0], Y, "must have shape"),
        (np.ones((12, 1)), Y, "must have shape"),
        (np.where(np.arange(48).reshape(12, 4) == 7, np.nan, F), Y, "finite"),
        (np.where(F > 0, [-0.5, 0.5, 0.5, 0.5], F), Y, r"lie in \[0, 1\]"),
        (F * 1.1, Y, "sum to 1"),
        (F, Y[:5], "labels must have shape"),
        (F, Y + 1, "labels must lie in 0 .. 3"),
        (F, Y - 1, "labels must lie in 0 .. 3"),
        (F, Y.astype(float), "must be integers"),
        (F[:0], Y[:0], "calibration is empty"),
    ],
)
def test_bad_calibration_is_refused(name: str, f: np.ndarray, y: np.ndarray, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        make_sets(name, 0.1).fit(f, y)


@pytest.mark.parametrize("name", SET_METHODS)
def test_bad_levels_and_predictions_are_refused(name: str) -> None:
    for alpha in (0.0, 1.0, -0.1, 1.5, float("nan")):
        with pytest.raises(CalibrationError, match="alpha must lie strictly between 0 and 1"):
            make_sets(name, alpha)
    with pytest.raises(CalibrationError, match=r"call fit|not calibrated"):
        make_sets(name, 0.1).predict(F)
    with pytest.raises(CalibrationError, match="fitted on 4 classes"):
        make_sets(name, 0.1).fit(F, Y).predict(np.full((2, 5), 0.2))
    assert [len(end) for end in make_sets(name, 0.1).fit(F, Y).predict(F[:0])] == [0, 0]


def test_other_bad_input_is_refused() -> None:
    for call in (
        lambda: make_sets("magic", 0.1),
        lambda: MinimumLength(0.1, penalty=-1.0),
        lambda: NormalisedSets(0.1, beta=0.0),
        lambda: RegularisedWindow(0.1, window=0),
        lambda: RegularisedWindow(0.1, stride=0),
        lambda: RegularisedWindow(0.1, free_ranks=-1),
        lambda: minimum_length_interval(F, float("nan")),
        lambda: RankBins.fit([1.0, 2.0], 0.1),
        lambda: RankBins.fit([1.0, 2.0, 3.0], 0.5, 1),
        lambda: RankBins.fit([[1.0]], 0.5),
        lambda: RankBins.fit([1.0, float("inf")], 0.5),
        lambda: RankBins.fit([1.0, 2.0], 0.5).labels([float("nan")]),
        lambda: snap_interval([2.0], [1.0]),
        lambda: snap_interval([2.0], [3.0, 4.0]),
        lambda: snap_interval([2.0], [3.0], step=0.0),
        lambda: snap_interval([2.0], [3.0], low=1.0, high=2.5),
        lambda: midpoint([1.0], [1.0, 2.0]),
        lambda: beliefs([[-1.0, 1.0]]),
        lambda: beliefs([1.0, 2.0]),
        lambda: evidence_of([[float("nan"), 1.0]]),
        lambda: belief_intervals([[1.0, 2.0]], 1.0),
    ):
        with pytest.raises(CalibrationError):
            call()


def test_the_example_of_the_page_runs(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (root / "docs" / "ordinal.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    exec(compile(code, "docs/ordinal.md", "exec"), {})
    assert capsys.readouterr().out.strip() == code.rsplit("# ", 1)[1].strip()
    assert all(f"`{name}`" in page for name in SET_METHODS)
