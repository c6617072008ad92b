"""Log-probability of given tokens from hidden states and the LM head, without logits in memory.

Launch 1, `_split_kernel`: a program owns BLOCK_T rows and one split of the vocabulary. It walks its split in tiles of
BLOCK_V columns; a tile's logits live in the fp32 accumulator only, where they feed an online log-sum-exp and, in the
tile that holds a row's id, give the target logit. It leaves (peak, total, target) per row and split.

Launch 2, `_merge_kernel`: folds the splits of a row in one order.

Two designs share the kernel. Up to 64 rows the weight's bandwidth is the limit: one tile of rows, one program a split,
and one deep pipeline over all tiles of the split (`flatten`), so that the weight never stops flowing between two of
them. Above, the tensor cores are: tiles of 128 or 256 rows, and programs ordered so that a group of row tiles, whose
hidden states stay in the second-level cache, passes over the vocabulary together and reads each tile of the weight from
memory once. A tile of 64 rows is the least that sm_90's warpgroup instruction takes. Fewer rows waste tensor work there
but no time (by an H100's data sheet arithmetic is the limit from about 295 rows on), and in exchange both designs issue
the same instruction.

On sm_90 and later, where alignment allows it, tiles are read through tensor descriptors (TMA, which also fills what
lies outside with zeros), else through pointers. Operands that no tensor core or vector load takes (fp32, or H that is
no multiple of 16) take small tiles and pointers.

A row's result is a function of its hidden state, the weight and its id, whoever shares the batch. By construction:
BLOCK_V, BLOCK_H and the splits depend on (V, H, dtype) alone; every accumulator adds along H in one order; sums over
the vocabulary are the tree of `fold`, whatever the layout of a tile; multiply and add are never contracted. On sm_90
all tiles of tensor-core operands issue m64n128k16, on sm_80 m16n8k16 (tests read it in the compiled code), and tiles of
small operands m16n8k16 or scalar arithmetic. What no compiler shows is how an instruction adds inside its K step: that
two tiles issue it with the same K and operands in the same places is the ground to expect equal bits. The interpreter's
tests compare bits; those on a device are marked `gpu`. sm_100 issues tcgen05 with 64 or 128 rows, whose equality only a
device can tell. Neither T nor the alignment of what T decides is specialised on: no batch size compiles anything anew.

Numerics: products of the operands' dtype accumulate in fp32 (fp32 operands without TF32). With peak m and total
s = sum 2^((z - m) log2 e), logprob = (z_target - m) - ln2 log2 s. See `atts_triton.logsumexp` for -inf and NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from atts_triton import tuning
from atts_triton.logsumexp import LOG2_E, MAX_SPLITS, anchor_of, fold, logprob_of, soft_cap
from atts_triton.variants import POINTERS, Variant

_MERGE_ROWS = 32
_GROUP_BYTES = 16 << 20
"""Hidden states of a group of row tiles: they stay in the second-level cache (40 MB and more) while weights pass."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """What decides the bits of a score: a function of (V, H, dtype) alone."""

    block_v: int
    block_h: int
    tiles_per_split: int
    splits: int
    small: bool
    """Tiles for operands that no tensor core or vector load takes."""

    @property
    def split_columns(self) -> int:
        return self.tiles_per_split * self.block_v


@dataclass(frozen=True, slots=True)
class RowTiling:
    """What follows the number of rows, and changes no bit of a score."""

    block_t: int
    num_warps: int
    num_stages: int
    flatten: bool = False


_SMALL = RowTiling(16, 4, 3)
_STREAMING = RowTiling(64, 4, 6, flatten=True)
_SQUARE = RowTiling(128, 8, 4)
_TALL = RowTiling(256, 8, 3)
"""Three quarters of the traffic of `_SQUARE` from the second-level cache. It leaves no register for pointers or a
soft-cap."""


def tiling(vocab: int, hidden: int, dtype: torch.dtype) -> Tiling:
    """Tiles and splits for a weight [vocab, hidden]."""
    small = dtype == torch.float32 or hidden % 16 != 0
    block_v, block_h = (32, 32) if small else (128, 64)
    tiles = triton.cdiv(vocab, block_v)
    per_split = triton.cdiv(tiles, MAX_SPLITS)
    return Tiling(
        block_v=block_v,
        block_h=min(block_h, max(16, triton.next_power_of_2(hidden))),
        tiles_per_split=per_split,
        splits=triton.cdiv(tiles, per_split),
        small=small,
    )


def row_tiling(sizes: Tiling, rows: int, tall: bool) -> RowTiling:
    """Tiles for a number of rows; tall: whether those of 256 rows can be had."""
    if sizes.small:
        return _SMALL
    if rows <= _STREAMING.block_t:
        return _STREAMING
    # Tiles of 256 rows would compute 256 rows for 128, and 512 for 384.
    return _TALL if tall and triton.cdiv(rows, _SQUARE.block_t) not in (1, 3) else _SQUARE


@triton.jit(
    do_not_specialize=["T", "V", "tiles_per_split", "splits", "group"],
    do_not_specialize_on_alignment=["ids_ptr", "peak_ptr", "total_ptr", "target_ptr", "ticket_ptr"],
)
def _split_kernel(
    hidden,  # [T, H], a pointer or a descriptor of tiles (BLOCK_T, BLOCK_H)
    weight,  # [V, H], a pointer or a descriptor of tiles (BLOCK_V, BLOCK_H)
    ids_ptr,  # [T] int64
    peak_ptr,  # [splits, T] fp32
    total_ptr,  # [splits, T] fp32
    target_ptr,  # [splits, T] fp32
    ticket_ptr,  # [1] int32
    T,
    V,
    H,
    hidden_stride,
    weight_stride,
    tiles_per_split,
    splits,
    group,
    cap,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LOG_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    EVEN_H: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    FLATTEN: tl.constexpr,
    SOFT_CAP: tl.constexpr,
):
    program = tl.program_id(0)
    if program == 0:
        tl.store(ticket_ptr, 0)
    first_tile = program // (group * splits) * group
    here = tl.minimum(group, tl.cdiv(T, BLOCK_T) - first_tile)
    local = program % (group * splits)
    row_at = (first_tile + local % here) * BLOCK_T
    split = local // here

    row = row_at + tl.arange(0, BLOCK_T)
    live = row < T
    token = tl.load(ids_ptr + row, mask=live, other=-1)
    token = tl.where((token >= 0) & (token < V), token, -1).to(tl.int32)
    k = tl.arange(0, BLOCK_H)

    peak = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    target = tl.zeros((BLOCK_T,), tl.float32)
    first = split * tiles_per_split
    for tile in tl.range(first, tl.minimum(first + tiles_per_split, tl.cdiv(V, BLOCK_V)), flatten=FLATTEN):
        column = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        inside = column < V
        logits = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
        for at in range(0, H, BLOCK_H):
            if DESCRIPTORS:
                x = hidden.load([row_at, at])
                w = weight.load([tile * BLOCK_V, at])
            else:
                x_at = hidden + row.to(tl.int64)[:, None] * hidden_stride + (at + k)[None, :]
                w_at = weight + column.to(tl.int64)[:, None] * weight_stride + (at + k)[None, :]
                if EVEN_H:
                    x = tl.load(x_at, mask=live[:, None], other=0.0)
                    w = tl.load(w_at, mask=inside[:, None], other=0.0)
                else:
                    x = tl.load(x_at, mask=live[:, None] & (k[None, :] < H - at), other=0.0)
                    w = tl.load(w_at, mask=inside[:, None] & (k[None, :] < H - at), other=0.0)
            logits = tl.dot(x, tl.trans(w), logits, input_precision="ieee")
        if SOFT_CAP:
            logits = soft_cap(logits, cap)
        hit = column[None, :] == token[:, None]
        target += tl.sum(tl.where(hit, logits, 0.0), 1)
        logits = tl.where(inside[None, :], logits, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(logits, 1))
        anchor = anchor_of(new_peak)
        total = total * tl.exp2((peak - anchor) * LOG2_E)
        total += fold(tl.exp2((logits - anchor[:, None]) * LOG2_E), LOG_V)
        peak = new_peak

    out = split.to(tl.int64) * T + row
    tl.store(peak_ptr + out, peak, mask=live)
    tl.store(total_ptr + out, total, mask=live)
    tl.store(target_ptr + out, target, mask=live)


@triton.jit(
    do_not_specialize=["T", "V", "splits", "split_columns"],
    do_not_specialize_on_alignment=["peak_ptr", "total_ptr", "target_ptr", "ids_ptr", "logprob_ptr"],
)
def _merge_kernel(
    peak_ptr,  # [splits, T] fp32
    total_ptr,  # [splits, T] fp32
    target_ptr,  # [splits, T] fp32
    ids_ptr,  # [T] int64
    logprob_ptr,  # [T] fp32
    T,
    V,
    splits,
    split_columns,
    BLOCK_T: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = row < T
    logprob = logprob_of(peak_ptr, total_ptr, target_ptr, ids_ptr, row, live, T, V, splits, split_columns)
    tl.store(logprob_ptr + row, logprob, mask=live)


class Partials(NamedTuple):
    """What the splits of the vocabulary leave of T rows: peak, total and target fp32[splits, T]."""

    peak: Tensor
    total: Tensor
    target: Tensor
    splits: int
    split_columns: int

    @staticmethod
    def empty(splits: int, split_columns: int, rows: int, device: torch.device) -> Partials:
        peak, total, target = torch.empty((3, splits, rows), dtype=torch.float32, device=device).unbind(0)
        return Partials(peak, total, target, splits, split_columns)


def merge(partials: Partials, ids: Tensor, vocab: int) -> Tensor:
    """logprob[T] fp32 of ids[T] int64, contiguous, from what the splits of a vocabulary left."""
    rows = ids.shape[0]
    logprob = torch.empty(rows, dtype=torch.float32, device=ids.device)
    _merge_kernel[(triton.cdiv(rows, _MERGE_ROWS),)](
        partials.peak,
        partials.total,
        partials.target,
        ids,
        logprob,
        rows,
        vocab,
        partials.splits,
        partials.split_columns,
        BLOCK_T=_MERGE_ROWS,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return logprob


@cache
def _capability(device: torch.device) -> int:
    """Major compute capability; 0 where there is none to ask (the interpreter)."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def takes_descriptors(tensor: Tensor) -> bool:
    """Whether tiles of tensor[N, H] can be read through a descriptor on its device, or in the interpreter."""
    size = tensor.element_size()
    aligned = tensor.data_ptr() % 16 == 0 and tensor.stride(0) * size % 16 == 0
    return aligned and tensor.stride(0) >= tensor.shape[1] and _capability(tensor.device) not in range(1, 9)


def check(hidden: Tensor, weight: Tensor, name: str) -> None:
    """Raises ValueError where the kernels cannot run."""
    if hidden.dtype != weight.dtype or hidden.dtype not in POINTERS:
        raise ValueError(f"{name} takes one of fp32, fp16, bf16, not {hidden.dtype} and {weight.dtype}")
    if hidden.stride(1) != 1 or weight.stride(1) != 1:
        raise ValueError(f"{name} needs rows of hidden and weight without gaps")
    if triton.knobs.runtime.interpret and hidden.dtype == torch.bfloat16:
        raise ValueError("Triton's interpreter multiplies bf16 wrongly: use fp32 or fp16 there")


def split(hidden: Tensor, weight: Tensor, ids: Tensor, softcap: float, ticket: Tensor) -> Partials:
    """Launch 1 for one row or more; ids contiguous. It also writes 0 to ticket[1] int32, for a kernel behind it."""
    rows, width = hidden.shape
    vocab = weight.shape[0]
    sizes = tiling(vocab, width, hidden.dtype)
    descriptors = not sizes.small and takes_descriptors(hidden) and takes_descriptors(weight)
    tall = descriptors and not softcap and _capability(hidden.device) in (0, 9)
    measured = tuning.settings("score_tokens", hidden.dtype, T=rows, V=vocab, H=width)
    tile = replace(row_tiling(sizes, rows, tall), **measured)
    partials = Partials.empty(sizes.splits, sizes.split_columns, rows, hidden.device)
    _split_kernel[(triton.cdiv(rows, tile.block_t) * sizes.splits,)](
        TensorDescriptor.from_tensor(hidden, [tile.block_t, sizes.block_h]) if descriptors else hidden,
        TensorDescriptor.from_tensor(weight, [sizes.block_v, sizes.block_h]) if descriptors else weight,
        ids,
        *partials[:3],
        ticket,
        rows,
        vocab,
        width,
        hidden.stride(0),
        weight.stride(0),
        sizes.tiles_per_split,
        sizes.splits,
        max(1, _GROUP_BYTES // (tile.block_t * width * hidden.element_size())),
        float(softcap),
        **_constants(sizes, tile, width, descriptors, softcap != 0),
        **_options(tile),
    )
    return partials


def _constants(sizes: Tiling, tile: RowTiling, width: int, descriptors: bool, capped: bool) -> dict[str, int]:
    return {
        "BLOCK_T": tile.block_t,
        "BLOCK_V": sizes.block_v,
        "LOG_V": sizes.block_v.bit_length() - 1,
        "BLOCK_H": sizes.block_h,
        "EVEN_H": width % sizes.block_h == 0,
        "DESCRIPTORS": descriptors,
        "FLATTEN": tile.flatten,
        "SOFT_CAP": capped,
    }


def _options(tile: RowTiling) -> dict[str, int]:
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": False}


def score_tokens(hidden: Tensor, weight: Tensor, ids: Tensor, softcap: float = 0.0) -> Tensor:
    """log softmax(cap(hidden[T, H] @ weight[V, H].T))[t, ids[t]] -> logprob[T] fp32; cap(z) = softcap tanh(z / softcap)
    where softcap is not 0.

    hidden and weight share one of fp32, fp16, bf16 and have rows without gaps; ids int64. An id outside [0, V) gives
    NaN. Raises ValueError for other dtypes and strides.
    """
    check(hidden, weight, "score_tokens")
    if not hidden.shape[0]:
        return hidden.new_empty(0, dtype=torch.float32)
    ids = ids.contiguous()
    ticket = torch.empty(1, dtype=torch.int32, device=hidden.device)
    return merge(split(hidden, weight, ids, softcap, ticket), ids, weight.shape[0])


_HIDDEN = (32, 4096, 1008, 4100)
"""Hidden sizes, one for each way that rows divide: less than a tile, whole tiles, whole vectors only, nothing."""
PARTIALS = {"peak_ptr": "*fp32", "total_ptr": "*fp32", "target_ptr": "*fp32"}
"""Types of the partial results in a signature."""


def _split_variant(dtype: torch.dtype, width: int, tile: RowTiling, descriptors: bool, capped: bool) -> Variant:
    sizes = tiling(1 << 17, width, dtype)
    pointer = POINTERS[dtype]
    hidden, weight = pointer, pointer
    if descriptors:
        hidden = f"tensordesc<{pointer[1:]}[{tile.block_t}, {sizes.block_h}]>"
        weight = f"tensordesc<{pointer[1:]}[{sizes.block_v}, {sizes.block_h}]>"
    signature = {"hidden": hidden, "weight": weight, "ids_ptr": "*i64", **PARTIALS, "ticket_ptr": "*i32", "cap": "fp32"}
    numbers = ("T", "V", "H", "hidden_stride", "weight_stride", "tiles_per_split", "splits", "group")
    name = f"score_tokens {pointer[1:]} {tile.block_t} rows H={width}"
    return Variant(
        f"{name}{' tma' if descriptors else ''}{' cap' if capped else ''}",
        _split_kernel,
        signature | dict.fromkeys(numbers, "i32"),
        _constants(sizes, tile, width, descriptors, capped),
        _options(tile),
        frozenset() if width % 16 else frozenset({"H", "hidden_stride", "weight_stride"}),
        frozenset({90} if tile is _TALL else {90, 100} if descriptors else ()),
    )


def variants() -> Iterator[Variant]:
    """What `score_tokens` launches."""
    for dtype in POINTERS:
        for width in _HIDDEN:
            small = tiling(1 << 17, width, dtype).small
            for capped in (False, True):
                for tile in (_SMALL,) if small else (_STREAMING, _SQUARE):
                    yield _split_variant(dtype, width, tile, False, capped)
                for tile in () if small else (_STREAMING, _SQUARE, *(() if capped else (_TALL,))):
                    yield _split_variant(dtype, width, tile, True, capped)
    signature = {**PARTIALS, "ids_ptr": "*i64", "logprob_ptr": "*fp32"}
    signature |= dict.fromkeys(("T", "V", "splits", "split_columns"), "i32")
    options = {"num_warps": 4, "enable_fp_fusion": False}
    yield Variant("score_tokens merge", _merge_kernel, signature, {"BLOCK_T": _MERGE_ROWS}, options)
