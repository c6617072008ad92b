"""Budget policies: the counts they promise under any interleaving, and how well they choose."""

from __future__ import annotations

import copy
import itertools
from collections import deque
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atts_engine.conformal.errors import CalibrationError, ScoreError
from atts_engine.conformal.policies import POLICIES, ExactCount, Threshold, TopB, make_policy
from atts_engine.conformal.policies.thresholds import OptimalThresholds
from atts_engine.conformal.pvalue import LEVEL_ONE

ALPHAS = (0.05, 0.25, 0.3, 0.4, 0.5, 2 / 3, 0.9)
UNIFORMS = st.one_of(st.sampled_from([1, LEVEL_ONE]), st.integers(1, LEVEL_ONE))


class _Problem:
    """A problem whose verdicts are tested against u, and the balances that its policy ought to hold."""

    def __init__(self, alpha: float, optimal: bool = False) -> None:
        self.policy = ExactCount(alpha, optimal=optimal)
        self.alpha = Fraction(repr(alpha))
        self.balance: dict[int, Fraction] = {}
        self.decided: dict[int, int] = {}
        self.announced: dict[int, int] = {}

    def expect(self, turn: int, arrivals: int) -> None:
        self.announced[turn] = arrivals
        self.policy.expect("p", turn, arrivals)

    def judge(self, turn: int, u: int) -> bool:
        takeover = u <= self.policy.level("p", turn, LEVEL_ONE // 3)
        self.policy.decided("p", turn, takeover)
        self.balance[turn] = self.balance.get(turn, Fraction(0)) + takeover - self.alpha
        self.decided[turn] = self.decided.get(turn, 0) + 1
        return takeover

    def left(self, turn: int) -> int:
        return max(self.announced.get(turn, 0) - self.decided.get(turn, 0), 0)

    def up_to(self, turn: int) -> Fraction:
        return sum((b for t, b in self.balance.items() if t <= turn), Fraction(0))

    def could_end(self, turn: int) -> bool:
        """No announced span of the turns 0 .. turn is outstanding."""
        return not any(self.left(t) for t in self.announced if t <= turn)

    @property
    def last(self) -> int:
        return max((*self.balance, *self.announced), default=0)


@settings(max_examples=300)
@given(st.sampled_from(ALPHAS), st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6), UNIFORMS), max_size=60))
def test_count_stays_within_one_however_turns_interleave(alpha: float, events: list[tuple[int, int, int]]) -> None:
    """Law 1: announcements of any turn at any time, verdicts of any turn in any order."""
    problem = _Problem(alpha)
    for turn, more, u in events:
        if more:
            problem.expect(turn, problem.decided.get(turn, 0) + problem.left(turn) + more - 1)
        problem.judge(turn, u)
        if problem.could_end(problem.last):
            assert abs(problem.up_to(problem.last)) <= 1
            assert problem.policy.balance("p") == pytest.approx(float(problem.up_to(problem.last)))
    for turn in list(problem.announced):
        while problem.left(turn):
            problem.judge(turn, 1)
    assert abs(problem.up_to(problem.last)) <= 1


@settings(max_examples=300)
@given(
    st.sampled_from(ALPHAS),
    st.lists(st.tuples(st.sampled_from(["lower", "upper", "end"]), st.integers(0, 4), UNIFORMS), max_size=80),
)
def test_every_turn_stays_within_one_while_two_overlap(alpha: float, events: list[tuple[str, int, int]]) -> None:
    """Law 2: spans of turns t and t + 1 in any order, announced or not, until t ends."""
    problem, low = _Problem(alpha), 0
    for kind, more, u in events:
        if kind == "end":
            if problem.left(low) == 0:
                problem.policy.turn_ended("p", low)
                low += 1
            continue
        # A turn begins after the one below it has begun.
        turn = low + (kind == "upper" and low in problem.decided)
        if more:
            problem.expect(turn, problem.decided.get(turn, 0) + problem.left(turn) + more - 1)
        problem.judge(turn, u)
        for t in (low, low + 1):
            if problem.could_end(t):
                assert abs(problem.up_to(t)) <= 1


@pytest.mark.parametrize("alpha", [0.25, 0.4, 0.5])
def test_no_sequence_of_calls_breaks_the_law_of_two_open_turns(alpha: float) -> None:
    """Law 2 against an adversary: every state that two open turns can reach with at most one span announced ahead in
    each, over all interleavings and all verdicts that the levels allow. 6,024 states for alpha = 0.4."""
    first = _Problem(alpha)
    seen, ahead = {_state(first, 0)}, deque([(first, 0)])
    while ahead:
        problem, low = ahead.popleft()
        for after, bottom in _next_calls(problem, low):
            state = _state(after, bottom)
            if state not in seen:
                seen.add(state)
                ahead.append((after, bottom))
                for turn in (bottom, bottom + 1):
                    assert not after.could_end(turn) or abs(after.up_to(turn)) <= 1
    assert len(seen) >= 500


def _state(problem: _Problem, low: int) -> tuple[object, ...]:
    """What the future depends on: balances, and what is announced. A quota of one span shows in its level."""
    spans = [
        (t - low, problem.balance.get(t), problem.left(t), problem.policy.level("p", t, 0) if problem.left(t) else 0)
        for t in (low, low + 1)
        if t in problem.balance or t in problem.announced
    ]
    return (problem.up_to(low - 1), *spans)


def _next_calls(problem: _Problem, low: int) -> list[tuple[_Problem, int]]:
    found = []
    for turn in (low, low + 1) if low in problem.decided or low in problem.announced else (low,):
        if not problem.left(turn):
            found.append((copy.deepcopy(problem), low))
            found[-1][0].expect(turn, problem.decided.get(turn, 0) + 1)
        for u in {1, LEVEL_ONE}:
            found.append((copy.deepcopy(problem), low))
            found[-1][0].judge(turn, u)
    if not problem.left(low):
        found.append((copy.deepcopy(problem), low + 1))
        found[-1][0].policy.turn_ended("p", low)
    return found


@pytest.mark.parametrize(
    ("turns", "bound", "can"), [(1, 2, True), (2, 3, False), (2, 4, True), (3, 5, False), (3, 6, True)]
)
def test_no_selector_holds_three_open_turns_within_one(turns: int, bound: int, can: bool) -> None:
    """Why law 2 stops at two: alpha = 2/5, balances in fifths. A state is safe if, whichever turn the next verdict is
    of, a takeover or a keep leads to a safe state with every |F_t| <= bound / 5."""
    safe = set(itertools.product(range(-bound, bound + 1), repeat=turns))
    while True:
        lost = set()
        for f in safe:
            for t in range(turns):
                moved = [(*f[:t], *(x + step for x in f[t:])) for step in (3, -2)]
                if not any(m in safe for m in moved):
                    lost.add(f)
        if not lost:
            break
        safe -= lost
    assert ((0,) * turns in safe) == can


@given(
    st.sampled_from(ALPHAS),
    st.booleans(),
    st.lists(st.lists(st.tuples(st.integers(1, 9), UNIFORMS), min_size=1, max_size=4), max_size=8),
)
def test_count_stays_within_a_half_when_spans_are_announced(
    alpha: float, optimal: bool, turns: list[list[tuple[int, int]]]
) -> None:
    """Law 3: turns one after another, their spans announced bit by bit, at the latest before they are judged."""
    problem = _Problem(alpha, optimal)
    for turn, parts in enumerate(turns):
        arrivals = 0
        for more, u in parts:
            arrivals += more
            problem.expect(turn, arrivals)
            for i in range(1 + u % max(problem.left(turn), 1)):
                problem.judge(turn, 1 + (u * (i + 1) * 2654435761) % LEVEL_ONE)
        while problem.left(turn):
            problem.judge(turn, LEVEL_ONE)
        assert abs(problem.up_to(turn)) <= Fraction(1, 2)
        problem.policy.turn_ended("p", turn)


@given(st.integers(1, 40), st.sampled_from(ALPHAS), st.booleans(), st.data())
def test_exactly_b_of_m(m: int, alpha: float, optimal: bool, data: st.DataObject) -> None:
    problem = _Problem(alpha, optimal)
    problem.expect(0, m)
    taken = sum(problem.judge(0, data.draw(UNIFORMS)) for _ in range(m))
    assert abs(taken - Fraction(repr(alpha)) * m) <= Fraction(1, 2)


def test_announced_turn_keeps_its_count_while_the_next_one_runs() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        problem = _Problem(0.4)
        problem.expect(0, 16)
        taken = 0
        for place in range(16):
            taken += problem.judge(0, int(rng.integers(1, LEVEL_ONE + 1)))
            for _ in range(int(rng.integers(0, 3)) if place > 3 else 0):
                problem.judge(1, int(rng.integers(1, LEVEL_ONE + 1)))
        assert taken == 6


def test_problems_do_not_share_credit_and_leave_drops_it() -> None:
    policy = ExactCount(0.5)
    policy.expect("a", 0, 1)
    before = policy.level("a", 0, 0)
    policy.decided("a", 0, before == LEVEL_ONE)
    assert policy.balance("a") == (0.5 if before else -0.5)
    assert policy.balance("b") == 0.0
    policy.leave("a")
    policy.leave("never seen")
    assert policy.balance("a") == 0.0


def test_spans_that_never_come_are_worked_off() -> None:
    policy = ExactCount(0.4)
    policy.expect("p", 0, 16)
    for _ in range(6):
        assert policy.level("p", 0, 0) > 0
        policy.decided("p", 0, True)
    policy.expect("p", 0, 6)
    policy.turn_ended("p", 0)
    assert policy.balance("p") == pytest.approx(3.6)
    for _ in range(7):
        assert policy.level("p", 1, 0) == 0
        policy.decided("p", 1, False)
    assert policy.balance("p") == pytest.approx(0.8)
    # Spans that stay outstanding when their turn ends count no longer.
    policy.expect("p", 2, 5)
    policy.turn_ended("p", 2)
    policy.decided("p", 3, False)
    assert policy.balance("p") == pytest.approx(0.4)


def test_lone_spans_are_chosen_by_their_p_value() -> None:
    """Unannounced spans of iid uniform p: taken over at rate alpha, and stranger than a coin would choose."""
    rng = np.random.default_rng(5)
    policy = ExactCount(0.4)
    u = rng.integers(1, LEVEL_ONE, 20_000, endpoint=True)
    taken = np.zeros(u.size, dtype=bool)
    for i, draw in enumerate(u.tolist()):
        taken[i] = draw <= policy.level("p", i, 0)
        policy.decided("p", i, bool(taken[i]))
        policy.turn_ended("p", i)
    assert abs(int(taken.sum()) - 8000) <= 1
    assert 1 - np.mean(u[taken] / LEVEL_ONE) >= 0.66


@pytest.fixture(scope="module")
def sixteen() -> np.ndarray:
    """20,000 problems of 16 uniforms."""
    return np.random.default_rng(10).integers(1, LEVEL_ONE, (20_000, 16), endpoint=True)


def _select(policy: ExactCount, uniforms: np.ndarray) -> np.ndarray:
    chosen = np.zeros(uniforms.shape, dtype=bool)
    for row, draws in enumerate(uniforms.tolist()):
        policy.expect("p", 0, len(draws))
        for place, u in enumerate(draws):
            chosen[row, place] = u <= policy.level("p", 0, 0)
            policy.decided("p", 0, bool(chosen[row, place]))
        policy.leave("p")
    return chosen


def test_exact_count_chooses_every_place_alike_and_strange_spans(sixteen: np.ndarray) -> None:
    chosen = _select(ExactCount(0.4), sixteen)
    assert np.all(chosen.sum(axis=1) == 6)
    # Five sigma of Binomial(20000, 6 / 16).
    assert np.all(np.abs(chosen.mean(axis=0) - 6 / 16) <= 5 * np.sqrt(6 / 16 * 10 / 16 / 20_000))
    assert 0.758 <= 1 - np.mean(sixteen[chosen] / LEVEL_ONE) <= 0.768


def test_optimal_thresholds_choose_no_worse(sixteen: np.ndarray) -> None:
    chosen = _select(ExactCount(0.4, optimal=True), sixteen)
    assert np.all(chosen.sum(axis=1) == 6)
    assert abs(1 - np.mean(sixteen[chosen] / LEVEL_ONE) - 0.764) <= 0.003


def test_top_b_chooses_best(sixteen: np.ndarray) -> None:
    policy = TopB(0.4)
    chosen = np.zeros(sixteen.shape, dtype=bool)
    for row, draws in enumerate(sixteen):
        chosen[row] = policy.choose("p", 0, -draws)
        policy.leave("p")
    assert np.all(chosen.sum(axis=1) == 6)
    assert abs(1 - np.mean(sixteen[chosen] / LEVEL_ONE) - 0.794) <= 0.003


def test_optimal_thresholds_are_those_of_the_assignment_problem() -> None:
    """Breakpoints a[i, n] by the recursion of the paper: a[i, n + 1] is the expected value of what the i-th of n
    places gets. With n values to come, b of them to choose, a value is taken from a[n - b, n] on."""
    thresholds = OptimalThresholds()
    a = np.array([0.0, 1.0])
    for n in range(2, 41):
        low, high = a[:-1], a[1:]
        a = np.concatenate(([0.0], low * low + (high**2 - low**2) / 2 + high * (1 - high), [1.0]))
        for b in range(1, n):
            assert thresholds.level(n, b) / LEVEL_ONE == pytest.approx(1 - a[n - b], abs=1e-9)
    for left, quota in ((3, 0), (3, 3), (0, 0), (3, -1)):
        with pytest.raises(CalibrationError, match="0 < quota < left"):
            thresholds.level(left, quota)


@given(st.sampled_from(ALPHAS), st.lists(st.lists(st.integers(0, 3), max_size=9), max_size=9))
def test_top_b_carries_its_rounding(alpha: float, turns: list[list[int]]) -> None:
    policy, balance = TopB(alpha), Fraction(0)
    for turn, scores in enumerate(turns):
        chosen = policy.choose("p", turn, scores)
        order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
        assert set(np.flatnonzero(chosen)) == set(order[: int(chosen.sum())])
        balance += int(chosen.sum()) - Fraction(repr(alpha)) * len(scores)
        assert abs(balance) <= Fraction(1, 2)


def test_threshold_leaves_the_level_alone() -> None:
    policy = Threshold(0.4)
    policy.expect("p", 0, 3)
    policy.decided("p", 0, True)
    policy.turn_ended("p", 0)
    policy.leave("p")
    assert [policy.level("p", 2, own) for own in (0, 7, LEVEL_ONE)] == [0, 7, LEVEL_ONE]
    for own in (-1, LEVEL_ONE + 1):
        with pytest.raises(CalibrationError, match="level must lie"):
            policy.level("p", 0, own)


def test_policies_by_name() -> None:
    assert POLICIES == ("threshold", "exact-count", "exact-count-dlr", "top-b")
    assert [type(make_policy(name, 0.4)) for name in POLICIES] == [Threshold, ExactCount, ExactCount, TopB]
    assert make_policy("exact-count-dlr", 0.4).name == "exact-count-dlr"
    with pytest.raises(CalibrationError, match="there are threshold, exact-count, exact-count-dlr, top-b"):
        make_policy("best", 0.4)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, 1.5, float("nan"), float("inf")])
def test_alpha_outside_its_range_is_refused(name: str, alpha: float) -> None:
    with pytest.raises(CalibrationError, match="alpha"):
        make_policy(name, alpha)


def test_bad_calls_are_refused() -> None:
    policy = ExactCount(0.4)
    with pytest.raises(CalibrationError, match="turn must be 0 or more"):
        policy.level("p", -1, 0)
    policy.decided("p", 0, False)
    policy.decided("p", 0, False)
    with pytest.raises(CalibrationError, match="2 were judged already"):
        policy.expect("p", 0, 1)
    policy.turn_ended("p", 0)
    for call in (
        lambda: policy.level("p", 0, 0),
        lambda: policy.expect("p", 0, 3),
        lambda: policy.decided("p", 0, True),
        lambda: policy.turn_ended("p", 0),
    ):
        with pytest.raises(CalibrationError, match="turn 0 has ended"):
            call()
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ScoreError, match="not finite"):
            TopB(0.4).choose("p", 0, [1.0, bad])
    with pytest.raises(CalibrationError, match="vector"):
        TopB(0.4).choose("p", 0, [[1.0]])
