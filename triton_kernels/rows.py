"""Layers of a decoder that work row by row: norms, SwiGLU's product, rotary embedding.

All are bound by bandwidth: each reads its inputs once and writes its outputs once. With b bytes an element, bytes moved
are 2 N H b (rms_norm), 4 N H b (add_rms_norm), 3 N F b (silu_mul), 2 N h D b + 4 N D (rope, its fp32 angles included),
and H b for a norm's weight, which stays in L2.

Numerics: fp32 inside, and rounded where the references round: a residual's sum before its norm, a normed value before
its weight, everything else once. rope has contraction off and the bits of a product and a sum that are rounded apart.
A norm's sum of squares is a tree within the row: the same for every row, whoever shares the tile. NaN passes through.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from atts_triton.variants import POINTERS, Variant

MAX_BLOCK = 16384
"""Elements of a row that a program of 512 threads holds in registers. A wider row is read twice by `rms_norm`."""
_TILE = 1024
"""Elements of a tile of short rows: with 128 threads each has 16 bytes of a 16-bit type to load at once."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows and columns of a program's tile, and the threads for it, a function of the row's width alone."""

    rows: int
    columns: int
    num_warps: int


def norm_tile(width: int) -> Tile:
    columns = min(MAX_BLOCK, triton.next_power_of_2(width))
    rows = max(1, _TILE // columns)
    return Tile(rows, columns, max(4, columns // 1024))


def short_tile(width: int) -> Tile:
    """For rows of a head's size."""
    columns = triton.next_power_of_2(width)
    return Tile(max(1, _TILE // columns), columns, 4)


@triton.jit
def _residual(x_ptr, delta_ptr, x_at, delta_at, mask):
    """x, or x + delta rounded to their dtype."""
    x = tl.load(x_ptr + x_at, mask=mask, other=0.0)
    if delta_ptr is not None:
        delta = tl.load(delta_ptr + delta_at, mask=mask, other=0.0)
        x = (x.to(tl.float32) + delta.to(tl.float32)).to(x.dtype)
    return x


@triton.jit
def _write_norm(x, scale, weight_ptr, sum_ptr, out_ptr, column, at, inside, mask):
    """normed = x * scale * weight, and x itself where a sum is wanted."""
    if sum_ptr is not None:
        tl.store(sum_ptr + at, x, mask=mask)
    normed = (x.to(tl.float32) * scale[:, None]).to(x.dtype)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    tl.store(out_ptr + at, normed.to(tl.float32) * weight.to(tl.float32)[None, :], mask=mask)


@triton.jit(do_not_specialize=["rows", "heads"])
def _norm_kernel(
    x_ptr,  # [rows / heads, heads, width]
    delta_ptr,  # [rows, width], or None
    weight_ptr,  # [width]
    sum_ptr,  # [rows, width], or None
    out_ptr,  # [rows, width]
    rows,
    heads,
    width,
    x_stride,
    x_head_stride,
    delta_stride,
    eps,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    WHOLE: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = (row < rows)[:, None]
    x_row = ((row // heads).to(tl.int64) * x_stride + (row % heads) * x_head_stride)[:, None]
    delta_row = (row.to(tl.int64) * delta_stride)[:, None]
    out_row = (row.to(tl.int64) * width)[:, None]
    if WHOLE:
        column = tl.arange(0, BLOCK_H)
        inside = column < width
        mask = live & inside[None, :]
        x = _residual(x_ptr, delta_ptr, x_row + column[None, :], delta_row + column[None, :], mask)
        wide = x.to(tl.float32)
        scale = tl.rsqrt(tl.sum(wide * wide, 1) / width + eps)
        _write_norm(x, scale, weight_ptr, sum_ptr, out_ptr, column, out_row + column[None, :], inside, mask)
    else:
        squares = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)
        for first in range(0, width, BLOCK_H):
            column = first + tl.arange(0, BLOCK_H)
            mask = live & (column < width)[None, :]
            x = _residual(x_ptr, delta_ptr, x_row + column[None, :], delta_row + column[None, :], mask)
            squares += x.to(tl.float32) * x.to(tl.float32)
        scale = tl.rsqrt(tl.sum(squares, 1) / width + eps)
        for first in range(0, width, BLOCK_H):
            column = first + tl.arange(0, BLOCK_H)
            inside = column < width
            mask = live & inside[None, :]
            x = _residual(x_ptr, delta_ptr, x_row + column[None, :], delta_row + column[None, :], mask)
            _write_norm(x, scale, weight_ptr, sum_ptr, out_ptr, column, out_row + column[None, :], inside, mask)


@triton.jit(do_not_specialize=["blocks"])
def _silu_mul_kernel(
    gate_ptr,  # [N, F]
    up_ptr,  # [N, F]
    out_ptr,  # [N, F]
    width,
    gate_stride,
    up_stride,
    blocks,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    # exp overflows to inf for a gate below -88, and the quotient is -0 then, as it must be.
    tl.store(out_ptr + row * width + column, gate / (tl.exp(-gate) + 1.0) * up, mask=inside)


@triton.jit
def rotated(x_ptr, x_at, cos, sin, mask, HALF: tl.constexpr):
    """Both halves of rotated rows in fp32; x_at: where the elements of the lower halves lie."""
    low = tl.load(x_ptr + x_at, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(x_ptr + x_at + HALF, mask=mask, other=0.0).to(tl.float32)
    return low * cos - high * sin, high * cos + low * sin


@triton.jit(do_not_specialize=["rows", "heads"])
def _rope_kernel(
    x_ptr,  # [rows / heads, heads, 2 HALF]
    cos_ptr,  # [rows / heads, HALF] fp32
    sin_ptr,  # [rows / heads, HALF] fp32
    out_ptr,  # [rows, 2 HALF]
    rows,
    heads,
    x_stride,
    x_head_stride,
    cos_stride,
    sin_stride,
    HALF: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # A head of a token is a row of its own: tiles are full for any number of heads. Angles come again out of L1.
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    token = (row // heads).to(tl.int64)
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = (row < rows)[:, None] & (d < HALF)
    cos = tl.load(cos_ptr + (token * cos_stride)[:, None] + d, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + (token * sin_stride)[:, None] + d, mask=mask, other=0.0)
    x_at = (token * x_stride + (row % heads) * x_head_stride)[:, None] + d
    low, high = rotated(x_ptr, x_at, cos, sin, mask, HALF)
    out = (row.to(tl.int64) * (2 * HALF))[:, None] + d
    tl.store(out_ptr + out, low, mask=mask)
    tl.store(out_ptr + out + HALF, high, mask=mask)


def check_dtypes(name: str, *tensors: Tensor) -> None:
    """Raises ValueError unless all have one dtype, fp32, fp16 or bf16."""
    dtypes = {t.dtype for t in tensors}
    if len(dtypes) > 1 or not dtypes <= POINTERS.keys():
        raise ValueError(f"{name} takes one of fp32, fp16, bf16, not {', '.join(sorted(map(str, dtypes)))}")


def dense_rows(x: Tensor) -> Tensor:
    """x with elements of its last dimension side by side: x itself for every view that a decoder makes."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor | None, Tensor]:
    x = dense_rows(x)
    width = x.shape[-1]
    heads = x.shape[1] if x.dim() == 3 else 1
    rows = x.numel() // max(1, width)
    out = x.new_empty(x.shape)
    total = None if delta is None else x.new_empty(x.shape)
    if not out.numel():
        return total, out
    delta = None if delta is None else dense_rows(delta)
    tile = norm_tile(width)
    _norm_kernel[(triton.cdiv(rows, tile.rows),)](
        x,
        delta,
        weight.contiguous(),
        total,
        out,
        rows,
        heads,
        width,
        x.stride(0),
        x.stride(1) if x.dim() == 3 else 0,
        0 if delta is None else delta.stride(0),
        eps,
        BLOCK_R=tile.rows,
        BLOCK_H=tile.columns,
        WHOLE=width <= tile.columns,
        num_warps=tile.num_warps,
        enable_fp_fusion=True,
    )
    return total, out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight[H] over the last dimension of x[N, H] or x[N, h, H] -> the same shape, dense.

    One dtype of fp32, fp16, bf16; any strides of N and h. Raises ValueError for other dtypes.
    """
    check_dtypes("rms_norm", x, weight)
    return _norm(x, None, weight, eps)[1]


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(s, rms_norm(s, weight[H], eps)) of s = x[N, H] + delta[N, H] in their dtype; see `rms_norm`."""
    check_dtypes("add_rms_norm", x, delta, weight)
    total, normed = _norm(x, delta, weight, eps)
    assert total is not None
    return total, normed


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate[N, F]) * up[N, F] -> [N, F], dense. One dtype of fp32, fp16, bf16 (ValueError for others); any stride
    of N, so gate and up may be the halves of one tensor."""
    check_dtypes("silu_mul", gate, up)
    gate, up = dense_rows(gate), dense_rows(up)
    rows, width = gate.shape
    out = gate.new_empty(gate.shape)
    if not out.numel():
        return out
    block = min(_TILE, triton.next_power_of_2(width))
    blocks = triton.cdiv(width, block)
    _silu_mul_kernel[(rows * blocks,)](
        gate, up, out, width, gate.stride(0), up.stride(0), blocks, BLOCK=block, num_warps=4, enable_fp_fusion=True
    )
    return out


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x[N, h, D] (fp32, fp16 or bf16) by cos, sin[N, D/2] fp32 -> [N, h, D], dense; element i pairs
    with i + D/2. Any strides of N and h. Raises ValueError for other dtypes."""
    check_dtypes("rope", x)
    check_dtypes("rope's angles", cos, sin, cos.new_empty(0, dtype=torch.float32))
    x, cos, sin = dense_rows(x), dense_rows(cos), dense_rows(sin)
    tokens, heads, dim = x.shape
    out = x.new_empty(x.shape)
    if not out.numel():
        return out
    tile = short_tile(dim // 2)
    _rope_kernel[(triton.cdiv(tokens * heads, tile.rows),)](
        x,
        cos,
        sin,
        out,
        tokens * heads,
        heads,
        x.stride(0),
        x.stride(1),
        cos.stride(0),
        sin.stride(0),
        HALF=dim // 2,
        BLOCK_R=tile.rows,
        BLOCK_D=tile.columns,
        num_warps=tile.num_warps,
        enable_fp_fusion=False,
    )
    return out


HEAD_DIMS = (16, 64, 128, 256, 30)
"""Sizes of a head in the list of variants; the last divides by nothing."""
_WIDTHS = (576, 2048, 4096, 8192, 16384, 32768, 4100)
"""Widths of rows, one for each way that a norm's tile comes out; the last divides by nothing."""


def variants() -> Iterator[Variant]:
    """What the wrappers launch."""
    for pointer in POINTERS.values():
        dtype = pointer[1:]
        for width in (*HEAD_DIMS, *_WIDTHS):
            for residual in (False, True) if width in _WIDTHS else (False,):
                yield _norm_variant(pointer, width, residual)
        for width in (14336, 61):
            signature = {"gate_ptr": pointer, "up_ptr": pointer, "out_ptr": pointer}
            signature |= dict.fromkeys(("width", "gate_stride", "up_stride", "blocks"), "i32")
            sixteens = frozenset() if width % 16 else frozenset({"width", "gate_stride", "up_stride"})
            constants = {"BLOCK": min(_TILE, triton.next_power_of_2(width))}
            options = {"num_warps": 4, "enable_fp_fusion": True}
            yield Variant(f"silu_mul {dtype} F={width}", _silu_mul_kernel, signature, constants, options, sixteens)
        for dim in HEAD_DIMS:
            tile = short_tile(dim // 2)
            signature = {"x_ptr": pointer, "cos_ptr": "*fp32", "sin_ptr": "*fp32", "out_ptr": pointer}
            strides = ("x_stride", "x_head_stride", "cos_stride", "sin_stride")
            signature |= dict.fromkeys(("rows", "heads", *strides), "i32")
            constants = {"HALF": dim // 2, "BLOCK_R": tile.rows, "BLOCK_D": tile.columns}
            options = {"num_warps": tile.num_warps, "enable_fp_fusion": False}
            sixteens = frozenset() if dim % 32 else frozenset(strides)
            yield Variant(f"rope {dtype} D={dim}", _rope_kernel, signature, constants, options, sixteens)


def _norm_variant(pointer: str, width: int, residual: bool) -> Variant:
    tile = norm_tile(width)
    strides = ("x_stride", "x_head_stride", "delta_stride")
    signature = dict.fromkeys(("x_ptr", "delta_ptr", "weight_ptr", "sum_ptr", "out_ptr"), pointer)
    signature |= dict.fromkeys(("rows", "heads", "width", *strides), "i32") | {"eps": "fp32"}
    constants = {"BLOCK_R": tile.rows, "BLOCK_H": tile.columns, "WHOLE": width <= tile.columns}
    if not residual:
        constants |= {"delta_ptr": None, "sum_ptr": None}
    return Variant(
        f"{'add_' if residual else ''}rms_norm {pointer[1:]} H={width}",
        _norm_kernel,
        signature,
        constants,
        {"num_warps": tile.num_warps, "enable_fp_fusion": True},
        # Strides that are not used are 0.
        frozenset(strides[1:] if not residual else strides[1:2]) | (frozenset() if width % 16 else {"width", *strides}),
    )
