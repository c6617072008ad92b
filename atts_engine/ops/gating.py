"""The conformal gate: count a batch of scores against their calibration rings, decide, then insert."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from atts_engine.errors import InputError
from atts_engine.ops import checks, cuda, native
from atts_engine.ops.checks import LEVEL_ONE
from atts_engine.ops.dispatch import CUDA, NATIVE, TRITON, chosen

MAX_CAPACITY = 1 << 28
"""Calibration scores per key. Keeps u * (1 + ties) and level * (n + 1) below 2^62, so that int64 decides exactly."""


class GateResult(NamedTuple):
    """Per row of the batch: greater = #{calibration > score}, ties = #{==}, n (all int64[B]), takeover bool[B], p
    fp64[B]."""

    greater: Tensor
    ties: Tensor
    n: Tensor
    takeover: Tensor
    p: Tensor


def check_capacity(ring: Tensor, op: str) -> None:
    """Raises InputError for rings that hold nothing, or more than the test can decide exactly."""
    if not 1 <= ring.shape[1] <= MAX_CAPACITY:
        raise InputError(f"{op}: a ring holds 1 to {MAX_CAPACITY} scores, not {ring.shape[1]}")


def gate(
    score: Tensor,
    key: Tensor,
    ring: Tensor,
    size: Tensor,
    head: Tensor,
    level: Tensor,
    u: Tensor,
    insert: Tensor,
) -> GateResult:
    """Test score[B] fp32 of key[B] int64 against ring[K, C] fp32, size[K] int64, head[K] int64, then insert.

    level[B] int64 = ceil(alpha * 2^32), 0 (never) .. 2^32 (always); u[B] int64 in 1..2^32 (2^32: no randomisation of
    ties); insert[B] bool.
    The whole batch is counted against the rings as they are; then rows with `insert` are written in index order, each
    at its ring's head (oldest out), and ring, size and head are updated in place.

    takeover iff greater * 2^32 + u * (1 + ties) <= level * (n + 1), in int64; p = (greater + u/2^32 (1 + ties)) / (n
    + 1), the smoothed conformal p-value (Vovk, Gammerman, Shafer 2005, eq. 2.20). A score that is NaN or infinite is
    not inserted and gives greater = -1, ties = 0, takeover False, p NaN: the caller makes it an error of that chain.

    Raises InputError for shapes and dtypes that do not fit and, where that needs no wait for a device, for a key that
    the store does not have; on a GPU such a key gives what a NaN score gives, with n = 0.
    """
    checks.gate(score, key, ring, size, head, level, u, insert)
    check_capacity(ring, "gate")
    impl = chosen("gate", score.device)
    if impl == TRITON:
        import atts_triton

        return GateResult(*atts_triton.gate(score, key, ring, size, head, level, u, insert))
    if impl == CUDA:
        return GateResult(*cuda.gate(score, key, ring, size, head, level, u, insert))
    if impl == NATIVE:
        return GateResult(*native.gate(score, key, ring, size, head, level, u, insert))
    return _reference(score, key, ring, size, head, level, u, insert)


def _reference(
    score: Tensor,
    key: Tensor,
    ring: Tensor,
    size: Tensor,
    head: Tensor,
    level: Tensor,
    u: Tensor,
    insert: Tensor,
) -> GateResult:
    capacity = ring.shape[1]
    finite = torch.isfinite(score)
    n = size[key]
    column = torch.arange(capacity, device=ring.device)
    window = ring[key]  # a copy: the inserts below do not reach what is counted
    filled = column < n[:, None]
    greater = ((window > score[:, None]) & filled).sum(1)
    ties = ((window == score[:, None]) & filled).sum(1)
    greater = torch.where(finite, greater, -1)
    ties = torch.where(finite, ties, 0)
    takeover = finite & (greater * LEVEL_ONE + u * (1 + ties) <= level * (n + 1))
    p = (greater.double() + u.double() / LEVEL_ONE * (1 + ties)) / (n + 1)
    p = torch.where(finite, p, float("nan"))
    for row in torch.nonzero(finite & insert).view(-1).tolist():
        ring_key = int(key[row])
        at = int(head[ring_key])
        ring[ring_key, at] = score[row]
        head[ring_key] = (at + 1) % capacity
        size[ring_key] = min(int(size[ring_key]) + 1, capacity)
    return GateResult(greater, ties, n, takeover, p)
