"""`atts tune` and real trials, with the built-in pair."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from atts_engine.cli import main as cli
from atts_engine.config import ATTSParams, EngineConfig
from atts_engine.conformal import make_calibrator
from atts_engine.errors import InputError
from atts_engine.evaluation import registers
from atts_engine.evaluation.tuning import Configuration, EngineEvaluator, Sizes, Trial, Unit
from atts_engine.models import load_model
from atts_engine.models.size import parameter_count
from atts_engine.pipeline import Problem
from tests.chat_server import serving
from tests.test_cli import fails

TASK = ["tune", "--task", "registers", "--steps", "2"]
SMALL = [*TASK, "--problems-count", "3", "--chains", "1-2", "--turns", "3,4", "--concurrency", "3", "--plain"]


def words(out: Path, *more: str) -> list[str]:
    return [*SMALL, "--budget-tokens", "60", "--out", str(out), *more]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "name one budget: --budget-tokens, --budget-flops, --budget-units, --budget-seconds"),
        (["--budget-tokens", "5", "--budget-flops", "5"], "name one budget"),
        (["--budget-tokens", "-5"], "a budget must be a positive number of target tokens, not -5.0"),
        (["--budget-tokens", "5", "--chains", "0-4"], "chains must be whole numbers, 1 or more, not 0"),
        (["--budget-tokens", "5", "--chains", "many"], "chains must be a range such as LOW-HIGH"),
        (["--budget-tokens", "5", "--alpha", "0.5-1"], "alpha must be inside (0, 1), not 1.0"),
        (["--budget-tokens", "5", "--takeover", "swap"], "takeover must be one of continue, replace, not 'swap'"),
        (["--budget-tokens", "5", "--pair", "tiny-draft"], "--pair must be DRAFT:TARGET, not 'tiny-draft'"),
        (["--budget-tokens", "5", "--pair", "a:b:c"], "--pair must be DRAFT:TARGET, not 'a:b:c'"),
        (["--budget-tokens", "5", "--pair", "nowhere:tiny-target"], "no model 'nowhere'"),
        (["--budget-tokens", "5", "--pair", "tiny-draft:vllm://h:8000/m"], "is on a server"),
        (["--budget-tokens", "5", "--pair", "d:t", "--draft", "d"], "leave --draft and --target out"),
        (["--budget-tokens", "5", "--pair", "d:t", "--pair", "d:t"], "--pair names a pair twice"),
        (["--budget-tokens", "5", "--trials", "0"], "--trials must be 1 or more, not 0"),
        (["--budget-tokens", "5", "--validate", "48"], "--validate 48 leaves none of the 48 problems"),
        (["--budget-tokens", "5", "--unit-parameters", "0"], "--unit-parameters must be 1 or more, not 0.0"),
        (["--budget-tokens", "5", "--calibrator", "best"], "no calibrator 'best'"),
        (["--budget-tokens", "5", "--proposer", "agent"], "needs --agent-url URL and --agent-model NAME"),
        (["--budget-tokens", "5", "--proposer", "luck"], "argument --proposer: invalid choice: 'luck'"),
        (
            "--budget-tokens 5 --proposer agent --agent-url u --agent-model m".split(),
            "the agent's URL must be http://HOST[:PORT]/v1",
        ),
        (
            "--budget-tokens 5 --proposer agent --agent-url http://h/v1 --agent-model m --agent-key-env NO_KEY".split(),
            "there is no environment variable NO_KEY",
        ),
    ],
)
def test_bad_input_is_one_line_before_any_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], said: str
) -> None:
    monkeypatch.delenv("NO_KEY", raising=False)
    assert said in fails(capsys, [*TASK, "--out", str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()


def test_problems_without_answers_cannot_be_tuned_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "problems.jsonl"
    file.write_text('{"id": "a", "problem": "a = 85; b = a-43; b?", "answer": "42"}\n{"id": "b", "problem": "?"}\n')
    line = ["tune", "--problems", str(file), "--draft", "tiny-draft", "--target", "tiny-target"]
    said = fails(capsys, [*line, "--budget-tokens", "5", "--out", str(tmp_path / "out")])
    assert "tuning needs gold answers, and problem 'b' has none" in said


def test_a_study_is_run_reported_and_resumed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = words(out, "--validate", "1", "--trials", "3", "--json", "-")
    assert cli.main(line) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert json.loads((out / "summary.json").read_text()) == found
    assert {p.name for p in out.iterdir()} == {"settings.json", "trials.jsonl", "summary.json", "report.html"}
    history = [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]
    assert found["history"] == history and [t["number"] for t in history] == [1, 2, 3]
    assert found["settings"]["problems"]["count"] == 2
    assert history[0]["planned_cost"] is None
    for trial in history[1:]:
        assert (trial["measurement"] is None) == (trial["planned_cost"] > 60) == (trial["state"] == "infeasible")
    assert found["best"]["measurement"]["costs"]["tokens"] <= 60
    assert found["validation"]["problems"] == 1
    assert "kept out of the study" in captured.err
    assert "[3/3] tiny-draft:tiny-target, " in captured.err

    assert "add --resume" in fails(capsys, line)
    assert "budget.limit: was 60.0, is 61.0" in fails(capsys, [*line, "--resume", "--budget-tokens", "61"])
    assert cli.main([*line, "--resume", "--trials", "4"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["history"][:3] == history
    assert "3 trials were saved by an earlier process" in captured.err and "[3/4]" not in captured.err


def test_an_agent_tunes_and_its_server_may_go_away(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENT_KEY", "secret")
    configuration = {
        "pair": "tiny-draft:tiny-target", "chains": 1, "turns": 4, "draft_tokens": 24, "target_tokens": 24,
        "alpha": 0.5, "takeover": "replace",
    }  # fmt: skip
    first = json.dumps({"insights": ["one chain may do"], "reason": "cheap", "configuration": configuration})
    out = tmp_path / "out"
    with serving(first, 404) as model:
        line = words(out, "--proposer", "agent", "--agent-url", model.url, "--agent-model", "m", "--trials", "2")
        said = fails_after_output(capsys, [*line, "--agent-key-env", "AGENT_KEY"])
        assert model.requests[0][1]["Authorization"] == "Bearer secret"
        assert "HTTP 404" in said and "(1 trials are saved; --resume goes on with them)" in said
    assert "secret" not in "".join(p.read_text() for p in out.iterdir())
    # No more than one trial is wanted now, so nobody has to be asked.
    assert cli.main([*line, "--resume", "--trials", "1"]) == 0
    assert "- one chain may do" in capsys.readouterr().out
    assert "one chain may do" in (out / "report.html").read_text()


def fails_after_output(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def test_ctrl_c_says_what_was_saved_and_how_to_go_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "atts_engine.cli.main", *words(out, "--trials", "5000", "--threads", "1")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A suite that runs in the background of a shell has SIGINT ignored, and a child would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        trials = out / "trials.jsonl"
        while process.poll() is None and not (trials.exists() and trials.stat().st_size > 0):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert err.count("\n") == 1
    saved = len(trials.read_text().splitlines())
    assert f"{saved} trials are saved in {out}; go on with: atts tune --task registers" in err


def test_parameters_are_those_of_the_loaded_model() -> None:
    for name in ("tiny-draft", "tiny-target"):
        weights = load_model(name).decoder.weights
        tensors = {id(t): t for t in (weights.embed, weights.lm_head, weights.norm)}
        for layer in weights.layers:
            tensors |= {id(t): t for t in (getattr(layer, slot) for slot in type(layer).__slots__) if t is not None}
        assert parameter_count(name) == sum(t.numel() for t in tensors.values())
    with pytest.raises(InputError, match="no model 'nowhere'"):
        parameter_count("nowhere")


SIZES = {"a": Sizes(1000, 5000), "b": Sizes(1000, 1000)}
CONFIGURATION = Configuration("a", 2, 4, 24, 24, 0.4, "continue")


@pytest.fixture(scope="module")
def evaluator() -> Iterator[EngineEvaluator]:
    drawn = registers.heldout(5, 0, (2, 2))
    problems = [Problem(p.id, p.problem, p.answer, i) for i, p in enumerate(drawn)]
    configs = {"a": EngineConfig("tiny-draft", "tiny-target"), "b": EngineConfig("tiny-draft", "tiny-draft")}
    unit = Unit(1000, 128, 64)
    with EngineEvaluator(
        configs, SIZES, unit, problems, ATTSParams(), lambda _, p: make_calibrator("adaptive", p.alpha), 5
    ) as made:
        yield made


def test_a_measurement_counts_what_was_written(evaluator: EngineEvaluator) -> None:
    found, whole = evaluator.measure(CONFIGURATION, None)
    assert whole and found.problems == 5 and found.accuracy == found.right / 5
    work, text = found.work, found.work.draft_tokens + found.work.target_tokens
    assert found.text_tokens == pytest.approx(text)
    assert found.costs["tokens"] == pytest.approx(2 * work.target_tokens)
    prompt = work.prompt_tokens[0]
    assert prompt == work.prompt_tokens[1] > 10
    assert found.costs["flops"] == pytest.approx(2 * (1000 + 5000) * (prompt + 2 * text))
    assert found.costs["units"] == pytest.approx(found.costs["flops"] / (2 * 1000 * 64) - 4)
    assert found.costs["seconds"] == pytest.approx(found.wall_s / 5)

    # What it would plan for the same configuration is of that size, and for another pair it is the other's.
    history = [Trial(1, "measured", CONFIGURATION, None, found)]
    plan = evaluator.planned(CONFIGURATION, history)
    other = evaluator.planned(Configuration("b", 2, 4, 24, 24, 0.4, "continue"), history)
    assert plan is not None and other is not None
    assert plan["flops"] == pytest.approx(found.costs["flops"], rel=1e-9)
    assert other["flops"] == pytest.approx(plan["flops"] / 3) and other["tokens"] == plan["tokens"]
    assert plan["seconds"] == pytest.approx(found.costs["seconds"])
    assert evaluator.planned(CONFIGURATION, []) is None


def test_replaced_spans_are_not_text(evaluator: EngineEvaluator) -> None:
    found, _ = evaluator.measure(Configuration("b", 1, 3, 8, 8, 0.9, "replace"), None)
    assert found.takeover_rate is not None and found.takeover_rate > 0.5
    assert found.work.target_tokens <= found.text_tokens < found.work.draft_tokens + found.work.target_tokens


def test_a_trial_is_looked_at_between_its_parts_and_ended(evaluator: EngineEvaluator) -> None:
    looks: list[tuple[int, int]] = []

    def enough(right: int, seen: int) -> bool:
        looks.append((right, seen))
        return len(looks) == 2

    found, whole = evaluator.measure(CONFIGURATION, enough)
    assert not whole and [seen for _, seen in looks] == [2, 4]
    assert (found.right, found.problems) == looks[-1]
    assert looks[0][0] <= looks[1][0]
    _, whole = evaluator.measure(CONFIGURATION, lambda right, seen: False)
    assert whole
