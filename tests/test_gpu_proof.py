"""`python -m bench.gpu_proof` without a GPU: the dry run of every part, recorded failures, oracles and tables."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from atts_engine import ops
from atts_engine.evaluation.simulation.work import TurnWork, cut, load_turns, tokens_of
from atts_engine.models import ModelConfig
from bench import readme
from bench.gpu_proof import ahead, build, engine, kernels, once, profiles, turns
from bench.gpu_proof.__main__ import PARTS, main
from bench.gpu_proof.apart import run_apart, serve
from bench.gpu_proof.context import Context, DeviceLost, Found, Line, OutOfTime, ran, run_parts, written
from bench.gpu_proof.exact import ORACLES, WRITTEN, excess, poisoned, relative
from bench.gpu_proof.job import ALONE, ATTS, FEWER, SYNC
from bench.gpu_proof.lanes import decode_rows, least_seconds, verify_rows
from bench.gpu_proof.models import CONFIGS, NoText, random_model
from bench.gpu_proof.report import file_name, newest, section
from bench.kernels.cases import cases
from bench.kernels.devices import Facts
from bench.kernels.run import measure_case

CPU = torch.device("cpu")


@dataclass
class Step:
    """A part that does as it is told."""

    error: BaseException | None = None
    seen: list[Context] = field(default_factory=list)

    def measure(self, ctx: Context, found: Found) -> None:
        self.seen.append(ctx)
        found["kept"] = 1
        if self.error is not None:
            raise self.error

    def lines(self, found: Found) -> list[Line]:
        return [("a figure", str(found["kept"]), "1")]


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any], Path]:
    """The dry run of all parts: exit code, record, folder."""
    out = tmp_path_factory.mktemp("proof")
    code = main(["--out", str(out), "--dry-run", "--minutes", "5"])
    (path,) = out.glob("dry_gpu_proof_*.json")
    return code, json.loads(path.read_text()), out


def test_the_dry_run_touches_every_part(dry: tuple[int, dict[str, Any], Path]) -> None:
    code, record, out = dry
    parts = record["parts"]
    assert code == 0 and list(parts) == [name for name, _, _ in PARTS]
    assert {cell["status"] for cell in parts.values()} == {"ok"}, {n: c["error"] for n, c in parts.items()}
    assert record["dry"] and record["device"] == "cpu" and not [*out.glob("*.new"), *out.glob("*.state")]
    assert {"commit", "date", "torch", "packages", "command"} <= set(record["provenance"])
    names = {line[1] for line in record["lines"]}
    assert {"memory bandwidth", "decode 14B, 2 chains", "job, ATTS", "verify hidden by overlap", "[profiles]"} <= names
    if importlib.util.find_spec("matplotlib"):
        assert {path.name for path in out.glob("*.png")} == {"decode.png", "kernels.png"}


def test_every_op_and_implementation_is_checked(dry: tuple[int, dict[str, Any], Path]) -> None:
    found = dry[1]["parts"]["correctness"]["found"]
    cells = {(c["op"], c["impl"]) for c in found["ops"]}
    wanted = {(op, i) for op in ops.available() for i in ops.IMPLEMENTATIONS if ops.obstacle(op, i, CPU) is None}
    assert cells == wanted
    assert all(model["right"] for model in found["models"].values())


def test_engine_and_job_say_what_the_issue_asks(dry: tuple[int, dict[str, Any], Path]) -> None:
    parts = dry[1]["parts"]
    pair = parts["engine"]["found"]["pair"]
    assert pair["takeover_tokens_forwarded"] == 1
    assert set(pair["verdict_delay_passes"]) == {"streamed", "whole"}
    assert all(parts["engine"]["found"][name]["verify"]["tokens_per_s"] > 0 for name in CONFIGS)
    job = parts["job"]["found"]
    assert set(job["runs"]) == set(job["predicted_s"]) == {ALONE, SYNC, ATTS, FEWER}
    assert set(job["ratios"]) == set(job["of_ceiling"]) == {ATTS, FEWER}
    assert job["ceiling"][FEWER] > job["ceiling"][ATTS]
    assert job["paper"] == {"latency": 56.7, "throughput": 4.14}
    assert job["ceiling_recorded"] == pytest.approx(3.6, abs=0.01)
    lanes = job["grid"][0]["lanes"]["target"]
    assert {"T_c", "T_m", "T_s", "r"} <= set(lanes)
    tokens = job["draft_tokens"] + job["target_tokens"]
    assert job["runs"][ALONE]["lanes"]["target"]["sampled_tokens"] == tokens
    assert job["runs"][ATTS]["lanes"]["target"]["sampled_tokens"] == job["target_tokens"]


def test_a_part_that_fails_or_runs_out_of_time_stops_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = (
        ("one", 0.5, Step(RuntimeError("broken\nmore"))),
        ("two", 0.2, Step(OutOfTime())),
        ("three", 0.1, Step(SystemExit("gave up"))),
        ("four", 0.2, Step()),
    )
    assert main(["--out", str(tmp_path), "--dry-run"], parts) == 1
    (path,) = tmp_path.glob("*.json")
    found = json.loads(path.read_text())["parts"]
    assert [cell["status"] for cell in found.values()] == ["failed", "out of time", "failed", "ok"]
    assert found["one"]["error"] == "RuntimeError: broken" and found["three"]["error"] == "SystemExit: gave up"
    assert all(cell["found"] == {"kept": 1} for cell in found.values())
    said = capsys.readouterr().out
    assert said.startswith("DRY RUN") and "RuntimeError: broken" in said and said.count("a figure") == 4


_CHILD = """
import json, os, sys, time
path = sys.argv[1]
state = json.load(open(path))
def keep(doing):
    state["doing"] = doing
    json.dump(state, open(path + ".new", "w"))
    os.replace(path + ".new", path)
for cell in ("good", "lost", "dead", "hung", "last"):
    if cell not in state["cell"]["found"] and cell not in state["lost"]:
        keep(cell)
        if cell == "lost":
            state["cell"] |= {"status": "device lost", "error": "illegal address"}
            keep(cell)
            sys.exit()
        if cell == "dead":
            os.abort()
        if cell == "hung" or sys.argv[2] == "late":
            time.sleep(600)
    state["cell"]["found"].setdefault(cell, state["lost"].get(cell))
state["cell"]["status"] = "ok"
keep(cell)
"""
"""The child's side of `bench.gpu_proof.apart` without torch, whose import takes seconds."""


def test_a_part_goes_on_behind_what_the_device_did_not_survive(tmp_path: Path) -> None:
    """Three cells end their processes, each in its way, and what was found before and behind them is there."""
    ctx, state, kept = Context(CPU, tmp_path, False), tmp_path / "cells.state", []
    ctx.deadline = time.perf_counter() + 100
    cell: Found = {"status": "running", "error": None, "found": {}}
    command = [sys.executable, "-c", _CHILD, str(state), "in time"]
    run_apart(command, state, ctx, cell, lambda: kept.append(len(cell["found"])), hang_s=1.0)
    assert cell["status"] == "ok" and not state.exists() and kept
    assert cell["found"] == {
        "good": None, "lost": "illegal address", "dead": "its process ended with -6", "hung": "nothing came for 1 s",
        "last": None,
    }  # fmt: skip


def test_a_part_that_does_not_look_at_the_clock_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.gpu_proof.apart._GRACE_S", 0.0)
    ctx, state = Context(CPU, tmp_path, False), tmp_path / "cells.state"
    ctx.deadline = time.perf_counter() + 1
    cell: Found = {"status": "running", "error": None, "found": {}}
    run_apart([sys.executable, "-c", _CHILD, str(state), "late"], state, ctx, cell, lambda: None)
    assert cell["status"] == "out of time" and cell["error"] == "its share of --minutes was over, in good"


def test_a_part_is_served_behind_what_an_earlier_process_left(tmp_path: Path) -> None:
    state, facts = tmp_path / "s.state", Facts("cuda", "a card", 1.0, 2.0, 3.0, 4)
    cell = {"status": "running", "error": None, "found": {"old": 1}}
    written(state, {"cell": cell, "doing": "", "lost": {"second": "it hung"}, "facts": asdict(facts)})

    class Two(Step):
        def measure(self, ctx: Context, found: Found) -> None:
            assert ctx.limits() == facts and found == {"old": 1}
            assert ctx.begin("second") == "it hung" and ctx.begin("first") is None
            assert json.loads(state.read_text())["doing"] == "first"
            raise DeviceLost("illegal address")

    serve("s", Two(), Context(CPU, tmp_path, False), state)
    left = json.loads(state.read_text())
    assert left["cell"]["status"] == "device lost" and left["cell"]["error"] == "DeviceLost: illegal address"
    assert left["doing"] == "first" and left["cell"]["found"] == {"old": 1}


def test_kernels_go_on_behind_a_lost_case(tmp_path: Path) -> None:
    ctx = Context(CPU, tmp_path, True, facts=Facts("cpu", "a machine", 1.0, 1.0, 1.0, 1))
    gate = next(f"{case.op} {case.label}" for case in cases("tiny", torch.float32) if case.op == "gate")
    ctx.lost[gate] = "it hung"
    found: Found = {}
    kernels.measure(ctx, found)
    assert found["failed"] == {gate: "it hung"} and "gate" not in {row["op"] for row in found["rows"]}
    again = json.loads(json.dumps(found))
    kernels.measure(ctx, again)
    assert again == found and (gate, "failed", "it hung") in kernels.lines(found)


def test_what_is_not_compiled_in_time_is_left_out(tmp_path: Path) -> None:
    compiling = ahead.Ahead(tmp_path)
    for op, script in (
        ("sample", "pass"),
        ("rms_norm", "print('no nvcc'); exit(1)"),
        ("kv_append", "import time; time.sleep(99)"),
    ):
        compiling.running[op] = subprocess.Popen(
            [sys.executable, "-c", script], stdout=-1, text=True, start_new_session=True
        )
    compiling.settle(2.0)
    found = json.loads(ahead.ready_file(tmp_path).read_text())
    assert found == {"sample": "", "rms_norm": "no nvcc", "kv_append": "its kernels were not compiled in time"}
    rows, absent = [], {}
    for case in cases("tiny", torch.float32):
        if case.op == "rms_norm":
            without = {"torch": "not today", "native": "nor this"}
            facts = Facts("cpu", "a machine", 1.0, 1.0, 1.0, 1)
            rows += measure_case(case, CPU, facts, 1, absent, without=without)
    assert [row.provider for row in rows] == ["reference"]
    assert absent["torch rms_norm"] == "not today"


def test_headers_of_curand_are_searched_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toolkit, site = tmp_path / "toolkit", tmp_path / "site"
    headers = site / "nvidia" / "cu13" / "include"
    for folder in (toolkit / "bin", toolkit / "include", headers):
        folder.mkdir(parents=True)
    (headers / "curand_kernel.h").touch()
    monkeypatch.syspath_prepend(str(site))
    nvcc = str(toolkit / "bin" / "nvcc")
    assert ahead.curand_flags(nvcc) == f"-Xcompiler -idirafter,{headers}"
    (toolkit / "include" / "curand_kernel.h").touch()
    assert ahead.curand_flags(nvcc) == ahead.curand_flags(None) == ""


def test_only_some_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path), "--dry-run", "--only", "facts", "--only", "profiles"]) == 0
    (path,) = tmp_path.glob("*.json")
    assert list(json.loads(path.read_text())["parts"]) == ["facts", "profiles"]
    assert main(["--out", str(tmp_path), "--dry-run", "--only", "memory"]) == 2
    assert "no part is named memory" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so_and_measures_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path)]) == 2
    assert "--dry-run" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_time_that_a_part_leaves_over_is_the_next_ones() -> None:
    ctx, deadlines = Context(CPU, Path(), True), []

    class Watch(Step):
        def measure(self, ctx: Context, found: Found) -> None:
            super().measure(ctx, found)
            deadlines.append(ctx.deadline)

    run_parts(ctx, (("a", 1, Watch()), ("b", 3, Watch())), 4.0, lambda outcome: None)
    assert deadlines[1] - deadlines[0] == pytest.approx(180)
    ctx.deadline = 0.0
    assert ctx.left() == 0.0
    with pytest.raises(OutOfTime):
        ctx.check()


def test_what_has_no_oracle_is_compared_bit_for_bit() -> None:
    bitwise = set(ops.available()) - set(ORACLES)
    assert bitwise == {
        "gate", "kv_append", "kv_copy_pages", "kv_gather", "kv_scatter", "kv_slots", "kv_swap", "sample", "score_gate",
    }  # fmt: skip
    for op, places in WRITTEN.items():
        names = [a.name for a in getattr(torch.ops.atts, op).default._schema.arguments if a.is_write]
        declared = [a.name for a in getattr(torch.ops.atts, op).default._schema.arguments]
        assert [declared[i] for i in places] == names, op


def test_an_error_is_measured_against_what_is_allowed() -> None:
    exact = torch.linspace(-1, 1, 101).double()
    half = exact.half()
    assert excess(half, half, exact) < 1
    assert excess(half + 0.01, half, exact) > 1
    assert excess(half.float(), half, exact) == float("inf")
    assert relative(half, exact) < 1 < 4 < relative(half + 0.01, exact)
    assert excess(torch.full_like(half, torch.nan), half, exact) == float("inf")


def test_a_file_holds_no_infinity(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    written(path, {"a": [float("nan"), (1.0, float("inf"))], "b": {"c": -0.5}})
    assert json.loads(path.read_text()) == {"a": [None, [1.0, None]], "b": {"c": -0.5}}


def test_poison_fills_what_nobody_writes() -> None:
    with poisoned():
        assert torch.empty(4).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_bounds_of_steps() -> None:
    model = random_model("m", tiny_config(), CPU, torch.float32)
    facts = Facts("cpu", "a machine", bandwidth=1e9, link=1e9, peak=1e30, cache=1)
    small, large = (least_seconds(model, facts, decode_rows(1, length)) for length in (10, 110))
    # 100 tokens more of keys and values: 2 x layers x kv heads x head size x 4 bytes each.
    assert large - small == pytest.approx(100 * 2 * 2 * 1 * 8 * 4 / 1e9)
    assert engine.weights_bytes(model) == (64 * 16 + 2 * (32 * 16 + 16 * 16 + 2 * 32 * 16 + 16 * 32)) * 4
    rows = verify_rows(n=3, before=5, span=2)
    assert (rows.rows, rows.scored, rows.cached) == (6, 6, 21)
    assert rows.attended == 3 * (6 + 7)


def tiny_config() -> ModelConfig:
    return ModelConfig(
        family="qwen2", vocab_size=64, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8,
        intermediate_size=32, rms_norm_eps=1e-6, rope_theta=1e4, rope_scaling=None, max_positions=64,
        tie_embeddings=True, eos_token_ids=(0,), qkv_bias=True, qk_norm=False,
    )  # fmt: skip


def test_shapes_have_the_parameters_that_their_names_say() -> None:
    def parameters(c: ModelConfig) -> int:
        attention = c.hidden_size * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
        layer = attention + 3 * c.hidden_size * c.intermediate_size
        return c.num_layers * layer + (1 if c.tie_embeddings else 2) * c.vocab_size * c.hidden_size

    sizes = {name: parameters(config) / 1e9 for name, config in CONFIGS.items()}
    assert sizes == pytest.approx({"1.5B": 1.54, "7B": 7.61, "14B": 14.77}, abs=0.01)
    assert NoText(9, (0,)).decode([1, 2]) == ""


def test_recorded_turns() -> None:
    recorded = load_turns()
    assert [len(problem) for problem in recorded.job] == [16] * 8
    assert recorded.takeover_rate == pytest.approx(2507 / 6074)
    # The chosen problems stand for the whole job where it matters most: how much the target writes.
    own = turns.ceiling(*tokens_of(recorded.job))
    assert own == pytest.approx(turns.ceiling(recorded.draft_tokens, recorded.target_tokens), rel=0.05)
    half = turns.fewer_takeovers(recorded.job)
    assert sum(tokens_of(half)) == sum(tokens_of(recorded.job))
    taken = [sum(w.target > 0 for p in job for chain in p for w in chain) for job in (recorded.job, half)]
    assert taken[1] == -(-taken[0] // 2)
    part = cut(recorded.job, problems=2, chains=3, turns=1, scale=10.0)
    assert [[len(chain) for chain in problem] for problem in part] == [[1] * 3] * 2
    assert part[0][0][0] == TurnWork(max(1, round(recorded.job[0][0][0].draft / 10)), part[0][0][0].target)


def test_turns_are_counted_from_a_trace_file(tmp_path: Path) -> None:
    turn = {"turn": 0, "draft": "x" * 30, "ppl": 1.5, "percentile": None, "takeover": True, "target": "y" * 12}
    chain = {"problem_id": "p", "problem_index": 0, "chain": 0, "gold": None, "final_answer": None, "duration_s": 1.0}
    path = tmp_path / "traces.jsonl"
    path.write_text("".join(json.dumps(chain | {"problem_id": f"p{i}", "turns": [turn]}) + "\n" for i in range(9)))
    found = turns.derive(path)
    assert found["problems"] == [[[[10, 4, 1]]]]
    assert found["whole"] == {"chains": 9, "turns": 9, "takeovers": 9, "draft_tokens": 90, "target_tokens": 36}
    assert "x" * 3 not in json.dumps(found["problems"])


def test_output_of_nsight_compute() -> None:
    text = "\n".join(
        ["==PROF== Connected", '"ID","Kernel Name","Metric Name","Metric Value"']
        + [
            f'"{i}","score(int, float)","{name}","{value}"'
            for i, value in enumerate(("1,024.5", "7"))
            for name in profiles.METRICS
        ]
    )
    assert profiles.kernels_of(text) == {"score": {"launches": 2, **dict.fromkeys(profiles.METRICS, 1024.5)}}
    assert profiles.kernels_of("==ERROR== no permission") == {}
    told = profiles.lines({"kernels": {"gate": profiles.kernels_of(text), "sample": {"error": "no permission"}}})
    assert told[0][0] == "gate: score" and told[1] == ("profile of sample", "failed", "no permission")


def test_a_case_is_run_once_for_a_profiler(capsys: pytest.CaptureFixture[str]) -> None:
    assert once.main("gate", "tiny") == 0 and once.main("softmax", "tiny") == 2
    assert capsys.readouterr().out.splitlines() == ["gate: 1 cases", "softmax: 0 cases"]


def test_one_model_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def broken(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine, "_one_model", broken)
    found: Found = {}
    with pytest.raises(RuntimeError, match="1.5B: RuntimeError: out of memory; 7B"):
        engine.measure(Context(CPU, tmp_path, True), found)
    assert found["pair"]["takeover_tokens_forwarded"] == 1


def test_flags_of_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    assert build.cuda_flags(CPU, "nvcc") == ["-DATTS_CUDA=OFF"]
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    flags = build.cuda_flags(torch.device("cuda"), "/opt/nvcc")
    assert flags[0] == "-DATTS_CUDA=ON" and "-DATTS_CUDA_ARCHITECTURES=90a-real" in flags


def test_the_newest_result_of_each_device_goes_into_the_pages(tmp_path: Path) -> None:
    assert file_name("NVIDIA H100 80GB HBM3", "2026-01-31", False) == "gpu_proof_nvidia-h100-80gb-hbm3_2026-01-31.json"
    for device, date in (("A", "2026-01-01"), ("A", "2026-02-01"), ("B", "2026-01-15")):
        where = {"command": "c", "date": date, "torch": "2", "commit": "abc"}
        record = {
            "device": device,
            "provenance": where,
            "lines": [["kernels", "gate", date, "|"], ["job", "j", "1", ""]],
        }
        (tmp_path / file_name(device, date, False)).write_text(json.dumps(record))
    (tmp_path / file_name("A", "2026-09-01", True)).write_text("a dry run is no result")
    results = newest(tmp_path)
    assert [record["provenance"]["date"] for _, record in results] == ["2026-02-01", "2026-01-15"]
    page = f"before\n{readme.GPU_BEGIN}old{readme.GPU_END}after"
    text = readme.gpu_updated("docs/kernels.md", page, results)
    assert "| gate | 2026-02-01 | \\| |" in text and "| j |" not in text
    assert "(../bench/results/gpu_proof_a_2026-02-01.json)" in text
    assert readme.gpu_updated("docs/kernels.md", text, []) == f"before\n{readme.GPU_BEGIN}{readme.GPU_END}after"
    assert section([]) == ""


def test_the_pages_show_what_lies_under_results(root: Path) -> None:
    for page in readme.GPU_PAGES:
        text = (root / page).read_text(encoding="utf-8")
        assert readme.gpu_updated(page, text, newest(readme.RESULTS.parent)) == text, "run python -m bench.readme"


def test_a_command_that_takes_too_long_is_ended_with_its_children() -> None:
    """A child that lived on would hold the pipe open for as long as it sleeps."""
    with pytest.raises(subprocess.TimeoutExpired):
        ran(["bash", "-c", "sleep 1000 & wait"], 0.1)
    assert ran(["echo", "said"], 10.0).stdout == "said\n"
