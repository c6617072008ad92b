"""Writes to the paged KV cache. A lane's cache is one tensor kv[L, 2, P, page, Hkv, D] (2: keys, values); a slot is
page_id * page + offset."""

from __future__ import annotations

import torch
from torch import Tensor

from atts_engine.ops import checks, flash, native
from atts_engine.ops.dispatch import FLASHINFER, chosen, runs_native

_STAGED_BYTES = 64 << 20
"""Device memory that `kv_swap` gathers pages in: it runs when memory is short."""


def kv_append(k: Tensor, v: Tensor, kv_layer: Tensor, slots: Tensor) -> None:
    """Write k[N, Hkv, D] and v[N, Hkv, D] to slots[N] int64 of kv_layer[2, P, page, Hkv, D], in place.

    Two rows must not name one slot: which of them stays would not be defined.
    """
    checks.kv_append(k, v, kv_layer, slots)
    if chosen("kv_append", kv_layer.device) == FLASHINFER:
        return flash.kv_append(k, v, kv_layer, slots)
    if runs_native("kv_append", kv_layer) and k.dtype is kv_layer.dtype:
        return native.kv_append(k, v, kv_layer, slots)
    rows = kv_layer.view(2, -1, *kv_layer.shape[3:])
    if checks.values_read(slots):
        checks.within("kv_append", "slots", slots, 0, rows.shape[1], "the cache")
    rows[0].index_copy_(0, slots, k.to(kv_layer.dtype))
    rows[1].index_copy_(0, slots, v.to(kv_layer.dtype))
    return None


def kv_copy_pages(kv: Tensor, src: Tensor, dst: Tensor) -> None:
    """Copy pages src[C] int64 to dst[C] int64 in every layer of kv[L, 2, P, page, Hkv, D], in place.

    All sources are read before anything is written, so a page may be a source and a destination in one call.
    """
    checks.kv_copy_pages(kv, src, dst)
    kv.index_copy_(2, dst, kv.index_select(2, src))


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
    by_page = kv.movedim(2, 0)  # [P, L, 2, page, Hkv, D]
    order = slots.argsort()
    for part in order.split(max(1, _STAGED_BYTES * host.shape[0] // max(1, host.nbytes))):
        index, runs = pages[part.to(pages.device)], _runs(slots[part].tolist())
        if to_host:
            staged = by_page.index_select(0, index)
            for at, slot, n in runs:
                host[slot : slot + n].copy_(staged[at : at + n], non_blocking=True)
        else:
            staged = torch.empty((len(part), *host.shape[1:]), dtype=kv.dtype, device=kv.device)
            for at, slot, n in runs:
                staged[at : at + n].copy_(host[slot : slot + n], non_blocking=True)
            by_page.index_copy_(0, index, staged)


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
