"""The command line: what users type wrongly ends in one line and exit code 2, Ctrl-C in 130, never in a traceback."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from atts_engine import ops
from atts_engine.cli import main as cli
from atts_engine.cli import options
from atts_engine.cli.progress import Progress, Tail
from atts_engine.cli.tables import Table, plain_table, seconds
from atts_engine.cli.view import Heading, LiveView, PlainView
from atts_engine.config import EngineConfig
from atts_engine.pipeline import Chain, ChainEvent, TokensEvent, Turn, VerdictEvent
from tests.fake_engine import some_problems

PAIR = ["--draft", "tiny-draft", "--target", "tiny-target"]
SMALL = ["--chains", "2", "--turns", "3", "--draft-tokens", "12", "--target-tokens", "12", "--concurrency", "2"]


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    path = tmp_path / "problems.jsonl"
    lines = [
        {"id": "a", "problem": "a = 85; b = a-43; b?", "answer": "42"},
        {"id": "b", "problem": "a = 20; b = a+11; b?"},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def fails(capsys: pytest.CaptureFixture[str], argv: Sequence[str], code: int = 2) -> str:
    """The one line that a failing command writes."""
    assert cli.main(list(argv)) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("atts: ")
    return captured.err


def run_words(problems: Path, out: Path, *more: str) -> list[str]:
    return ["run", *PAIR, "--problems", str(problems), "--out", str(out), *SMALL, *more]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--alpha", "0"], "alpha must be inside (0, 1), not 0.0"),
        (["--alpha", "1.5"], "alpha must be inside (0, 1), not 1.5"),
        (["--alpha", "nan"], "alpha"),
        (["--alpha", "x"], "argument --alpha: invalid float value: 'x'"),
        (["--chains", "0"], "chains must be a whole number, 1 or more, not 0"),
        (["--turns", "0"], "turns must be"),
        (["--draft-tokens", "-3"], "draft_tokens must be"),
        (["--temperature", "-1"], "temperature"),
        (["--top-p", "0"], "top_p"),
        (["--dtype", "int4"], "dtype must be one of"),
        (["--page-size", "0"], "page_size"),
        (["--chunk-tokens", "0"], "chunk_tokens must be 1 or more"),
        (["--lane-threads", "many"], "argument --lane-threads: invalid choice: 'many'"),
        (["--overlap", "yes"], "unrecognized arguments: yes"),
        (["--concurrency", "0"], "--concurrency must be 1 or more"),
        (["--limit", "0"], "--limit must be 1 or more"),
        (["--draft", "nowhere"], "no model 'nowhere'"),
        (["--target", "vllm://host:1"], "vllm://HOST"),
        (["--problems", "nowhere.jsonl"], "no such file: nowhere.jsonl"),
        (["--task", "registers"], "either --problems FILE or --task registers"),
        (["--calibrator", "best"], "no calibrator 'best'; there are adaptive"),
        (["--calibrator", "tracker", "--policy", "exact-count"], "the tracker tests scores"),
        (["--cold-start", "accept:x"], "--cold-start must be RULE:N"),
        (["--policy", "top-b"], "policy must be one of threshold, exact-count, not 'top-b'"),
        (["--frozen"], "--frozen needs --calibration FILE"),
        (["--calibration", "nowhere.npz"], "no calibration file at nowhere.npz"),
        (["--mode", "sync", "--strategy", "draft"], "--mode sync is --strategy atts-sync"),
        (["--strategy", "best"], "strategy must be one of atts, "),
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["--json", "/nowhere/x.json"], "--json /nowhere/x.json"),
    ],
)
def test_bad_input_is_one_line_before_any_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, problems: Path, flags: list[str], said: str
) -> None:
    assert said in fails(capsys, run_words(problems, tmp_path / "out", *flags))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"id": "c", "problem": ', "line 3: not valid JSON"),
        ('["c"]', "line 3: must be a JSON object, not list"),
        ('{"id": "c"}', "line 3: field 'problem' is missing"),
        ('{"id": "a", "problem": "x"}', "line 3: id 'a' was used by an earlier line"),
    ],
)
def test_a_malformed_problem_is_named_by_its_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, problems: Path, line: str, said: str
) -> None:
    with problems.open("a") as file:
        file.write(line + "\n")
    assert said in fails(capsys, run_words(problems, tmp_path / "out"))


@pytest.mark.parametrize("command", ["run", "calibrate", "eval"])
def test_settings_of_the_lanes_reach_the_engine(command: str) -> None:
    def settings(*flags: str) -> tuple[object, ...]:
        args = cli.build_parser().parse_args([command, *PAIR, "--out", "x", *flags])
        made = options.engine_config(args)
        return made.overlap, made.graphs, made.lane_threads, made.profile, made.packed_weights

    plain = EngineConfig("tiny-draft", "tiny-target")
    default = plain.overlap, plain.graphs, plain.lane_threads, plain.profile, plain.packed_weights
    assert settings() == default == (None, None, None, False, None)
    flags = ("--overlap", "--graphs", "--lane-threads", "each", "--profile", "--packed-weights")
    assert settings(*flags) == (True, True, "each", True, True)
    assert settings("--no-overlap", "--no-graphs", "--no-packed-weights") == (False, False, None, False, False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")
def test_graphs_that_cannot_be_had_are_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, problems: Path
) -> None:
    assert "paged_attention" in fails(capsys, run_words(problems, tmp_path / "out", "--graphs"))


def test_the_lanes_may_run_ahead_on_a_thread_each(tmp_path: Path, problems: Path) -> None:
    chains = []
    for i, flags in enumerate((["--lane-threads", "one"], ["--overlap", "--lane-threads", "each"])):
        assert cli.main(run_words(problems, tmp_path / f"{i}", "--strategy", "draft", *flags)) == 0
        chains.append(sorted(_untimed((tmp_path / f"{i}" / "chains.jsonl").read_text())))
    assert chains[0] == chains[1]


def test_a_folder_that_cannot_be_written(capsys: pytest.CaptureFixture[str], tmp_path: Path, problems: Path) -> None:
    assert "cannot write to" in fails(capsys, run_words(problems, problems / "out"))


def test_commands_that_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert "invalid choice: 'dance'" in fails(capsys, ["dance"])
    assert "required: COMMAND" in fails(capsys, [])
    assert "strategy must be one of atts, " in fails(
        capsys, ["eval", "--task", "registers", "--strategies", "best", "--out", "x"]
    )
    assert "--out is missing" in fails(capsys, ["eval", "--task", "registers"])
    assert "--steps must be" in fails(capsys, ["eval", "--task", "registers", "--steps", "6-4", "--out", "x"])
    assert "no such file" in fails(capsys, ["eval", "--traces", "nowhere.jsonl"])
    assert "--frozen would learn nothing" in fails(
        capsys, ["calibrate", "--task", "registers", "--frozen", "--out", "x.npz"]
    )


def test_an_unexpected_error_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from atts_engine.cli import doctor

    def broken() -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(doctor, "findings", broken)
    line = fails(capsys, ["doctor"], code=1)
    assert line == "atts: unexpected error: RuntimeError: first line second line (add --traceback to see where)\n"
    with pytest.raises(RuntimeError):
        cli.main(["doctor", "--traceback"])


def test_help_and_version_need_no_torch() -> None:
    code = "import sys; from atts_engine.cli.main import main\ntry: main(['run', '--help'])\nexcept SystemExit: pass\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "assert 'torch' not in sys.modules"], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0


def test_run_calibrate_and_resume_with_the_built_in_pair(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, problems: Path
) -> None:
    state, out = tmp_path / "state.npz", tmp_path / "out"
    words = ["calibrate", *PAIR, "--problems", str(problems), "--out", str(state), *SMALL, "--json", "-"]
    assert cli.main(words) == 0
    learnt = json.loads(capsys.readouterr().out)
    assert learnt["scores"] == learnt["takeovers"]["decisions"] > 0

    words = run_words(problems, out, "--calibration", str(state), "--frozen", "--json", "-")
    assert cli.main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["chains"] == 4 and found["graded"] == 1
    assert {p.name for p in out.iterdir()} == {
        "settings.json", "decisions.jsonl", "chains.jsonl", "solutions.jsonl", "summary.json", "report.html"
    }  # fmt: skip
    assert json.loads((out / "summary.json").read_text()) == found

    chains = sorted(_untimed((out / "chains.jsonl").read_text()))
    lines = (out / "chains.jsonl").read_text().splitlines(keepends=True)
    (out / "chains.jsonl").write_text("".join(lines[:1]) + lines[1][:20])
    assert "add --resume" in fails(capsys, words)
    assert cli.main([*words, "--resume", "--concurrency", "1"]) == 0
    assert sorted(_untimed((out / "chains.jsonl").read_text())) == chains
    capsys.readouterr()
    assert "params.alpha: was 0.4, is 0.3" in fails(capsys, run_words(problems, out, "--alpha", "0.3", "--resume"))
    assert "other conditions" in fails(
        capsys, run_words(problems, tmp_path / "o2", "--calibration", str(state), "--temperature", "0.5")
    )


def _untimed(text: str) -> list[str]:
    chains = []
    for line in text.splitlines():
        chain = json.loads(line)
        del chain["duration_s"], chain["wait_s"]
        for turn in chain["turns"]:
            del turn["t_draft"], turn["t_verdict"], turn["t_target"]
        chains.append(json.dumps(chain))
    return chains


def test_eval_compares_and_describes_its_own_traces(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["eval", "--task", "registers", "--steps", "2", "--problems-count", "2", *SMALL, "--out", str(out)]
    assert cli.main([*words, "--strategies", "target,atts,atts-sync"]) == 0
    printed = capsys.readouterr().out
    assert "chain accuracy" in printed and "any of 2" in printed and "atts - target: vote" in printed
    assert "on the Pareto front by target tokens: " in printed and "; by time: " in printed
    assert "\x1b" not in printed
    assert set(json.loads((out / "summary.json").read_text())["strategies"]) == {"target", "atts", "atts-sync"}
    assert (out / "report.html").stat().st_size > 10_000
    assert cli.main(["eval", "--traces", str(out / "atts" / "chains.jsonl"), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["chains"] == 4


def test_ctrl_c_says_what_was_saved_and_how_to_go_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["run", "--task", "registers", "--problems-count", "500", "--chains", "2", "--out", str(out), "--plain"]
    process = subprocess.Popen(
        [sys.executable, "-m", "atts_engine.cli.main", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A suite that runs in the background of a shell has SIGINT ignored, and a child would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        chains = out / "chains.jsonl"
        while process.poll() is None and not (chains.exists() and chains.stat().st_size > 0):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert err.count("\n") == 1
    saved = len(chains.read_text().splitlines())
    assert f"{saved} chains are saved in {out}; go on with: atts run --task registers" in err
    assert err.rstrip().endswith("--resume")


def test_doctor_knows_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json", "-"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["row_invariance"]["holds"] is True
    assert "reference" in found["ops"]["score_tokens"]["available"]
    assert found["models"] == {"tiny-draft": True, "tiny-target": True}
    assert found["ops"]["rms_norm"]["obstacles"]["native"]["cuda"] == "CPU only"
    assert "apache-tvm-ffi" in found["packages"]
    assert ("a CUDA device" in found["csrc_cuda"]) != torch.cuda.is_available()
    packing = found["packed_weights"]["obstacle"]
    assert packing == ops.packing_obstacle("cpu", torch.bfloat16)
    assert f"packed weights  {'in bfloat16 on the CPU' if packing is None else 'none: '}" in captured.err
    assert "kernels on cpu" in captured.err


def test_the_doctor_tells_what_runs_and_why_others_do_not() -> None:
    from atts_engine.cli.doctor import kernel_table

    facts = {"chosen": {"cpu": "native"}, "obstacles": {"reference": {}, "native": {"cuda": "CPU only"}}}
    assert kernel_table({"rope": facts}, "cpu").rows == (("rope", "can run", "runs"),)
    elsewhere = kernel_table({"rope": facts}, "cuda")
    assert elsewhere.rows == (("rope", "no GPU", "CPU only"),) and "no cuda device" in str(elsewhere.note)


def test_an_implementation_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str], problems: Path) -> None:
    line = fails(capsys, ["calibrate", *PAIR, "--problems", str(problems), "--ops", "cutlass", "--out", "x.npz"])
    assert "ops must be one of reference, triton, native, flashinfer, cuda, not 'cutlass'" in line


def watched(view_of: type[PlainView] | type[LiveView], stream: io.StringIO) -> str:
    problem = some_problems(1)[0]
    heading = Heading("atts", "d", "t", 0.4, "1 problem")
    with view_of(heading, Progress(1, 2, lambda chains: chains[0].final_answer, str.__eq__), stream) as view:
        view.started(problem)
        view.event(TokensEvent("p0", 0, 0, "draft", "one\n\ntwo [bold]", 5))
        view.event(VerdictEvent("p0", 0, 0, 1.0, 0.25, True, None))
        view.event(TokensEvent("p0", 0, 0, "target", "three", 2))
        view.tick()
        chains = [
            Chain("p0", 0, c, "0", "0", 1.0, (Turn(0, "x", 5, 1.0, p_value=0.25, takeover=True),)) for c in (0, 1)
        ]
        view.event(ChainEvent(chains[0]))
        view.finished(problem, chains, restored=False)
        view.tick()
    return stream.getvalue()


def test_plain_view_writes_one_line_a_problem() -> None:
    lines = watched(PlainView, io.StringIO()).splitlines()
    assert lines[0] == "atts: d -> t, alpha 0.4, 1 problem"
    assert lines[1].startswith("[1/1] p0: answer 0, right; 2/2 chains right; 2/2 spans taken over; ")
    assert len(lines) == 2


def test_live_view_shows_authors_and_verdicts() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = watched(LiveView, Terminal())
    assert "one  two [bold]" in shown
    assert "⇄ 0.25" in shown and "three" in shown and "taken over" in shown


def test_a_tail_is_bounded_and_keeps_its_end() -> None:
    tail = Tail()
    for i in range(200):
        tail.add("draft" if i % 2 else "target", f"piece {i} ")
    text = "".join(piece for _, piece in tail.pieces)
    assert text.endswith("piece 199 ")
    assert 400 <= len(text) <= 420 and len(text) == tail.length


def test_tables_and_times() -> None:
    table = plain_table(Table("t", ("name", "n"), (("a", "1"), ("long", "22")), note="so"))
    assert table == "t\nname   n\n----  --\na      1\nlong  22\nso\n"
    assert [seconds(s) for s in (None, 0.84, 42, 185, 7300)] == ["-", "0.8 s", "42 s", "3 min 05 s", "2 h 01 min"]
