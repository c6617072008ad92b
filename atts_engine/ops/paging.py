"""Writes to the paged KV cache. A lane's cache is one tensor kv[L, 2, P, page, Hkv, D] (2: keys, values); a slot is
page_id * page + offset."""

from __future__ import annotations

import torch
from torch import Tensor

from atts_engine.errors import InputError
from atts_engine.ops import checks, cuda, flash, native
from atts_engine.ops.dense import rope
from atts_engine.ops.dispatch import CUDA, FLASHINFER, TRITON, chosen, runs_native

_STAGED_BYTES = 64 << 20
"""Device memory that `kv_swap` gathers pages in: it runs when memory is short."""


def kv_slots(positions: Tensor, block_table: Tensor, cu_q: Tensor, page: int) -> Tensor:
    """Where each row's key and value go, for all layers of a forward pass: [N] int64.

    positions[N] int64; block_table[B, W] int32; cu_q[B + 1] int32, row bounds of the sequences. Row i of cu_q[b] ..
    cu_q[b + 1] - 1 goes to block_table[b, positions[i] // page] * page + positions[i] % page. Every row must belong to
    a sequence and lie within its row of the table.

    Raises InputError where shapes or dtypes do not fit.
    """
    checks.kv_slots(positions, block_table, cu_q, page)
    if chosen("kv_slots", positions.device) == TRITON:
        import atts_triton

        return atts_triton.kv_slots(positions, block_table, cu_q, page)
    rows = torch.arange(positions.shape[0], dtype=torch.int32, device=positions.device)
    sequence = torch.searchsorted(cu_q[1:], rows, right=True)
    index = torch.div(positions, page, rounding_mode="floor")
    # slot = page_id * page + (position - index * page)
    return (block_table[sequence, index] - index).mul_(page).add_(positions)


def kv_append(k: Tensor, v: Tensor, kv_layer: Tensor, slots: Tensor) -> None:
    """Write k[N, Hkv, D] and v[N, Hkv, D] to slots[N] int64 of kv_layer[2, P, page, Hkv, D], in place.

    Two rows must not name one slot: which of them stays would not be defined. A slot that the cache does not have is an
    error on the CPU; on a GPU, where looking would mean waiting, its row is not written, but under `use("flashinfer")`,
    which would write outside the cache.
    """
    checks.kv_append(k, v, kv_layer, slots)
    impl = chosen("kv_append", kv_layer.device)
    if impl == TRITON:
        import atts_triton

        return atts_triton.kv_append(k, v, kv_layer, slots)
    if impl == FLASHINFER:
        return flash.kv_append(k, v, kv_layer, slots)
    if impl == CUDA:
        return cuda.kv_append(k, v, kv_layer, slots)
    if runs_native("kv_append", kv_layer.device, kv_layer.dtype) and k.dtype is kv_layer.dtype:
        try:
            return native.kv_append(k, v, kv_layer, slots)
        except InputError:
            checks.within("kv_append", "slots", slots, 0, kv_layer.shape[1] * kv_layer.shape[2], "the cache")
            raise
    rows = kv_layer.view(2, -1, *kv_layer.shape[3:])
    if checks.values_read(slots):
        checks.within("kv_append", "slots", slots, 0, rows.shape[1], "the cache")
    rows[0].index_copy_(0, slots, k.to(kv_layer.dtype))
    rows[1].index_copy_(0, slots, v.to(kv_layer.dtype))
    return None


def rope_kv_append(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, kv_layer: Tensor, slots: Tensor
) -> Tensor:
    """`rope` of q[N, Hq, D] -> [N, Hq, D]; k[N, Hkv, D] rotated likewise and v[N, Hkv, D] go to slots[N] int64 of
    kv_layer[2, P, page, Hkv, D], in place.

    cos, sin: fp32 [N, D/2]. The keys that are stored have the bits of `rope` followed by `kv_append`, which on the CPU
    is what runs. Slots as `kv_slots` gives them, once for all layers; for them the words of `kv_append` hold.

    Raises InputError as `rope` and `kv_append` do, and for q and k of two dtypes.
    """
    impl = chosen("rope_kv_append", q.device)
    if impl in (TRITON, CUDA) or q.dtype is not k.dtype:  # the ops that follow otherwise check all the rest
        checks.rope_kv_append(q, k, v, cos, sin, kv_layer, slots)
    if impl == TRITON:
        import atts_triton

        return atts_triton.rope_kv_append(q, k, v, cos, sin, kv_layer, slots)
    if impl == CUDA:
        return cuda.rope_kv_append(q, k, v, cos, sin, kv_layer, slots)
    rotated = rope(q, cos, sin)
    kv_append(rope(k, cos, sin), v, kv_layer, slots)
    return rotated


def kv_copy_pages(kv: Tensor, src: Tensor, dst: Tensor) -> None:
    """Copy pages src[C] int64 to dst[C] int64 in every layer of kv[L, 2, P, page, Hkv, D], in place.

    One launch on a GPU, whose parts run in no order: no page may be both a source and a destination, and none a
    destination twice. The CPU raises InputError for such a page; on a GPU, where looking would mean waiting, it holds
    some mixture.
    """
    checks.kv_copy_pages(kv, src, dst)
    impl = chosen("kv_copy_pages", kv.device)
    if impl == TRITON:
        import atts_triton

        return atts_triton.kv_copy_pages(kv, src, dst)
    if impl == CUDA:
        return cuda.kv_copy_pages(kv, src, dst)
    kv.index_copy_(2, dst, kv.index_select(2, src))
    return None


def kv_gather(kv: Tensor, pages: Tensor) -> Tensor:
    """Pages pages[C] int64 of kv[L, 2, P, page, Hkv, D], each in one piece -> [C, L, 2, page, Hkv, D].

    With a sequence's row of the block table: its keys and values without gaps, to be moved or handed over. Every page
    must be one of the cache; a GPU does not look.
    """
    checks.kv_gather(kv, pages)
    impl = chosen("kv_gather", kv.device)
    if impl == TRITON:
        import atts_triton

        return atts_triton.kv_gather(kv, pages)
    if impl == CUDA:
        return cuda.kv_gather(kv, pages)
    return kv.movedim(2, 0).index_select(0, pages)


def kv_scatter(staged: Tensor, kv: Tensor, pages: Tensor) -> None:
    """Write staged[C, L, 2, page, Hkv, D] to pages[C] int64 of kv[L, 2, P, page, Hkv, D], in place: `kv_gather`
    backwards. No page may be named twice.

    Raises InputError where shapes or dtypes do not fit.
    """
    checks.kv_scatter(staged, kv, pages)
    impl = chosen("kv_scatter", kv.device)
    if impl == TRITON:
        import atts_triton

        return atts_triton.kv_scatter(staged, kv, pages)
    if impl == CUDA:
        return cuda.kv_scatter(staged, kv, pages)
    kv.movedim(2, 0).index_copy_(0, pages, staged)
    return None


def kv_swap(kv: Tensor, host: Tensor, pages: Tensor, slots: Tensor, to_host: bool) -> None:
    """Copy pages between the cache kv[L, 2, P, page, Hkv, D] and host[S, L, 2, page, Hkv, D], in place.

    pages[C] int64 on kv's device names pages of kv; slots[C] int64 on the CPU names slots of host, which is a CPU
    tensor of kv's dtype, pinned where kv is on a GPU. to_host: pages[i] -> slots[i], otherwise slots[i] -> pages[i];
    what is written must be named once only. A slot holds its page of all layers in one piece, so that a page crosses
    the link in one transfer, and neighbouring slots in one together.

    On a GPU the copies are queued on the current stream and not waited for: `host` is the caller's to read or write
    on the CPU only when the stream has come to them. Up to 64 MiB of the device are used in passing.
    """
    checks.kv_swap(kv, host, pages, slots, to_host)
    if chosen("kv_swap", kv.device) == CUDA:
        return cuda.kv_swap(kv, host, pages, slots, to_host)
    order = slots.argsort()
    for part in order.split(max(1, _STAGED_BYTES * host.shape[0] // max(1, host.nbytes))):
        index, runs = pages[part.to(pages.device, non_blocking=True)], _runs(slots[part].tolist())
        if to_host:
            staged = kv_gather(kv, index)
            for at, slot, n in runs:
                host[slot : slot + n].copy_(staged[at : at + n], non_blocking=True)
        else:
            staged = torch.empty((len(part), *host.shape[1:]), dtype=kv.dtype, device=kv.device)
            for at, slot, n in runs:
                staged[at : at + n].copy_(host[slot : slot + n], non_blocking=True)
            kv_scatter(staged, kv, index)
    return None


def _runs(slots: list[int]) -> list[tuple[int, int, int]]:
    """(index, first, length) of each run of consecutive numbers in an ascending list."""
    runs: list[tuple[int, int, int]] = []
    for index, slot in enumerate(slots):
        if runs and runs[-1][1] + runs[-1][2] == slot:
            at, first, n = runs[-1]
            runs[-1] = (at, first, n + 1)
        else:
            runs.append((index, slot, 1))
    return runs
