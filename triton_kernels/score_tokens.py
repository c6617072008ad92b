"""Log-probability of given tokens from hidden states and the LM head, without logits in memory.

Launch 1, `_split_kernel`: a program owns BLOCK_T rows and one split of the vocabulary. It walks its split in tiles of
BLOCK_V columns; a tile's logits live in the fp32 accumulator only, where they feed an online log-sum-exp and, in the
tile that holds a row's id, give the target logit. It leaves (peak, total, target) per row and split.

Launch 2, `_merge_kernel`: folds the splits of a row from the first to the last.

A row's result is a function of its hidden state, the weight and its id: tiles and splits depend on (V, H, dtype) alone,
never on T, and the splits are merged in one order. T is not specialised on, so no batch size compiles anything anew.

Numerics: products of the operands' dtype accumulate in fp32 (fp32 operands without TF32). With peak m and total
s = sum 2^((z - m) log2 e), logprob = (z_target - m) - ln2 log2 s. A tile may be wholly past V, and a row may be -inf
throughout: then m is -inf, and 0 is subtracted instead of m, so that 2^(-inf) = 0 and never 2^(-inf - -inf) = NaN. A
NaN logit reaches s and makes the row NaN; an id outside [0, V) makes its row NaN too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from atts_triton import tuning
from atts_triton.variants import POINTERS, Variant

MAX_SPLITS = 128
"""Splits of the vocabulary: with one tile of rows a launch still has a program for nearly every SM of an H100."""
_MERGE_ROWS = 64
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@dataclass(frozen=True, slots=True)
class Tiling:
    """Sizes of `_split_kernel`, a function of (V, H, dtype) alone but for what `tuning` lets a table change."""

    block_t: int
    block_v: int
    block_h: int
    tiles_per_split: int
    splits: int
    num_warps: int
    num_stages: int


def tiling(vocab: int, hidden: int, dtype: torch.dtype) -> Tiling:
    """Tiles for a weight [vocab, hidden].

    fp32 operands use no tensor cores, and rows whose length is no multiple of 16 are loaded element by element, which
    holds pointers in registers: both take small tiles.
    """
    small = dtype == torch.float32 or hidden % 16
    block_t, block_v, block_h = (32, 64, 32) if small else (128, 128, 64)
    tiles = triton.cdiv(vocab, block_v)
    per_split = triton.cdiv(tiles, MAX_SPLITS)
    return Tiling(
        block_t=block_t,
        block_v=block_v,
        block_h=min(block_h, max(16, triton.next_power_of_2(hidden))),
        tiles_per_split=per_split,
        splits=triton.cdiv(tiles, per_split),
        num_warps=4 if small else 8,
        num_stages=3,
    )


@triton.jit
def _anchor(peak):
    """What is subtracted before exp2: the peak, or 0 where nothing finite was seen."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit(do_not_specialize=["T", "V", "tiles_per_split"])
def _split_kernel(
    hidden_ptr,  # [T, H]
    weight_ptr,  # [V, H]
    ids_ptr,  # [T] int64
    peak_ptr,  # [splits, T] fp32
    total_ptr,  # [splits, T] fp32
    target_ptr,  # [splits, T] fp32
    T,
    V,
    H,
    hidden_stride,
    weight_stride,
    tiles_per_split,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    EVEN_H: tl.constexpr,
):
    # Row tiles are the fastest axis: programs that run together read the same part of the weight, out of L2.
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    split = tl.program_id(1)
    live = row < T
    target_id = tl.load(ids_ptr + row, mask=live, other=-1)
    k = tl.arange(0, BLOCK_H)
    hidden_rows = hidden_ptr + row.to(tl.int64)[:, None] * hidden_stride + k[None, :]  # (BLOCK_T, BLOCK_H)

    peak = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    target = tl.zeros((BLOCK_T,), tl.float32)
    for tile in range(tiles_per_split):
        column = (split * tiles_per_split + tile) * BLOCK_V + tl.arange(0, BLOCK_V)
        inside = column < V
        weight_rows = weight_ptr + column.to(tl.int64)[:, None] * weight_stride + k[None, :]  # (BLOCK_V, BLOCK_H)
        logits = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
        for at in range(0, H, BLOCK_H):
            if EVEN_H:
                x = tl.load(hidden_rows + at, mask=live[:, None], other=0.0)
                w = tl.load(weight_rows + at, mask=inside[:, None], other=0.0)
            else:
                x = tl.load(hidden_rows + at, mask=live[:, None] & (k[None, :] < H - at), other=0.0)
                w = tl.load(weight_rows + at, mask=inside[:, None] & (k[None, :] < H - at), other=0.0)
            logits = tl.dot(x, tl.trans(w), logits, input_precision="ieee")
        target += tl.sum(tl.where(column[None, :] == target_id[:, None], logits, 0.0), 1)
        logits = tl.where(inside[None, :], logits, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(logits, 1))
        anchor = _anchor(new_peak)
        total = total * tl.exp2((peak - anchor) * _LOG2_E)
        total += tl.sum(tl.exp2((logits - anchor[:, None]) * _LOG2_E), 1)
        peak = new_peak

    out = split.to(tl.int64) * T + row
    tl.store(peak_ptr + out, peak, mask=live)
    tl.store(total_ptr + out, total, mask=live)
    tl.store(target_ptr + out, target, mask=live)


@triton.jit(do_not_specialize=["T", "V", "splits", "split_columns"])
def _merge_kernel(
    peak_ptr,  # [splits, T] fp32
    total_ptr,  # [splits, T] fp32
    target_ptr,  # [splits, T] fp32
    ids_ptr,  # [T] int64
    logprob_ptr,  # [T] fp32
    T,
    V,
    splits,
    split_columns,
    BLOCK_T: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = row < T
    peak = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    for split in range(splits):
        at = tl.cast(split, tl.int64) * T + row
        other_peak = tl.load(peak_ptr + at, mask=live, other=float("-inf"))
        other_total = tl.load(total_ptr + at, mask=live, other=0.0)
        new_peak = tl.maximum(peak, other_peak)
        anchor = _anchor(new_peak)
        total = total * tl.exp2((peak - anchor) * _LOG2_E) + other_total * tl.exp2((other_peak - anchor) * _LOG2_E)
        peak = new_peak
    target_id = tl.load(ids_ptr + row, mask=live, other=0)
    known = (target_id >= 0) & (target_id < V)
    owner = tl.where(known, target_id // split_columns, 0)
    target = tl.load(target_ptr + owner * T + row, mask=live, other=0.0)
    logprob = (target - peak) - _LN_2 * tl.log2(total)
    tl.store(logprob_ptr + row, tl.where(known, logprob, float("nan")), mask=live)


def score_tokens(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """log softmax(hidden[T, H] @ weight[V, H].T)[t, ids[t]] -> logprob[T] fp32.

    hidden and weight share one of fp32, fp16, bf16 and have rows without gaps; ids int64. An id outside [0, V) gives
    NaN. Raises ValueError for other dtypes and strides.
    """
    if hidden.dtype != weight.dtype or hidden.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"score_tokens takes one of fp32, fp16, bf16, not {hidden.dtype} and {weight.dtype}")
    if hidden.stride(1) != 1 or weight.stride(1) != 1:
        raise ValueError("score_tokens needs rows of hidden and weight without gaps")
    if triton.knobs.runtime.interpret and hidden.dtype == torch.bfloat16:
        raise ValueError("Triton's interpreter multiplies bf16 wrongly: use fp32 or fp16 there")
    rows, width = hidden.shape
    vocab = weight.shape[0]
    logprob = hidden.new_empty(rows, dtype=torch.float32)
    if not rows:
        return logprob
    measured = tuning.settings("score_tokens", hidden.dtype, T=rows, V=vocab, H=width)
    sizes = replace(tiling(vocab, width, hidden.dtype), **measured)
    partial = hidden.new_empty((3, sizes.splits, rows), dtype=torch.float32)
    peak, total, target = partial.unbind(0)
    ids = ids.contiguous()
    _split_kernel[(triton.cdiv(rows, sizes.block_t), sizes.splits)](
        hidden,
        weight,
        ids,
        peak,
        total,
        target,
        rows,
        vocab,
        width,
        hidden.stride(0),
        weight.stride(0),
        sizes.tiles_per_split,
        BLOCK_T=sizes.block_t,
        BLOCK_V=sizes.block_v,
        BLOCK_H=sizes.block_h,
        EVEN_H=width % sizes.block_h == 0,
        num_warps=sizes.num_warps,
        num_stages=sizes.num_stages,
        enable_fp_fusion=True,
    )
    _merge_kernel[(triton.cdiv(rows, _MERGE_ROWS),)](
        peak,
        total,
        target,
        ids,
        logprob,
        rows,
        vocab,
        sizes.splits,
        sizes.tiles_per_split * sizes.block_v,
        BLOCK_T=_MERGE_ROWS,
        num_warps=2,
        enable_fp_fusion=True,
    )
    return logprob


_HIDDEN = (32, 4096, 1008, 4100)
"""Hidden sizes, one for each way that rows divide: less than a tile, whole tiles, whole vectors only, nothing."""


def variants() -> Iterator[Variant]:
    """What `score_tokens` launches."""
    partials = {"peak_ptr": "*fp32", "total_ptr": "*fp32", "target_ptr": "*fp32"}
    for dtype, pointer in POINTERS.items():
        for hidden in _HIDDEN:
            sizes = tiling(1 << 17, hidden, dtype)
            signature = {"hidden_ptr": pointer, "weight_ptr": pointer, "ids_ptr": "*i64", **partials}
            signature |= dict.fromkeys(("T", "V", "H", "hidden_stride", "weight_stride", "tiles_per_split"), "i32")
            yield Variant(
                f"score_tokens split {pointer[1:]} H={hidden}",
                _split_kernel,
                signature,
                {
                    "BLOCK_T": sizes.block_t,
                    "BLOCK_V": sizes.block_v,
                    "BLOCK_H": sizes.block_h,
                    "EVEN_H": hidden % sizes.block_h == 0,
                },
                {"num_warps": sizes.num_warps, "num_stages": sizes.num_stages, "enable_fp_fusion": True},
                frozenset() if hidden % 16 else frozenset({"H", "hidden_stride", "weight_stride"}),
            )
    signature = {**partials, "ids_ptr": "*i64", "logprob_ptr": "*fp32"}
    signature |= dict.fromkeys(("T", "V", "splits", "split_columns"), "i32")
    options = {"num_warps": 2, "enable_fp_fusion": True}
    yield Variant("score_tokens merge", _merge_kernel, signature, {"BLOCK_T": _MERGE_ROWS}, options)
