"""Parts of a log-sum-exp that several kernels share, each with one order of its sums on every target.

A compiler lays a tile out as it sees fit, and the order in which `tl.sum` adds follows the layout. `fold` adds in pairs
only, and a pair has one sum: its tree is that of the source, whatever the layout.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
MAX_SPLITS = 128
"""Splits of the vocabulary: with one tile of rows a launch still has a program for nearly every SM of an H100."""
_SMALL_TANH = tl.constexpr(0.25)


@triton.jit
def fold(x, LOG_COLUMNS: tl.constexpr):
    """x[N, 2^LOG_COLUMNS] -> [N]: one half of the columns to the other, and so on. A tensor core leaves far columns in
    one thread and near ones in its neighbours, so few sums are left when threads must meet."""
    for _ in tl.static_range(LOG_COLUMNS):
        x = tl.sum(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), 1)
    return tl.reshape(x, (x.shape[0],))


@triton.jit
def anchor_of(peak):
    """What is subtracted before exp2: the peak, or 0 where nothing finite was seen."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def soft_cap(z, cap):
    """cap * tanh(z / cap). (1 - t) / (1 + t) with t = exp(-2 |x|) <= 1 cannot overflow, but loses the digits of a small
    x: there the Taylor series, whose first term left out is below 2^-26 of x, takes its place."""
    x = z / cap
    t = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    large = (1.0 - t) / (1.0 + t)
    s = x * x
    small = x + x * s * (-1.0 / 3 + s * (2.0 / 15 + s * (-17.0 / 315 + s * (62.0 / 2835))))
    return cap * tl.where(tl.abs(x) < _SMALL_TANH, small, tl.where(x < 0, -large, large))


@triton.jit
def logprob_of(
    peak_ptr,  # [splits, T] fp32
    total_ptr,  # [splits, T] fp32
    target_ptr,  # [splits, T] fp32
    ids_ptr,  # [T] int64
    row,
    live,
    T,
    V,
    splits,
    split_columns,
):
    """Log-probability of the ids of some rows from what the splits left of them: (BLOCK_T,) fp32.

    A tile may be wholly -inf: 0 is subtracted there instead of its peak, so that 2^(-inf) = 0 and never 2^(-inf - -inf)
    = NaN. A NaN logit reaches the total and makes the row NaN; an id outside [0, V) makes its row NaN too.
    """
    split = tl.arange(0, 128)  # MAX_SPLITS
    at = split.to(tl.int64)[None, :] * T + row[:, None]
    held = live[:, None] & (split < splits)[None, :]
    peaks = tl.load(peak_ptr + at, mask=held, other=float("-inf"))
    totals = tl.load(total_ptr + at, mask=held, other=0.0)
    peak = tl.max(peaks, 1)
    total = fold(totals * tl.exp2((peaks - anchor_of(peak)[:, None]) * LOG2_E), 7)
    target_id = tl.load(ids_ptr + row, mask=live, other=0)
    known = (target_id >= 0) & (target_id < V)
    owner = tl.where(known, target_id // split_columns, 0)
    target = tl.load(target_ptr + owner * T + row, mask=live, other=0.0)
    logprob = (target - peak) - LN_2 * tl.log2(total)
    return tl.where(known, logprob, float("nan"))
