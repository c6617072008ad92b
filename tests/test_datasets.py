"""Problem sets: whole files, rows of the hub, generated tasks; and what counts as a right answer in each."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from atts_engine.cli import main as cli
from atts_engine.cli import options
from atts_engine.errors import InputError
from atts_engine.evaluation import datasets, gym, hub, registers
from atts_engine.evaluation.datasets import Dataset
from atts_engine.evaluation.grading import (
    Grader,
    answers_equal,
    has_math_verify,
    is_graded,
    is_right,
    math_verify_equal,
    number,
)
from atts_engine.evaluation.measures import grade
from atts_engine.pipeline.records import Chain, Problem

SIZES = {"aime24": 30, "aime25": 30, "amc23": 40, "gsm8k": 1319, "math500": 500, "olympiadbench": 675}

needs_math_verify = pytest.mark.skipif(not has_math_verify(), reason="math-verify is not installed (extra eval)")


def chosen(*flags: str) -> Dataset:
    return options.dataset(cli.build_parser().parse_args(["run", "--out", "x", *flags]))


@pytest.mark.parametrize("name", SIZES)
def test_each_set_is_read_whole_and_every_gold_answer_is_right(shared: Path, name: str) -> None:
    found = chosen("--problems", str(shared / "data" / "problems" / f"{name}.jsonl"))
    assert len(found.problems) == SIZES[name]
    assert [p.index for p in found.problems] == list(range(SIZES[name]))
    assert all(found.right(p, p.answer) for p in found.problems)
    assert not any(found.right(p, None) for p in found.problems)


@needs_math_verify
@pytest.mark.parametrize("name", ["math500", "olympiadbench"])
def test_math_verify_finds_each_gold_answer_equal_to_itself(shared: Path, name: str) -> None:
    """`answers_equal` needs no math-verify for two equal texts, so it is asked alone here: it can parse them all."""
    problems = datasets.from_file(shared / "data" / "problems" / f"{name}.jsonl").problems
    golds = {p.answer for p in problems if p.answer is not None and number(p.answer) is None}
    assert len(golds) > 80
    assert [gold for gold in sorted(golds) if not math_verify_equal(gold, gold)] == []


@needs_math_verify
@pytest.mark.parametrize(
    ("gold", "answer", "equal"),
    [
        ("(1,8,19), (2,7,13), (4,5,7)", "(4,5,7),(2,7,13),(1,8,19)", True),
        ("(1,8,19), (2,7,13), (4,5,7)", "(4,5,7),(2,7,13)", False),
        ("69$,$84", "84, 69", True),
        ("69$,$84", "84", False),
        ("1,3,5", r"\{1, 3, 5\}", True),
        ("1,3,5", "1,3", False),
        (r"(-\infty,-5)", r"x \in (-\infty, -5)", True),
        (r"(-\infty,-5)", r"(-\infty, -5]", False),
        (r"(-\infty,-5)", r"(-\infty, 5)", False),
        ("(2,4)", "(4,2)", False),
        ("f(x)=2 x", "f(x) = 2x", True),
        ("f(x)=2 x", "2x", True),
        (r"\frac{n(n+1)(2 n+1)}{6}", r"\frac{n(n + 1)(2n + 1)}{6}", True),
        (r"-2,0,2", r"0, \pm 2", True),
        (r"\frac{1}{3}", "0.333333", True),
        (r"\frac{1}{3}", "0.3334", False),
    ],
)
def test_several_answers_intervals_and_tolerance(gold: str, answer: str, equal: bool) -> None:
    assert answers_equal(gold, answer) is equal


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("openai/gsm8k:main/test", ("openai/gsm8k", "main", "test")),
        ("openai/gsm8k:main", ("openai/gsm8k", "main", None)),
        ("HuggingFaceH4/MATH-500/test", ("HuggingFaceH4/MATH-500", None, "test")),
        ("HuggingFaceH4/MATH-500", ("HuggingFaceH4/MATH-500", None, None)),
        ("gsm8k:main/train", ("gsm8k", "main", "train")),
        ("gsm8k:/train", ("gsm8k", None, "train")),
    ],
)
def test_references_to_the_hub(text: str, expected: tuple[str | None, ...]) -> None:
    found = hub.Reference.of(text)
    assert (found.name, found.config, found.split) == expected


@pytest.mark.parametrize("text", ["", "a/b/c/d", "a:b:c", "a b", "/x"])
def test_a_reference_that_is_none(text: str) -> None:
    with pytest.raises(InputError, match="--dataset must be NAME"):
        hub.Reference.of(text)


# One row of each set with the columns that it has on the hub.
ROWS: list[tuple[str, dict[str, Any], str]] = [
    ("HuggingFaceH4/MATH-500", {"problem": "q", "solution": r"so \boxed{7}", "answer": "p - q", "level": 2}, "p - q"),
    ("openai/gsm8k", {"question": "q", "answer": "9*2 = <<9*2=18>>18\n#### 1,080"}, "1,080"),
    ("math-ai/amc23", {"id": 0, "question": "q", "answer": 27.0, "url": ""}, "27.0"),
    ("HuggingFaceH4/aime_2024", {"id": 60, "problem": "q", "solution": "..", "answer": "204", "url": ""}, "204"),
    ("math-ai/aime24", {"id": 0, "problem": "q", "solution": r"$\boxed{204}$", "url": ""}, "204"),
    ("Maxwell-Jia/AIME_2024", {"ID": "2024-II-4", "Problem": "q", "Solution": "Let", "Answer": 33}, "33"),
    ("opencompass/AIME2025", {"question": "q", "answer": "70"}, "70"),
    ("Hothan/OlympiadBench", {"id": 1, "question": "q", "solution": [".."], "final_answer": ["2"]}, "2"),
    ("Hothan/OlympiadBench", {"question": "q", "final_answer": ["2", "-2"], "is_multiple_answer": True}, "2, -2"),
]


@pytest.mark.parametrize(("name", "row", "gold"), ROWS, ids=[name for name, _, _ in ROWS])
def test_columns_of_the_six_sets(name: str, row: dict[str, Any], gold: str) -> None:
    short = name.split("/")[1].lower()
    assert hub.of_rows([row], list(row), name) == (Problem(f"{short}-0000", "q", gold, 0),)


def test_columns_can_be_named() -> None:
    rows = [{"question": "no", "answer": "no", "asked": f"q{i}", "told": f"\\frac{{{i}}}{{2}}"} for i in range(3)]
    found = hub.of_rows(rows, list(rows[0]), "me/halves", question="asked", answer="told", limit=2)
    assert [(p.problem, p.answer) for p in found] == [("q0", r"\frac{0}{2}"), ("q1", r"\frac{1}{2}")]


@pytest.mark.parametrize(
    ("row", "flags", "said"),
    [
        (
            {"text": "q", "answer": "1"},
            {},
            "no column of me/set is known as the question .* name it by --question-field",
        ),
        ({"problem": "q", "label": "1"}, {}, "no column of me/set is known as the answer .* name it by --answer-field"),
        ({"problem": "q", "answer": "1"}, {"answer": "gold"}, "has no column 'gold'; it has problem, answer"),
        ({"problem": " ", "answer": "1"}, {}, "row 0: column 'problem' must be a text"),
        ({"problem": "q", "answer": None}, {}, "row 0: no answer in column 'answer'"),
        ({"problem": "q", "answer": []}, {}, "row 0: no answer in column 'answer'"),
        ({"problem": "q", "answer": float("nan")}, {}, "row 0: no answer in column 'answer'"),
        ({"problem": "q", "answer": True}, {}, "row 0: no answer in column 'answer'"),
        ({"problem": "q", "solution": "no box"}, {}, "row 0: no answer in column 'solution'"),
    ],
)
def test_rows_that_hold_no_problem_are_named(row: dict[str, Any], flags: dict[str, str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        hub.of_rows([row], list(row), "me/set", **flags)
    with pytest.raises(InputError, match="holds no problems"):
        hub.of_rows([], ["problem", "answer"], "me/set")


def test_without_the_package_one_line_names_the_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for module in (hub, gym):
        monkeypatch.setattr(module.importlib, "util", SimpleNamespace(find_spec=lambda name: None))
    words = ["run", "--draft", "tiny-draft", "--target", "tiny-target", "--out", str(tmp_path / "out")]
    for source in (["--dataset", "openai/gsm8k:main"], ["--task", "reasoning-gym:not_cached"]):
        assert cli.main([*words, *source]) == 2
        err = capsys.readouterr().err
        assert "pip install 'atts-engine[datasets]'" in err and err.count("\n") == 1


def test_a_set_is_loaded_by_the_real_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local folder `owner/set` goes the way of a set of the hub, but for the network."""
    package = pytest.importorskip("datasets", reason="the package datasets is not installed (extra datasets)")
    folder = tmp_path / "owner" / "set"
    folder.mkdir(parents=True)
    for split, count in (("train", 2), ("test", 3)):
        lines = [json.dumps({"question": f"{split} {i}?", "answer": f"so\n#### {i}"}) + "\n" for i in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(package.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    found = chosen("--dataset", "owner/set").problems
    assert [(p.id, p.problem, p.answer) for p in found] == [(f"set-000{i}", f"test {i}?", str(i)) for i in range(3)]
    assert len(chosen("--dataset", "owner/set/train").problems) == 2
    assert len(chosen("--dataset", "owner/set", "--limit", "1").problems) == 1
    with pytest.raises(InputError, match="the data set owner/set/dev cannot be loaded"):
        chosen("--dataset", "owner/set/dev")


def test_the_register_task_is_a_data_set() -> None:
    found = chosen("--task", "registers", "--seed", "1", "--problems-count", "3", "--steps", "2-3")
    assert [(p.problem, p.answer) for p in found.problems] == [
        (p.problem, p.answer) for p in registers.heldout(3, 1, (2, 3))
    ]
    assert chosen("--task", "registers", "--seed", "9", "--seed-tasks", "1", "--problems-count", "3", "--steps", "2-3")
    assert all(found.right(p, f" {p.answer}.") for p in found.problems)


def test_a_task_of_reasoning_gym_grades_its_own_answers() -> None:
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed (extra datasets)")
    found = chosen("--task", "reasoning-gym:chain_sum", "--problems-count", "4", "--seed-tasks", "7")
    assert found == datasets.from_gym("chain_sum", 7, 4)
    assert found != datasets.from_gym("chain_sum", 8, 4)
    assert all(gym.is_task(p.id) for p in datasets.from_gym("chain_sum", -1, 2).problems)
    assert found.problems[2].id.startswith("reasoning-gym/chain_sum/7/4/2/")
    for p in found.problems:
        assert p.answer is not None
        assert found.right(p, p.answer) and found.right(p, rf"\text{{{p.answer}}}")
        assert not found.right(p, str(int(p.answer) + 1)) and not found.right(p, None)
    other = f"{found.problems[0].id.rpartition('/')[0]}/00000000"
    with pytest.raises(InputError, match="is another problem here: grade it with the version of reasoning-gym"):
        gym.right(other, ["1"])
    with pytest.raises(InputError, match="is not the id of a reasoning-gym problem"):
        gym.right("math500-000", ["1"])


def test_a_task_with_many_right_answers_needs_no_gold_one() -> None:
    reasoning_gym = pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed (extra datasets)")
    (problem,) = datasets.from_gym("graph_color", 0, 1).problems
    assert problem.answer is None and is_graded(problem.id, None)
    entry = reasoning_gym.create_dataset("graph_color", seed=0, size=1)[0]
    solved = json.dumps(entry["metadata"]["possible_answer"])
    chains = [
        Chain(problem.id, 0, i, None, answer, 1.0, ()) for i, answer in enumerate([solved, "{}", None, "no colours"])
    ]
    assert grade(chains)[0].correct == (True, False, False, False)


def test_a_grader_that_breaks_on_an_answer_calls_it_wrong() -> None:
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed (extra datasets)")
    (problem,) = datasets.from_gym("prime_factorization", 0, 1).problems
    assert is_right(problem.id, problem.answer, "banana", Grader().equal) is False


def test_tasks_that_reasoning_gym_cannot_make() -> None:
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed (extra datasets)")
    with pytest.raises(InputError, match="no task 'no_such_task'; there are "):
        datasets.from_gym("no_such_task", 0, 1)
    with pytest.raises(InputError, match="composite cannot be made from seed and size alone"):
        datasets.from_gym("composite", 0, 1)


def test_a_problem_without_a_rule_is_not_graded() -> None:
    assert is_right("p", None, "5", str.__eq__) is None
    assert is_right("p", "5", None, str.__eq__) is False
    assert is_right("p", "5", "5", str.__eq__) is True


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--dataset", "a/b", "--task", "registers"], "name the problems by either"),
        (["--task", "registers", "--answer-field", "x"], "--answer-field belongs to --dataset"),
        (["--dataset", "a/b", "--steps", "2"], "--steps belongs to --task"),
        (["--dataset", "a/b", "--seed-tasks", "2"], "--seed-tasks belongs to --task"),
        (["--task", "registers", "--limit", "2"], "--limit belongs to a file or set"),
        (["--task", "reasoning-gym:chain_sum", "--steps", "2"], "--steps belongs to --task registers"),
        (["--task", "reasoning-gym:"], "no task 'reasoning-gym:'"),
        (["--task", "dance"], "no task 'dance'"),
    ],
)
def test_sources_that_contradict_each_other(flags: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        chosen(*flags)
