"""Part 7: Nsight Compute on the kernels of each op, where `ncu` is on the PATH: shares of DRAM and of the tensor pipes.

bench/profile.md has the command lines for a person, Nsight Systems with NVTX ranges among them.
"""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import sys
from collections.abc import Sequence

from atts_engine import ops
from bench.gpu_proof.context import Context, Found, Line, one_line, ran

DRAM = "dram__throughput.avg.pct_of_peak_sustained_elapsed"
TENSOR = "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active"
TIME = "gpu__time_duration.sum"
METRICS = (DRAM, TENSOR, TIME)
LAUNCHES = 200
"""Profiled of an op at most: Nsight Compute repeats each several times."""
FIRST = ("score_tokens", "score_gate", "paged_attention", "score_logits", "sample", "gate")
"""Each op takes a process of its own, so those that matter most come first."""


def measure(ctx: Context, found: Found) -> None:
    tool = shutil.which("ncu")
    found["tools"] = {"ncu": tool is not None, "nsys": shutil.which("nsys") is not None}
    found["commands"] = {
        op: command(op, "tiny" if ctx.dry else "8b") for op in dict.fromkeys((*FIRST, *ops.available()))
    }
    if tool is None or ctx.device.type != "cuda":
        found["left_out"] = "ncu is not on the PATH" if tool is None else "no CUDA device"
        return
    found["kernels"] = {}
    for op, words in found["commands"].items():
        ctx.check()
        try:
            done = ran(words, max(1.0, ctx.left()))
            found["kernels"][op] = kernels_of(done.stdout)
            if not found["kernels"][op]:
                said = [line for line in (done.stdout + done.stderr).splitlines() if "==ERROR==" in line]
                found["kernels"][op] = {
                    "error": said[0] if said else f"no kernel was profiled (exit {done.returncode})"
                }
        except subprocess.TimeoutExpired as error:
            found["kernels"][op] = {"error": one_line(error)}


def command(op: str, size: str) -> list[str]:
    """The op's cases eagerly: inside a graph a kernel is not profiled apart."""
    wanted = ["ncu", "--csv", "--profile-from-start", "off", "--launch-count", str(LAUNCHES)]
    return [*wanted, "--metrics", ",".join(METRICS), sys.executable, "-m", "bench.gpu_proof.once", op, size]


def kernels_of(text: str) -> dict[str, dict[str, float]]:
    """By kernel: its launches, and the largest value of each metric, from the output of `ncu --csv`."""
    rows = [line for line in text.splitlines() if line.startswith('"')]
    found: dict[str, dict[str, float]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(rows))):
        cell = found.setdefault(row["Kernel Name"].split("(")[0], {"launches": 0})
        value = float(row["Metric Value"].replace(",", ""))
        cell["launches"] += row["Metric Name"] == TIME
        cell[row["Metric Name"]] = max(value, cell.get(row["Metric Name"], 0.0))
    return found


def lines(found: Found) -> list[Line]:
    if "left_out" in found:
        return [("profiles", "left out", found["left_out"])]
    told: list[Line] = []
    for op, kernels in found.get("kernels", {}).items():
        told += [(f"profile of {op}", "failed", kernels["error"])] if "error" in kernels else _shares(op, kernels)
    return told


def _shares(op: str, kernels: dict[str, dict[str, float]]) -> Sequence[Line]:
    return [
        (f"{op}: {name}", f"DRAM {cell.get(DRAM, 0.0):.0f}%", f"tensor pipes {cell.get(TENSOR, 0.0):.0f}% (ncu)")
        for name, cell in kernels.items()
    ]
