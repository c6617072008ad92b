"""The conformal gate in one launch: count a batch against its calibration rings, decide, insert.

The batch must be counted against the rings as they were before it, so no insert may overtake a count. A program counts
one row against one part of its ring, leaves the two counts and takes a ticket. The program with the last ticket knows
that all others have counted: it alone adds the parts, decides, and inserts the rows in index order by their rank among
the rows of their key. No program waits for another, so no order of programs is needed.

Counts are integers: how a ring is parted, and who comes last, changes no bit. A ticket is an atomic addition that
releases what its program has read and written (all its threads wait at a barrier before it) and acquires what the
others released. The last program sets the ticket back to 0, so a captured launch can be replayed. Triton's interpreter
runs one program after another: it checks the counts and the inserts, while the ordering of programs that run at the
same time rests on those semantics and on tests marked `gpu`.

Everything that decides is int64. p is fp64 with contraction off, so that it has the bits of the reference.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from atts_triton.variants import Variant

BLOCK_B = 32
"""Rows that the last program decides on, and ranks, at a time."""
BLOCK_C = 2048
"""Scores of a ring that a program reads at a time."""
_PART = 8192
"""Scores of a full ring that one program counts, up to _MAX_PARTS programs a row."""
_MAX_PARTS = 64
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
_LEVEL_ONE = tl.constexpr(1 << 32)


@triton.jit
def is_finite(score):
    """False for NaN too."""
    return tl.abs(score) < float("inf")


@triton.jit
def count_part(score, ring, first, last, BLOCK_C: tl.constexpr):
    """(#{ring > score}, #{ring == score}) over ring[first:last], int32. A ring holds 2^28 scores at most."""
    greater = tl.zeros((BLOCK_C,), tl.int32)
    ties = tl.zeros((BLOCK_C,), tl.int32)
    for at in range(first, last, BLOCK_C):
        column = at + tl.arange(0, BLOCK_C)
        # NaN beyond the part is neither greater nor equal, so the tail needs no second mask.
        held = tl.load(ring + column, mask=column < last, other=float("nan"))
        greater += (held > score).to(tl.int32)
        ties += (held == score).to(tl.int32)
    return tl.sum(greater, 0), tl.sum(ties, 0)


@triton.jit
def is_last(ticket_ptr, programs):
    """Whether all other programs have taken their ticket: what they did before it has then happened."""
    tl.debug_barrier()
    return tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1


@triton.jit
def _inserted(score_ptr, key_ptr, insert_ptr, row, B, K):
    """Scores and keys of rows of the batch, and which of them are inserted."""
    live = row < B
    # Round the first-level cache: another multiprocessor may have written the score.
    score = tl.load(score_ptr + row, mask=live, other=float("nan"), cache_modifier=".cg")
    key = tl.load(key_ptr + row, mask=live, other=-1)
    wanted = tl.load(insert_ptr + row, mask=live, other=0) != 0
    return score, key, wanted & is_finite(score) & (key >= 0) & (key < K)


@triton.jit
def decide_and_insert(
    score_ptr,  # [B] fp32
    key_ptr,  # [B] int64
    level_ptr,  # [B] int64
    u_ptr,  # [B] int64
    insert_ptr,  # [B] uint8
    ring_ptr,  # [K, C] fp32
    size_ptr,  # [K] int64
    head_ptr,  # [K] int64
    part_ptr,  # [2, parts, B] int32
    greater_ptr,  # [B] int64
    ties_ptr,  # [B] int64
    n_ptr,  # [B] int64
    takeover_ptr,  # [B] uint8
    p_ptr,  # [B] fp64
    ticket_ptr,  # [1] int32
    B,
    K,
    C,
    parts,
    BLOCK_B: tl.constexpr,
):
    """What the program with the last ticket does, once all counts are there."""
    for first in range(0, B, BLOCK_B):
        row = first + tl.arange(0, BLOCK_B)
        live = row < B
        score = tl.load(score_ptr + row, mask=live, other=float("nan"), cache_modifier=".cg")
        key = tl.load(key_ptr + row, mask=live, other=-1)
        known = (key >= 0) & (key < K)
        finite = known & is_finite(score)
        greater = tl.zeros((BLOCK_B,), tl.int64)
        ties = tl.zeros((BLOCK_B,), tl.int64)
        for part in range(parts):
            at = part_ptr + tl.cast(part, tl.int64) * B + row
            greater += tl.load(at, mask=live, other=0, cache_modifier=".cg")
            ties += tl.load(at + tl.cast(parts, tl.int64) * B, mask=live, other=0, cache_modifier=".cg")
        n = tl.load(size_ptr + key, mask=known, other=0)
        level = tl.load(level_ptr + row, mask=live, other=0)
        u = tl.load(u_ptr + row, mask=live, other=1)
        takeover = finite & (greater * _LEVEL_ONE + u * (1 + ties) <= level * (n + 1))
        share = u.to(tl.float64) * (1.0 / _LEVEL_ONE)
        p = (greater.to(tl.float64) + share * (1 + ties).to(tl.float64)) / (n + 1).to(tl.float64)
        tl.store(greater_ptr + row, tl.where(finite, greater, -1), mask=live)
        tl.store(ties_ptr + row, tl.where(finite, ties, 0), mask=live)
        tl.store(n_ptr + row, n, mask=live)
        tl.store(takeover_ptr + row, takeover.to(tl.uint8), mask=live)
        tl.store(p_ptr + row, tl.where(finite, p, float("nan")), mask=live)

    # Every thread has read the sizes before any changes them.
    tl.debug_barrier()
    for first in range(0, B, BLOCK_B):
        row = first + tl.arange(0, BLOCK_B)
        score, key, insert = _inserted(score_ptr, key_ptr, insert_ptr, row, B, K)
        # Ranks, heads and capacities are below 2^31: 32-bit remainders need no subroutine.
        rank = tl.zeros((BLOCK_B,), tl.int32)
        arriving = tl.zeros((BLOCK_B,), tl.int32)
        for other in range(0, B, BLOCK_B):
            other_row = other + tl.arange(0, BLOCK_B)
            _, other_key, other_insert = _inserted(score_ptr, key_ptr, insert_ptr, other_row, B, K)
            same = (other_key[None, :] == key[:, None]) & other_insert[None, :]
            arriving += tl.sum(same.to(tl.int32), 1)
            rank += tl.sum((same & (other_row[None, :] < row[:, None])).to(tl.int32), 1)
        size = tl.load(size_ptr + key, mask=insert, other=0)
        head = tl.load(head_ptr + key, mask=insert, other=0).to(tl.int32)
        # More arrivals than the ring holds: those that later ones would overwrite are not written at all.
        tl.store(ring_ptr + key * C + (head + rank) % C, score, mask=insert & (rank >= arriving - C))
        # The last row of a key moves its head. No row behind this block reads it, and those in it have.
        tl.debug_barrier()
        final = insert & (rank == arriving - 1)
        tl.store(head_ptr + key, ((head + arriving) % C).to(tl.int64), mask=final)
        tl.store(size_ptr + key, tl.minimum(size + arriving, C), mask=final)
    tl.store(ticket_ptr, 0)


@triton.jit(
    do_not_specialize=["B", "K", "parts"],
    do_not_specialize_on_alignment=[
        "score_ptr", "key_ptr", "level_ptr", "u_ptr", "insert_ptr", "size_ptr", "head_ptr", "part_ptr", "greater_ptr",
        "ties_ptr", "n_ptr", "takeover_ptr", "p_ptr", "ticket_ptr",
    ],
)  # fmt: skip
def _gate_kernel(
    score_ptr,  # [B] fp32
    key_ptr,  # [B] int64
    level_ptr,  # [B] int64
    u_ptr,  # [B] int64
    insert_ptr,  # [B] uint8
    ring_ptr,  # [K, C] fp32
    size_ptr,  # [K] int64
    head_ptr,  # [K] int64
    part_ptr,  # [2, parts, B] int32
    greater_ptr,  # [B] int64
    ties_ptr,  # [B] int64
    n_ptr,  # [B] int64
    takeover_ptr,  # [B] uint8
    p_ptr,  # [B] fp64
    ticket_ptr,  # [1] int32, 0 before and after
    B,
    K,
    C,
    parts,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0)
    part = tl.program_id(1)
    score = tl.load(score_ptr + row)
    key = tl.load(key_ptr + row)
    counted = is_finite(score) & (key >= 0) & (key < K)
    key = tl.where(counted, key, 0)
    size = tl.where(counted, tl.load(size_ptr + key, mask=counted, other=0), 0)
    width = tl.cdiv(tl.cdiv(size, parts), BLOCK_C) * BLOCK_C
    first = tl.minimum(part * width, size)
    greater, ties = count_part(score, ring_ptr + key * C, first, tl.minimum(first + width, size), BLOCK_C)
    at = part_ptr + tl.cast(part, tl.int64) * B + row
    tl.store(at, greater)
    tl.store(at + tl.cast(parts, tl.int64) * B, ties)
    if is_last(ticket_ptr, B * parts):
        decide_and_insert(
            score_ptr, key_ptr, level_ptr, u_ptr, insert_ptr, ring_ptr, size_ptr, head_ptr, part_ptr,
            greater_ptr, ties_ptr, n_ptr, takeover_ptr, p_ptr, ticket_ptr, B, K, C, parts, BLOCK_B,
        )  # fmt: skip


_TICKETS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _ticket(ring: Tensor) -> Tensor:
    """The ticket of a store: calls that change the same ring follow one another, so they can share one, and calls on
    other rings must not. Zeros that were asked for under capture are written by the replay: they serve it alone."""
    ticket = _TICKETS.get(ring)
    if ticket is None:
        ticket = torch.zeros(1, dtype=torch.int32, device=ring.device)
        if not (ring.is_cuda and torch.cuda.is_current_stream_capturing()):
            _TICKETS[ring] = ticket
    return ticket


def empty_results(rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(greater[B], ties[B], n[B] int64, takeover[B] bool, p[B] fp64), not yet written."""
    greater, ties, n = torch.empty((3, rows), dtype=torch.int64, device=device).unbind(0)
    takeover = torch.empty(rows, dtype=torch.bool, device=device)
    return greater, ties, n, takeover, torch.empty(rows, dtype=torch.float64, device=device)


def check_store(ring: Tensor, size: Tensor, head: Tensor, name: str) -> None:
    """Raises ValueError for a store with gaps."""
    if not (ring.is_contiguous() and size.is_contiguous() and head.is_contiguous()):
        raise ValueError(f"{name} needs a contiguous ring, size and head")


def gate(
    score: Tensor, key: Tensor, ring: Tensor, size: Tensor, head: Tensor, level: Tensor, u: Tensor, insert: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(greater[B], ties[B], n[B], takeover[B] bool, p[B] fp64), and the rows inserted; see `atts_engine.ops.gate`.

    score fp32, ring[K, C] fp32, insert bool, all else int64; ring, size and head contiguous, changed in place. A key
    outside 0..K-1 gives its row the results of a score that is not finite, with n = 0. Calls on one ring must follow
    one another, as those of one stream do. Raises ValueError for a store with gaps.
    """
    check_store(ring, size, head, "gate")
    rows = score.shape[0]
    results = greater, ties, n, takeover, p = empty_results(rows, score.device)
    if rows:
        parts = min(_MAX_PARTS, triton.cdiv(ring.shape[1], _PART))
        _gate_kernel[(rows, parts)](
            score.contiguous(),
            key.contiguous(),
            level.contiguous(),
            u.contiguous(),
            insert.contiguous().view(torch.uint8),
            ring,
            size,
            head,
            torch.empty((2, parts, rows), dtype=torch.int32, device=score.device),
            greater,
            ties,
            n,
            takeover.view(torch.uint8),
            p,
            _ticket(ring),
            rows,
            *ring.shape,
            parts,
            BLOCK_B=BLOCK_B,
            BLOCK_C=BLOCK_C,
            **_OPTIONS,
        )
    return results


GATE_POINTERS = {
    "score_ptr": "*fp32", "key_ptr": "*i64", "level_ptr": "*i64", "u_ptr": "*i64", "insert_ptr": "*u8",
    "ring_ptr": "*fp32", "size_ptr": "*i64", "head_ptr": "*i64", "part_ptr": "*i32", "greater_ptr": "*i64",
    "ties_ptr": "*i64", "n_ptr": "*i64", "takeover_ptr": "*u8", "p_ptr": "*fp64", "ticket_ptr": "*i32",
}  # fmt: skip
"""Types of the store and the results in a signature."""


def variants() -> Iterator[Variant]:
    """What `gate` launches, for capacities that are multiples of 16 and others."""
    signature = {**GATE_POINTERS, "B": "i32", "K": "i32", "C": "i32", "parts": "i32"}
    constants = {"BLOCK_B": BLOCK_B, "BLOCK_C": BLOCK_C}
    for name, multiples in (("gate", frozenset({"C"})), ("gate any capacity", frozenset())):
        yield Variant(name, _gate_kernel, signature, constants, dict(_OPTIONS), multiples)
