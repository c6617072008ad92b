"""Part 4: the table of `bench.kernels`: ours in every implementation, peers where installed, beside the limit."""

from __future__ import annotations

from dataclasses import asdict

import torch

from bench.gpu_proof.context import Context, Found, Line, one_line
from bench.kernels.cases import cases
from bench.kernels.run import measure_case
from bench.kernels.table import Row, duration


def measure(ctx: Context, found: Found) -> None:
    """Cold inputs, graphs replayed, medians; a case that fails is named in `failed` and the rest goes on."""
    facts, rounds = ctx.limits(), 1 if ctx.dry else 7
    dtype = torch.float32 if ctx.dry else torch.bfloat16
    found |= {"rows": [], "absent": {}, "failed": {}}
    for case in cases("tiny" if ctx.dry else "8b", dtype):
        ctx.check()
        try:
            rows = measure_case(case, ctx.device, facts, rounds, found["absent"], only_kernels=not ctx.dry)
            found["rows"] += [asdict(row) for row in rows]
        except Exception as error:
            found["failed"][f"{case.op} {case.label}"] = one_line(error)
        if ctx.device.type == "cuda":
            torch.cuda.empty_cache()


def best_of_ours(found: Found) -> dict[tuple[str, str], Row]:
    """The quickest of our implementations on each case."""
    best: dict[tuple[str, str], Row] = {}
    for cell in found.get("rows", ()):
        row = Row(**cell)
        known = best.get((row.op, row.case))
        if row.ours and (known is None or row.seconds < known.seconds):
            best[row.op, row.case] = row
    return best


def lines(found: Found) -> list[Line]:
    told = []
    for (op, case), row in best_of_ours(found).items():
        limit = f"{100 * row.limit_s / row.seconds:.1f}% of the limit {duration(row.limit_s)} ({row.bound})"
        told.append((f"{op} {case}", f"{duration(row.seconds)} {row.provider}", limit))
    return told + [(name, "failed", error) for name, error in found.get("failed", {}).items()]
