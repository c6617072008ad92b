"""The implementation "cuda": when it is chosen, what it says where it cannot run, and, with the library's host forms
behind csrc/tvm_ffi.cpp, every op through it against the reference."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterator
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


@pytest.fixture
def on_host(module: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ops forced to "cuda", which takes CPU tensors here."""

    def zeros(op: str, like: Tensor, size: int) -> Tensor | None:
        return torch.zeros(size, dtype=torch.uint8) if size else None

    cuda._function.cache_clear()
    monkeypatch.setattr(cuda, "built", lambda: module)
    monkeypatch.setattr(cuda._Workspaces, "of", zeros)
    monkeypatch.setitem(dispatch._MACHINE, "cuda", lambda device_type: None)
    with ops.use("cuda"):
        yield
    cuda._function.cache_clear()


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize(("keys", "capacity"), [(1, 4), (3, 64), (2, 5000)])
def test_gate(keys: int, capacity: int) -> None:
    g = torch.Generator().manual_seed(capacity)
    store = [torch.zeros(keys, capacity), torch.zeros(keys).long(), torch.zeros(keys).long()]
    mirror = [t.clone() for t in store]
    for batch in (1, 7, 0, 40):
        score = torch.randint(0, 5, (batch,), generator=g).float()
        key = torch.randint(0, keys, (batch, 2), generator=g)[:, 0]  # with a stride
        level = torch.randint(0, (1 << 32) + 1, (batch,), generator=g)
        u = torch.randint(1, (1 << 32) + 1, (batch,), generator=g)
        insert = torch.rand(batch, generator=g) < 0.7
        found = ops.gate(score, key, *store, level, u, insert)
        with ops.use("reference"):
            wanted = ops.gate(score, key, *mirror, level, u, insert)
        for mine, theirs in zip((*found, *store), (*wanted, *mirror), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_score_logits_with_any_strides(dtype: torch.dtype, rows: int) -> None:
    g = torch.Generator().manual_seed(rows)
    wide = (torch.randn(rows, 900, generator=g) * 4).to(dtype)
    ids = torch.randint(0, 300, (rows,), generator=g)
    for logits in (wide[:, :300].contiguous(), wide[:, 100:400], wide[:, ::3], wide[:, :300].t().contiguous().t()):
        exact = logits.double().log_softmax(1).gather(1, ids[:, None])[:, 0]
        torch.testing.assert_close(ops.score_logits(logits, ids).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("bounds", [torch.int32, torch.int64])
def test_span_mean(bounds: torch.dtype) -> None:
    logprob = -torch.rand(9, generator=torch.Generator().manual_seed(0))
    cu_seqlens = torch.tensor([0, 2, 3, 9], dtype=bounds)
    found = ops.span_mean(logprob, cu_seqlens)
    with ops.use("reference"):
        wanted = ops.span_mean(logprob, cu_seqlens)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, wanted, strict=True))


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("dtype", FLOATS)
def test_paging(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    kv, mirror = (torch.zeros(3, 2, 6, 4, 2, 8, dtype=dtype) for _ in range(2))
    host, host_mirror = (torch.zeros(4, 3, 2, 4, 2, 8, dtype=dtype) for _ in range(2))
    fused = torch.randn(5, 3, 2, 8, generator=g).to(dtype)  # q, k and v of one product: rows and heads with strides
    across = torch.randn(5, 8, 2, generator=g).transpose(1, 2)  # fp32 whatever the cache is, and gaps in its rows
    slots = torch.tensor([3, 0, 23, 7, 12])
    src, dst, pages, places = (torch.tensor(t) for t in ([0, 5], [2, 4], [5, 0, 3], [1, 3, 0]))

    def run(kv: Tensor, host: Tensor) -> None:
        ops.kv_append(fused[:, 1], fused[:, 2], kv[1], slots)
        ops.kv_append(across, across, kv[2], slots)
        ops.kv_copy_pages(kv, src, dst)
        ops.kv_swap(kv, host, pages, places, True)
        ops.kv_swap(kv, host, torch.tensor([1]), torch.tensor([3]), False)

    run(kv, host)
    with ops.use("reference"):
        run(mirror, host_mirror)
    assert kv.count_nonzero() and host.count_nonzero()
    assert torch.equal(kv, mirror) and torch.equal(host, host_mirror)
    gathered = ops.kv_gather(kv, pages)
    assert torch.equal(gathered, kv.movedim(2, 0)[pages])
    ops.kv_scatter(gathered, kv, pages.flip(0))
    mirror.movedim(2, 0)[pages.flip(0)] = gathered
    assert torch.equal(kv, mirror)


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("dtype", FLOATS)
def test_rope_kv_append(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(1)
    kv, mirror = (torch.zeros(2, 3, 4, 2, 8, dtype=dtype) for _ in range(2))
    q = torch.randn(5, 8, 6, generator=g).to(dtype).transpose(1, 2)
    k, v = torch.randn(2, 5, 2, 8, generator=g).to(dtype)
    angle, slots = torch.randn(5, 4, generator=g), torch.tensor([3, 0, 11, 7, 6])
    turned = ops.rope_kv_append(q, k, v, angle.cos(), angle.sin(), kv, slots)
    with ops.use("reference"):
        wanted = ops.rope_kv_append(q, k, v, angle.cos(), angle.sin(), mirror, slots)
    assert torch.equal(turned, wanted) and turned.is_contiguous()
    assert torch.equal(kv, mirror) and kv.count_nonzero()


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
def test_a_module_of_other_sources_says_so() -> None:
    with pytest.raises(InputError, match="was built from other sources; install again"):
        cuda._call("softmax")
