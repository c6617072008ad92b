"""The implementation "cuda": when it is chosen, what it says where it cannot run, and, with the library's host forms
behind csrc/tvm_ffi.cpp, every op through it against the reference."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from atts_engine import ops
from atts_engine.errors import InputError
from atts_engine.ops import cuda, dispatch

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def test_what_is_missing_is_named_in_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "built", lambda: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(cuda, "lacking", cuda.lacking.__wrapped__)
    with pytest.raises(InputError) as refused:
        ops.use("cuda")
    for words in ("nvcc and apache-tvm-ffi at installation", "the apache-tvm-ffi wheel", "a CUDA device"):
        assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    assert ops.obstacle("gate", "cuda", "cuda").short == "not built"
    assert ops.obstacle("gate", "cuda", "cpu").short == "GPU only"
    assert ops.obstacle("rope", "cuda", "cuda").short == "no kernel"


def test_it_runs_only_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "lacking", dict)
    dispatch._Selection.forget()
    assert all(ops.chosen(op, "cuda") != "cuda" for op in ops.available())
    assert set(ops.available()) >= dispatch.CUDA_OPS
    with ops.use("cuda"):
        assert all(ops.chosen(op, "cuda") == "cuda" for op in dispatch.CUDA_OPS)
        assert ops.chosen("rope", "cuda") != "cuda"
        with pytest.raises(InputError, match="gate: the CUDA kernels of csrc/ cannot run on cpu"):
            ops.chosen("gate", "cpu")


@pytest.fixture(scope="module")
def module(csrc_install: Path, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """csrc/tvm_ffi.cpp with the host forms behind it."""
    if importlib.util.find_spec("tvm_ffi") is None:
        pytest.skip("needs apache-tvm-ffi")
    compiler = shutil.which("c++")
    assert compiler is not None
    place = tmp_path_factory.mktemp("tvm_ffi") / "atts_tvm_ffi.so"

    def config(name: str) -> str:
        command = [sys.executable, "-m", "tvm_ffi.config", f"--{name}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    done = subprocess.run(
        [
            *(compiler, "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"),
            *("-Wno-unused-parameter", "-DATTS_TVM_FFI_DEVICE=kDLCPU", f"-I{root / 'tests' / 'tvm_ffi_host'}"),
            *(f"-I{root / 'csrc' / 'include'}", f"-isystem{config('includedir')}"),
            *(f"-isystem{config('dlpack-includedir')}", str(root / "csrc" / "tvm_ffi.cpp")),
            *(str(root / "tests" / "tvm_ffi_host" / "host.cpp"), str(csrc_install / "lib" / "libatts.a")),
            *(f"-L{config('libdir')}", "-ltvm_ffi", "-pthread", "-o", str(place)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return place


def _forget() -> None:
    cuda._module.cache_clear()
    cuda._function.cache_clear()


@pytest.fixture
def on_host(module: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ops forced to "cuda", which takes CPU tensors here."""

    def zeros(op: str, like: Tensor, size: int) -> Tensor | None:
        return torch.zeros(size, dtype=torch.uint8) if size else None

    _forget()
    monkeypatch.setattr(cuda, "built", lambda: module)
    monkeypatch.setattr(cuda._Workspaces, "of", zeros)
    monkeypatch.setitem(dispatch._MACHINE, "cuda", lambda device_type: None)
    with ops.use("cuda"):
        yield
    _forget()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where ops forced to "cuda" take tensors: the CPU, by the host forms, or a GPU, by the kernels as installed."""
    if request.param == "cpu":
        request.getfixturevalue("on_host")
        yield "cpu"
        return
    if cuda.lacking():
        pytest.skip(f"the CUDA kernels of csrc/ lack {'; '.join(cuda.lacking().values())}")
    with ops.use("cuda"):
        yield "cuda"


def _same(found: Iterable[Tensor], wanted: Iterable[Tensor]) -> None:
    """To the bit, wherever they are."""
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("keys", "capacity"), [(1, 4), (3, 64), (2, 5000)])
def test_gate(device: str, keys: int, capacity: int) -> None:
    g = torch.Generator().manual_seed(capacity)
    mirror = [torch.zeros(keys, capacity), torch.zeros(keys).long(), torch.zeros(keys).long()]
    store = [t.clone().to(device) for t in mirror]
    for batch in (1, 7, 0, 40):
        score = torch.randint(0, 5, (batch,), generator=g).float()
        key = torch.randint(0, keys, (batch, 2), generator=g)[:, 0]  # with a stride
        level = torch.randint(0, (1 << 32) + 1, (batch,), generator=g)
        u = torch.randint(1, (1 << 32) + 1, (batch,), generator=g)
        insert = torch.rand(batch, generator=g) < 0.7
        moved = [t.to(device) for t in (score, key, level, u, insert)]
        found = ops.gate(*moved[:2], *store, *moved[2:])
        with ops.use("reference"):
            wanted = ops.gate(score, key, *mirror, level, u, insert)
        _same((*found, *store), (*wanted, *mirror))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_score_logits_with_any_strides(device: str, dtype: torch.dtype, rows: int) -> None:
    g = torch.Generator().manual_seed(rows)
    wide = (torch.randn(rows, 900, generator=g) * 4).to(dtype).to(device)
    ids = torch.randint(0, 300, (rows,), generator=g).to(device)
    for logits in (wide[:, :300].contiguous(), wide[:, 100:400], wide[:, ::3], wide[:, :300].t().contiguous().t()):
        exact = logits.double().log_softmax(1).gather(1, ids[:, None])[:, 0]
        torch.testing.assert_close(ops.score_logits(logits, ids).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bounds", [torch.int32, torch.int64])
def test_span_mean(device: str, bounds: torch.dtype) -> None:
    logprob = -torch.rand(9, generator=torch.Generator().manual_seed(0))
    cu_seqlens = torch.tensor([0, 2, 3, 9], dtype=bounds)
    found = ops.span_mean(logprob.to(device), cu_seqlens.to(device))
    with ops.use("reference"):
        _same(found, ops.span_mean(logprob, cu_seqlens))


@pytest.mark.parametrize("dtype", FLOATS)
def test_paging(device: str, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    fused = torch.randn(5, 3, 2, 8, generator=g).to(dtype)  # q, k and v of one product: rows and heads with strides
    across = torch.randn(5, 8, 2, generator=g)  # fp32 whatever the cache is, and gaps in its rows once transposed
    slots = torch.tensor([3, 0, 23, 7, 12])
    src, dst, pages, places = (torch.tensor(t) for t in ([0, 5], [2, 4], [5, 0, 3], [1, 3, 0]))

    def moves(device: str) -> list[Tensor]:
        kv = torch.zeros(3, 2, 6, 4, 2, 8, dtype=dtype, device=device)
        host = torch.zeros(4, 3, 2, 4, 2, 8, dtype=dtype, pin_memory=device == "cuda")
        rows, columns = fused.to(device), across.to(device).transpose(1, 2)
        ops.kv_append(rows[:, 1], rows[:, 2], kv[1], slots.to(device))
        ops.kv_append(columns, columns, kv[2], slots.to(device))
        ops.kv_copy_pages(kv, src.to(device), dst.to(device))
        ops.kv_swap(kv, host, pages.to(device), places, True)
        ops.kv_swap(kv, host, torch.tensor([1], device=device), torch.tensor([3]), False)
        gathered = ops.kv_gather(kv, pages.to(device))
        kept = gathered.clone()
        ops.kv_scatter(gathered, kv, pages.flip(0).to(device))
        if device == "cuda":
            torch.cuda.synchronize()  # the host's pool is written by then
        return [kv, host, kept]

    found = moves(device)
    with ops.use("reference"):
        wanted = moves("cpu")
    assert all(t.count_nonzero() for t in wanted)
    _same(found, wanted)


@pytest.mark.parametrize("dtype", FLOATS)
def test_rope_kv_append(device: str, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(1)
    q = torch.randn(5, 8, 6, generator=g).to(dtype).transpose(1, 2)
    k, v = torch.randn(2, 5, 2, 8, generator=g).to(dtype)
    angle, slots = torch.randn(5, 4, generator=g), torch.tensor([3, 0, 11, 7, 6])

    def turned(device: str) -> list[Tensor]:
        kv = torch.zeros(2, 3, 4, 2, 8, dtype=dtype, device=device)
        moved = [t.to(device) for t in (q, k, v, angle.cos(), angle.sin())]
        return [ops.rope_kv_append(*moved, kv, slots.to(device)), kv]

    found = turned(device)
    with ops.use("reference"):
        _same(found, turned("cpu"))
    assert found[0].is_contiguous() and found[1].count_nonzero()


@pytest.mark.gpu
def test_a_graph_replays_what_it_captured() -> None:
    """Scores and the gate behind them, with workspaces, against the same calls made one by one."""
    if cuda.lacking():
        pytest.skip(f"the CUDA kernels of csrc/ lack {'; '.join(cuda.lacking().values())}")
    g = torch.Generator().manual_seed(2)
    logits, ids = torch.randn(4, 40000, generator=g).cuda(), torch.randint(0, 40000, (4,), generator=g).cuda()
    bounds, key = torch.tensor([0, 1, 4]).cuda(), torch.zeros(2, dtype=torch.int64).cuda()
    half = torch.full((2,), 1 << 31).cuda()
    ring = (torch.rand(1, 8192, generator=g) * 4 + 9).cuda()

    def step(size: Tensor, head: Tensor) -> Tensor:
        score = ops.span_mean(ops.score_logits(logits, ids), bounds)[0]
        return ops.gate(score, key, ring, size, head, half, half, torch.zeros(2, dtype=torch.bool, device="cuda")).p

    size, head = torch.full((1,), 8000).cuda(), torch.full((1,), 8000).cuda()
    with ops.use("cuda"):
        wanted = step(size, head)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = step(size, head)
        for _ in range(3):
            found.zero_()
            graph.replay()
            assert torch.equal(found, wanted)


@pytest.mark.usefixtures("on_host")
def test_what_the_module_refuses_is_one_line() -> None:
    kv, ints = torch.zeros(3, 2, 6, 4, 2, 8), torch.zeros(2, dtype=torch.int64)
    score, ring = torch.zeros(2), torch.zeros(2, 4)
    flags = torch.zeros(2, dtype=torch.bool)
    for name, arguments, words in (
        ("kv_gather", (kv.transpose(0, 2), kv, ints, False), "kv_gather: kv must be contiguous"),
        ("kv_gather", (kv.double(), kv, ints, False), "kv must be float32, float16 or bfloat16"),
        ("kv_gather", (kv, kv, ints, True), "kv_scatter: the shape of dense does not fit"),
        ("kv_gather", (kv, kv.half(), ints, False), "the dtype of dense differs"),
        ("kv_copy_pages", (kv, ints.int(), ints), "src must be int64"),
        ("kv_copy_pages", (kv, ints, ints), "kv_copy_pages: a page or slot is written twice"),
        ("span_mean", (score, ints, score, score), "the shape of score does not fit"),
        ("score_logits", (ring[:, ::2], ints, score, None), "the rows of logits have gaps"),
        ("score_logits_workspace", (score,), "logits must have two dimensions"),
        (
            "gate",
            (score, ints, ring, ints, ints, ints, ints, flags, ints, ints, ints, flags, score, None),
            "p must be float64",
        ),
    ):
        with pytest.raises(InputError) as refused:
            cuda._call(name, *arguments)
        assert words in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.usefixtures("on_host")
def test_a_softcap_is_refused() -> None:
    with pytest.raises(InputError, match="has no softcap"):
        ops.score_logits(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), 30.0)


@pytest.mark.usefixtures("on_host")
def test_a_module_of_other_sources_says_so() -> None:
    with pytest.raises(InputError, match="was built from other sources; install again"):
        cuda._call("softmax")
