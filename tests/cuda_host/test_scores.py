"""Scores, spans and the gate: the CUDA kernels of csrc/ on the host, and their forms for the CPU, against torch."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atts_engine import ops
from tests.abi import DTYPES, STATUS
from tests.cuda_host.calls import (
    COMPILER,
    SHARED,
    Form,
    build,
    counts,
    device_form,
    load,
    random,
    same,
    workspace,
)

ONE = 1 << 32

# span_mean ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[1], [31, 1, 32, 33], [500, 7, 64, 1, 129]])
def test_span_mean_has_the_bits_of_the_reference(form: Form, lengths: list[int]) -> None:
    logprob = random(sum(lengths), scale=4.0)
    if len(lengths) > 1:
        logprob[5] = float("nan")
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    score, total = torch.empty(len(lengths)), torch.empty(len(lengths), dtype=torch.float64)
    fields = {"logprob": logprob, "cu_seqlens": bounds, "score": score, "sum": total}
    assert form("span_mean", **fields, tokens=len(logprob), batch=len(lengths)) == 0
    wanted_score, wanted_sum = ops.span_mean(logprob, bounds)
    assert same(score, wanted_score) and same(total, wanted_sum)


@settings(max_examples=25)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=9), st.integers(0, 1 << 30))
def test_spans_of_any_lengths(host: ctypes.CDLL, lengths: list[int], seed: int) -> None:
    logprob, bounds = random(sum(lengths), scale=50.0), torch.tensor([0, *lengths]).cumsum(0)
    means, total = torch.empty(len(lengths)), torch.empty(len(lengths), dtype=torch.float64)
    fields = {"logprob": logprob, "cu_seqlens": bounds, "score": means, "sum": total}
    assert device_form(host, seed)("span_mean", **fields, tokens=len(logprob), batch=len(lengths)) == 0
    wanted_means, wanted_total = ops.span_mean(logprob, bounds)
    assert torch.equal(means, wanted_means) and torch.equal(total, wanted_total)


def test_span_mean_of_a_span_that_is_none(device: Form) -> None:
    logprob, error = torch.ones(8), torch.zeros(1, dtype=torch.int32)
    score, total = torch.empty(4), torch.empty(4, dtype=torch.float64)
    bounds = torch.tensor([0, 3, 3, 9, 8])
    fields = {"logprob": logprob, "cu_seqlens": bounds, "score": score, "sum": total, "error": error}
    assert device("span_mean", **fields, tokens=8, batch=4) == 0
    assert error.item() == STATUS["ERROR_BATCH"]
    assert score[0] == -1 and score[1:].isnan().all() and total[1:].isnan().all()


# score_logits -------------------------------------------------------------------------------------------------------


def logits_of(rows: int, vocab: int, dtype: torch.dtype, stride: int, offset: int = 0) -> torch.Tensor:
    storage = torch.zeros(offset + rows * stride, dtype=dtype)
    view = storage.as_strided((rows, vocab), (stride, 1), offset)
    view.copy_(random(rows, vocab, scale=6.0))
    return view


def score(form: Form, logits: torch.Tensor, ids: torch.Tensor, **fields: torch.Tensor | int | None) -> torch.Tensor:
    logprob = torch.full((len(ids),), 7.0)
    rows, vocab = logits.shape
    arrays = {"logits": logits, "ids": ids, "logprob": logprob}
    sizes = {"rows": rows, "vocab": vocab, "logits_stride": logits.stride(0), "dtype": DTYPES[logits.dtype]}
    assert form("score_logits", **arrays, **sizes, **{"threads": 1, **fields}) == 0
    return logprob


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 9, 1000, 17001])
def test_score_logits_is_as_good_as_torch(form: Form, dtype: torch.dtype, vocab: int) -> None:
    logits = logits_of(3, vocab, dtype, vocab + vocab % 8)
    ids = torch.tensor([0, vocab - 1, vocab // 2])
    found = score(form, logits, ids)
    oracle = torch.log_softmax(logits.double(), 1).gather(1, ids[:, None])[:, 0]
    torchs = torch.log_softmax(logits.float(), 1).gather(1, ids[:, None])[:, 0]
    assert bool(((found - oracle).abs() <= 3 * (torchs - oracle).abs() + 2e-6).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_logits_keeps_its_bits(host: ctypes.CDLL, device: Form, dtype: torch.dtype) -> None:
    """Alone or in company, aligned or not, its parts in one block or in several, in any order of these."""
    vocab = 40000  # 3 parts, of fp32 5
    logits = logits_of(3, vocab, dtype, vocab)
    ids = torch.tensor([1, 39999, 20000])
    found = score(device, logits, ids)
    shared = workspace(host, "score_logits", rows=3, vocab=vocab, logits_stride=vocab, dtype=DTYPES[dtype])
    assert shared.numel() > 512
    for seed in range(6):
        host.cuda_host_seed(ctypes.c_uint64(seed))
        apart = score(device, logits, ids, workspace=shared, workspace_bytes=8 * shared.numel())
        assert torch.equal(apart, found)
        assert not shared[:512].any()  # the tickets
    for row in range(3):
        moved = torch.zeros(vocab + 1, dtype=dtype)[1:]
        moved.copy_(logits[row])
        assert torch.equal(score(device, moved[None], ids[row : row + 1]), found[row : row + 1])


def test_score_logits_that_are_not_finite(form: Form) -> None:
    inf, nan = float("inf"), float("nan")
    logits = torch.zeros(6, 9000)  # two parts
    logits[0, 8999] = nan
    logits[1, 3] = inf
    logits[2] = -inf
    logits[3, 1:] = -inf
    logits[4, :8192] = -inf
    logits[5, 8192:] = -inf
    logits[5, 3] = -inf
    found = score(form, logits, torch.tensor([5, 4, 0, 0, 8999, 3]))
    assert found[:3].isnan().all()
    assert found[3] == 0 and abs(found[4] + torch.tensor(9000.0 - 8192).log()) < 1e-6 and found[5] == -inf


def test_spans_follow_the_logits(form: Form, host: ctypes.CDLL) -> None:
    host.cuda_host_reset_counts()
    logits, ids = logits_of(70, 50, torch.bfloat16, 56), torch.arange(70) % 50
    bounds = torch.tensor([0, 40, 41, 70])
    spans, total = torch.empty(3), torch.empty(3, dtype=torch.float64)
    logprob = score(form, logits, ids, cu_seqlens=bounds, score=spans, sum=total, batch=3)
    wanted_score, wanted_sum = ops.span_mean(logprob, bounds)
    assert torch.equal(spans, wanted_score) and torch.equal(total, wanted_sum)
    assert counts(host)["behind"] in (0, 1) and counts(host)["launches"] == 2 * counts(host)["behind"]


def test_an_id_outside_the_vocabulary_gives_nan(device: Form) -> None:
    logits, error = logits_of(3, 50, torch.float32, 50), torch.zeros(1, dtype=torch.int32)
    found = score(device, logits, torch.tensor([50, 3, -1]), error=error)
    assert found[[0, 2]].isnan().all() and found[1].isfinite()
    assert error.item() == STATUS["ERROR_KEY"]


# gate ---------------------------------------------------------------------------------------------------------------


def store_of(keys: int, capacity: int) -> dict[str, torch.Tensor]:
    return {"ring": torch.zeros(keys, capacity), "size": torch.zeros(keys).long(), "head": torch.zeros(keys).long()}


def batch_of(batch: int, keys: int, seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 40, (batch,), generator=g).float() / 4
    values[torch.rand(batch, generator=g) < 0.1] = float("nan")
    values[torch.rand(batch, generator=g) < 0.05] = float("-inf")
    return {
        "score": values,
        "key": torch.randint(0, keys, (batch,), generator=g),
        "level": torch.randint(0, ONE + 1, (batch,), generator=g),
        "u": torch.randint(1, ONE + 1, (batch,), generator=g),
        "insert": torch.rand(batch, generator=g) < 0.8,
    }


def results_of(batch: int) -> dict[str, torch.Tensor]:
    return {
        **{name: torch.full((batch,), 7, dtype=torch.int64) for name in ("greater", "ties", "n")},
        "takeover": torch.zeros(batch, dtype=torch.bool),
        "p": torch.zeros(batch, dtype=torch.float64),
    }


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize(("keys", "capacity"), [(1, 1), (3, 6), (1, 5000), (40, 2050)])
def test_gate_equals_the_reference(form: Form, host: ctypes.CDLL, keys: int, capacity: int, spread: bool) -> None:
    """Batches one after the other, of more rows than a block has threads and than a ring holds, on one workspace."""
    ours, wanted_store = store_of(keys, capacity), store_of(keys, capacity)
    if capacity > 1000:  # half full, so that a batch wraps around
        for store in (ours, wanted_store):
            store["ring"][:, : capacity - 40] = random(keys, capacity - 40, scale=5).mul(4).round().div(4)
            store["size"][:] = capacity - 40
            store["head"][:] = capacity - 40
    sizes = {"keys": keys, "capacity": capacity}
    shared = workspace(host, "gate", batch=300, **sizes) if spread else torch.zeros(0)
    assert (shared.numel() > 0) == (spread and capacity > 1024)
    room = {"workspace": shared, "workspace_bytes": 8 * shared.numel()} if shared.numel() else {}
    for seed, batch in enumerate((1, 17, 0, 300, 40)):
        inputs, results = batch_of(batch, keys, seed), results_of(batch)
        assert form("gate", **inputs, **results, **ours, **sizes, **room, batch=batch) == 0
        for name, value in ops.gate(**inputs, **wanted_store)._asdict().items():
            assert same(results[name], value), name
        for name, value in wanted_store.items():
            assert torch.equal(ours[name], value), name
        assert not shared.any()


BATCHES = st.lists(
    st.lists(
        st.tuples(
            st.sampled_from([0.0, 0.5, 1.0, float("nan"), float("inf"), -0.0]),
            st.integers(0, 3),
            st.sampled_from([0, 1, ONE // 3, ONE]),
            st.sampled_from([1, ONE // 2, ONE]),
            st.booleans(),
        ),
        max_size=12,
    ),
    max_size=4,
)


@settings(max_examples=25)
@given(st.integers(0, 1 << 30), st.integers(1, 5), BATCHES)
def test_gate_on_any_batches(
    host: ctypes.CDLL,
    seed: int,
    capacity: int,
    batches: list[list[tuple[float, int, int, int, bool]]],
) -> None:
    ours, wanted_store, call = store_of(4, capacity), store_of(4, capacity), device_form(host, seed)
    for rows in batches:
        kinds = {
            "score": torch.float32,
            "key": torch.int64,
            "level": torch.int64,
            "u": torch.int64,
            "insert": torch.bool,
        }
        columns = zip(*rows, strict=True) if rows else [()] * 5
        inputs = {name: torch.tensor(c, dtype=kinds[name]) for name, c in zip(kinds, columns, strict=True)}
        results = results_of(len(rows))
        assert call("gate", **inputs, **results, **ours, batch=len(rows), keys=4, capacity=capacity) == 0
        for name, value in ops.gate(**inputs, **wanted_store)._asdict().items():
            assert same(results[name], value), name
        assert all(torch.equal(ours[name], value) for name, value in wanted_store.items())


def test_rows_that_the_gate_cannot_take_are_left_out(device: Form) -> None:
    for name, value, status in (
        ("key", 3, "KEY"),
        ("key", -1, "KEY"),
        ("level", ONE + 1, "VALUE"),
        ("u", 0, "VALUE"),
        ("size", 7, "STORE"),
        ("head", 6, "STORE"),
    ):
        store, inputs, results = store_of(3, 6), batch_of(8, 3, 0), results_of(8)
        inputs["score"][:] = 1.0
        inputs["insert"][:] = True
        inputs["key"][:] = torch.tensor([0, 0, 1, 2, 2, 0, 0, 0])
        bad = store | inputs
        bad[name][2 if name in inputs else 1] = value
        before = {key: tensor.clone() for key, tensor in store.items()}
        error = torch.zeros(1, dtype=torch.int32)
        assert device("gate", **inputs, **results, **store, error=error, batch=8, keys=3, capacity=6) == 0
        assert error.item() == STATUS[f"ERROR_{status}"]
        refused = (inputs["key"] == 1) | (torch.arange(8) == 2)
        assert not results["n"][refused].any() and not results["takeover"][refused].any()
        assert (results["greater"][refused] == -1).all() and results["p"][refused].isnan().all()
        assert results["greater"][~refused].min() >= 0
        assert store["size"].tolist() == [5, int(before["size"][1]), 2]


# A kernel with a fault ----------------------------------------------------------------------------------------------

PEAKS = "  if (lane == 0) shared.peaks[warp] = peak;\n"
FAULTS = {
    "counts-before-ticket": ("gate.cuh", "  // the counts before the ticket\n    __syncthreads();\n", "\n"),
    "ticket-before-return": (
        "gate.cuh",
        "    __syncthreads();\n    if (!is_last) return;\n",
        "    if (!is_last) return;\n",
    ),
    "peaks-before-sums": ("score_logits.cuh", PEAKS + "  __syncthreads();\n", PEAKS),
}
"""(file, what it says, what it says without one of its barriers)"""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_missing_barrier_is_found(root: Path, runtime: Path, tmp_path: Path, fault: str) -> None:
    """A copy of a kernel without one of its barriers gives a wrong result for some order of warps and blocks."""
    name, right, wrong = FAULTS[fault]
    source = (root / "csrc" / "cuda" / name).read_text()
    assert source.count(right) == 1
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / name).write_text(source.replace(right, wrong))
    kernel = tmp_path / name.removesuffix("h")  # its own folder comes before every other
    shutil.copy(root / "csrc" / kernel.name, kernel)
    others = ["csrc/span_mean.cu"] if name == "score_logits.cuh" else []
    broken = load(build(root, tmp_path / "broken.so", [str(kernel), *others], *SHARED, objects=[runtime]))

    def wrong_results(seed: int) -> bool:
        form = device_form(broken, seed)
        if name == "score_logits.cuh":
            logits, ids = logits_of(1, 3000, torch.float32, 3000), torch.tensor([2])
            oracle = torch.log_softmax(logits.double(), 1)[0, 2]
            return not bool((score(form, logits, ids)[0] - oracle).abs() < 1e-5)
        store, inputs, results = store_of(1, 3000), batch_of(40, 1, 3), results_of(40)
        store["ring"][:], store["size"][:] = 5.0, 3000
        wanted = ops.gate(**inputs, **{key: tensor.clone() for key, tensor in store.items()})
        room = {"workspace": torch.zeros(50, dtype=torch.int64), "workspace_bytes": 400}
        status = form("gate", **inputs, **results, **store, **room, batch=40, keys=1, capacity=3000)
        return status != 0 or not all(same(results[key], value) for key, value in wanted._asdict().items())

    assert any(wrong_results(seed) for seed in range(10))


def test_no_kernel_reaches_beside_its_arrays(root: Path, tmp_path: Path) -> None:
    """tests/cuda_host/sanitize.cpp, with the address and undefined-behaviour sanitizers."""
    checks = "-fsanitize=address,undefined"
    (tmp_path / "probe.cpp").write_text("int main() { return 0; }")
    probe = [COMPILER or "g++", checks, str(tmp_path / "probe.cpp"), "-o", str(tmp_path / "probe")]
    if COMPILER is not None and subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("needs the sanitizers of g++")
    kernels = sorted(str(path.relative_to(root)) for path in root.glob("csrc/*.cu"))
    host_side = [f"csrc/{name}.cpp" for name in ("workspace", "gate_cpu", "paging_cpu")]
    sources = ["tests/cuda_host/run.cpp", "tests/cuda_host/sanitize.cpp", *host_side, *kernels]
    program = build(root, tmp_path / "sanitize", sources, checks, "-fno-sanitize-recover=all", "-O0")
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
