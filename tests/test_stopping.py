"""When sampling stops: hand tables, exact expectations, and the recorded chains of 100 problems."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from atts_engine.evaluation.traces import read_chains
from atts_engine.pipeline.strategies.stopping import majority_probability, to_majority, to_unanimous, unanimous
from atts_engine.pipeline.voting import one_spelling, weigh, winner

ANSWERS = st.lists(st.sampled_from(["a", "b", "c", None]), max_size=14)


def test_probability_of_a_majority_is_scipys() -> None:
    for first, second in itertools.product(range(30), repeat=2):
        expected = stats.beta(first + 1, second + 1).sf(0.5)
        assert majority_probability(first, second) == pytest.approx(expected, rel=1e-12)


def test_adaptive_consistency_needs_this_many_votes() -> None:
    """Against 0 to 5 votes of the runner-up, at 0.95."""
    for second, first in enumerate((4, 6, 8, 9, 11, 12)):
        assert majority_probability(first, second) >= 0.95 > majority_probability(first - 1, second)
        answers = ["a"] * first + ["b"] * second
        assert to_majority(answers, 0.95) == 0
        assert to_majority(answers[1:], 0.95) == 1
    assert [to_majority(["b"] * votes, 0.95) for votes in range(6)] == [4, 3, 2, 1, 0, 0]


@given(ANSWERS, st.sampled_from([0.6, 0.8, 0.95]))
def test_no_outcome_lets_adaptive_consistency_stop_sooner(answers: list[str | None], threshold: float) -> None:
    """Chains that are launched together would have been launched one after another too."""
    needed = to_majority(answers, threshold)
    if needed:
        for more in itertools.product(["a", "b", "c", None], repeat=min(needed - 1, 3)):
            assert to_majority([*answers, *more], threshold) > 0
        leader = winner(weigh(answers, itertools.repeat(1.0))) or "a"
        assert to_majority([*answers, *[leader] * needed], threshold) == 0


def test_a_window_must_be_whole_and_of_one_answer() -> None:
    assert unanimous(list("abbbb" + "bbbbb"), 5) == "b"
    assert unanimous(list("abbbbbbbb"), 5) is None
    assert unanimous([None] * 5, 5) is None
    assert unanimous([*"aaaa", None], 5) is None
    assert [to_unanimous(list("abbbbbbbbb")[:n], 5) for n in (0, 3, 5, 9, 10)] == [5, 2, 5, 1, 0]


def stops_after(answers: list[str | None], window: int) -> int:
    n = 0
    while n < len(answers) and (more := to_unanimous(answers[:n], window)):
        n += more
    return min(n, len(answers))


@pytest.mark.parametrize(("share", "expected"), [(0.8, 14.61), (0.5, 32.26)])
def test_esc_writes_this_many_chains_on_average(share: float, expected: float) -> None:
    """Windows of 5, 40 at most, two answers: E = 5 (1 - (1 - q)^8) / q with q the chance that a window agrees. The mean
    of 20000 draws lies within 5 standard errors, of windows between 1 and 8."""
    q = share**5 + (1 - share) ** 5
    exact = 5 * (1 - (1 - q) ** 8) / q
    assert exact == pytest.approx(expected, abs=0.005)
    weights = np.array([q * (1 - q) ** k for k in range(7)] + [(1 - q) ** 7])
    windows = 5 * np.arange(1, 9)
    deviation = math.sqrt(float((weights * (windows - exact) ** 2).sum()))
    draws = np.random.default_rng(0).random((20000, 40)) < share
    mean = np.mean([stops_after(["a" if x else "b" for x in row], 5) for row in draws])
    assert mean == pytest.approx(exact, abs=5 * deviation / math.sqrt(20000))


def test_answers_are_counted_by_their_first_spelling() -> None:
    same = lambda gold, answer: gold.strip() == answer.strip()  # noqa: E731
    assert one_spelling(["a ", None, "b", " a", "a"], same) == ["a ", None, "b", "a ", "a "]
    assert weigh(["x", None, "y", "x"], [0.5, 9.0, 2.0, 0.25]) == {"x": 0.75, "y": 2.0}


def test_recorded_chains(shared: Path) -> None:
    """The published run, 16 chains of each of 100 problems: what stopping early would have spared and cost. The figures
    are those of plain loops over the recorded answers, written without the functions under test."""
    chains = read_chains(shared / "data" / "traces" / "math100_r1-distill-llama-8b_qwq-32b.jsonl.gz")
    recorded: dict[str, dict[int, str | None]] = {}
    gold = {c.problem_id: c.gold for c in chains}
    for chain in chains:
        recorded.setdefault(chain.problem_id, {})[chain.chain] = chain.final_answer
    used: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for problem, by_number in recorded.items():
        answers = [by_number[number] for number in range(16)]

        # The rules one chain at a time.
        n = next((n for n in range(17) if to_majority(answers[:n], 0.95) == 0), 16)
        voted = {"all": winner(weigh(answers, [1.0] * 16)), "adaptive": winner(weigh(answers[:n], [1.0] * n))}
        used["adaptive"] += n
        n = next((n for n in range(17) if to_unanimous(answers[:n], 5) == 0), 16)
        voted["esc"] = unanimous(answers[:n], 5) or winner(weigh(answers[:n], [1.0] * n))
        used["esc"] += n
        for name, answer in voted.items():
            right[name] += answer == gold[problem]

        loop_adaptive, loop_esc = plain_loops(answers)
        assert (voted["adaptive"], voted["esc"]) == (loop_adaptive, loop_esc)
    assert used == {"adaptive": 673, "esc": 900}
    assert right == {"all": 72, "adaptive": 72, "esc": 72}


def plain_loops(answers: list[str | None]) -> tuple[str | None, str | None]:
    """Answers of Adaptive-Consistency and ESC, by scipy and a set."""
    counts: Counter[str] = Counter()
    for answer in answers:
        if answer is not None:
            counts[answer] += 1
        (_, v1), *rest = counts.most_common(2)
        v2 = rest[0][1] if rest else 0
        if stats.beta.sf(0.5, v1 + 1, v2 + 1) >= 0.95:
            break
    adaptive = counts.most_common(1)[0][0]
    windows = [set(answers[at : at + 5]) for at in (0, 5, 10)]
    agreed = next((w.pop() for w in windows if len(w) == 1), None)
    return adaptive, agreed or Counter(answers).most_common(1)[0][0]
