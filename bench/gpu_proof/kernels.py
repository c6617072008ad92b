"""Part 4: the table of `bench.kernels`: ours in every implementation, peers where installed, beside the limit."""

from __future__ import annotations

import json
from dataclasses import asdict

import torch

from bench.gpu_proof import ahead
from bench.gpu_proof.context import Context, DeviceLost, Found, Line, free_memory, one_line
from bench.kernels.cases import cases
from bench.kernels.run import measure_case
from bench.kernels.table import Row, duration


def measure(ctx: Context, found: Found) -> None:
    """Cold inputs, graphs replayed, medians; a case that fails is named in `failed` and the rest goes on."""
    facts, rounds = ctx.limits(), 1 if ctx.dry else 7
    dtype = torch.float32 if ctx.dry else torch.bfloat16
    if not found:
        found |= {"rows": [], "absent": {}, "failed": {}}
    lacking = _flashinfer(ctx)
    done = {f"{row['op']} {row['case']}" for row in found["rows"]}
    for case in cases("tiny" if ctx.dry else "8b", dtype):
        name = f"{case.op} {case.label}"
        if name in done or name in found["failed"]:
            continue
        if (lost := ctx.begin(name)) is not None:
            found["failed"][name] = lost
            continue
        try:
            without = {ahead.PACKAGE: lacking[case.op]} if lacking.get(case.op) else {}
            rows = measure_case(
                case, ctx.device, facts, rounds, found["absent"], only_kernels=not ctx.dry, without=without
            )
            found["rows"] += [asdict(row) for row in rows]
        except Exception as error:
            found["failed"][name] = one_line(error)
            ctx.survived()
        try:
            free_memory(ctx.device)
        except RuntimeError as error:  # a capture was broken off, and torch's allocator takes it to go on
            raise DeviceLost(one_line(error)) from error


def _flashinfer(ctx: Context) -> dict[str, str]:
    """By op, what keeps FlashInfer from it."""
    path = ahead.ready_file(ctx.out)
    found: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


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
    told += [(name, "left out", reason) for name, reason in found.get("absent", {}).items()]
    return told + [(name, "failed", error) for name, error in found.get("failed", {}).items()]
