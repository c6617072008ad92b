"""A disk that fills up and a lane that fails, at every moment: nothing that had ended is lost, and the run resumes."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from atts_engine.cli import main as cli
from atts_engine.conformal import Mondrian
from atts_engine.conformal.state import load_state
from atts_engine.errors import InputError
from atts_engine.evaluation import files, jsonl
from atts_engine.evaluation.decisions import read_decisions
from atts_engine.evaluation.folder import RunFolder
from atts_engine.evaluation.jsonl import JsonlWriter, read_lines
from atts_engine.evaluation.solutions import read_solutions
from atts_engine.evaluation.traces import chain_from_line
from atts_engine.runtime.runner import Runner
from tests.fake_engine import FakeEngine
from tests.test_job import PARAMS, frozen, run, settings_of
from tests.test_kill import untimed

WORDS = [
    "--task", "registers", "--steps", "2-2", "--problems-count", "2", "--chains", "3", "--concurrency", "2",
    "--turns", "2", "--draft-tokens", "12", "--target-tokens", "12", "--chunk-tokens", "8", "--threads", "1", "--plain",
]  # fmt: skip
FEW = replace(PARAMS, chains=2)
FILES = {"settings.json", "decisions.jsonl", "chains.jsonl", "solutions.jsonl", "summary.json", "report.html"}


class FullDisk:
    """The system's calls that write: the one numbered `fails_at` and all after it fail, a write after half of its
    bytes. Told by patches of `files`, `jsonl` and `os`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails_at: int | None = None) -> None:
        self.calls = 0
        self.fails_at = fails_at
        patch, fsync, replace, write_text = monkeypatch.setattr, os.fsync, Path.replace, Path.write_text
        disk = self

        def full(then: Callable[[], object] | None = None) -> None:
            disk.calls += 1
            if disk.fails_at is not None and disk.calls >= disk.fails_at:
                if then is not None:
                    then()
                raise OSError(errno.ENOSPC, "No space left on device")

        class File:
            """A raw file that counts its writes."""

            def __init__(self, path: Path) -> None:
                self._raw = path.open("ab", buffering=0)

            def write(self, data: bytes) -> int:
                full(lambda: self._raw.write(data[: len(data) // 2]))
                # Short, as the system may: the writer goes on from there.
                return self._raw.write(data[: max(1, len(data) - 3)])

            def __getattr__(self, name: str) -> Any:
                return getattr(self._raw, name)

        def counted_fsync(file: int) -> None:
            full()
            fsync(file)

        def counted_replace(path: Path, target: Path) -> Path:
            full()
            return replace(path, target)

        def counted_text(path: Path, text: str, **how: Any) -> int:
            full(lambda: write_text(path, text[: len(text) // 2], **how))
            return write_text(path, text, **how)

        patch(jsonl, "_open_to_append", File)
        patch(os, "fsync", counted_fsync)
        patch(Path, "replace", counted_replace)
        patch(Path, "write_text", counted_text)


def check_whole(folder: Path) -> None:
    """Every line that is there is whole, and of a chain no decision is missing."""
    chains = [chain_from_line(line) for line in read_lines(folder / "chains.jsonl")]
    decisions = read_decisions(folder / "decisions.jsonl")
    assert [d.decision_seq for d in decisions] == list(range(len(decisions)))
    logged = {(d.problem, d.chain, d.turn) for d in decisions}
    saved = {(c.problem_id, c.chain) for c in chains}
    assert len(saved) == len(chains)
    assert all((c.problem_id, c.chain, t.turn) in logged for c in chains for t in c.turns)
    solutions = read_solutions(folder / "solutions.jsonl")
    assert all((s.problem_id, number) in saved for s in solutions for number in s.chains)


def test_a_disk_that_is_full_from_any_write_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    disk = FullDisk(monkeypatch)
    whole = run(tmp_path / "whole", params=FEW, calibrator=frozen())
    total = disk.calls
    assert total > 50
    for at in range(1, total + 1):
        folder = tmp_path / str(at)
        disk.calls, disk.fails_at = 0, at
        engine = FakeEngine()
        with pytest.raises((OSError, InputError), match=r"No space left on device") as full:
            run(folder, engine=engine, params=FEW, calibrator=frozen())
        assert str(folder) in str(full.value)
        assert not any(path.name.endswith(".partial") for path in folder.iterdir())
        if (folder / "chains.jsonl").exists():
            check_whole(folder)
            # Who had ended is saved, but for the one that met the full disk and those behind it.
            assert engine.in_flight == 0
        disk.fails_at = None
        saved = (folder / "chains.jsonl").read_bytes() if (folder / "chains.jsonl").exists() else b""
        again = run(folder, params=FEW, calibrator=frozen(), resume=True)
        assert again.chains == whole.chains and again.ballots == whole.ballots
        assert (folder / "chains.jsonl").read_bytes().startswith(saved)
        check_whole(folder)


def test_what_had_ended_before_the_disk_was_full_is_saved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    disk = FullDisk(monkeypatch)
    run(tmp_path / "whole", params=FEW, calibrator=frozen(), concurrency=1)
    chains = (tmp_path / "whole" / "chains.jsonl").read_bytes()
    sizes = set()
    for at in range(4, disk.calls, 7):
        disk.calls, disk.fails_at = 0, at
        with pytest.raises(OSError, match="No space left"):
            run(tmp_path / str(at), params=FEW, calibrator=frozen(), concurrency=1)
        saved = (tmp_path / str(at) / "chains.jsonl").read_bytes()
        assert chains.startswith(saved) and (not saved or saved.endswith(b"\n"))
        sizes.add(len(saved))
    assert len(sizes) > 5


def test_a_decision_that_cannot_be_saved_ends_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The engine tells of it in a callback, where an exception would end nothing."""
    add = RunFolder.add_decision

    def full(folder: RunFolder, decision: Any) -> None:
        if decision.decision_seq >= 5:
            raise OSError(errno.ENOSPC, "No space left on device", "decisions.jsonl")
        add(folder, decision)

    monkeypatch.setattr(RunFolder, "add_decision", full)
    with pytest.raises(OSError, match="decisions.jsonl"):
        run(tmp_path, params=FEW, calibrator=frozen())


def test_one_folder_has_one_writer(tmp_path: Path) -> None:
    first = RunFolder.open(tmp_path, settings_of(), resume=False)
    with pytest.raises(InputError, match=r"decisions\.jsonl is being written by another process"):
        RunFolder.open(tmp_path, settings_of(), resume=True)
    first.close()
    RunFolder.open(tmp_path, settings_of(), resume=True).close()


def test_a_writer_that_begins_anew_leaves_a_locked_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    with JsonlWriter(path) as first:
        first.write({"a": 1})
        with pytest.raises(InputError, match="another process"):
            JsonlWriter(path)
    assert [line.fields for line in read_lines(path)] == [{"a": 1}]


def test_a_calibration_is_never_half_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "state.npz"
    frozen().save(path)
    before = path.read_bytes()
    other = Mondrian(0.4)
    disk = FullDisk(monkeypatch)
    for at in (1, 2):
        disk.calls, disk.fails_at = 0, at
        with pytest.raises(OSError, match="No space left") as full:
            other.save(path)
        assert full.value.filename == str(path)
        assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]
    assert load_state(path).calibrator == "mondrian"


def test_a_file_takes_the_place_of_another_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    files.write_text(path, "before")
    with pytest.raises(OSError, match="x.json"), files.atomically(path) as partial:
        partial.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_text() == "before" and [p.name for p in tmp_path.iterdir()] == ["x.json"]


# -- the command, with the built-in pair --


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """Words of a run with a frozen calibration, less its folder, and the folder of one that nothing disturbed."""
    path = tmp_path_factory.mktemp("faults")
    assert cli.main(["calibrate", *WORDS, "--out", str(path / "state.npz")]) == 0
    words = ["run", *WORDS, "--calibration", str(path / "state.npz"), "--frozen"]
    assert cli.main([*words, "--out", str(path / "whole")]) == 0
    return words, path / "whole"


def one_line(capsys: pytest.CaptureFixture[str], words: list[str], code: int) -> str:
    capsys.readouterr()
    assert cli.main(words) == code
    err = capsys.readouterr().err
    assert err.startswith("atts: error: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize(("lane", "step"), [("draft", 25), ("target", 1), ("target", 4)])
def test_a_lane_that_raises_in_mid_run(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    calibrated: tuple[list[str], Path],
    lane: str,
    step: int,
) -> None:
    words, whole = calibrated
    words = [*words, "--out", str(tmp_path)]
    launch, runners, steps = Runner.launch, [], []

    def fault(runner: Runner, *args: Any) -> Any:
        if runner not in runners:
            runners.append(runner)
        # The draft's is the first to be launched: it has the first tokens to write.
        if (runners.index(runner) == 0) == (lane == "draft"):
            steps.append(runner)
            if len(steps) >= step:
                raise RuntimeError("device-side assert")
        return launch(runner, *args)

    with monkeypatch.context() as patches:
        patches.setattr(Runner, "launch", fault)
        line = one_line(capsys, words, 1)
    assert "lane failed: RuntimeError: device-side assert" in line
    saved = (tmp_path / "chains.jsonl").read_bytes()
    count = saved.count(b"\n")
    assert f"{count} chains are saved in {tmp_path}; go on with: atts run " in line and "--resume" in line
    check_whole(tmp_path)
    assert cli.main([*words, "--resume"]) == 0
    assert untimed(tmp_path / "chains.jsonl") == untimed(whole / "chains.jsonl")
    assert (tmp_path / "chains.jsonl").read_bytes().startswith(saved)


def test_the_figures_at_the_end_meet_a_full_disk(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, calibrated: Any
) -> None:
    words, out = [*calibrated[0], "--out", str(tmp_path / "out")], tmp_path / "out"
    write_text = Path.write_text

    def full(path: Path, text: str, **how: Any) -> int:
        if "report.html" in path.name:
            write_text(path, text[:100], **how)
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_text(path, text, **how)

    with monkeypatch.context() as patches:
        patches.setattr(Path, "write_text", full)
        line = one_line(capsys, words, 2)
    assert f"{out / 'report.html'}: No space left on device; 6 chains are saved in {out}; free some space, then" in line
    assert {p.name for p in out.iterdir()} == FILES - {"report.html"}
    # Of --json too: a device is written to, not replaced.
    assert cli.main([*words, "--resume", "--json", "/dev/full"]) == 2
    assert "/dev/full: No space left on device" in capsys.readouterr().err
    chains = (out / "chains.jsonl").read_bytes()
    assert cli.main([*words, "--resume", "--json", str(tmp_path / "x.json")]) == 0
    assert (out / "chains.jsonl").read_bytes() == chains and {p.name for p in out.iterdir()} == FILES
    assert json.loads((tmp_path / "x.json").read_text()) == json.loads((out / "summary.json").read_text())


def atts(words: list[str], limit: int | None = None, **how: Any) -> subprocess.CompletedProcess[str]:
    """`atts` in a process of its own. limit: bytes that a file of it may have."""

    def limited() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, "-m", "atts_engine.cli.main", *words]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | how
    return subprocess.run(command, preexec_fn=limited, text=True, check=False, **streams)


def test_a_file_that_may_grow_no_further(tmp_path: Path, calibrated: tuple[list[str], Path]) -> None:
    words, whole = calibrated
    words = [*words, "--out", str(tmp_path)]
    done = atts(words, limit=(whole / "chains.jsonl").stat().st_size // 2)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert ".jsonl: File too large; " in done.stderr and "free some space, then go on with: atts run" in done.stderr
    check_whole(tmp_path)
    assert cli.main([*words, "--resume"]) == 0
    assert untimed(tmp_path / "chains.jsonl") == untimed(whole / "chains.jsonl")


@pytest.mark.long
def test_a_file_system_that_is_full(tmp_path: Path, calibrated: tuple[list[str], Path]) -> None:
    """A real one, where the kernel lets this user mount it."""
    words, whole = calibrated
    mounted = ["unshare", "-Urm", "sh", "-c", 'mount -t tmpfs -o size=64k tmpfs "$0" && exec "$@"', str(tmp_path)]
    try:
        if subprocess.run([*mounted, "true"], capture_output=True, check=False).returncode:
            pytest.skip("no tmpfs can be mounted here")
    except FileNotFoundError:
        pytest.skip("there is no unshare here")
    script = (
        "head -c 45056 /dev/zero > ballast; "
        '"$@" 2>&1; echo "code $?"; mount -o remount,size=8m . && "$@" --resume > /dev/null; cat out/chains.jsonl'
    )
    run_words = [sys.executable, "-m", "atts_engine.cli.main", *words, "--out", "out"]
    command = [*mounted, "sh", "-c", f"cd {tmp_path} && {script}", "sh", *run_words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "No space left on device; " in done.stdout and "\ncode 2\n" in done.stdout, (done.stdout, done.stderr)
    assert "Traceback" not in done.stdout
    found = tmp_path / "found.jsonl"
    found.write_text("".join(line + "\n" for line in done.stdout.splitlines() if line.startswith('{"problem_id')))
    assert untimed(found) == untimed(whole / "chains.jsonl")


def test_the_streams_may_be_full_too(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        assert atts(["dance"], stderr=full).returncode == 2
        done = atts(["doctor", "--json", "-"], stdout=full)
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == "atts: error: No space left on device"
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
