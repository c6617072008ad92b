"""Paged attention in Triton: against float64 by error ratio, bit for bit under any company, chunks and launch form, and
with NaN in everything that a row must not see."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atts_engine import ops
from atts_engine.errors import InputError
from atts_engine.models import ForwardBatch, load_model

pytest.importorskip("triton", reason="triton is not installed")

from atts_triton.attention_tiling import KEY_SPLIT, MAX_WORKSPACE, tiling

pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning:triton.runtime.interpreter")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = float("nan")
Part = tuple[int, int, int]  # rows start .. end - 1 of a sequence, `end` tokens of which are in the cache


@dataclass(frozen=True)
class Case:
    """Sequences with all their queries, and a cache that holds their keys and values and NaN everywhere else."""

    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]
    kv_layer: Tensor
    table: Tensor


def make(
    lengths: list[int], heads: int, kv_heads: int, dim: int, page: int = 16, dtype: torch.dtype = torch.float16
) -> Case:
    g = torch.Generator().manual_seed(sum(lengths) + dim)
    pages = -(-max(lengths) // page)
    kv_layer = torch.full((2, len(lengths) * pages, page, kv_heads, dim), NAN, dtype=dtype, device=DEVICE)
    table = torch.randperm(len(lengths) * pages, generator=g).view(len(lengths), pages).int().to(DEVICE)
    q, k, v = (
        [torch.randn(length, h, dim, generator=g).to(DEVICE, dtype) for length in lengths]
        for h in (heads, kv_heads, kv_heads)
    )
    for b, length in enumerate(lengths):
        at = torch.arange(length, device=DEVICE)
        with ops.use("reference"):
            ops.kv_append(k[b], v[b], kv_layer, table[b].long()[at // page] * page + at % page)
    return Case(q, k, v, kv_layer, table)


def run(case: Case, parts: list[Part], window: int = 0, more_pages: int = 0) -> list[Tensor]:
    counts = [end - start for _, start, end in parts]
    table = case.table[[b for b, _, _ in parts]]
    table = torch.cat((table, table.new_zeros(len(parts), more_pages)), 1)
    with ops.use("triton"):
        out = ops.paged_attention(
            torch.cat([case.q[b][start:end] for b, start, end in parts]),
            case.kv_layer,
            table,
            torch.tensor([0, *counts]).cumsum(0).int().to(DEVICE),
            torch.tensor([end for _, _, end in parts]).int().to(DEVICE),
            0.2,
            window=window,
        )
    return list(out.split(counts))


def dense(case: Case, part: Part, window: int, dtype: torch.dtype) -> Tensor:
    """Torch's own attention, in dtype."""
    b, start, end = part
    q, k, v = (t[b][:end].to("cpu", dtype).transpose(0, 1) for t in (case.q, case.k, case.v))
    group = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    at = torch.arange(end)
    seen = at <= at[:, None]
    if window:
        seen &= at > at[:, None] - window
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=0.2)
    return out.transpose(0, 1)[start:]


def check(case: Case, parts: list[Part], window: int = 0) -> None:
    """No further from float64 than three times what torch is in the same dtype."""
    for part, got in zip(parts, run(case, parts, window)):
        if not len(got):
            continue
        exact = dense(case, part, window, torch.float64)
        plain = dense(case, part, window, got.dtype)
        allowed = 3 * (plain.double() - exact).abs().max() + 1e-6
        assert (got.cpu().double() - exact).abs().max() <= allowed


@contextmanager
def plain_products() -> Iterator[None]:
    """The interpreter's products are BLAS's, whose rounding depends on how many rows a product has. Tests of bits take
    them in float64, where that is lost in the rounding to fp32; on a device they are left as they are."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def dot(self: object, a: TensorHandle, b: TensorHandle, d: TensorHandle, *_: object) -> TensorHandle:
        product = (a.data.astype("float64") @ b.data.astype("float64")).astype(d.data.dtype)
        return TensorHandle(product + d.data, d.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", dot)
        yield


@settings(max_examples=12)
@given(st.data())
def test_ragged_batches_against_float64(data: st.DataObject) -> None:
    group, kv_heads = data.draw(st.sampled_from([(1, 2), (3, 1), (4, 2), (7, 1)]))
    dim = data.draw(st.sampled_from([16, 64, 80, 128]))
    page = data.draw(st.sampled_from([7, 8, 16, 64]))
    dtype = data.draw(st.sampled_from([torch.float16, torch.float32]))
    window = data.draw(st.sampled_from([0, 1, 40]))
    parts = []
    for b in range(data.draw(st.integers(1, 4))):
        end = data.draw(st.integers(1, 100))
        rows = data.draw(st.sampled_from([0, 1, 1, 5, end]))  # none, a decode step, a span, a prompt
        parts.append((b, max(0, end - rows), end))
    case = make([end for _, _, end in parts], group * kv_heads, kv_heads, dim, page, dtype)
    check(case, parts, window)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("window", [0, 300, 700])
def test_long_contexts_in_both_forms(dtype: torch.dtype, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths around the bounds of splits; both forms of a launch agree to the bit, and so does one whose programs take
    several splits each."""
    ends = [KEY_SPLIT - 1, KEY_SPLIT, KEY_SPLIT + 1, 3 * KEY_SPLIT + 70]
    case = make(ends, 3, 1, 16, 32, dtype)
    parts = [(b, end - rows, end) for (b, end), rows in zip(enumerate(ends), (1, 3, 4, 2))]
    check(case, parts, window)
    spread = run(case, parts, window)
    sizes = tiling(10, 4, len(case.table[0]) * 32, 3, 1, 16, dtype)
    assert sizes.spread and sizes.parts == sizes.splits == 4
    for enough in (7, 0):
        monkeypatch.setattr("atts_triton.attention_tiling.ENOUGH_TILES", enough)
        sizes = tiling(10, 4, len(case.table[0]) * 32, 3, 1, 16, dtype)
        assert (sizes.spread, sizes.parts) == (enough > 0, 2 if enough else 1)
        for mine, theirs in zip(run(case, parts, window), spread):
            assert torch.equal(mine, theirs)


@settings(max_examples=6)
@given(st.data())
def test_bits_do_not_depend_on_company_chunks_or_padding(data: st.DataObject) -> None:
    heads, dim = data.draw(st.sampled_from([(4, 64), (3, 80), (7, 16)]))
    dtype = data.draw(st.sampled_from([torch.float16, torch.float16, torch.float32]))
    window = data.draw(st.sampled_from([0, 30]))
    lengths = data.draw(st.lists(st.integers(1, 50), min_size=2, max_size=3))
    case = make(lengths, heads, 1, dim, dtype=dtype)
    done = [0] * len(lengths)
    with plain_products():
        whole = [run(case, [(b, 0, length)], window)[0] for b, length in enumerate(lengths)]
        while any(at < length for at, length in zip(done, lengths)):
            step = []
            for b in data.draw(st.permutations(range(len(lengths)))):
                if done[b] < lengths[b]:
                    end = data.draw(st.integers(done[b] + 1, lengths[b])) if len(step) < 2 else lengths[b]
                    step.append((b, done[b], end))
                    done[b] = end
            found = run(case, step, window, data.draw(st.sampled_from([0, 1, KEY_SPLIT // 16])))
            for (b, start, end), got in zip(step, found):
                assert torch.equal(got, whole[b][start:end])


def test_a_row_is_the_same_alone_and_at_the_end_of_a_long_prompt() -> None:
    """A long context, and both heights of a tile."""
    end = 2 * KEY_SPLIT + 30
    case = make([end, 40], 4, 1, 16)
    assert tiling(1, 1, end, 4, 1, 16, torch.float16).block_m == 64
    assert tiling(60, 1, end, 4, 1, 16, torch.float16).block_m == 128
    with plain_products():
        alone = run(case, [(0, end - 1, end)])[0]
        assert torch.equal(run(case, [(0, end - 60, end)])[0][-1:], alone)
        assert torch.equal(run(case, [(1, 0, 40), (0, end - 3, end)], more_pages=40)[1][-1:], alone)


def test_nan_of_others_reaches_nobody() -> None:
    case = make([90, 75], 4, 2, 32)
    parts = [(0, 60, 90), (1, 74, 75)]
    clean, windowed = run(case, parts), run(case, parts, 20)
    case.q[1][:] = NAN
    case.kv_layer[:, case.table[1].long()] = NAN
    assert torch.equal(run(case, parts)[0], clean[0])
    assert run(case, parts)[1].isnan().all()
    # Pages that lie before every row's window are somebody else's: rows 60 .. 89 see keys from 41 on.
    case.kv_layer[:, case.table[0, :2].long()] = NAN
    assert torch.equal(run(case, parts, 20)[0], windowed[0])
    case.table[0, :2] = case.table[1, 0]
    assert torch.equal(run(case, parts, 20)[0], windowed[0])


def test_a_nan_query_spoils_its_own_row_alone() -> None:
    case = make([40], 4, 4, 32)
    clean = run(case, [(0, 30, 40)])[0]
    case.q[0][33, 2, 5] = NAN
    found = run(case, [(0, 30, 40)])[0]
    assert found[3, 2].isnan().all()
    found[3, 2] = clean[3, 2]
    assert torch.equal(found, clean)


def test_sequences_without_rows_and_rows_without_keys() -> None:
    case = make([20, 5], 2, 1, 16)
    empty, rest = run(case, [(0, 20, 20), (1, 3, 5)])
    assert empty.shape == (0, 2, 16) and torch.equal(rest, run(case, [(1, 3, 5)])[0])
    assert run(case, [(0, 0, 0), (1, 5, 5)])[0].shape == (0, 2, 16)
    cu_q, kv_len = torch.tensor([0, 1, 3], device=DEVICE).int(), torch.tensor([0, 5], device=DEVICE).int()
    for more in (0, KEY_SPLIT // 16):
        table = torch.cat((case.table, case.table.new_zeros(2, more)), 1)
        with ops.use("triton"):
            out = ops.paged_attention(
                torch.cat((case.q[0][:1], case.q[1][3:])), case.kv_layer, table, cu_q, kv_len, 0.2
            )
        assert out[0].isnan().all() and torch.equal(out[1:], rest)


def test_queries_may_be_a_slice_and_a_group_may_exceed_a_tile() -> None:
    case = make([6], 140, 2, 16)
    parts = [(0, 4, 6)]
    check(case, parts)
    wanted = run(case, parts)[0]
    wide = torch.cat((case.q[0], torch.full_like(case.q[0], NAN)), 1)
    case.q[0] = wide[:, :140]
    cu_q, kv_len = torch.tensor([0, 2], device=DEVICE).int(), torch.tensor([6], device=DEVICE).int()
    with ops.use("triton"):
        out = ops.paged_attention(wide[4:, :140], case.kv_layer, case.table, cu_q, kv_len, 0.2)
    assert torch.equal(out, wanted)


def test_the_reference_has_the_same_windows() -> None:
    case = make([90, 30], 4, 2, 16, dtype=torch.float32)
    counts, table = torch.tensor([0, 40, 41]).int(), case.table.cpu()
    q, kv_layer = torch.cat((case.q[0][50:], case.q[1][29:])).cpu(), case.kv_layer.cpu().clone()
    kv_layer[:, table[0, :1].long()] = NAN  # keys 0 .. 15: no row's from 50 on with a window of 20
    scratch = ops.Scratch()
    for window in (20, 1, 200, 20):
        if window == 200:
            kv_layer = case.kv_layer.cpu()
        with ops.use("reference"):
            out = ops.paged_attention(
                q, kv_layer, table, counts, torch.tensor([90, 30]).int(), 0.2, scratch, window=window
            )
        for part, got in zip([(0, 50, 90), (1, 29, 30)], out.split([40, 1])):
            torch.testing.assert_close(got.double(), dense(case, part, window, torch.float64), atol=2e-6, rtol=0)
    with pytest.raises(InputError, match="a window has 1 key"):
        ops.paged_attention(q, kv_layer, table, counts, torch.tensor([90, 30]).int(), 0.2, window=-1)


def test_bfloat16_with_a_window_runs_the_reference_on_the_cpu() -> None:
    q, kv = torch.randn(3, 2, 16).bfloat16(), torch.randn(2, 2, 4, 1, 16).bfloat16()
    table, cu_q, kv_len = torch.tensor([[1, 0]]).int(), torch.tensor([0, 3]).int(), torch.tensor([7]).int()
    whole = ops.paged_attention(q, kv, table, cu_q, kv_len, 0.2, window=7)
    with ops.use("reference"):
        torch.testing.assert_close(whole, ops.paged_attention(q, kv, table, cu_q, kv_len, 0.2))
    one = ops.paged_attention(q, kv, table, cu_q, kv_len, 0.2, window=1)
    assert torch.equal(one[2], kv[1, 0, 2].expand(2, 16))  # key 6 alone


def test_refuses_what_it_does_not_serve() -> None:
    case = make([20], 4, 4, 16)
    cu_q, kv_len = torch.tensor([0, 20], device=DEVICE).int(), torch.tensor([20], device=DEVICE).int()
    q, kv = case.q[0], case.kv_layer
    wide = torch.zeros(20, 4, 272, device=DEVICE), torch.zeros(2, 2, 16, 4, 272, device=DEVICE)
    for mine, cache, table, bounds, match in (
        (q.float(), kv, case.table, cu_q, "one of fp32, fp16, bf16"),
        (q.double(), kv.double(), case.table, cu_q, "q does not fit"),
        (q, kv, case.table.long(), cu_q, "int32"),
        (*wide, case.table, cu_q, "at most 256"),
        (q.transpose(1, 2).contiguous().transpose(1, 2), kv, case.table, cu_q, "without gaps"),
        (q, kv, case.table, cu_q[:1], "cu_q does not fit"),
        (q, kv, case.table[0], cu_q, "block_table does not fit"),
        (q[..., :8], kv, case.table, cu_q, "does not fit"),
    ):
        with ops.use("triton"), pytest.raises(InputError, match=match):
            ops.paged_attention(mine, cache, table, bounds, kv_len, 1.0)


@given(
    st.integers(1, 5000),
    st.integers(1, 600),
    st.integers(1, 40_000),
    st.sampled_from([(32, 8), (9, 3), (28, 4), (140, 2)]),
    st.sampled_from([16, 80, 128, 256]),
    st.sampled_from([torch.float32, torch.float16]),
    st.sampled_from([80, 90, 100]),
)
def test_what_decides_bits_is_a_function_of_the_head_and_dtype(
    rows: int, batch: int, slots: int, heads: tuple[int, int], dim: int, dtype: torch.dtype, capability: int
) -> None:
    sizes = tiling(rows, batch, slots, *heads, dim, dtype, capability)
    alone = tiling(1, 1, 1, *heads, dim, dtype, capability)
    assert (sizes.block_n, sizes.block_d) == (alone.block_n, alone.block_d)
    assert KEY_SPLIT % sizes.block_n == 0 and sizes.block_m % 16 == 0 and sizes.block_d >= dim
    assert sizes.rows >= 1 and sizes.rows * sizes.heads <= sizes.block_m
    assert sizes.tiles * sizes.rows >= rows
    if sizes.spread:
        assert 4 * sizes.splits * rows * heads[0] * (dim + 2) <= MAX_WORKSPACE


def test_a_decoder_runs_on_it() -> None:
    """The decoder's own call: a prompt, then a decode step beside another prompt."""
    model = load_model("tiny-draft")
    config = model.config
    hidden = {}
    for name in ("reference", "triton"):
        kv = torch.full((config.num_layers, 2, 4, 16, config.num_kv_heads, config.head_dim), NAN)
        found = []
        for starts, ends in (([0], [9]), ([9, 0], [10, 3])):
            positions = torch.cat([torch.arange(start, end) for start, end in zip(starts, ends)])
            batch = ForwardBatch(
                ids=positions + 5,
                positions=positions,
                block_table=torch.arange(1, len(ends) + 1).view(-1, 1).int(),
                cu_q=torch.tensor([0, *(end - start for start, end in zip(starts, ends))]).cumsum(0).int(),
                kv_len=torch.tensor(ends).int(),
            )
            # Attention alone in Triton: the decoder's other ops are others' tests.
            with pytest.MonkeyPatch.context() as patch, ops.use(name):
                patch.setattr("atts_engine.ops.dispatch.TRITON_OPS", frozenset({"paged_attention"}))
                found.append(model.decoder.forward(batch, kv))
        hidden[name] = torch.cat(found)
    torch.testing.assert_close(hidden["triton"], hidden["reference"], atol=2e-4, rtol=1e-4)


_COMPILED = """
import re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from atts_triton.paged_attention import variants

wanted = {f"attention fp16 D=64 M={height} walk": height for height in (64, 128)}
for variant in variants():
    if variant.name in wanted and 90 in variant.capabilities:
        signature = dict(variant.signature) | dict.fromkeys(variant.constants, "constexpr")
        ordered = {name: signature[name] for name in variant.kernel.arg_names}
        source = ASTSource(variant.kernel, ordered, variant.constants, {})
        code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=variant.options).asm
        sums = re.findall(r"arith.addf", code["ttir"])
        shapes = set(re.findall(r"wgmma.mma_async.sync.aligned.m64n(?:16|64)k16", code["ptx"]))
        print(wanted[variant.name], len(sums), sorted(shapes))
"""


def test_no_thread_adds_up_keys_and_both_heights_multiply_alike(root: Path) -> None:
    """What the bits of a row rest on in compiled code: sums over keys run inside one kind of product only."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", _COMPILED]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shapes = "['wgmma.mma_async.sync.aligned.m64n16k16', 'wgmma.mma_async.sync.aligned.m64n64k16']"
    assert done.stdout.splitlines() == [f"64 0 {shapes}", f"128 0 {shapes}"]


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_bits_on_the_device(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16: chunks, company, heights and forms; then a captured graph over buffers that change."""
    end = 3 * KEY_SPLIT + 11
    case = make([end, 40], 8, 2, dim, dtype=torch.bfloat16)
    check(case, [(0, end - 300, end), (1, 0, 40)])
    whole = run(case, [(0, 0, end)])[0]
    for start in (end - 1, end - 5, end - 100):
        assert torch.equal(run(case, [(1, 39, 40), (0, start, end)], more_pages=9)[1], whole[start:])
    for enough in (3, 0):  # several splits a program; walked
        monkeypatch.setattr("atts_triton.attention_tiling.ENOUGH_TILES", enough)
        assert torch.equal(run(case, [(0, end - 5, end)])[0], whole[-5:])
    monkeypatch.undo()
    q, table = case.q[0][:2].clone(), case.table.clone()
    cu_q, kv_len = torch.tensor([0, 1, 2], device=DEVICE).int(), torch.tensor([1, 1], device=DEVICE).int()
    graph = torch.cuda.CUDAGraph()
    with ops.use("triton"):
        ops.paged_attention(q, case.kv_layer, table, cu_q, kv_len, 0.2)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            out = ops.paged_attention(q, case.kv_layer, table, cu_q, kv_len, 0.2)
    q[0], kv_len[0] = case.q[0][-1], end
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out[:1], whole[-1:])
