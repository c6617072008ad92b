"""Measures of runs, pairs of runs, and which strategies are worth their cost."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atts_engine.cli import main as cli
from atts_engine.errors import InputError
from atts_engine.evaluation import measures, pareto, registers
from atts_engine.evaluation.comparison import FinishedRun, compare_runs
from atts_engine.evaluation.detection import wrong_chains, wrong_steps
from atts_engine.evaluation.folder import RunFolder
from atts_engine.evaluation.grading import has_math_verify
from atts_engine.evaluation.job import job_settings
from atts_engine.evaluation.measures import Outcome
from atts_engine.evaluation.solutions import Ballot, SavedSolution
from atts_engine.pipeline.params import ATTSParams
from atts_engine.pipeline.records import Chain, Problem, Turn
from atts_engine.pipeline.voting import tally, winner

PROBLEMS = [Problem(f"p{i}", f"{i} + {i}?", str(2 * i), i) for i in range(4)]
PARAMS = ATTSParams(chains=2)
TRACES = "data/traces/math100_r1-distill-llama-8b_qwq-32b.jsonl.gz"


def chain(problem: Problem, number: int, answer: str | None, tokens: int = 10, seconds: float = 1.0) -> Chain:
    turns = (Turn(0, "x", 5, 0.5, target="y", takeover=True, target_tokens=tokens),)
    return Chain(problem.id, problem.index, number, problem.answer, answer, seconds, turns)


def saved(
    path: Path, right: list[int], problems: list[Problem] = PROBLEMS, params: ATTSParams = PARAMS, tokens: int = 10
) -> Path:
    """A run in which `right[i]` chains of problem i, the first ones, gave the right answer."""
    settings = job_settings("d", "t", "float32", params, {}, problems)
    folder = RunFolder.open(path, settings, resume=False)
    for problem, n in zip(problems, right, strict=True):
        chains = [
            chain(problem, number, problem.answer if number < n else "-1", tokens, 1.0 + number)
            for number in range(params.chains)
        ]
        for one in chains:
            folder.add_chain(one)
        votes = tally(chains, "majority")
        folder.add_solution(SavedSolution(problem.id, tuple(range(params.chains)), Ballot(winner(votes), votes)))
    folder.close()
    return path


def test_two_runs_by_hand(tmp_path: Path) -> None:
    first = FinishedRun.read(saved(tmp_path / "a", [2, 2, 1, 0], tokens=10))
    second = FinishedRun.read(saved(tmp_path / "b", [2, 0, 0, 0], params=replace(PARAMS, alpha=0.2), tokens=30))
    found = compare_runs(first, second)
    cells = found["accuracies"]
    assert cells["chain_accuracy"]["first"]["mean"] == 5 / 8
    assert cells["chain_accuracy"]["difference"]["mean"] == 3 / 8
    assert cells["chain_accuracy"]["mcnemar"] is None
    # A tie goes to the first chain's answer, so problem 2 is won by one of two.
    assert cells["majority"]["mcnemar"] == {"only_first": 2, "only_second": 0, "p_value": 0.5}
    assert cells["voted"] == cells["majority"]
    assert cells["majority"] == {
        "first": measures.as_json(measures.bootstrap([1, 1, 1, 0])),
        "second": measures.as_json(measures.bootstrap([1, 0, 0, 0])),
        "difference": measures.as_json(measures.bootstrap([0, 1, 1, 0])),
        "mcnemar": cells["majority"]["mcnemar"],
    }
    assert found["costs"]["target_tokens"]["difference"]["mean"] == -40
    assert found["costs"]["target_tokens"]["ratio"] == {"mean": 1 / 3, "low": 1 / 3, "high": 1 / 3}
    assert found["costs"]["latency_s"]["first"]["mean"] == 2.0
    assert found["settings"] == ["params.alpha: was 0.4, is 0.2"]
    json.dumps(found, allow_nan=False)


def test_any_of_is_of_as_many_chains_as_both_runs_have(tmp_path: Path) -> None:
    four = FinishedRun.read(saved(tmp_path / "a", [1, 2, 4, 0], params=replace(PARAMS, chains=4)))
    two = FinishedRun.read(saved(tmp_path / "b", [1, 0, 2, 0]))
    cell = compare_runs(four, two)["accuracies"]["any_of"]
    assert cell["first"]["mean"] == pytest.approx((1 / 2 + 5 / 6 + 1 + 0) / 4)
    assert cell["mcnemar"] is None


def test_the_command_shows_both_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = saved(tmp_path / "a", [2, 2, 1, 0]), saved(tmp_path / "b", [2, 0, 0, 0])
    assert cli.main(["eval", "--compare", str(a), str(b), "--json", str(tmp_path / "out.json")]) == 0
    printed = capsys.readouterr().out
    assert "majority" in printed and "+50.0 (" in printed and "only A" in printed
    assert json.loads((tmp_path / "out.json").read_text()) == compare_runs(FinishedRun.read(a), FinishedRun.read(b))


def test_runs_that_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = saved(tmp_path / "whole", [2, 2, 1, 0])
    fewer = saved(tmp_path / "fewer", [2, 2, 1], PROBLEMS[:3])
    texts = saved(tmp_path / "texts", [0] * 4, [replace(p, problem="?") for p in PROBLEMS])
    golds = saved(tmp_path / "golds", [0] * 4, [*PROBLEMS[:3], replace(PROBLEMS[3], answer="7")])
    cut = saved(tmp_path / "cut", [2, 2, 1, 0])
    (cut / "solutions.jsonl").write_text("".join((cut / "solutions.jsonl").read_text().splitlines(keepends=True)[:2]))
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "settings.json").write_text("[]")
    for other, said in (
        (fewer, "whole has p3, .*fewer has it not \\(1 are in one only\\)"),
        (texts, "have the same ids, but differ in texts, or their order"),
        (golds, "have the same ids, but differ in the answer of p3"),
        (cut, "cut is not finished: it holds 2 of 4 answers; go on with it by --resume"),
        (tmp_path / "odd", "is not the settings of a run"),
        (tmp_path / "none", "none holds no run"),
    ):
        with pytest.raises(InputError, match=said):
            compare_runs(FinishedRun.read(whole), FinishedRun.read(other))
    assert cli.main(["eval", "--compare", str(whole), str(fewer)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("right", [0, 1, 3, 6])
def test_any_of_k_is_the_share_of_subsets_with_a_right_chain(right: int) -> None:
    correct = (True,) * right + (False,) * (6 - right)
    outcome = Outcome("p", correct, False, False, any(correct), False, False)
    for k in range(1, 7):
        subsets = [any(s) for s in combinations(correct, k)]
        assert outcome.any_of_k(k) == pytest.approx(sum(subsets) / len(subsets))
    for k in (0, 7):
        with pytest.raises(InputError, match="p has 6"):
            outcome.any_of_k(k)


@pytest.mark.parametrize(("chains", "expected"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_any_of_is_shown_for_powers_of_two_and_all(chains: int, expected: list[int]) -> None:
    assert measures.draws([Outcome("p", (True,) * chains, True, True, True, True, True)]) == expected


def test_costs_of_a_run_by_hand() -> None:
    chains = [chain(PROBLEMS[i], n, "1", tokens=10 * (i + 1), seconds=1.0 + i + n) for i in range(2) for n in range(2)]
    found = measures.summary(chains, str.__eq__)
    assert measures.latencies(chains) == [2.0, 3.0]
    assert found["latency_s"]["mean"]["mean"] == found["latency_s"]["p50"]["mean"] == 2.5
    assert found["tokens_per_problem"]["target"]["mean"] == 30.0
    assert found["tokens_per_problem"]["draft"] == {"mean": 10.0, "low": 10.0, "high": 10.0}
    assert found["takeovers"]["interval"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    # 80 tokens in 4 s of wall time: a resample of one problem twice has its tokens over its share of the time.
    assert measures.throughput(chains, 4.0) == {
        "mean": pytest.approx(20.0), "low": pytest.approx(60 / 3.2), "high": pytest.approx(100 / 4.8)
    }  # fmt: skip
    assert measures.throughput(chains, 0.0) is None


def test_wrong_chains_are_told_by_their_mean_score() -> None:
    chains = []
    for i in range(3):
        for n, score in enumerate((0.1, 0.2, 0.9)):
            turns = (Turn(0, "", 1, score), Turn(1, "", 1, None), Turn(2, "", 1, score + 0.2))
            chains.append(Chain(f"p{i}", i, n, "1", "1" if score < 0.5 else None, 1.0, turns))
    found = wrong_chains(chains, str.__eq__)
    assert found == {"mean": 1.0, "low": 1.0, "high": 1.0, "items": 9, "wrong": 3}
    assert wrong_chains([replace(c, gold=None) for c in chains], str.__eq__) is None
    assert wrong_chains([replace(c, turns=()) for c in chains], str.__eq__) is None


def _register_chain(number: int, spans: list[tuple[str, float, str | None]]) -> Chain:
    turns = tuple(
        Turn(i, draft, 1, score, takeover=target is not None, target=target)
        for i, (draft, score, target) in enumerate(spans)
    )
    return Chain("r", 0, number, "53", "53", 1.0, turns)


@pytest.mark.parametrize("replaced", [False, True])
def test_wrong_steps_belong_to_the_span_that_wrote_them(replaced: bool) -> None:
    problem = Problem("r", "a = 85; b = a-43; c = b+11; c?", "53")
    right_b, wrong_b = "b = a-43 = 85-43 = 42\n\n", "b = a-43 = 85-43 = 52\n\n"
    mend = "" if replaced else "Wait, "
    chains = [
        _register_chain(0, [(right_b, 0.1, None), ("c = b+11 = 42+11 = 53\n\n\\boxed{53}", 0.2, None)]),
        # Cut in the middle of a step that comes out wrong: its end is at fault, not its beginning.
        _register_chain(
            1, [("b = a-43 = 85", 0.3, None), ("-43 = 52\n\n", 2.0, f"{mend}{right_b}"), ("c = ", 0.4, None)]
        ),
        _register_chain(2, [(wrong_b, 3.0, f"{mend}{right_b}"), ("c = b+11 = 42+11 = 53", 0.3, None)]),
    ]
    if replaced:
        # The target redid the span, so its text begins where the span did.
        spans = [("b = a-43 = 85", 0.3, None), ("-43 = 52\n\n", 2.0, "-43 = 42\n\n"), ("c = ", 0.4, None)]
        chains[1] = _register_chain(1, spans)
    found = wrong_steps(chains, [problem], replaced=replaced)
    assert found is not None
    assert (found["items"], found["wrong"], found["mean"]) == (7, 2, 1.0)


def test_other_problems_have_no_steps() -> None:
    assert wrong_steps([chain(PROBLEMS[0], 0, "1")], PROBLEMS) is None
    drawn = registers.heldout(1)[0]
    problem = Problem(drawn.id, drawn.problem, drawn.answer)
    assert wrong_steps([chain(problem, 0, "1")], [problem]) is None


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=8))
def test_the_front_is_what_nothing_dominates(points: list[tuple[int, int]]) -> None:
    def dominates(a: tuple[int, int], b: tuple[int, int]) -> bool:
        return a[0] <= b[0] and a[1] >= b[1] and a != b

    found = pareto.front([(float(x), float(y)) for x, y in points])
    assert sorted(found) == [i for i, p in enumerate(points) if not any(dominates(q, p) for q in points)]
    assert [points[i][0] for i in found] == sorted(points[i][0] for i in found)


def test_fronts_leave_out_what_has_no_figure() -> None:
    def figures(tokens: float | None, seconds: float, accuracy: float | None) -> dict[str, object]:
        def cell(mean: float | None) -> dict[str, float] | None:
            return None if mean is None else {"mean": mean, "low": mean, "high": mean}

        per_problem = None if tokens is None else {"target": cell(tokens)}
        return {
            "voted": cell(accuracy),
            "tokens_per_problem": per_problem, "latency_s": {"mean": cell(seconds)},
        }  # fmt: skip

    strategies = {
        "target": figures(100.0, 9.0, 0.9),
        "atts": figures(30.0, 5.0, 0.9),
        "draft": figures(0.0, 2.0, 0.5),
        "unknown": figures(None, 1.0, 0.4),
        "ungraded": figures(0.0, 0.0, None),
    }
    assert pareto.fronts(strategies) == {
        "target_tokens": ["draft", "atts"],
        "latency_s": ["unknown", "draft", "atts"],
    }


@pytest.mark.skipif(not has_math_verify(), reason="math-verify is not installed (extra eval)")
def test_recorded_chains_have_their_known_figures(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mean of a chain 0.826, majority 0.92 (counted by spelling; 0.93 where equal answers are one), any of 16 0.97,
    takeover rate 0.413: 1,321 of 1,600 chains, 2,507 of 6,065 spans."""
    path = tmp_path / "figures.json"
    assert cli.main(["eval", "--traces", str(shared / TRACES), "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["chain_accuracy"]["mean"] == pytest.approx(1321 / 1600, abs=1e-12)
    assert found["majority_by_spelling"]["mean"] == pytest.approx(0.92)
    assert found["majority"]["mean"] == pytest.approx(0.93)
    assert found["any_of"]["mean"] == found["any_of_k"]["16"]["mean"] == pytest.approx(0.97)
    assert found["any_of_k"]["1"]["mean"] == pytest.approx(1321 / 1600)
    assert found["takeovers"]["rate"] == pytest.approx(2507 / 6065)
    assert found["takeovers"]["interval"]["mean"] == pytest.approx(2507 / 6065)
    for cell, low, high in (
        (found["chain_accuracy"], 0.774, 0.874),
        (found["majority_by_spelling"], 0.86, 0.97),
        (found["majority"], 0.88, 0.97),
        (found["any_of"], 0.93, 1.0),
        (found["takeovers"]["interval"], 0.362, 0.464),
    ):
        assert (cell["low"], cell["high"]) == pytest.approx((low, high), abs=6e-4)
    assert found["auc_chains"] == {
        "mean": pytest.approx(0.600, abs=5e-4), "low": pytest.approx(0.520, abs=5e-4),
        "high": pytest.approx(0.672, abs=5e-4), "items": 1600, "wrong": 279,
    }  # fmt: skip
    assert found["tokens"] is found["tokens_per_problem"] is None
    printed = capsys.readouterr().out
    for row in ("chain accuracy", "majority by spelling", "any of 16", "taken over", "time of a problem, p95"):
        (line,) = (text for text in printed.splitlines() if text.startswith(row))
        assert " to " in line and line.rstrip().endswith((")", "spans")), line


def test_votes_by_spelling_and_by_equality_may_differ() -> None:
    answers = ["1/2", "0.5", r"\frac{1}{2}", "3", "3"]
    chains = [chain(replace(PROBLEMS[0], answer="0.5"), n, a) for n, a in enumerate(answers)]
    (outcome,) = measures.grade(chains)
    assert (outcome.majority, outcome.majority_by_spelling) == (True, False)
    assert winner(tally(chains, "majority")) == "3"
