"""The verifier's fused path in two launches: hidden states and drafted ids to verdicts.

Launch 1 is that of `score_tokens`. In launch 2 a program owns a span: it merges the vocabulary splits of the span's
tokens in one order, adds their log-probabilities in fp64 from the first to the last as `span_mean` does, and counts the
score against the ring of the span's key. Then it takes a ticket, and the program with the last one decides and inserts
for the whole batch: see `atts_triton.gate`, whose arithmetic this is. Launch 1 sets the ticket to 0, so nothing is kept
between calls.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from atts_triton.gate import (
    BLOCK_B,
    BLOCK_C,
    GATE_POINTERS,
    check_store,
    count_part,
    decide_and_insert,
    empty_results,
    is_finite,
    is_last,
)
from atts_triton.logsumexp import logprob_of
from atts_triton.score_tokens import PARTIALS, Partials, check, split
from atts_triton.span_mean import mean_score, span_bounds, sum_in_order
from atts_triton.variants import Variant

_BLOCK_T = 32
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit(
    do_not_specialize=["T", "V", "splits", "split_columns", "B", "K"],
    do_not_specialize_on_alignment=[
        "peak_ptr", "total_ptr", "target_ptr", "ids_ptr", "logprob_ptr", "cu_seqlens_ptr", "sum_ptr", "score_ptr",
        "key_ptr", "level_ptr", "u_ptr", "insert_ptr", "size_ptr", "head_ptr", "part_ptr", "greater_ptr", "ties_ptr",
        "n_ptr", "takeover_ptr", "p_ptr", "ticket_ptr",
    ],
)  # fmt: skip
def _finish_kernel(
    peak_ptr,  # [splits, T] fp32
    total_ptr,  # [splits, T] fp32
    target_ptr,  # [splits, T] fp32
    ids_ptr,  # [T] int64
    logprob_ptr,  # [T] fp32, scratch
    cu_seqlens_ptr,  # [B + 1] int32 or int64
    sum_ptr,  # [B] fp64
    score_ptr,  # [B] fp32
    key_ptr,  # [B] int64
    level_ptr,  # [B] int64
    u_ptr,  # [B] int64
    insert_ptr,  # [B] uint8
    ring_ptr,  # [K, C] fp32
    size_ptr,  # [K] int64
    head_ptr,  # [K] int64
    part_ptr,  # [2, 1, B] int32
    greater_ptr,  # [B] int64
    ties_ptr,  # [B] int64
    n_ptr,  # [B] int64
    takeover_ptr,  # [B] uint8
    p_ptr,  # [B] fp64
    ticket_ptr,  # [1] int32, 0 before and after
    T,
    V,
    splits,
    split_columns,
    B,
    K,
    C,
    BLOCK_T: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    span = tl.program_id(0)
    start, end = span_bounds(cu_seqlens_ptr, span, T)
    for first in range(start, end, BLOCK_T):
        row = first + tl.arange(0, BLOCK_T)
        live = row < end
        logprob = logprob_of(peak_ptr, total_ptr, target_ptr, ids_ptr, row, live, T, V, splits, split_columns)
        tl.store(logprob_ptr + row, logprob, mask=live)
    # The sum reads what other threads of this program have written.
    tl.debug_barrier()
    total = sum_in_order(logprob_ptr, start, end)
    score = mean_score(total, start, end)
    tl.store(sum_ptr + span, tl.where(end > start, total, float("nan")))
    tl.store(score_ptr + span, score)

    key = tl.load(key_ptr + span)
    counted = is_finite(score) & (key >= 0) & (key < K)
    key = tl.where(counted, key, 0)
    size = tl.where(counted, tl.load(size_ptr + key, mask=counted, other=0), 0)
    greater, ties = count_part(score, ring_ptr + key * C, 0, size, BLOCK_C)
    tl.store(part_ptr + span, greater)
    tl.store(part_ptr + B + span, ties)
    if is_last(ticket_ptr, B):
        decide_and_insert(
            score_ptr, key_ptr, level_ptr, u_ptr, insert_ptr, ring_ptr, size_ptr, head_ptr, part_ptr,
            greater_ptr, ties_ptr, n_ptr, takeover_ptr, p_ptr, ticket_ptr, B, K, C, 1, BLOCK_B,
        )  # fmt: skip


def score_gate(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    cu_seqlens: Tensor,
    key: Tensor,
    ring: Tensor,
    size: Tensor,
    head: Tensor,
    level: Tensor,
    u: Tensor,
    insert: Tensor,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(score[B] fp32, sum_logprob[B] fp64, greater[B], ties[B], n[B], takeover[B] bool, p[B] fp64), and the rows
    inserted; see `atts_engine.ops.score_gate`.

    hidden, weight, ids as `score_tokens` takes them, cu_seqlens as `span_mean`, the rest as `gate`. A span that is
    empty or leaves 0..T, an id outside [0, V) and a key outside 0..K-1 give what a score that is not finite gives.
    """
    check(hidden, weight, "score_gate")
    check_store(ring, size, head, "score_gate")
    tokens, spans = hidden.shape[0], cu_seqlens.shape[0] - 1
    device = hidden.device
    score = torch.empty(spans, dtype=torch.float32, device=device)
    sums = torch.empty(spans, dtype=torch.float64, device=device)
    greater, ties, n, takeover, p = empty_results(spans, device)
    if spans:
        ids = ids.contiguous()
        if tokens:
            ticket = torch.empty(1, dtype=torch.int32, device=device)
            partials = split(hidden, weight, ids, softcap, ticket)
        else:
            ticket = torch.zeros(1, dtype=torch.int32, device=device)
            partials = Partials.empty(1, 1, 0, device)
        _finish_kernel[(spans,)](
            partials.peak,
            partials.total,
            partials.target,
            ids,
            torch.empty(tokens, dtype=torch.float32, device=device),
            cu_seqlens.contiguous(),
            sums,
            score,
            key.contiguous(),
            level.contiguous(),
            u.contiguous(),
            insert.contiguous().view(torch.uint8),
            ring,
            size,
            head,
            torch.empty((2, 1, spans), dtype=torch.int32, device=device),
            greater,
            ties,
            n,
            takeover.view(torch.uint8),
            p,
            ticket,
            tokens,
            weight.shape[0],
            partials.splits,
            partials.split_columns,
            spans,
            *ring.shape,
            BLOCK_T=_BLOCK_T,
            BLOCK_B=BLOCK_B,
            BLOCK_C=BLOCK_C,
            **_OPTIONS,
        )
    return score, sums, greater, ties, n, takeover, p


def variants() -> Iterator[Variant]:
    """What `score_gate` launches behind the splits of `score_tokens`."""
    signature = {**PARTIALS, **GATE_POINTERS, "ids_ptr": "*i64", "logprob_ptr": "*fp32", "sum_ptr": "*fp64"}
    signature |= dict.fromkeys(("T", "V", "splits", "split_columns", "B", "K", "C"), "i32")
    constants = {"BLOCK_T": _BLOCK_T, "BLOCK_B": BLOCK_B, "BLOCK_C": BLOCK_C}
    for bounds in ("*i32", "*i64"):
        for name, multiples in (("", frozenset({"C"})), (" any capacity", frozenset())):
            types = signature | {"cu_seqlens_ptr": bounds}
            yield Variant(
                f"score_gate finish {bounds[1:]}{name}", _finish_kernel, types, constants, dict(_OPTIONS), multiples
            )
