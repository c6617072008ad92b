"""The conformal gate in one launch: count a batch against its calibration rings, decide, insert.

The batch must be counted against the rings as they were before it, so no insert may overtake a count. Program k owns
key k: it alone reads and writes ring k, it counts every row of its key, waits for its own threads, and then inserts.
No order between programs is needed, and rows are inserted in index order by their rank among the rows of the key.

Everything that decides is int64. p is fp64 with contraction off, so that it has the bits of the reference.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from atts_triton.variants import Variant

_BLOCK_B = 32
_BLOCK_C = 256
_NUM_WARPS = 4
_LEVEL_ONE = tl.constexpr(1 << 32)


@triton.jit
def _rows_of_key(score_ptr, key_ptr, insert_ptr, row, B, key):
    """Scores of rows of the batch; which belong to key; which of those are finite; which of those are inserted."""
    live = row < B
    score = tl.load(score_ptr + row, mask=live, other=0.0)
    mine = live & (tl.load(key_ptr + row, mask=live, other=-1) == key)
    finite = mine & (tl.abs(score) < float("inf"))  # false for NaN too
    insert = finite & (tl.load(insert_ptr + row, mask=live, other=0) != 0)
    return score, mine, finite, insert


@triton.jit(do_not_specialize=["B"])
def _gate_kernel(
    score_ptr,  # [B] fp32
    key_ptr,  # [B] int64
    level_ptr,  # [B] int64
    u_ptr,  # [B] int64
    insert_ptr,  # [B] uint8
    ring_ptr,  # [K, C] fp32
    size_ptr,  # [K] int64
    head_ptr,  # [K] int64
    greater_ptr,  # [B] int64
    ties_ptr,  # [B] int64
    n_ptr,  # [B] int64
    takeover_ptr,  # [B] uint8
    p_ptr,  # [B] fp64
    B,
    C,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    key = tl.program_id(0)
    ring = ring_ptr + key.to(tl.int64) * C
    size = tl.load(size_ptr + key)
    head = tl.load(head_ptr + key)
    arriving = tl.zeros((), tl.int64)
    for first in range(0, B, BLOCK_B):
        row = first + tl.arange(0, BLOCK_B)
        score, mine, finite, insert = _rows_of_key(score_ptr, key_ptr, insert_ptr, row, B, key)
        if tl.sum(mine.to(tl.int32), 0) > 0:
            arriving += tl.sum(insert.to(tl.int64), 0)
            greater = tl.zeros((BLOCK_B,), tl.int64)
            ties = tl.zeros((BLOCK_B,), tl.int64)
            for at in range(0, size, BLOCK_C):
                column = at + tl.arange(0, BLOCK_C)
                # NaN in the unfilled part is neither greater nor equal, so the tail needs no second mask.
                held = tl.load(ring + column, mask=column < size, other=float("nan"))
                greater += tl.sum((held[None, :] > score[:, None]).to(tl.int32), 1)
                ties += tl.sum((held[None, :] == score[:, None]).to(tl.int32), 1)
            level = tl.load(level_ptr + row, mask=mine, other=0)
            u = tl.load(u_ptr + row, mask=mine, other=1)
            takeover = finite & (greater * _LEVEL_ONE + u * (1 + ties) <= level * (size + 1))
            share = u.to(tl.float64) * (1.0 / _LEVEL_ONE)
            p = (greater.to(tl.float64) + share * (1 + ties).to(tl.float64)) / (size + 1).to(tl.float64)
            tl.store(greater_ptr + row, tl.where(finite, greater, -1), mask=mine)
            tl.store(ties_ptr + row, tl.where(finite, ties, 0), mask=mine)
            tl.store(n_ptr + row, tl.zeros((BLOCK_B,), tl.int64) + size, mask=mine)
            tl.store(takeover_ptr + row, takeover.to(tl.uint8), mask=mine)
            tl.store(p_ptr + row, tl.where(finite, p, float("nan")), mask=mine)

    # Every thread of the program has read the ring before any writes it.
    tl.debug_barrier()
    if arriving > 0:
        rank = tl.zeros((), tl.int64)
        for first in range(0, B, BLOCK_B):
            row = first + tl.arange(0, BLOCK_B)
            score, mine, finite, insert = _rows_of_key(score_ptr, key_ptr, insert_ptr, row, B, key)
            place = rank + tl.cumsum(insert.to(tl.int64), 0) - 1
            # More arrivals than the ring holds: those that later ones would overwrite are not written at all.
            tl.store(ring + (head + place) % C, score, mask=insert & (place >= arriving - C))
            rank += tl.sum(insert.to(tl.int64), 0)
        tl.store(head_ptr + key, (head + arriving) % C)
        tl.store(size_ptr + key, tl.minimum(size + arriving, C))


def gate(
    score: Tensor, key: Tensor, ring: Tensor, size: Tensor, head: Tensor, level: Tensor, u: Tensor, insert: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(greater[B], ties[B], n[B], takeover[B] bool, p[B] fp64), and the rows inserted; see `atts_engine.ops.gate`.

    score fp32, ring[K, C] fp32, insert bool, all else int64; ring, size and head contiguous, changed in place. A key
    outside 0..K-1 leaves its row of the results as it was allocated. Raises ValueError for a store with gaps.
    """
    if not (ring.is_contiguous() and size.is_contiguous() and head.is_contiguous()):
        raise ValueError("gate needs a contiguous ring, size and head")
    rows = score.shape[0]
    counts = torch.empty((3, rows), dtype=torch.int64, device=score.device)
    takeover = torch.empty(rows, dtype=torch.bool, device=score.device)
    p = torch.empty(rows, dtype=torch.float64, device=score.device)
    greater, ties, n = counts.unbind(0)
    if rows:
        _gate_kernel[(ring.shape[0],)](
            score.contiguous(),
            key.contiguous(),
            level.contiguous(),
            u.contiguous(),
            insert.contiguous().view(torch.uint8),
            ring,
            size,
            head,
            greater,
            ties,
            n,
            takeover.view(torch.uint8),
            p,
            rows,
            ring.shape[1],
            BLOCK_B=_BLOCK_B,
            BLOCK_C=_BLOCK_C,
            num_warps=_NUM_WARPS,
            enable_fp_fusion=False,
        )
    return greater, ties, n, takeover, p


def variants() -> Iterator[Variant]:
    """What `gate` launches."""
    pointers = {
        "score_ptr": "*fp32", "key_ptr": "*i64", "level_ptr": "*i64", "u_ptr": "*i64", "insert_ptr": "*u8",
        "ring_ptr": "*fp32", "size_ptr": "*i64", "head_ptr": "*i64", "greater_ptr": "*i64", "ties_ptr": "*i64",
        "n_ptr": "*i64", "takeover_ptr": "*u8", "p_ptr": "*fp64", "B": "i32", "C": "i32",
    }  # fmt: skip
    constants = {"BLOCK_B": _BLOCK_B, "BLOCK_C": _BLOCK_C}
    yield Variant("gate", _gate_kernel, pointers, constants, {"num_warps": _NUM_WARPS, "enable_fp_fusion": False})
