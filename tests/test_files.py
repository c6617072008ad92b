"""Where commands write: what is in the way is named before any work, and a killed write leaves what stood there."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from atts_engine.cli import main as cli
from atts_engine.conformal import Mondrian
from atts_engine.errors import InputError
from atts_engine.evaluation import files
from atts_engine.evaluation.files import atomically, check_file, write_text
from atts_engine.evaluation.replay_plot import draw_rates
from atts_engine.ops import tuning
from bench.output import out_file

SMALL = ["--task", "registers", "--steps", "2-2", "--problems-count", "2", "--chains", "2"]
FOLDERS = {
    "run": SMALL,
    "eval": SMALL,
    "eval --sweep-chains 1": SMALL,
    "eval --suite": SMALL,
    "tune": [*SMALL, "--budget-tokens", "100"],
    "simulate": ["--draft", "qwen2.5-1.5b", "--target", "llama-3.1-70b", "--gpus", "8", "--problems", "2"],
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("kept", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


@pytest.mark.parametrize("command", FOLDERS)
@pytest.mark.parametrize(
    ("out", "reason"),
    [
        ("file", "{place}/file is a file, not a folder; choose another --out"),
        ("file/run", "{place}/file is a file, not a folder; choose another --out"),
        ("loop", "{place}/loop is a symbolic link that leads nowhere; choose another --out"),
        ("pipe/run", "{place}/pipe is a device or a pipe, not a folder; choose another --out"),
        ("", "argument --out: must name a place, not an empty text"),
    ],
)
def test_what_is_in_the_way_of_a_folder_is_named(
    capsys: pytest.CaptureFixture[str], place: Path, command: str, out: str, reason: str
) -> None:
    name, *more = command.split()
    assert cli.main([name, *more, *FOLDERS[command], "--out", str(place / out) if out else ""]) == 2
    told = capsys.readouterr()
    assert told.err.count("\n") == 1 and reason.format(place=place) in told.err
    assert (place / "file").read_text(encoding="utf-8") == "kept"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("folder", "a folder stands there; name a file"),
        ("nowhere/x", "no such folder: {place}/nowhere; make it first"),
        ("file/x", "{place}/file is a file, not a folder; make it first"),
        ("loop", "a symbolic link that leads nowhere; name another file"),
        ("pipe", "a device or a pipe; name a file"),
    ],
)
def test_a_file_that_cannot_be_written_is_named_before_any_work(
    capsys: pytest.CaptureFixture[str], place: Path, name: str, reason: str
) -> None:
    with pytest.raises(InputError) as refused:
        check_file(place / name, "--out")
    assert str(refused.value) == f"--out {place / name}: {reason.format(place=place)}"
    assert cli.main(["calibrate", *SMALL, "--out", str(place / name)]) == 2
    assert capsys.readouterr().err == f"atts: error: {refused.value}\n"
    with pytest.raises(Exception, match="the file"):
        out_file(str(place / name))
    assert not [path for path in place.iterdir() if path.name.endswith(".partial")]


def test_a_link_is_followed_and_a_device_is_never_replaced(place: Path) -> None:
    (place / "link").symlink_to("file")
    write_text(place / "link", "new")
    assert (place / "link").is_symlink() and (place / "file").read_text(encoding="utf-8") == "new"
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(place / "socket"))
        for there in ("pipe", "socket", "folder"):
            with pytest.raises(OSError, match="stands there"):
                write_text(place / there, "x")
            with pytest.raises(OSError, match="stands there"):
                Mondrian(0.4).save(place / there)
            assert not (place / there).is_file()
    Mondrian(0.4).save(place / "link")
    assert (place / "link").is_symlink()


def _plot(path: Path) -> None:
    cells = {"0": {"n": 1, "rate": 0.5}}
    draw_rates({"adaptive": {"by_turn": cells, "by_problem": cells}}, 0.4, path)


def _table(path: Path) -> None:
    with atomically(path) as partial:
        tuning.save(tuning.merged(None, "a GPU", {}), partial)


@pytest.mark.parametrize(("name", "write"), [("rates.png", _plot), ("table.json", _table)])
def test_a_write_that_fails_leaves_what_stood_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, write: Callable[[Path], None]
) -> None:
    path = tmp_path / name
    write(path)
    whole = path.read_bytes()
    assert whole

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(path)
    assert path.read_bytes() == whole and list(tmp_path.iterdir()) == [path]
