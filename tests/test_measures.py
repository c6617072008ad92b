"""Grading, votes, intervals and tests, against hand counts, exact laws and the published accuracies."""

from __future__ import annotations

import importlib.util
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from atts_engine.errors import InputError
from atts_engine.evaluation.grading import Grader, answers_equal, has_math_verify, number
from atts_engine.evaluation.intervals import wilson
from atts_engine.evaluation.measures import (
    Outcome,
    bootstrap,
    by_problem,
    compare,
    grade,
    mcnemar,
    paired_bootstrap,
    summary,
    takeover_rates,
    tokens_by_author,
)
from atts_engine.evaluation.traces import TOKENS_RECORDED, read_chains
from atts_engine.pipeline.records import Chain, Turn
from atts_engine.pipeline.voting import tally, winner

needs_math_verify = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed (extra eval)"
)


def _chain(problem: int, chain: int, answer: str | None, gold: str | None = "5", score: float = 0.1) -> Chain:
    turns = (Turn(0, "a", 10, score, takeover=answer != gold, target_tokens=4), Turn(1, "b", 5, None))
    return Chain(f"p{problem}", problem, chain, gold, answer, 1.0, turns)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("5", "5"),
        ("5", " 5. "),
        ("5", "5.0"),
        ("5", "+5"),
        ("0.5", r"\frac{1}{2}"),
        (r"\frac{3}{4}", r"\dfrac{3}{4}"),
        (r"-\frac{3}{4}", "-0.75"),
        ("3/4", r"\tfrac{6}{8}"),
        ("58,500", r"58,\!500"),
        ("1,234,567", "1234567"),
        ("90", r"90^\circ"),
        ("50", r"50\%"),
        ("18", r"\$18"),
        (r"\text{Evelyn}", "Evelyn"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
        ("x+1", r"\(x + 1\)"),
    ],
)
def test_equal_without_math_verify(monkeypatch: pytest.MonkeyPatch, gold: str, answer: str) -> None:
    monkeypatch.setattr("atts_engine.evaluation.grading.has_math_verify", lambda: False)
    assert answers_equal(gold, answer)


@pytest.mark.parametrize(
    ("gold", "answer"), [("5", "6"), ("5", ""), ("5", "x"), ("12", "1,2"), ("1/0", "0"), ("0.5", "50"), ("7", "-7")]
)
def test_not_equal(gold: str, answer: str) -> None:
    assert not answers_equal(gold, answer)


@pytest.mark.parametrize(
    ("text", "value"), [("1/0", None), (r"\frac{1}{0}", None), ("1e5", None), ("", None), (".5", 0.5), ("-3.", -3)]
)
def test_number(text: str, value: float | None) -> None:
    assert number(text) == value


@needs_math_verify
@pytest.mark.parametrize(
    ("gold", "answer", "equal"),
    [("1+2i", "2i + 1", True), ("-2,1", "1, -2", True), (r"18+2\pi", "18 + 2π", True), ("2k+2", "3k + 2", False)],
)
def test_math_verify_decides_the_rest_in_any_thread(gold: str, answer: str, equal: bool) -> None:
    assert has_math_verify()
    assert answers_equal(gold, answer) is equal
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(answers_equal, gold, answer).result() is equal


def test_a_grader_judges_each_pair_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(
        "atts_engine.evaluation.grading.answers_equal", lambda gold, answer: asked.append((gold, answer)) or False
    )
    grader = Grader()
    for _ in range(3):
        assert grader.equal("1", "2") is False
    assert asked == [("1", "2")]


def test_outcomes_of_a_hand_made_run() -> None:
    chains = [
        *(_chain(1, i, a) for i, a in enumerate(["4", "5", "4", "5.0", "5"])),
        *(_chain(0, i, a) for i, a in enumerate([None, "7", "5", "7", None])),
        # One sure chain against two unsure ones: weights exp(-0.1) against 2 exp(-3).
        _chain(2, 0, "1", score=3.0),
        _chain(2, 1, "1", score=3.0),
        _chain(2, 2, "5", score=0.1),
        _chain(3, 0, "9", gold=None),
    ]
    assert grade(chains) == [
        Outcome("p0", (False, False, True, False, False), False, False, True, False, False),
        Outcome("p1", (False, True, False, True, True), True, True, True, True, False),
        Outcome("p2", (False, False, True), False, True, True, False, False),
    ]
    found = summary(chains)
    assert (found["problems"], found["graded"], found["chains"], found["answered"]) == (4, 3, 14, 12)
    assert found["chain_accuracy"]["mean"] == pytest.approx((0.2 + 0.6 + 1 / 3) / 3)
    assert found["majority"]["mean"] == pytest.approx(1 / 3)
    assert found["weighted"]["mean"] == pytest.approx(2 / 3)
    assert found["any_of"]["mean"] == 1.0
    assert found["tokens"] == {"draft": 14 * 15, "target": 14 * 4}


def test_nothing_to_grade_is_none() -> None:
    found = summary([_chain(0, 0, "5", gold=None)])
    assert found["graded"] == 0
    assert found["majority"] is None


def test_takeover_rates_count_scored_turns_only() -> None:
    chains = [_chain(0, 0, "5"), _chain(0, 1, "4"), _chain(1, 0, "4")]
    found = takeover_rates(chains)
    assert found["decisions"] == 3
    assert found["rate"] == pytest.approx(2 / 3)
    assert found["by_turn"] == {"0": {"n": 3, "rate": pytest.approx(2 / 3)}}
    assert found["by_problem"] == {"p0": {"n": 2, "rate": 0.5}, "p1": {"n": 1, "rate": 1.0}}
    assert takeover_rates([])["rate"] is None


def test_tokens_are_unknown_where_one_chain_did_not_record_them() -> None:
    unknown = Chain("p", 0, 0, "5", "5", 1.0, (), extra={TOKENS_RECORDED: False})
    assert tokens_by_author([_chain(0, 0, "5"), unknown]) is None


def test_bootstrap_of_a_share_is_the_binomial_law() -> None:
    stats = pytest.importorskip("scipy.stats", reason="the oracle scipy is not installed")
    values = [1.0] * 60 + [0.0] * 140
    found = bootstrap(values, seed=1)
    assert found.mean == 0.3
    for end, q in ((found.low, 0.025), (found.high, 0.975)):
        # Of 10,000 resamples the quantile's own level is off by at most five sigma, 0.0078.
        low, high = stats.binom.ppf([q - 0.0078, q + 0.0078], 200, 0.3) / 200
        assert low <= end <= high
    assert bootstrap(values, seed=1) == found


def test_wilson_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats", reason="the oracle scipy is not installed")
    for right, seen in ((0, 3), (3, 3), (7, 12), (31, 40)):
        oracle = stats.binomtest(right, seen).proportion_ci(0.95, method="wilson")
        found = wilson(right, seen)
        assert (found.mean, found.low, found.high) == pytest.approx((right / seen, oracle.low, oracle.high), abs=1e-12)
    for right, seen in ((0, 0), (4, 3), (-1, 3)):
        with pytest.raises(InputError, match="0 <= right <= seen"):
            wilson(right, seen)


def test_paired_bootstrap_sees_what_the_pairs_share() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=300)
    found = paired_bootstrap(base + 0.1, base)
    assert found.low == pytest.approx(0.1)
    assert found.high == pytest.approx(0.1)
    noisy = paired_bootstrap(base + 0.1, rng.normal(size=300))
    assert noisy.high - noisy.low > 0.2


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (1, 0), (5, 5), (3, 11), (40, 12)])
def test_mcnemar_is_the_exact_binomial_test(only_first: int, only_second: int) -> None:
    first = np.array([True] * only_first + [False] * only_second + [True, False] * 20)
    second = np.array([False] * only_first + [True] * only_second + [True, False] * 20)
    found = mcnemar(first, second)
    assert (found.only_first, found.only_second) == (only_first, only_second)
    if only_first + only_second == 0:
        assert found.p_value == 1.0
        return
    stats = pytest.importorskip("scipy.stats", reason="the oracle scipy is not installed")
    expected = stats.binomtest(only_first, only_first + only_second, 0.5).pvalue
    assert found.p_value == pytest.approx(expected, rel=1e-12)


def test_comparison_of_two_strategies_on_the_same_problems() -> None:
    right, wrong = [_chain(i, 0, "5") for i in range(8)], [_chain(i, 0, "6") for i in range(8)]
    outcomes = {"first": grade(right), "second": grade(right[:3] + wrong[3:])}
    found = compare(outcomes["first"], outcomes["second"])
    assert found["difference"]["mean"] == 5 / 8
    assert found["mcnemar"] == {"only_first": 5, "only_second": 0, "p_value": 2 / 32}
    assert found["difference"]["low"] <= 5 / 8 <= found["difference"]["high"]
    assert compare(outcomes["first"], outcomes["second"], "chain_accuracy")["mcnemar"] is None
    reordered = compare(outcomes["first"], list(reversed(outcomes["second"])))
    assert reordered["difference"]["mean"] == 5 / 8
    with pytest.raises(InputError, match="same problems on both sides; p7"):
        compare(outcomes["first"], outcomes["second"][:7])


def test_bad_input_is_refused() -> None:
    with pytest.raises(InputError, match="at least one problem"):
        bootstrap([])
    with pytest.raises(InputError, match="level"):
        bootstrap([1.0], level=1.0)
    with pytest.raises(InputError, match="as many values"):
        paired_bootstrap([1.0], [1.0, 2.0])
    with pytest.raises(InputError, match="as many problems"):
        mcnemar([True], [True, False])


@needs_math_verify
def test_published_run_has_its_published_accuracy(shared: Path) -> None:
    chains = read_chains(shared / "data/traces/math100_r1-distill-llama-8b_qwq-32b.jsonl.gz")
    grader = Grader()
    outcomes = grade(chains, grader.equal)
    assert sum(sum(o.correct) for o in outcomes) == 1321
    assert math.isclose(sum(o.any_of for o in outcomes), 97)
    # 0.92 where votes are counted by spelling; one problem more where equal answers ("12th grade") are one.
    by_spelling = [winner(tally(group, "majority")) for group in by_problem(chains).values()]
    golds = [group[0].gold for group in by_problem(chains).values()]
    right = [grader.equal(g, a) for g, a in zip(golds, by_spelling, strict=True) if g is not None and a is not None]
    assert sum(right) == 92
    assert sum(o.majority for o in outcomes) == 93
