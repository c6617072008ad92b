"""Measurements beside their limits: the arithmetic, and the table for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from bench.kernels.cases import Case
from bench.kernels.devices import Facts

COLUMNS = ("op", "case", "provider", "time", "limit", "of limit", "best peer", "allocated", "off by", "")


@dataclass(frozen=True, slots=True)
class Row:
    """One provider on one case. part: it does only part of the work. bound: what the limit comes from.
    max_abs_diff: from our reference, None where results are not comparable. graph: replayed in a CUDA graph.
    cold: inputs came from memory."""

    op: str
    case: str
    dtype: str
    provider: str
    ours: bool
    part: bool
    seconds: float
    limit_s: float
    bound: Literal["memory", "products", "link"]
    allocated: int
    max_abs_diff: float | None
    graph: bool
    cold: bool


def limit(case: Case, facts: Facts) -> tuple[float, Literal["memory", "products", "link"]]:
    """The least time the case can take on this device, and what sets it. `peak` is that of bfloat16, so for fp32 the
    limit may be out of reach."""
    times: tuple[tuple[float, Literal["memory", "products", "link"]], ...] = (
        (case.bytes / facts.bandwidth, "memory"),
        (case.flops / facts.peak, "products"),
        (case.link_bytes / facts.link, "link"),
    )
    return max(times)


def against_best_peer(rows: Sequence[Row], row: Row) -> float | None:
    """Time of the best peer over that of our row on the same case: above 1 ours is quicker. None without a peer."""
    same = (r for r in rows if (r.op, r.case, r.dtype) == (row.op, row.case, row.dtype))
    times = [r.seconds for r in same if not r.ours and not r.part]
    return min(times) / row.seconds if row.ours and times else None


def table(rows: Sequence[Row], facts: Facts) -> str:
    """The rows as aligned text under the limits of the device."""
    cells = [COLUMNS, *(_cells(rows, row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS))]
    lines = [
        f"{facts.name}: memory {facts.bandwidth / 1e9:,.0f} GB/s, bf16 products {facts.peak / 1e12:,.2f} TFLOP/s, "
        f"to the host {facts.link / 1e9:,.0f} GB/s (measured)"
    ]
    for index, row in enumerate(cells):
        left = (cell.ljust(width) for cell, width in zip(row[:3], widths[:3], strict=True))
        right = (cell.rjust(width) for cell, width in zip(row[3:-1], widths[3:-1], strict=True))
        lines.append("  ".join((*left, *right, row[-1])).rstrip())
        if index == 0:
            lines.append("  ".join("-" * width for width in widths[:-1]))
    return "\n".join(lines)


def _cells(rows: Sequence[Row], row: Row) -> tuple[str, ...]:
    ratio = against_best_peer(rows, row)
    notes = [f"by {row.bound}"]
    if not row.cold:
        notes.append("inputs in cache")
    if row.part:
        notes.append("part of the work")
    return (
        row.op,
        f"{row.case} {row.dtype}",
        row.provider,
        duration(row.seconds),
        duration(row.limit_s),
        f"{100 * row.limit_s / row.seconds:.1f}%",
        "-" if ratio is None else f"{ratio:.2f}x",
        size(row.allocated),
        "-" if row.max_abs_diff is None else f"{row.max_abs_diff:.1g}",
        ", ".join(notes),
    )


def duration(seconds: float) -> str:
    """0.0000123 -> "12.3 us"."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}" if seconds < 999 * scale else f"{seconds / scale:.0f} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def size(count: int) -> str:
    """123456 -> "121 KiB"."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}" if count < 999 * scale else f"{count / scale:.0f} {unit}"
    return f"{count} B"
