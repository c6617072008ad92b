"""Causal attention over paged keys and values: decode steps, appended spans and prefill in one kernel family.

**Rows.** A tile of BLOCK_M rows holds query rows of one sequence times the heads that share a KV head, so a tile of
keys and values is read once for all of them. Where a sequence's rows lie is known on the device alone: the grid has
N // R + B tiles (R: query rows of a tile), enough for any way to cut N rows into B sequences, and sequence b owns the
tiles from cu_q[b] // R + b on. A program counts the sequences whose first tile is not beyond its own: one vector load
of cu_q and a sum, where a binary search would wait for log2(B) loads in turn. A tile that no row falls to ends at once.

**Keys.** Absolute positions are cut into splits of KEY_SPLIT keys and those into tiles of BLOCK_N. A split starts from
nothing and leaves (peak, total, acc): maximum of a row's scores, sum of its weights exp2(score - peak), and their
product with the values. A row's result is the left fold of its splits, `_fold`. Two forms of a launch do the same:

- *walk*: a program takes all splits of its tile in turn and folds each into what it holds. No workspace.
- *spread*: a tile has several programs, which take its splits in turns and store each; `_merge_kernel` folds the splits
  of a row.

**Bits.** `tiling` chooses the form, and the height of a tile, from shapes that the host knows; no bit depends on them.
Splits and tiles of keys lie at absolute positions, and their sizes are a function of the head and the dtype. Both forms
fold with one function, and nothing is compiled with products fused into sums but what `tl.fma` fuses. A tile or a split
of which a row sees nothing changes no bit of the row. Sums over keys run inside products only, that of the weights too
(a product with ones), in the order of the matrix instruction, so the layout of threads has no part in them; and all
heights that one head and dtype can get use one kind of instruction. That is why 16-bit rows never get a tile of 16:
below 64 rows sm_90 takes mma.sync, whose roundings nobody promises to be those of wgmma.

**What it costs.** Spread writes and reads 8 (D + 2) bytes for each row, head and split, whose keys and values are
4 D KEY_SPLIT bytes in 16 bits for the whole group: 2 group / KEY_SPLIT of the traffic of a decode step, 1.6 % for a
group of 4. Its workspace, half of those bytes for every split that the block table could hold, is at most
MAX_WORKSPACE; beyond that, and where tiles alone are ENOUGH_TILES, splits are walked. A decode step multiplies 64 rows
whatever the group: 256 D operations for the 4 D bytes of a key and its value, 64 a byte, where an H100 has 295 for each
byte of its memory and an A100 153. One sequence of 4096 keys with 8 KV heads makes 64 programs of 512 keys; one of less
than 512 keys makes 8, which is what fixed splits cost in parallelism.

**Not supported**: logit caps, ALiBi, attention sinks, 8-bit caches, heads wider than 256.

A key that no row of a tile sees is loaded as 0, not multiplied by 0: slots that nobody wrote, and pages before every
row's window, may hold NaN. Scores are scaled in fp32 by scale * log2(e). Where a row has seen nothing its peak is -inf,
and 0 is subtracted instead, so that -inf - -inf is never taken. Weights are rounded to the dtype of the values, in the
numerator and the denominator alike. A row that sees no key gives NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from atts_triton.attention_tiling import KEY_SPLIT, MAX_HEAD_DIM, Tiling, tiling
from atts_triton.variants import POINTERS, Variant

_SEARCH = 128
_MERGE_HEADS = 4
_MERGE_UNROLL = 4
_MERGE_OPTIONS = {"num_warps": 4, "maxnreg": 128, "enable_fp_fusion": False}
_LOG2_E = math.log2(math.e)


@triton.jit
def _sequence(cu_q_ptr, place, B, ROWS: tl.constexpr, SEARCH: tl.constexpr):
    """The sequence that owns a tile: the last b with cu_q[b] // ROWS + b <= place. With ROWS = 0 that of a query row:
    the last b with cu_q[b] <= place."""
    owner = tl.full((), -1, tl.int32)
    for first in range(0, B, SEARCH):
        b = first + tl.arange(0, SEARCH)
        at = tl.load(cu_q_ptr + b, mask=b < B, other=0)
        if ROWS > 0:
            at = at // ROWS + b
        owner += tl.sum(((at <= place) & (b < B)).to(tl.int32), 0)
    return owner


@triton.jit
def _fold(peak, total, acc, next_peak, next_total, next_acc):
    """Splits so far and the next one, as one: peak[M], total[M], acc[M, D]. A split of which a row sees nothing is
    (-inf, 0, 0) and changes none of its bits."""
    new_peak = tl.maximum(peak, next_peak)
    anchor = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    old = tl.exp2(peak - anchor)
    new = tl.exp2(next_peak - anchor)
    total = tl.fma(total, old, next_total * new)
    acc = tl.fma(acc, tl.broadcast_to(old[:, None], acc.shape), next_acc * new[:, None])
    return new_peak, total, acc


@triton.jit
def _split(
    q,  # (BLOCK_M, BLOCK_D)
    k_ptr,  # of this KV head, as v_ptr
    v_ptr,
    table_ptr,  # of this sequence
    position,  # (BLOCK_M,)
    first,
    end,
    begin,
    window,
    scale,
    page_stride,
    slot_stride,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOWED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(peak, total, acc) of the keys first .. end - 1, those before `begin` left out."""
    d = tl.arange(0, BLOCK_D)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    ones = tl.full((BLOCK_N, 16), 1.0, q.dtype)
    total = tl.zeros((BLOCK_M, 16), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for at in range(first, end, BLOCK_N):
        key = at + tl.arange(0, BLOCK_N)
        held = (key < end) & (key >= begin)
        page = tl.load(table_ptr + key // PAGE, mask=held, other=0).to(tl.int64)
        rows = page[:, None] * page_stride + (key % PAGE)[:, None] * slot_stride + d[None, :]  # (BLOCK_N, BLOCK_D)
        mask = held[:, None]
        if D < BLOCK_D:
            mask = mask & (d < D)[None, :]
        k = tl.load(k_ptr + rows, mask=mask, other=0.0)
        v = tl.load(v_ptr + rows, mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        seen = key[None, :] <= position[:, None]
        if WINDOWED:
            seen = seen & (key[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        anchor = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        old = tl.exp2(peak - anchor)
        weights = tl.exp2(scores - anchor[:, None]).to(v.dtype)
        total = tl.dot(weights, ones, total * old[:, None], input_precision="ieee")
        acc = tl.dot(weights, v, acc * old[:, None], input_precision="ieee")
        peak = new_peak
    return peak, tl.max(total, 1), acc


@triton.jit(
    do_not_specialize=["N", "B", "table_stride"],
    do_not_specialize_on_alignment=["table_ptr", "cu_q_ptr", "kv_len_ptr", "peak_ptr", "total_ptr"],
)
def _attend_kernel(
    q_ptr,  # [N, Hkv * GROUP, D]
    k_ptr,  # [P, PAGE, Hkv, D]
    v_ptr,  # [P, PAGE, Hkv, D]
    table_ptr,  # [B, table_stride] int32
    cu_q_ptr,  # [B + 1] int32
    kv_len_ptr,  # [B] int32
    out_ptr,  # [N, Hkv * GROUP, D]
    peak_ptr,  # [splits, N, Hkv * GROUP] fp32, where SPREAD
    total_ptr,  # [splits, N, Hkv * GROUP] fp32, where SPREAD
    acc_ptr,  # [splits, N, Hkv * GROUP, D] fp32, where SPREAD
    N,
    B,
    table_stride,
    window,
    scale,  # times log2(e)
    q_stride,
    q_head_stride,
    page_stride,
    slot_stride,
    head_stride,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOWED: tl.constexpr,
    SPREAD: tl.constexpr,
    KEY_SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SEARCH: tl.constexpr,
):
    ROWS: tl.constexpr = BLOCK_M // TILE_HEADS
    CHUNKS: tl.constexpr = (GROUP + TILE_HEADS - 1) // TILE_HEADS
    tile = tl.program_id(0)
    sequence = _sequence(cu_q_ptr, tile, B, ROWS, SEARCH)
    start = tl.load(cu_q_ptr + sequence)
    count = tl.load(cu_q_ptr + sequence + 1) - start
    first_row = (tile - (start // ROWS + sequence)) * ROWS
    before = tl.load(kv_len_ptr + sequence) - count  # tokens ahead of the sequence's first row
    end = before + tl.minimum(first_row + ROWS, count)
    begin = 0
    if WINDOWED:
        begin = tl.maximum(before + first_row - window + 1, 0)
    idle = first_row >= count
    split_0 = begin // KEY_SPLIT + tl.program_id(2)
    if SPREAD:
        idle = idle | (split_0 * KEY_SPLIT >= end)
    if idle:
        return

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    kv_head = tl.program_id(1) // CHUNKS
    member = tl.program_id(1) % CHUNKS * TILE_HEADS + m % TILE_HEADS
    row = first_row + m // TILE_HEADS
    position = before + row
    live = (m < ROWS * TILE_HEADS) & (row < count) & (member < GROUP)
    head = kv_head * GROUP + member
    token = (start + row).to(tl.int64)
    mask = live[:, None] & (d < D)[None, :]
    q = tl.load(q_ptr + token[:, None] * q_stride + head[:, None] * q_head_stride + d[None, :], mask=mask, other=0.0)
    k_ptr += kv_head * head_stride
    v_ptr += kv_head * head_stride
    table_ptr += sequence.to(tl.int64) * table_stride

    if SPREAD:
        # In 32 bits: MAX_WORKSPACE holds fewer numbers, and the compiler keeps the places of all stores in registers.
        place = (start + row) * HEADS + head
        for split in range(split_0, tl.cdiv(end, KEY_SPLIT), tl.num_programs(2)):
            first = split * KEY_SPLIT
            if WINDOWED:
                first = tl.maximum(first, begin // BLOCK_N * BLOCK_N)
            peak, total, acc = _split(
                q, k_ptr, v_ptr, table_ptr, position, first, tl.minimum((split + 1) * KEY_SPLIT, end), begin, window,
                scale, page_stride, slot_stride, D, PAGE, WINDOWED, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            rows_ahead = tl.cast(split, tl.int64) * N * HEADS
            tl.store(peak_ptr + rows_ahead + place, peak, mask=live)
            tl.store(total_ptr + rows_ahead + place, total, mask=live)
            tl.store(acc_ptr + rows_ahead * D + (place[:, None] * D + d[None, :]), acc, mask=mask)
    else:
        peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for at in range(begin // KEY_SPLIT * KEY_SPLIT, end, KEY_SPLIT):
            first = at
            if WINDOWED:
                first = tl.maximum(at, begin // BLOCK_N * BLOCK_N)
            next_peak, next_total, next_acc = _split(
                q, k_ptr, v_ptr, table_ptr, position, first, tl.minimum(at + KEY_SPLIT, end), begin, window, scale,
                page_stride, slot_stride, D, PAGE, WINDOWED, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            peak, total, acc = _fold(peak, total, acc, next_peak, next_total, next_acc)
        out = acc / total[:, None]
        place = token * HEADS + head
        tl.store(out_ptr + place[:, None] * D + d[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["N", "B"],
    do_not_specialize_on_alignment=["cu_q_ptr", "kv_len_ptr", "peak_ptr", "total_ptr"],
)
def _merge_kernel(
    peak_ptr,  # [splits, N, HEADS] fp32
    total_ptr,  # [splits, N, HEADS] fp32
    acc_ptr,  # [splits, N, HEADS, D] fp32
    cu_q_ptr,  # [B + 1] int32
    kv_len_ptr,  # [B] int32
    out_ptr,  # [N, HEADS, D]
    N,
    B,
    window,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    WINDOWED: tl.constexpr,
    KEY_SPLIT: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
    SEARCH: tl.constexpr,
):
    token = tl.program_id(0)
    sequence = _sequence(cu_q_ptr, token, B, 0, SEARCH)
    seen = tl.load(kv_len_ptr + sequence) - tl.load(cu_q_ptr + sequence + 1) + token + 1  # keys up to the row's own
    first = 0
    if WINDOWED:
        first = tl.maximum(seen - window, 0) // KEY_SPLIT
    last = (seen + KEY_SPLIT - 1) // KEY_SPLIT
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    peak = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    acc = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    for at in range(first, last, UNROLL):
        # Unrolled: the loads of several splits are under way while the folds, each of which needs the last, follow.
        for step in tl.static_range(UNROLL):
            split = tl.cast(at + step, tl.int64)
            place = (split * N + token) * HEADS + head
            there = head < tl.where(split < last, HEADS, 0)
            next_peak = tl.load(peak_ptr + place, mask=there, other=float("-inf"))
            next_total = tl.load(total_ptr + place, mask=there, other=0.0)
            next_acc = tl.load(
                acc_ptr + place[:, None] * D + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0
            )
            peak, total, acc = _fold(peak, total, acc, next_peak, next_total, next_acc)
    out = acc / total[:, None]
    place = token.to(tl.int64) * HEADS + head
    mask = (head < HEADS)[:, None] & (d < D)[None, :]
    tl.store(out_ptr + place[:, None] * D + d[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


def paged_attention(
    q: Tensor,
    kv_layer: Tensor,
    block_table: Tensor,
    cu_q: Tensor,
    kv_len: Tensor,
    scale: float,
    window: int = 0,
) -> Tensor:
    """Causal attention of q[N, Hq, D] over kv_layer[2, P, page, Hkv, D] -> [N, Hq, D]; see `atts_engine.ops.attention`.

    block_table[B, width], cu_q[B + 1] and kv_len[B] int32. q and kv_layer share one of fp32, fp16, bf16 and have heads
    without gaps. Reads no tensor on the host. Raises ValueError for other dtypes, strides and wider heads.
    """
    if q.dtype != kv_layer.dtype or q.dtype not in POINTERS:
        raise ValueError(f"paged_attention takes one of fp32, fp16, bf16, not {q.dtype} and {kv_layer.dtype}")
    if any(t.dtype != torch.int32 for t in (block_table, cu_q, kv_len)):
        raise ValueError("paged_attention needs block_table, cu_q and kv_len in int32")
    if q.shape[2] > MAX_HEAD_DIM:
        raise ValueError(f"paged_attention takes heads of at most {MAX_HEAD_DIM} numbers, not {q.shape[2]}")
    if q.stride(2) != 1 or kv_layer.stride(4) != 1:
        raise ValueError("paged_attention needs heads of q and kv_layer without gaps")
    if triton.knobs.runtime.interpret and q.dtype == torch.bfloat16:
        raise ValueError("Triton's interpreter multiplies bf16 wrongly: use fp32 or fp16 there")
    rows, heads, dim = q.shape
    batch, width = block_table.shape
    page, kv_heads = kv_layer.shape[2:4]
    out = q.new_empty((rows, heads, dim))
    if not rows:
        return out
    block_table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
    cu_q, kv_len = cu_q.contiguous(), kv_len.contiguous()
    capability = 90
    if q.is_cuda:
        major, minor = torch.cuda.get_device_capability(q.device)
        capability = 10 * major + minor
    sizes = tiling(rows, batch, width * page, heads, kv_heads, dim, q.dtype, capability)
    k, v = kv_layer.unbind(0)
    if sizes.spread:
        peak, total = q.new_empty((2, sizes.splits, rows, heads), dtype=torch.float32).unbind(0)
        acc = q.new_empty((sizes.splits, rows, heads, dim), dtype=torch.float32)
    else:
        peak = total = acc = out  # not touched
    grid = (sizes.tiles, kv_heads * triton.cdiv(heads // kv_heads, sizes.heads), sizes.parts)
    _attend_kernel[grid](
        q,
        k,
        v,
        block_table,
        cu_q,
        kv_len,
        out,
        peak,
        total,
        acc,
        rows,
        batch,
        block_table.stride(0),
        window,
        scale * _LOG2_E,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        k.stride(2),
        **_constants(sizes, heads, kv_heads, dim, page, window > 0),
        **_options(sizes),
    )
    if sizes.spread:
        _merge_kernel[(rows, triton.cdiv(heads, _MERGE_HEADS))](
            peak,
            total,
            acc,
            cu_q,
            kv_len,
            out,
            rows,
            batch,
            window,
            **_merge_constants(sizes.block_d, heads, dim, window > 0),
            **_MERGE_OPTIONS,
        )
    return out


def _constants(sizes: Tiling, heads: int, kv_heads: int, dim: int, page: int, windowed: bool) -> dict[str, int | bool]:
    return {
        "HEADS": heads,
        "GROUP": heads // kv_heads,
        "TILE_HEADS": sizes.heads,
        "D": dim,
        "PAGE": page,
        "WINDOWED": windowed,
        "SPREAD": sizes.spread,
        "KEY_SPLIT": KEY_SPLIT,
        "BLOCK_M": sizes.block_m,
        "BLOCK_N": sizes.block_n,
        "BLOCK_D": sizes.block_d,
        "SEARCH": _SEARCH,
    }


def _options(sizes: Tiling) -> dict[str, int | bool | None]:
    return {
        "num_warps": sizes.num_warps,
        "num_stages": sizes.num_stages,
        "maxnreg": sizes.max_registers,
        "enable_fp_fusion": False,
    }


def _merge_constants(block_d: int, heads: int, dim: int, windowed: bool) -> dict[str, int | bool]:
    return {
        "HEADS": heads,
        "D": dim,
        "WINDOWED": windowed,
        "KEY_SPLIT": KEY_SPLIT,
        "BLOCK_H": _MERGE_HEADS,
        "BLOCK_D": block_d,
        "UNROLL": _MERGE_UNROLL,
        "SEARCH": _SEARCH,
    }


_DIMS = (16, 32, 64, 80, 128, 256)
"""Head sizes: every BLOCK_D whole, and one in part."""


def variants() -> Iterator[Variant]:
    """What `paged_attention` launches."""
    workspace = {"peak_ptr": "*fp32", "total_ptr": "*fp32", "acc_ptr": "*fp32"}
    bounds = {"cu_q_ptr": "*i32", "kv_len_ptr": "*i32"}
    strides = ("q_stride", "q_head_stride", "page_stride", "slot_stride", "head_stride")
    for (dtype, pointer), dim in product(POINTERS.items(), _DIMS):
        signature = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), pointer)
        signature |= {"table_ptr": "*i32", **bounds, **workspace, "scale": "fp32"}
        signature |= dict.fromkeys(("N", "B", "table_stride", "window", *strides), "i32")
        launches: dict[Tiling, set[int]] = {}
        for capability, rows, spread in product((80, 90, 100), (1, 1000), (False, True)):
            sizes = tiling(rows, 1, KEY_SPLIT, 32, 8, dim, dtype, capability)
            # What a launch is compiled for, without what only its grid depends on.
            sizes = replace(sizes, tiles=1, spread=spread, parts=1)
            launches.setdefault(sizes, set()).add(capability)
        for (sizes, capabilities), windowed in product(launches.items(), (False, True)):
            form = "spread" if sizes.spread else "walk"
            yield Variant(
                f"attention {pointer[1:]} D={dim} M={sizes.block_m} {form}{' window' if windowed else ''}",
                _attend_kernel,
                signature,
                _constants(sizes, 32, 8, dim, 16, windowed),
                _options(sizes),
                frozenset(strides),
                frozenset(capabilities),
            )
        merged = {**workspace, **bounds, "out_ptr": pointer} | dict.fromkeys(("N", "B", "window"), "i32")
        sizes = tiling(1, 1, KEY_SPLIT, 32, 8, dim, dtype)
        for windowed in (False, True):
            yield Variant(
                f"attention {pointer[1:]} D={dim} merge{' window' if windowed else ''}",
                _merge_kernel,
                merged,
                _merge_constants(sizes.block_d, 32, dim, windowed),
                _MERGE_OPTIONS,
            )
