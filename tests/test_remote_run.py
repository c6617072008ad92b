"""`atts run` with lanes on servers: the same verdicts as in this process, and a server that goes away in mid-run."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from atts_engine.cli import main as cli
from atts_engine.evaluation.decisions import read_decisions
from tests.remote_site import site

WORDS = [
    "--task", "registers", "--steps", "2-3", "--problems-count", "4", "--chains", "1", "--temperature", "0",
    "--turns", "4", "--draft-tokens", "12", "--target-tokens", "12", "--chunk-tokens", "8", "--threads", "1", "--plain",
]  # fmt: skip
TARGET = ("--draft", "tiny-draft", "--target")


def run(out: Path, *words: str) -> int:
    return cli.main(["run", *WORDS, *words, "--out", str(out)])


def chains(out: Path) -> dict[tuple[str, int], Any]:
    """What does not depend on time, or on the last bits of a score."""
    found: dict[tuple[str, int], Any] = {}
    for line in (out / "chains.jsonl").read_text(encoding="utf-8").splitlines():
        chain = json.loads(line)
        key = (chain["problem_id"], chain["chain"])
        assert key not in found
        turns = [(t["draft"], t["takeover"], t["target"], pytest.approx(t["score"], abs=1e-4)) for t in chain["turns"]]
        found[key] = (chain["final_answer"], chain["finish"], turns)
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], dict[tuple[str, int], Any]]:
    """Words that name a frozen calibration, and the chains of the run with it in this process."""
    path = tmp_path_factory.mktemp("undisturbed")
    names = ["--draft", "tiny-draft", "--target", "tiny-target"]
    calibrate = [w if w != "4" else "16" for w in WORDS]
    assert cli.main(["calibrate", *calibrate, *names, "--seed-tasks", "1", "--out", str(path / "state.npz")]) == 0
    frozen = ["--calibration", str(path / "state.npz"), "--frozen"]
    assert run(path / "run", *frozen, *names) == 0
    found = chains(path / "run")
    taken = [takeover for _, _, turns in found.values() for _, takeover, _, _ in turns]
    assert any(taken) and not all(taken)
    return frozen, found


@pytest.mark.parametrize("there", ["both", "draft", "target"])
def test_verdicts_are_the_same_wherever_the_lanes_are(
    tmp_path: Path, undisturbed: tuple[list[str], dict[tuple[str, int], Any]], there: str
) -> None:
    frozen, expected = undisturbed
    with ExitStack() as stack:
        names = {
            lane: stack.enter_context(site(f"tiny-{lane}")).address if there in ("both", lane) else f"tiny-{lane}"
            for lane in ("draft", "target")
        }
        assert run(tmp_path / "run", *frozen, "--draft", names["draft"], "--target", names["target"]) == 0
    assert chains(tmp_path / "run") == expected
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["servers"].keys() == ({"draft", "target"} if there == "both" else {there})
    assert summary["lanes"].keys() == {"draft", "target"} - summary["servers"].keys()
    decided = [d.verdict == "takeover" for d in read_decisions(tmp_path / "run" / "decisions.jsonl")]
    taken = [takeover for _, _, turns in expected.values() for _, takeover, _, _ in turns]
    assert sorted(decided) == sorted(taken)
    if there == "target":
        target = summary["servers"]["target"]
        assert target["scores"] == "recompute" and target["scored_tokens"] > 0
        # The prompt and all that was written, for each span again.
        assert target["sent_per_scored"] > 2
        assert "sent to score" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_scores_that_append_cost_their_span(
    tmp_path: Path, undisturbed: tuple[list[str], dict[tuple[str, int], Any]]
) -> None:
    frozen, expected = undisturbed
    with site("tiny-target", scale_out=True, v2=True) as target:
        assert run(tmp_path / "run", *frozen, *TARGET, target.address) == 0
        computed = target.fake.computed
    assert chains(tmp_path / "run") == expected
    server = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))["servers"]["target"]
    assert server["scores"] == "append"
    assert computed < server["sent_tokens"] / 2


@pytest.mark.parametrize("rows", [False, True], ids=["whole", "rows"])
def test_early_verdicts_are_the_same_on_a_server(
    tmp_path: Path, undisturbed: tuple[list[str], dict[tuple[str, int], Any]], rows: bool
) -> None:
    words = [*undisturbed[0], "--early-verdict", "--chunk-tokens", "2", *TARGET]
    assert run(tmp_path / "here", *words, "tiny-target") == 0
    with site("tiny-target", scale_out=rows, v2=rows) as target:
        assert run(tmp_path / "there", *words, target.address) == 0
    assert chains(tmp_path / "there") == chains(tmp_path / "here")
    lines = (tmp_path / "here" / "chains.jsonl").read_text(encoding="utf-8").splitlines()
    assert any(turn.get("early") for line in lines for turn in json.loads(line)["turns"])


def test_a_server_that_is_started_again_in_time(
    tmp_path: Path, undisturbed: tuple[list[str], dict[tuple[str, int], Any]]
) -> None:
    frozen, expected = undisturbed
    with site("tiny-target", pace=0.005) as target:
        killer = target.kill_after(12, away_s=0.5)
        assert run(tmp_path / "run", *frozen, *TARGET, target.address) == 0
        killer.join()
    assert chains(tmp_path / "run") == expected
    server = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))["servers"]["target"]
    assert server["retries"] > 0 and server["waiting_s"] > 0 and server["failures"] == 0


def test_a_server_that_stays_away_ends_the_run_which_goes_on_later(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    undisturbed: tuple[list[str], dict[tuple[str, int], Any]],
) -> None:
    frozen, expected = undisturbed
    out = tmp_path / "run"
    with site("tiny-target", pace=0.002) as target:
        killer = target.kill_after(9)
        words = [*frozen, *TARGET, target.address, "--patience", "0.5", "--concurrency", "1"]
        assert run(out, *words) == 1
        killer.join()
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert "has not answered for" in said and "--resume" in said
        before = (out / "chains.jsonl").read_text(encoding="utf-8")
        ended = chains(out)
        assert 0 < len(ended) < len(expected)
        target.start()
        assert run(out, *words, "--resume") == 0
    assert (out / "chains.jsonl").read_text(encoding="utf-8").startswith(before)
    assert chains(out) == expected
