"""What a device reaches here and now: its rate of matrix products, and of copies within its memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from atts_engine import ops

_REPEATS = 5
_ENOUGH_S = 0.3
"""Seconds after which the runs of one kind are not repeated."""
_MATRIX = {"cuda": 8192, "cpu": 1024}
_COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}


@dataclass(frozen=True, slots=True)
class Rates:
    """flop_s: floating-point operations a second of a large square matrix product; bytes_s: bytes a second of a large
    copy, read and written both counted."""

    flop_s: float
    bytes_s: float


@torch.inference_mode()
def probe(device: torch.device, dtype: torch.dtype) -> Rates:
    """The best of up to five runs of either, after one that is not counted; about a second at most. The device should
    have nothing else to do."""
    kind = "cuda" if device.type == "cuda" else "cpu"
    n = _MATRIX[kind]
    rows, weight = (torch.ones((n, n), dtype=dtype, device=device) for _ in range(2))
    # The op and the layout that the models use: others may take slower kernels (bf16 `mm` on a CPU is 20 times slower).
    product = _best(lambda: ops.linear(rows, weight), device)
    source, copy = (torch.ones(_COPY_BYTES[kind], dtype=torch.uint8, device=device) for _ in range(2))
    copied = _best(lambda: copy.copy_(source), device)
    return Rates(2.0 * n**3 / product, 2.0 * _COPY_BYTES[kind] / copied)


def _best(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the quickest run."""
    work()
    times: list[float] = []
    while not times or (len(times) < _REPEATS and sum(times) < _ENOUGH_S):
        times.append(_timed(work, device))
    return min(times)


def _timed(work: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.device(device):
        start.record()
        work()
        end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3
