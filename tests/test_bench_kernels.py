"""The microbenchmarks: the arithmetic of limits and ratios, and every case on the CPU at its smallest."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from atts_engine import ops
from bench.kernels.__main__ import main
from bench.kernels.cases import SIZES, Case, cases
from bench.kernels.devices import Facts, Runner, bytes_allocated, input_sets, race
from bench.kernels.peers import PEERS, Peer, why_absent
from bench.kernels.run import measure_case
from bench.kernels.table import Row, against_best_peer, duration, limit, size, table

CPU = torch.device("cpu")
FACTS = Facts("cpu", "a machine", bandwidth=1e10, link=1e9, peak=1e12, cache=1 << 20)


def case(**changes: int) -> Case:
    return replace(Case("linear", "N=1", torch.float32, lambda *_: (), bytes=0), **changes)


def row(provider: str, seconds: float, **changes: bool) -> Row:
    ours = provider in ops.IMPLEMENTATIONS
    known = Row("linear", "N=1", "float32", provider, ours, False, seconds, 1e-4, "memory", 1 << 20, 0.25, False, True)
    return replace(known, **changes)


def test_the_limit_is_whatever_takes_longest() -> None:
    assert limit(case(bytes=10**9), FACTS) == (0.1, "memory")
    assert limit(case(bytes=10**9, flops=10**12), FACTS) == (1.0, "products")
    assert limit(case(bytes=10**9, flops=10**10, link_bytes=10**9), FACTS) == (1.0, "link")


def test_ours_is_compared_with_the_best_peer_that_does_all_the_work() -> None:
    rows = [row("reference", 2e-3), row("a", 3e-3), row("b", 1e-3), row("c", 1e-4, part=True)]
    assert against_best_peer(rows, rows[0]) == pytest.approx(0.5)
    assert against_best_peer(rows, rows[1]) is None
    assert against_best_peer(rows[:1], rows[0]) is None
    lines = table(rows, FACTS).splitlines()
    assert "memory 10 GB/s, bf16 products 1.00 TFLOP/s" in lines[0]
    wanted = ["linear", "N=1", "float32", "reference", "2", "ms", "100", "us", "5.0%", "0.50x", "1", "MiB", "0.2"]
    assert lines[3].split()[: len(wanted)] == wanted
    assert lines[-1].endswith("part of the work")


def test_units() -> None:
    assert [duration(t) for t in (2.5, 0.012, 3.21e-5, 5e-9)] == ["2.5 s", "12 ms", "32.1 us", "5 ns"]
    assert [size(n) for n in (0, 1023, 2048, 3 << 20, 5 << 30)] == ["0 B", "1023 B", "2 KiB", "3 MiB", "5 GiB"]


def test_inputs_go_round_until_they_outgrow_the_cache() -> None:
    assert input_sets(1 << 20, 1 << 20) == (4, True)
    assert input_sets(1 << 30, 1 << 20) == (1, True)
    assert input_sets(10, 1 << 20) == (256, False)
    assert input_sets(1 << 30, 1 << 30, budget=1 << 31) == (2, False)


def test_providers_take_turns_and_each_inside_its_own_scope() -> None:
    order: list[str] = []
    runners = [
        Runner("reference", [lambda: order.append(ops.chosen("rms_norm", "cpu"))], lambda: ops.use("reference")),
        Runner("peer", [lambda: order.append("peer")]),
    ]
    race(CPU, runners, rounds=2)
    assert [len(runner.seconds) for runner in runners] == [2, 2]
    assert order.index("peer") < len(order) - 1 and {"reference", "peer"} == set(order)
    assert all(runner.median() > 0 for runner in runners)


def test_a_provider_that_cannot_be_made_ready_leaves_the_others() -> None:
    def broken() -> None:
        raise RuntimeError("no kernel\nat all")

    runners = [Runner("good", [lambda: None]), Runner("bad", [broken])]
    assert race(CPU, runners, rounds=2) == {"bad": "RuntimeError: no kernel"}
    assert [len(runner.seconds) for runner in runners] == [2, 0]


def test_bytes_allocated_counts_what_goes_in_between_too() -> None:
    x = torch.ones(1000)
    assert 8000 <= bytes_allocated(CPU, lambda: (x + 1) * 2) < 9000
    assert bytes_allocated(CPU, lambda: x.add_(1)) < 1000


def test_every_op_has_a_case_and_cases_are_valid_calls() -> None:
    found = list(cases("tiny", torch.float32))
    assert {c.op for c in found} == set(ops.available())
    with ops.checked():
        for c in found:
            getattr(ops, c.op)(*c.make(CPU, 1))
    for name in SIZES:
        assert all(c.bytes > 0 for c in cases(name, torch.bfloat16))


def test_limits_count_what_must_move() -> None:
    by_op = {c.op: c for c in cases("tiny", torch.float16)}
    s = SIZES["tiny"]
    assert by_op["score_tokens"].bytes == (97 * 32 + 3 * 32) * 2 + 3 * 12
    assert by_op["score_tokens"].flops == 2 * 3 * 32 * 97
    assert by_op["kv_append"].bytes == 2 * (3 * 2 * 2 * 16 * 2) + 3 * 8
    assert by_op["paged_attention"].flops == 4 * 2 * (6 + 7 + 8 + 9) * s.heads * s.dim


def test_a_peer_that_fails_is_left_out_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise TypeError("no such argument\nmore")

    peers = (Peer("one", "torch", broken, cuda=False), Peer("two", "no_such_package", broken, cuda=False))
    monkeypatch.setitem(PEERS, "rms_norm", peers)
    absent: dict[str, str] = {}
    rms_norm = next(c for c in cases("tiny", torch.float16) if c.op == "rms_norm")
    rows = measure_case(rms_norm, CPU, FACTS, 1, absent)
    assert [r.provider for r in rows] == ["reference"] and rows[0].max_abs_diff == 0.0
    assert absent == {"one": "TypeError: no such argument", "two": "no_such_package is not installed"}
    assert why_absent(Peer("three", "torch", broken), CPU) == "needs a CUDA device"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_command_measures_all_ops(dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "kernels.json"
    assert main(["--size", "tiny", "--device", "cpu", "--dtype", dtype, "--rounds", "1", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert {r["op"] for r in found["rows"]} == set(ops.available())
    assert found["provenance"]["command"].startswith("python -m bench.kernels --size tiny")
    close = [r for r in found["rows"] if r["max_abs_diff"] is not None]
    assert close and all(r["max_abs_diff"] < 0.1 for r in close)
    assert "FlashInfer rmsnorm (needs a CUDA device)" in capsys.readouterr().out


def test_an_op_without_a_case_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--op", "softmax"]) == 2
    assert "no case for softmax" in capsys.readouterr().err
