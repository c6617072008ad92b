"""`kill -9` in the middle of a real run, at moments that no code chose, then `--resume`: the run ends as if nothing
had happened."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from atts_engine.cli import main as cli
from atts_engine.evaluation.decisions import in_force, read_decisions

SMALL = [
    "--task", "registers", "--steps", "2-3", "--problems-count", "4", "--chains", "4", "--concurrency", "2",
    "--chunk-tokens", "8", "--threads", "1", "--seed", "2", "--plain",
]  # fmt: skip


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_after(words: list[str], log: Path, decisions: int, pause: float) -> None:
    """Run `atts` in a process of its own and kill it a moment after it has logged so many decisions more."""
    goal = lines(log) + decisions
    process = subprocess.Popen(
        [sys.executable, "-m", "atts_engine.cli.main", *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        while process.poll() is None and lines(log) < goal:
            time.sleep(0.005)
        time.sleep(pause)
    finally:
        process.kill()
        _, err = process.communicate()
    assert process.returncode == -9, err


def untimed(path: Path) -> dict[tuple[str, int], object]:
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        chain = json.loads(line)
        del chain["duration_s"], chain["wait_s"]
        for turn in chain["turns"]:
            del turn["t_draft"], turn["t_verdict"], turn["t_target"]
        key = (chain["problem_id"], chain["chain"])
        assert key not in found, f"{key} was written twice"
        found[key] = chain
    return found


def test_an_online_run_that_was_killed_counts_every_span_once(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["run", *SMALL, "--problems-count", "12", "--out", str(tmp_path), "--resume"]
    log, rng = tmp_path / "decisions.jsonl", random.Random(8)
    for more in (rng.randint(8, 20), rng.randint(2, 8)):
        kill_after(words, log, more, rng.uniform(0.0, 0.05))
    check = ["replay", "--log", str(tmp_path), "--json", "-"]
    assert cli.main(check) == 0
    killed = json.loads(capsys.readouterr().out)
    assert killed["difference"] is None and killed["discarded"] > 0
    assert cli.main(words) == 0
    capsys.readouterr()
    assert cli.main(check) == 0
    found = json.loads(capsys.readouterr().out)
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert found["difference"] is None
    assert found["in_force"] == summary["decisions"] == summary["takeovers"]["decisions"] < found["decisions"]
    assert found["rate"] == summary["takeovers"]["rate"]
    spans = {
        (c["problem_id"], c["chain"], t["turn"]): (t["score"], t["p_value"], t["takeover"])
        for c in map(json.loads, (tmp_path / "chains.jsonl").read_text(encoding="utf-8").splitlines())
        for t in c["turns"]
    }
    kept = in_force(read_decisions(log))
    told = {(d.problem, d.chain, d.turn): (d.score, d.p_value, d.verdict == "takeover") for d in kept}
    assert len(kept) == len(told) and told == spans


def test_a_run_that_was_killed_twice_ends_as_the_one_that_was_not(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    state, whole, cut = tmp_path / "state.npz", tmp_path / "whole", tmp_path / "cut"
    calibrate = [*SMALL, "--problems-count", "1"]
    assert cli.main(["calibrate", *calibrate, "--out", str(state)]) == 0
    words = ["run", *SMALL, "--problems-count", "12", "--calibration", str(state), "--frozen", "--out"]
    assert cli.main([*words, str(whole)]) == 0

    rng = random.Random(5)
    log = cut / "decisions.jsonl"
    kill_after([*words, str(cut)], log, rng.randint(8, 20), rng.uniform(0.0, 0.05))
    assert lines(cut / "chains.jsonl") < 48
    kill_after([*words, str(cut), "--resume"], log, rng.randint(2, 8), rng.uniform(0.0, 0.05))
    saved = lines(cut / "chains.jsonl")
    assert not (cut / "summary.json").exists()
    capsys.readouterr()
    assert cli.main([*words, str(cut), "--resume", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)

    assert untimed(cut / "chains.jsonl") == untimed(whole / "chains.jsonl")
    assert (found["chains"], found["restored_chains"]) == (48, saved)
    assert json.loads((cut / "summary.json").read_text(encoding="utf-8")) == found
    assert (cut / "report.html").stat().st_size > 10_000
    decisions = list(read_decisions(log))
    assert [d.decision_seq for d in decisions] == list(range(len(decisions)))
    # A chain that was cut off is written anew, and its verdicts are those of the first time.
    verdicts: dict[tuple[str, int, int], set[tuple[float, int, str]]] = {}
    for d in decisions:
        verdicts.setdefault((d.problem, d.chain, d.turn), set()).add((d.score, d.count, d.verdict))
    assert all(len(told) == 1 for told in verdicts.values())
    assert len(decisions) >= len(verdicts) == sum(1 for _ in read_decisions(whole / "decisions.jsonl"))
