"""Named ranges on a profiler's time line."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

Ranges = Callable[[str], AbstractContextManager[None]]
"""Makes a context in which whatever the host does, and the kernels it launches, appears under a name."""


def no_ranges(_: str) -> AbstractContextManager[None]:
    return nullcontext()


def make_ranges(profile: bool, device: torch.device) -> Ranges:
    """NVTX ranges for a CUDA device while profiling, else nothing."""
    return torch.cuda.nvtx.range if profile and device.type == "cuda" else no_ranges
