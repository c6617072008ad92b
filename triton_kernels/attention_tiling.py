"""Sizes of a launch of paged attention, from shapes, dtype and device alone: nothing here reads a tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

KEY_SPLIT = 512
"""Keys of a split, a multiple of every BLOCK_N."""
MAX_HEAD_DIM = 256
MAX_WORKSPACE = 64 << 20
"""Bytes of partial results that a launch may take."""
ENOUGH_TILES = 1024
"""Tiles times KV heads from which on splits are walked: about eight programs for each SM of an H100. Below, splits are
spread over as many programs as make it so many, and not over one each: a table as wide as a model's context has many
more splits than its sequences fill, and a program without work still takes its turn on an SM."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """Sizes of a launch.

    heads: query heads of a tile, at most those of a KV head. rows: query rows of a tile. tiles: programs for N rows of
    B sequences. splits: splits of a block table. spread: `parts` programs of a tile take its splits in turns, then a
    merge.
    """

    block_m: int
    block_n: int
    block_d: int
    heads: int
    rows: int
    tiles: int
    splits: int
    spread: bool
    parts: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


def tiling(
    rows: int, batch: int, slots: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, capability: int = 90
) -> Tiling:
    """Sizes for rows of batch sequences, a block table of so many slots a sequence, and heads of dim numbers.

    All but block_m, num_warps, tiles, splits, spread and parts depend on the head, the dtype and the device alone. A
    tile is 128 rows high where a sequence has more than 64 rows, times the heads of a group, on average.
    """
    group = heads // kv_heads
    block_d = max(16, triton.next_power_of_2(dim))
    if dtype == torch.float32:
        block_m, block_n, num_warps, num_stages = 16, (16 if block_d > 64 else 32), (8 if block_d > 32 else 4), 2
    elif block_d == 256:
        block_m, block_n, num_warps, num_stages = 32, 32, 8, 4
    elif capability // 10 not in (9, 10):
        # Products read their operands from registers: twice the warps share queries and both accumulators.
        block_m, block_n, num_warps, num_stages = 64, (64 if block_d == 64 else 32), 8, 4
    else:
        block_m = 128 if rows * group > 64 * batch else 64
        block_n, num_warps, num_stages = (64 if block_d in (32, 64) else 32), block_m // 16, 4
    tile_heads = min(group, block_m)
    tile_rows = block_m // tile_heads
    tiles = rows // tile_rows + batch
    splits = triton.cdiv(slots, KEY_SPLIT)
    programs = tiles * kv_heads * triton.cdiv(group, tile_heads)
    workspace = 4 * rows * heads * splits * (dim + 2)
    spread = splits > 1 and programs < ENOUGH_TILES and workspace <= MAX_WORKSPACE
    return Tiling(
        block_m=block_m,
        block_n=block_n,
        block_d=block_d,
        heads=tile_heads,
        rows=tile_rows,
        tiles=tiles,
        splits=splits,
        spread=spread,
        parts=min(splits, triton.cdiv(ENOUGH_TILES, programs)) if spread else 1,
        num_warps=num_warps,
        num_stages=num_stages,
        # Left to itself the compiler spills a register or two there, to fit one more program on an SM.
        max_registers=255 if dtype == torch.float32 or capability // 10 != 9 else None,
    )
