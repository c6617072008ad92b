"""Writes to the paged KV cache. A lane's cache is one tensor kv[L, 2, P, page, Hkv, D] (2: keys, values); a slot is
page_id * page + offset."""

from __future__ import annotations

from torch import Tensor

from atts_engine.errors import InputError


def kv_append(k: Tensor, v: Tensor, kv_layer: Tensor, slots: Tensor) -> None:
    """Write k[N, Hkv, D] and v[N, Hkv, D] to slots[N] int64 of kv_layer[2, P, page, Hkv, D], in place.

    Two rows must not name one slot: which of them stays would not be defined.
    """
    if k.shape != v.shape or k.shape[1:] != kv_layer.shape[3:] or k.shape[0] != slots.shape[0]:
        raise InputError(
            f"kv_append: k {tuple(k.shape)}, v {tuple(v.shape)}, slots {tuple(slots.shape)} do not fit the "
            f"cache {tuple(kv_layer.shape)}"
        )
    rows = kv_layer.view(2, -1, *kv_layer.shape[3:])
    rows[0].index_copy_(0, slots, k.to(kv_layer.dtype))
    rows[1].index_copy_(0, slots, v.to(kv_layer.dtype))


def kv_copy_pages(kv: Tensor, src: Tensor, dst: Tensor) -> None:
    """Copy pages src[C] int64 to dst[C] int64 in every layer of kv[L, 2, P, page, Hkv, D], in place.

    All sources are read before anything is written, so a page may be a source and a destination in one call.
    """
    if src.shape != dst.shape:
        raise InputError(f"kv_copy_pages: {src.numel()} source pages but {dst.numel()} destination pages")
    kv.index_copy_(2, dst, kv.index_select(2, src))
