"""Mean of log-probabilities over spans, in one launch and one order.

A program owns a span and adds in fp64 from the first token to the last, as a host loop would. The loads of a stretch of
tokens do not wait for each other; only the additions do.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from atts_triton.variants import Variant


@triton.jit
def span_bounds(cu_seqlens_ptr, span, T):
    """(start, end) of a span; (0, 0) where it is empty or does not lie in 0..T."""
    start = tl.load(cu_seqlens_ptr + span).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + span + 1).to(tl.int64)
    valid = (start >= 0) & (start < end) & (end <= T)
    return tl.where(valid, start, 0), tl.where(valid, end, 0)


@triton.jit
def sum_in_order(logprob_ptr, start, end):
    """fp64 sum of logprob[start:end], from the first to the last. The zeros behind the last change no bit of a sum
    that began with +0."""
    total = tl.zeros((), tl.float64)
    for at in range(start, end, 16):
        for i in tl.static_range(16):
            total += tl.load(logprob_ptr + at + i, mask=at + i < end, other=0.0).to(tl.float64)
    return total


@triton.jit
def mean_score(total, start, end):
    """-total / tokens in fp64, then fp32; NaN for a span without tokens."""
    tokens = tl.where(end > start, (end - start).to(tl.float64), float("nan"))
    return (-total / tokens).to(tl.float32)


@triton.jit(
    do_not_specialize=["T"],
    do_not_specialize_on_alignment=["logprob_ptr", "cu_seqlens_ptr", "score_ptr", "sum_ptr"],
)
def _span_kernel(
    logprob_ptr,  # [T] fp32
    cu_seqlens_ptr,  # [B + 1] int32 or int64
    score_ptr,  # [B] fp32
    sum_ptr,  # [B] fp64
    T,
):
    span = tl.program_id(0)
    start, end = span_bounds(cu_seqlens_ptr, span, T)
    total = sum_in_order(logprob_ptr, start, end)
    tl.store(score_ptr + span, mean_score(total, start, end))
    tl.store(sum_ptr + span, tl.where(end > start, total, float("nan")))


def span_mean(logprob: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """(score[B] fp32 = -mean, sum_logprob[B] fp64) of logprob[T] fp32 over cu_seqlens[B + 1], int32 or int64.

    A span that is empty or leaves 0..T gives NaN for both: nothing waits for the device to refuse it.
    """
    spans = cu_seqlens.shape[0] - 1
    score = logprob.new_empty(spans, dtype=torch.float32)
    sums = logprob.new_empty(spans, dtype=torch.float64)
    if spans:
        _span_kernel[(spans,)](
            logprob.contiguous(),
            cu_seqlens.contiguous(),
            score,
            sums,
            logprob.shape[0],
            num_warps=1,
            enable_fp_fusion=False,
        )
    return score, sums


def variants() -> Iterator[Variant]:
    """What `span_mean` launches."""
    for bounds in ("*i32", "*i64"):
        signature = {
            "logprob_ptr": "*fp32", "cu_seqlens_ptr": bounds, "score_ptr": "*fp32", "sum_ptr": "*fp64", "T": "i32",
        }  # fmt: skip
        yield Variant(
            f"span_mean {bounds[1:]}", _span_kernel, signature, {}, {"num_warps": 1, "enable_fp_fusion": False}
        )
