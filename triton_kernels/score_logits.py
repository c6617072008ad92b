"""Log-probability of given tokens from logits that exist already, in one read of them.

Launch 1: a program reads one split of one row, tile by tile, and leaves (peak, total, target) as `score_tokens` does,
whose second launch merges the splits. Splits and tiles depend on V alone, and every sum is the tree of `fold`: the bits
of a row follow neither its company nor the stride and alignment of its logits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from atts_triton.logsumexp import LOG2_E, MAX_SPLITS, anchor_of, fold, soft_cap
from atts_triton.score_tokens import PARTIALS, Partials, merge
from atts_triton.variants import POINTERS, Variant

_LOG_COLUMNS = 12
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit(
    do_not_specialize=["T", "V", "tiles_per_split"],
    do_not_specialize_on_alignment=["ids_ptr", "peak_ptr", "total_ptr", "target_ptr"],
)
def _logits_kernel(
    logits_ptr,  # [T, V]
    ids_ptr,  # [T] int64
    peak_ptr,  # [splits, T] fp32
    total_ptr,  # [splits, T] fp32
    target_ptr,  # [splits, T] fp32
    T,
    V,
    row_stride,
    tiles_per_split,
    cap,
    LOG_COLUMNS: tl.constexpr,
    SOFT_CAP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    COLUMNS: tl.constexpr = 1 << LOG_COLUMNS
    logits_row = logits_ptr + row * row_stride
    first = split * tiles_per_split * COLUMNS
    last = tl.minimum(first + tiles_per_split * COLUMNS, V)

    peak = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    for at in range(first, last, COLUMNS):
        column = at + tl.arange(0, COLUMNS)
        logits = tl.load(logits_row + column, mask=column < last, other=float("-inf")).to(tl.float32)
        if SOFT_CAP:
            logits = tl.where(column < last, soft_cap(logits, cap), float("-inf"))
        logits = tl.reshape(logits, (1, COLUMNS))
        new_peak = tl.maximum(peak, tl.max(logits, 1))
        anchor = anchor_of(new_peak)
        total = total * tl.exp2((peak - anchor) * LOG2_E)
        total += fold(tl.exp2((logits - anchor[:, None]) * LOG2_E), LOG_COLUMNS)
        peak = new_peak

    token = tl.load(ids_ptr + row)
    target = tl.load(logits_row + token, mask=(token >= first) & (token < last), other=0.0).to(tl.float32)
    if SOFT_CAP:
        target = soft_cap(target, cap)
    out = split.to(tl.int64) * T + row + tl.arange(0, 1)
    tl.store(peak_ptr + out, peak)
    tl.store(total_ptr + out, total)
    tl.store(target_ptr + out, target)


def score_logits(logits: Tensor, ids: Tensor, softcap: float = 0.0) -> Tensor:
    """log softmax(cap(logits[T, V]))[t, ids[t]] -> logprob[T] fp32; cap as in `score_tokens`.

    logits fp32, fp16 or bf16, rows without gaps and any stride between them; ids int64. An id outside [0, V) gives NaN.
    Raises ValueError for other dtypes and strides.
    """
    if logits.dtype not in POINTERS:
        raise ValueError(f"score_logits takes fp32, fp16 or bf16, not {logits.dtype}")
    if logits.stride(1) != 1:
        raise ValueError("score_logits needs rows of logits without gaps")
    rows, vocab = logits.shape
    if not rows:
        return logits.new_empty(0, dtype=torch.float32)
    tiles = triton.cdiv(vocab, 1 << _LOG_COLUMNS)
    per_split = triton.cdiv(tiles, MAX_SPLITS)
    ids = ids.contiguous()
    partials = Partials.empty(triton.cdiv(tiles, per_split), per_split << _LOG_COLUMNS, rows, logits.device)
    _logits_kernel[(rows, partials.splits)](
        logits,
        ids,
        partials.peak,
        partials.total,
        partials.target,
        rows,
        vocab,
        logits.stride(0),
        per_split,
        float(softcap),
        LOG_COLUMNS=_LOG_COLUMNS,
        SOFT_CAP=softcap != 0,
        **_OPTIONS,
    )
    return merge(partials, ids, vocab)


def variants() -> Iterator[Variant]:
    """What `score_logits` launches beside the merge of `score_tokens`."""
    for pointer in POINTERS.values():
        for vectors in (False, True):
            for capped in (False, True):
                signature = {"logits_ptr": pointer, "ids_ptr": "*i64", **PARTIALS, "cap": "fp32"}
                signature |= dict.fromkeys(("T", "V", "row_stride", "tiles_per_split"), "i32")
                yield Variant(
                    f"score_logits {pointer[1:]}{' vectors' if vectors else ''}{' cap' if capped else ''}",
                    _logits_kernel,
                    signature,
                    {"LOG_COLUMNS": _LOG_COLUMNS, "SOFT_CAP": capped},
                    dict(_OPTIONS),
                    frozenset({"row_stride"} if vectors else ()),
                )
