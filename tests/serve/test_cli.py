"""`atts serve` refuses what it cannot use in one line, before a model is loaded."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from atts_engine.cli.main import main

PAIR = ["serve", "--draft", "tiny-draft", "--target", "tiny-target"]


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "keys").write_text("\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        cases = (
            (["--port", str(taken.getsockname()[1])], "cannot be had"),
            (["--port", "70000"], "--port must be 0 to 65535"),
            (["--host", "no address"], "no such address"),
            (["--api-key-file", str(tmp_path / "keys")], "no key in this file"),
            (["--api-key-file", str(tmp_path / "missing")], "missing"),
            (["--drain-s", "-1"], "--drain-s must be 0 or more"),
            (["--max-chains", "0"], "max_chains must be 1 or more"),
            (["--timeout-s", "0"], "timeout_s must be more than 0"),
            (["--frozen"], "--frozen needs --calibration"),
            (["--alpha", "1"], "alpha must be inside (0, 1)"),
            (["--target", "no-such-model"], "no-such-model"),
            (["--strategy", "draft"], "--strategy"),
            (["--monitor"], "--monitor"),
        )
        for words, said in cases:
            assert main([*PAIR, *words]) == 2, words
            out, err = capsys.readouterr()
            assert out == "" and said in err and err.count("\n") == 1, (words, err)
    assert main(["serve", "--target", "tiny-target"]) == 2
    assert "--draft is missing" in capsys.readouterr().err


def test_a_calibration_must_fit_the_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from atts_engine.conformal import Adaptive, Meta

    made = Adaptive(0.4, meta=Meta(draft="another", draft_tokens=24, temperature=0.8))
    made.save(tmp_path / "c.npz")
    words = ["--port", "0", "--kv-tokens", "512", "--calibration", str(tmp_path / "c.npz"), "--frozen"]
    assert main([*PAIR, *words, "--draft-tokens", "24"]) == 2
    assert "draft: is 'another', expected" in capsys.readouterr().err
