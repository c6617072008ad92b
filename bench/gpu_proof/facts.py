"""Part 1: the device as it was found, and the limits that every later figure is a share of."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import asdict
from typing import Any

import torch

from bench.gpu_proof.context import Context, Found, Line
from bench.kernels.devices import Facts
from bench.kernels.devices import measure as measure_device

QUERY = (
    "name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.draw", "power.limit",
    "temperature.gpu", "persistence_mode",
)  # fmt: skip
"""Asked of nvidia-smi, which only looks: no clock or limit is set."""


def measure(ctx: Context, found: Found) -> None:
    found["before"] = nvidia_smi(ctx.device)
    facts = ctx.limits()
    found["limits"] = asdict(facts)
    found["after"] = nvidia_smi(ctx.device)
    if ctx.device.type == "cuda":
        p = torch.cuda.get_device_properties(ctx.device)
        found["properties"] = {
            "capability": f"sm_{p.major}{p.minor}",
            "memory": p.total_memory,
            "processors": p.multi_processor_count,
            "cuda": torch.version.cuda,
        }


def measured_limits(ctx: Context) -> Facts:
    """A copy's bandwidth and a bf16 product's FLOP/s on random data; matrices of 8192 on a GPU."""
    size, matrix = (1 << 20, 128) if ctx.dry else (1 << 30, 8192)
    return measure_device(ctx.device, size, matrix)


def nvidia_smi(device: torch.device) -> dict[str, Any] | None:
    """Clocks and power at this moment; None where the tool is not there or says nothing."""
    tool = shutil.which("nvidia-smi")
    if tool is None or device.type != "cuda":
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    uuid = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
    command = [tool, f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader", "-i", uuid]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(QUERY, values, strict=True)) if len(values) == len(QUERY) else None


def lines(found: Found) -> list[Line]:
    limits = found.get("limits")
    if limits is None:
        return []
    return [
        ("memory bandwidth", f"{limits['bandwidth'] / 1e9:,.0f} GB/s", "measured: the limit below"),
        ("bf16 products", f"{limits['peak'] / 1e12:,.1f} TFLOP/s", "measured: the limit below"),
        ("link to the host", f"{limits['link'] / 1e9:,.1f} GB/s", "measured: the limit below"),
    ]
