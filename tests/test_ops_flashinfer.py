"""FlashInfer behind the ops: the indices it is given, what is refused and in which words, the calls it is called with
against the real package where that is installed, and on a GPU the results."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from atts_engine import ops
from atts_engine.errors import InputError
from atts_engine.ops import flash

HALF = torch.float16
LACKING = flash.lacking()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """A package that only writes down what it was called with."""
    calls: list[tuple[str, dict[str, Any]]] = []

    class Wrapper:
        def __init__(self, workspace: Tensor, kv_layout: str) -> None:
            calls.append(("init", {"float_workspace_buffer": workspace, "kv_layout": kv_layout}))

        def plan(self, **arguments: Any) -> None:
            calls.append(("plan", arguments))

        def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
            calls.append(("run", {"q": q, "paged_kv_cache": paged_kv_cache}))
            return torch.zeros_like(q)

    def append(append_key: Tensor, append_value: Tensor, **arguments: Any) -> None:
        calls.append(("append", {"append_key": append_key, "append_value": append_value, **arguments}))

    module = ModuleType("flashinfer")
    module.BatchPrefillWithPagedKVCacheWrapper = Wrapper  # type: ignore[attr-defined]
    module.append_paged_kv_cache = append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(flash, "_WORKSPACE_BYTES", 16)
    return calls


def batch_of(counts: list[int], lengths: list[int], page: int, spare: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """(block_table, cu_q, kv_len), with pages in no order and -1 in places that no token fills."""
    needed = [-(-n // page) for n in lengths]
    order = torch.randperm(sum(needed), generator=torch.Generator().manual_seed(len(lengths))).tolist()
    table = torch.full((len(lengths), max(needed, default=0) + spare), -1, dtype=torch.int32)
    for row, n in enumerate(needed):
        table[row, :n] = torch.tensor([order.pop() for _ in range(n)], dtype=torch.int32)
    cu_q = torch.tensor([0, *counts]).cumsum(0).int()
    return table, cu_q, torch.tensor(lengths, dtype=torch.int32)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 40)), max_size=6), st.integers(1, 16), st.integers(0, 2))
def test_indices_name_the_page_and_place_of_every_token(
    sequences: list[tuple[int, int]], page: int, spare: int
) -> None:
    counts, lengths = [c for c, _ in sequences], [c + more for c, more in sequences]
    table, cu_q, kv_len = batch_of(counts, lengths, page, spare)
    found = flash.page_indices(table, cu_q, kv_len, page, sum(counts))
    live = [b for b, count in enumerate(counts) if count]
    assert all(t.dtype == torch.int32 and t.device.type == "cpu" for t in found)
    assert len(found.rows) == len(found.bounds) == len(live) + 1 and len(found.last) == len(live)
    assert found.rows[-1] == sum(counts) and found.bounds[-1] == len(found.pages)
    for at, b in enumerate(live):
        assert found.rows[at] == cu_q[b] and found.rows[at + 1] == cu_q[b + 1]
        pages = found.pages[found.bounds[at] : found.bounds[at + 1]].tolist()
        assert 1 <= found.last[at] <= page
        assert (len(pages) - 1) * page + int(found.last[at]) == lengths[b]
        assert pages == [int(table[b, position // page]) for position in range(0, lengths[b], page)]


@pytest.mark.parametrize(
    ("counts", "lengths", "rows", "message"),
    [
        ([2, 1], [2, 1], 4, "cu_q ends at 3 for 4 rows"),
        ([2, 3], [9, 2], 5, "more query rows than tokens"),
        ([1], [100], 1, "longer than its row of the block table"),
    ],
)
def test_refuses_what_the_reference_refuses(counts: list[int], lengths: list[int], rows: int, message: str) -> None:
    table, cu_q, _ = batch_of(counts, [min(n, 8) for n in lengths], 4)
    kv_len = torch.tensor(lengths, dtype=torch.int32)
    with pytest.raises(InputError, match=message):
        flash.page_indices(table, cu_q, kv_len, 4, rows)
    q, kv_layer = torch.zeros(rows, 2, 8), torch.zeros(2, 9, 4, 1, 8)
    with ops.use("reference"), pytest.raises(InputError, match=message):
        ops.paged_attention(q, kv_layer, table, cu_q, kv_len, 1.0)


def test_layers_share_a_plan_and_a_change_makes_a_new_one(fake: list[tuple[str, dict[str, Any]]]) -> None:
    attend = flash.Attention(torch.device("cpu"))
    table, cu_q, kv_len = batch_of([1, 3], [9, 3], 4)
    q, kv_layer = torch.zeros(4, 6, 64, dtype=HALF), torch.zeros(2, 5, 4, 2, 64, dtype=HALF)
    for _ in range(3):
        assert attend(q, kv_layer, table, cu_q, kv_len, 0.5).shape == q.shape
    assert [name for name, _ in fake] == ["init", "plan", "run", "run", "run"]
    plan, run = fake[1][1], fake[2][1]
    assert plan["causal"] and plan["window_left"] == -1 and plan["sm_scale"] == 0.5
    assert (plan["num_qo_heads"], plan["num_kv_heads"], plan["head_dim_qk"], plan["page_size"]) == (6, 2, 64, 4)
    assert run["paged_kv_cache"][1].data_ptr() == kv_layer[1].data_ptr()
    attend(q, kv_layer, table, cu_q, kv_len.clone(), 0.5)
    attend(q, kv_layer, table, cu_q, kv_len, 0.5, window=7)
    assert [name for name, _ in fake].count("plan") == 3
    assert fake[-2][1]["window_left"] == 6
    assert attend(q[:0], kv_layer, table, cu_q, kv_len, 0.5).shape == (0, 6, 64)
    with pytest.raises(InputError, match="more query rows"):
        attend(q, kv_layer, table, cu_q, kv_len - 2, 0.5)
    attend(q, kv_layer, table, cu_q, kv_len, 0.5)
    assert [name for name, _ in fake].count("plan") == 4


def test_slots_are_positions_in_one_sequence_of_all_pages(fake: list[tuple[str, dict[str, Any]]]) -> None:
    kv_layer = torch.zeros(2, 5, 4, 2, 64, dtype=HALF)
    k, slots = torch.ones(3, 2, 64), torch.tensor([19, 0, 6])
    flash.kv_append(k, k, kv_layer, slots)
    flash.kv_append(k[:0], k[:0], kv_layer, slots[:0])
    ((_, call),) = fake
    assert call["append_key"].dtype == HALF
    assert call["kv_indptr"].tolist() == [0, 5] and call["kv_last_page_len"].tolist() == [4]
    # What the kernel does with them: position // page looks a page up, position % page is the place in it.
    looked_up = call["kv_indices"][call["kv_indptr"][call["batch_indices"].long()].long() + call["positions"] // 4]
    assert (looked_up * 4 + call["positions"] % 4).tolist() == slots.tolist()
    assert all(call[name].dtype == torch.int32 for name in ("batch_indices", "positions", "kv_indices", "kv_indptr"))


def test_refuses_dtypes_and_heads_without_a_kernel() -> None:
    q, kv_layer = torch.zeros(2, 4, 64, dtype=HALF), torch.zeros(2, 5, 4, 2, 64, dtype=HALF)
    flash.check_attention(q, kv_layer)
    flash.check_append(kv_layer)
    for bad in ((q.float(), kv_layer.float()), (q, kv_layer.bfloat16()), (q[..., :48], kv_layer[..., :48])):
        with pytest.raises(InputError, match=r"FlashInfer takes fp16 or bf16 .* use\('triton'\)"):
            flash.check_attention(*bad)
    for cache in (kv_layer.float(), kv_layer[..., :48]):
        with pytest.raises(InputError, match="FlashInfer takes a cache"):
            flash.check_append(cache)
    with pytest.raises(InputError, match="counts slots in int32"):
        flash.check_append(torch.empty(1, dtype=HALF).expand(2, 1 << 20, 4096, 2, 64))


def test_without_its_packages_the_mend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(name: str) -> object:
        return None if name in ("flashinfer", "tvm_ffi") else object()

    monkeypatch.setattr(importlib.util, "find_spec", found)
    flash.lacking.cache_clear()
    try:
        with pytest.raises(InputError, match=r"need flashinfer-python, apache-tvm-ffi: pip install .*gpu"):
            ops.use("flashinfer")
    finally:
        flash.lacking.cache_clear()


def test_serves_two_ops_on_cuda_and_leaves_others_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    unforced = {op: ops.chosen(op, "cuda") for op in ops.available()}
    assert "flashinfer" not in unforced.values()
    monkeypatch.setattr(flash, "lacking", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="need a CUDA device"):
        ops.use("flashinfer")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with ops.use("flashinfer"):
        assert {op: ops.chosen(op, "cuda") for op in unforced} == unforced | dict.fromkeys(flash.OPS, "flashinfer")
        with pytest.raises(InputError, match="cannot run on cpu: use a cuda device"):
            ops.chosen("paged_attention", "cpu")
        assert ops.capturable("kv_append", "cuda") and not ops.capturable("paged_attention", "cuda")


@pytest.mark.skipif(LACKING is not None, reason=f"flashinfer cannot be imported here: {LACKING}")
def test_calls_fit_the_package(fake: list[tuple[str, dict[str, Any]]]) -> None:
    """What is passed, by place and by name, binds to the signatures of the package that is installed."""
    q, kv_layer = torch.zeros(1, 2, 64, dtype=HALF), torch.zeros(2, 5, 4, 2, 64, dtype=HALF)
    flash.Attention(torch.device("cpu"))(q, kv_layer, *batch_of([1], [9], 4), 0.5)
    flash.kv_append(q, q, kv_layer, torch.zeros(1, dtype=torch.int64))
    names = {name: list(arguments) for name, arguments in fake}
    # In a process of its own, where the package is not the one that only writes down.
    code = f"""
import inspect, flashinfer
names = {names!r}
wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper
for name, function in (("init", wrapper.__init__), ("plan", wrapper.plan), ("run", wrapper.run)):
    places = list(inspect.signature(function).parameters)[1:]
    assert set(names[name]) <= set(places), (name, places)
    assert name == "plan" or places[:2] == names[name], (name, places)
places = list(inspect.signature(flashinfer.append_paged_kv_cache).parameters)
assert places == names["append"], places
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(LACKING is not None, reason=f"flashinfer cannot be imported here: {LACKING}")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_agrees_with_the_reference_on_the_device(dtype: torch.dtype) -> None:
    page, heads, kv_heads, dim = 16, 8, 2, 128
    counts, lengths = [1, 0, 37, 1, 5], [1, 0, 200, 333, 5]
    g = torch.Generator().manual_seed(0)
    table, cu_q, kv_len = (t.cuda() for t in batch_of(counts, lengths, page))
    q = torch.randn(sum(counts), heads, dim, generator=g).to(dtype).cuda()
    pages = int(table.max()) + 3
    appended = torch.full((2, pages, page, kv_heads, dim), float("nan"), dtype=dtype).cuda()
    slots = torch.cat(
        [
            table[b, torch.arange(n, device="cuda") // page].long() * page + torch.arange(n, device="cuda") % page
            for b, n in enumerate(lengths)
        ]
    )
    k, v = (torch.randn(len(slots), kv_heads, dim, generator=g).to(dtype).cuda() for _ in range(2))
    wanted_cache = appended.clone()
    with ops.use("reference"):
        ops.kv_append(k, v, wanted_cache, slots)
        wanted = ops.paged_attention(q.float(), wanted_cache.float(), table, cu_q, kv_len, dim**-0.5)
        rounded = ops.paged_attention(q, wanted_cache, table, cu_q, kv_len, dim**-0.5)
    with ops.use("flashinfer"):
        ops.kv_append(k, v, appended, slots)
        got = ops.paged_attention(q, appended, table, cu_q, kv_len, dim**-0.5)
    torch.testing.assert_close(appended, wanted_cache, rtol=0, atol=0, equal_nan=True)
    error = (got.float() - wanted).abs().max()
    assert error <= 3 * (rounded.float() - wanted).abs().max() + 2e-3
