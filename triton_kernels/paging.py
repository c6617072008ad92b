"""Writes to the paged KV cache: where tokens go, appends with and without rotary embedding, page copies.

All but `kv_slots` are bound by bandwidth: what is moved is read once and written once. With b bytes an element, bytes
moved are 4 N Hkv D b (kv_append), 2 N (Hq + 2 Hkv) D b + 4 N D for the fp32 angles (rope_kv_append), and
4 L page Hkv D b for each page (kv_copy_pages, kv_gather, kv_scatter: keys and values of all layers in one launch).

`kv_slots` walks from a row to its sequence, its page and its slot: dependent loads, made once for a forward pass and
not in every layer's append.

Page copies move integers, the widest that divide a page: every bit pattern arrives, that of a NaN too, and no dtype
compiles a kernel of its own. rope_kv_append rotates in fp32 with contraction off and rounds to the dtype of k before
the cache's: what it stores has the bits of `rope` followed by `kv_append`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from atts_triton.rows import HEAD_DIMS, check_dtypes, dense_rows, rotated, short_tile
from atts_triton.variants import POINTERS, Variant

_SLOT_ROWS = 128
_COPY_BLOCK = 1024
"""Integers that a program of 128 threads copies; four 16-byte loads a thread where they are of 8 bytes."""
_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


@triton.jit(
    do_not_specialize=["N", "B", "W", "page", "steps", "table_stride"],
    do_not_specialize_on_alignment=["position_ptr", "table_ptr", "cu_q_ptr", "slot_ptr"],
)
def _slots_kernel(
    position_ptr,  # [N] int64
    table_ptr,  # [B, W] int32
    cu_q_ptr,  # [B + 1] int32
    slot_ptr,  # [N] int64
    N,
    B,
    W,
    page,
    steps,
    table_stride,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = row < N
    # The number of sequences that end at or before the row, by bisection: those without rows are passed over.
    low = tl.zeros((BLOCK,), tl.int32)
    high = tl.zeros((BLOCK,), tl.int32) + B
    for _ in range(steps):
        middle = (low + high) // 2
        searching = low < high
        past = tl.load(cu_q_ptr + 1 + middle, mask=live & searching, other=0) <= row
        low = tl.where(searching & past, middle + 1, low)
        high = tl.where(searching & ~past, middle, high)
    position = tl.load(position_ptr + row, mask=live, other=0)
    index = position // page
    known = live & (low < B) & (position >= 0) & (index < W)
    page_id = tl.load(table_ptr + low.to(tl.int64) * table_stride + index, mask=known, other=0).to(tl.int64)
    tl.store(slot_ptr + row, tl.where(known, page_id * page + position % page, -1), mask=live)


@triton.jit
def _places(slot_ptr, token, head, live, slots, heads, dim):
    """Element of keys or values where each row (head of a token) goes, and which rows have a place."""
    slot = tl.load(slot_ptr + token, mask=live, other=-1)
    return (slot * heads + head) * dim, live & (slot >= 0) & (slot < slots)


@triton.jit(do_not_specialize=["rows", "slots", "heads"])
def _append_kernel(
    k_ptr,  # [rows / heads, heads, dim]
    v_ptr,  # [rows / heads, heads, dim]
    slot_ptr,  # [rows / heads] int64
    keys_ptr,  # [slots, heads, dim]
    values_ptr,  # [slots, heads, dim]
    rows,
    slots,
    heads,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    token, head = (row // heads).to(tl.int64), row % heads
    place, live = _places(slot_ptr, token, head, row < rows, slots, heads, DIM)
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = live[:, None] & (d < DIM)
    at = place[:, None] + d
    tl.store(keys_ptr + at, tl.load(k_ptr + (token * k_stride + head * k_head_stride)[:, None] + d, mask=mask), mask)
    tl.store(values_ptr + at, tl.load(v_ptr + (token * v_stride + head * v_head_stride)[:, None] + d, mask=mask), mask)


@triton.jit(do_not_specialize=["tokens", "slots", "q_programs", "q_heads", "kv_heads"])
def _rope_append_kernel(
    q_ptr,  # [tokens, q_heads, 2 HALF]
    k_ptr,  # [tokens, kv_heads, 2 HALF]
    v_ptr,  # [tokens, kv_heads, 2 HALF]
    cos_ptr,  # [tokens, HALF] fp32
    sin_ptr,  # [tokens, HALF] fp32
    slot_ptr,  # [tokens] int64
    keys_ptr,  # [slots, kv_heads, 2 HALF]
    values_ptr,  # [slots, kv_heads, 2 HALF]
    out_ptr,  # [tokens, q_heads, 2 HALF]
    tokens,
    slots,
    q_programs,
    q_heads,
    kv_heads,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    cos_stride,
    sin_stride,
    HALF: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # The first programs rotate queries, a head of a token as a row; the others rotate keys and move values.
    program = tl.program_id(0)
    asks = program < q_programs
    heads = tl.where(asks, q_heads, kv_heads)
    row = tl.where(asks, program, program - q_programs) * BLOCK_R + tl.arange(0, BLOCK_R)
    token, head = (row // heads).to(tl.int64), row % heads
    live = row < tokens * heads
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = live[:, None] & (d < HALF)
    cos = tl.load(cos_ptr + (token * cos_stride)[:, None] + d, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + (token * sin_stride)[:, None] + d, mask=mask, other=0.0)
    if asks:
        q_at = (token * q_stride + head * q_head_stride)[:, None] + d
        low, high = rotated(q_ptr, q_at, cos, sin, mask, HALF)
        out = (row.to(tl.int64) * (2 * HALF))[:, None] + d
        tl.store(out_ptr + out, low, mask=mask)
        tl.store(out_ptr + out + HALF, high, mask=mask)
    else:
        place, placed = _places(slot_ptr, token, head, live, slots, kv_heads, 2 * HALF)
        at = place[:, None] + d
        mask = placed[:, None] & (d < HALF)
        k_at = (token * k_stride + head * k_head_stride)[:, None] + d
        low, high = rotated(k_ptr, k_at, cos, sin, mask, HALF)
        tl.store(keys_ptr + at, low.to(k_ptr.dtype.element_ty), mask=mask)
        tl.store(keys_ptr + at + HALF, high.to(k_ptr.dtype.element_ty), mask=mask)
        v_at = v_ptr + (token * v_stride + head * v_head_stride)[:, None] + d
        tl.store(values_ptr + at, tl.load(v_at, mask=mask), mask=mask)
        tl.store(values_ptr + at + HALF, tl.load(v_at + HALF, mask=mask), mask=mask)


@triton.jit(do_not_specialize=["parts", "blocks", "src_part", "src_page", "dst_part", "dst_page"])
def _copy_kernel(
    src_ptr,  # pages of `length` integers: page p of part l is number l * src_part + p * src_page
    dst_ptr,  # the same with dst_part, dst_page
    src_ids_ptr,  # [C] int64, or None for 0, 1, ...
    dst_ids_ptr,  # [C] int64, or None for 0, 1, ...
    parts,
    blocks,
    length,
    src_part,
    src_page,
    dst_part,
    dst_page,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    part = ((program // blocks) % parts).to(tl.int64)
    entry = program // blocks // parts
    src = entry.to(tl.int64) if src_ids_ptr is None else tl.load(src_ids_ptr + entry)
    dst = entry.to(tl.int64) if dst_ids_ptr is None else tl.load(dst_ids_ptr + entry)
    at = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = at < length
    held = tl.load(src_ptr + (part * src_part + src * src_page) * length + at, mask=inside)
    tl.store(dst_ptr + (part * dst_part + dst * dst_page) * length + at, held, mask=inside)


def kv_slots(positions: Tensor, block_table: Tensor, cu_q: Tensor, page: int) -> Tensor:
    """Slot of each row, [N] int64: row i of cu_q[b] .. cu_q[b + 1] - 1 goes to
    block_table[b, positions[i] // page] * page + positions[i] % page.

    positions[N] int64, block_table[B, W] int32 with rows without gaps, cu_q[B + 1] int32. -1 for a row of no sequence
    and for a position that is negative or beyond the table. Raises ValueError for other dtypes.
    """
    if (positions.dtype, block_table.dtype, cu_q.dtype) != (torch.int64, torch.int32, torch.int32):
        raise ValueError(
            f"kv_slots takes int64 positions, an int32 table and int32 bounds, not {positions.dtype}, "
            f"{block_table.dtype}, {cu_q.dtype}"
        )
    rows, batch = positions.shape[0], block_table.shape[0]
    slots = positions.new_empty(rows)
    if rows:
        table = dense_rows(block_table)
        _slots_kernel[(triton.cdiv(rows, _SLOT_ROWS),)](
            positions.contiguous(),
            table,
            cu_q.contiguous(),
            slots,
            rows,
            batch,
            table.shape[1],
            page,
            batch.bit_length(),
            table.stride(0),
            BLOCK=_SLOT_ROWS,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return slots


def _halves(name: str, kv_layer: Tensor) -> tuple[Tensor, Tensor, int]:
    keys, values = kv_layer.unbind(0)
    if not (keys.is_contiguous() and values.is_contiguous()):
        raise ValueError(f"{name} needs contiguous keys and contiguous values")
    return keys, values, keys.shape[0] * keys.shape[1]


def kv_append(k: Tensor, v: Tensor, kv_layer: Tensor, slots: Tensor) -> None:
    """Write k[N, Hkv, D] and v[N, Hkv, D] to slots[N] int64 of kv_layer[2, P, page, Hkv, D], in place.

    fp32, fp16 or bf16, rounded to the cache's dtype; any strides of N and Hkv. A row whose slot is not in the cache is
    not written. Raises ValueError for other dtypes and for a cache with gaps.
    """
    check_dtypes("kv_append", k, v)
    check_dtypes("kv_append's cache", kv_layer)
    keys, values, places = _halves("kv_append", kv_layer)
    if not k.numel():
        return
    k, v = dense_rows(k), dense_rows(v)
    tokens, heads, dim = k.shape
    tile = short_tile(dim)
    _append_kernel[(triton.cdiv(tokens * heads, tile.rows),)](
        k,
        v,
        slots.contiguous(),
        keys,
        values,
        tokens * heads,
        places,
        heads,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        DIM=dim,
        BLOCK_R=tile.rows,
        BLOCK_D=tile.columns,
        num_warps=tile.num_warps,
        enable_fp_fusion=False,
    )


def rope_kv_append(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, kv_layer: Tensor, slots: Tensor
) -> Tensor:
    """q[N, Hq, D] rotated, dense; k[N, Hkv, D] rotated and v[N, Hkv, D] are written to slots[N] int64 of
    kv_layer[2, P, page, Hkv, D], in place.

    cos, sin[N, D/2] fp32. q, k, v of one dtype, fp32, fp16 or bf16, with any strides of N and heads: they may be views
    of one projection. A row whose slot is not in the cache is not written. Raises ValueError as `kv_append` and `rope`.
    """
    check_dtypes("rope_kv_append", q, k, v)
    check_dtypes("rope_kv_append's cache", kv_layer)
    check_dtypes("rope_kv_append's angles", cos, sin, cos.new_empty(0, dtype=torch.float32))
    keys, values, places = _halves("rope_kv_append", kv_layer)
    out = q.new_empty(q.shape)
    if not q.numel():
        return out
    q, k, v, cos, sin = (dense_rows(t) for t in (q, k, v, cos, sin))
    tokens, heads, dim = q.shape
    kv_heads = k.shape[1]
    tile = short_tile(dim // 2)
    q_programs = triton.cdiv(tokens * heads, tile.rows)
    _rope_append_kernel[(q_programs + triton.cdiv(tokens * kv_heads, tile.rows),)](
        q,
        k,
        v,
        cos,
        sin,
        slots.contiguous(),
        keys,
        values,
        out,
        tokens,
        places,
        q_programs,
        heads,
        kv_heads,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        cos.stride(0),
        sin.stride(0),
        HALF=dim // 2,
        BLOCK_R=tile.rows,
        BLOCK_D=tile.columns,
        num_warps=tile.num_warps,
        enable_fp_fusion=False,
    )
    return out


def _copy(
    src: Tensor,
    dst: Tensor,
    src_ids: Tensor | None,
    dst_ids: Tensor | None,
    page_shape: tuple[int, int],
    src_step: tuple[int, int],
    dst_step: tuple[int, int],
) -> None:
    """page_shape: parts (keys and values of layers), and elements of a page in one part. src_step, dst_step: from part
    to part and from page to page, in units of `elements`."""
    ids = src_ids if src_ids is not None else dst_ids
    assert ids is not None
    parts, elements = page_shape
    if not (src.is_contiguous() and dst.is_contiguous()):
        raise ValueError("pages are copied between tensors without gaps")
    if src.dtype != dst.dtype:
        raise ValueError(f"pages are copied between tensors of one dtype, not {src.dtype} and {dst.dtype}")
    if not ids.numel() or not parts * elements:
        return
    size = math.gcd(elements * src.element_size(), src.data_ptr(), dst.data_ptr(), 8)
    length = elements * src.element_size() // size
    blocks = triton.cdiv(length, _COPY_BLOCK)
    _copy_kernel[(ids.numel() * parts * blocks,)](
        src.view(-1).view(_INTEGERS[size]),
        dst.view(-1).view(_INTEGERS[size]),
        None if src_ids is None else src_ids.contiguous(),
        None if dst_ids is None else dst_ids.contiguous(),
        parts,
        blocks,
        length,
        *src_step,
        *dst_step,
        BLOCK=_COPY_BLOCK,
        num_warps=4,
        enable_fp_fusion=False,
    )


def kv_copy_pages(kv: Tensor, src: Tensor, dst: Tensor) -> None:
    """Copy pages src[C] int64 to dst[C] int64 in every layer of kv[L, 2, P, page, Hkv, D], in place.

    Programs run in no order: a page must not be both a source and a destination. Page numbers are not checked, here and
    in the two functions below. Raises ValueError for a kv with gaps.
    """
    layers, two, pages, page, heads, dim = kv.shape
    step = (pages, 1)
    _copy(kv, kv, src, dst, (layers * two, page * heads * dim), step, step)


def kv_gather(kv: Tensor, pages: Tensor) -> Tensor:
    """Pages pages[C] int64 of kv[L, 2, P, page, Hkv, D], each in one piece -> [C, L, 2, page, Hkv, D].

    Raises ValueError for a kv with gaps.
    """
    layers, two, count, page, heads, dim = kv.shape
    out = kv.new_empty((pages.shape[0], layers, two, page, heads, dim))
    _copy(kv, out, pages, None, (layers * two, page * heads * dim), (count, 1), (1, layers * two))
    return out


def kv_scatter(staged: Tensor, kv: Tensor, pages: Tensor) -> None:
    """Write staged[C, L, 2, page, Hkv, D] to pages[C] int64 of kv[L, 2, P, page, Hkv, D], in place: `kv_gather`
    backwards. Raises ValueError for tensors with gaps or of two dtypes."""
    layers, two, count, page, heads, dim = kv.shape
    _copy(staged, kv, None, pages, (layers * two, page * heads * dim), (1, layers * two), (count, 1))


def variants() -> Iterator[Variant]:
    """What the wrappers launch."""
    options = {"num_warps": 4, "enable_fp_fusion": False}
    signature = {"position_ptr": "*i64", "table_ptr": "*i32", "cu_q_ptr": "*i32", "slot_ptr": "*i64"}
    signature |= dict.fromkeys(("N", "B", "W", "page", "steps", "table_stride"), "i32")
    yield Variant("kv_slots", _slots_kernel, signature, {"BLOCK": _SLOT_ROWS}, options)
    strides = tuple(f"{x}_{kind}" for x in ("q", "k", "v") for kind in ("stride", "head_stride"))
    for pointer in POINTERS.values():
        for dim in HEAD_DIMS:
            signature = {"k_ptr": pointer, "v_ptr": pointer, "slot_ptr": "*i64", "keys_ptr": pointer}
            signature |= {"values_ptr": pointer} | dict.fromkeys(("rows", "slots", "heads", *strides[2:]), "i32")
            tile = short_tile(dim)
            constants = {"DIM": dim, "BLOCK_R": tile.rows, "BLOCK_D": tile.columns}
            even = frozenset() if dim % 16 else frozenset(strides[2:])
            yield Variant(f"kv_append {pointer[1:]} D={dim}", _append_kernel, signature, constants, options, even)
            signature = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "keys_ptr", "values_ptr", "out_ptr"), pointer)
            signature |= {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "slot_ptr": "*i64"}
            sizes = ("tokens", "slots", "q_programs", "q_heads", "kv_heads", *strides, "cos_stride", "sin_stride")
            signature |= dict.fromkeys(sizes, "i32")
            tile = short_tile(dim // 2)
            constants = {"HALF": dim // 2, "BLOCK_R": tile.rows, "BLOCK_D": tile.columns}
            even = frozenset() if dim % 32 else frozenset((*strides, "cos_stride", "sin_stride"))
            yield Variant(
                f"rope_kv_append {pointer[1:]} D={dim}", _rope_append_kernel, signature, constants, options, even
            )
    sizes = ("parts", "blocks", "length", "src_part", "src_page", "dst_part", "dst_page")
    for size in _INTEGERS:
        signature = {"src_ptr": f"*i{8 * size}", "dst_ptr": f"*i{8 * size}", "src_ids_ptr": "*i64"}
        signature |= {"dst_ids_ptr": "*i64"} | dict.fromkeys(sizes, "i32")
        for name, absent in (("kv_copy_pages", None), ("kv_gather", "dst_ids_ptr"), ("kv_scatter", "src_ids_ptr")):
            constants = {"BLOCK": _COPY_BLOCK} | ({absent: None} if absent else {})
            # Narrow integers are taken only where a page holds an odd number of them.
            for even in (frozenset({"length"}), frozenset[str]()) if size == 8 else (frozenset[str](),):
                label = f"{name} {size} bytes{'' if even else ' odd'}"
                yield Variant(label, _copy_kernel, signature, constants, options, even)
