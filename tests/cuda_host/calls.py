"""Builds the CUDA sources of csrc/ for the host (tests/cuda_host/), and calls them and their forms for the CPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

from atts_engine.ops import native
from tests.abi import params

COMPILER = shutil.which("g++") if sys.platform == "linux" else None
"""Shared variables need its sections, and threads the contexts of the C library."""
FLAGS = (
    "-std=c++17 -g -Wall -Wextra -Werror -Wno-unknown-pragmas -ffp-contract=off "
    "-Itests/cuda_host/include -Icsrc -Icsrc/include"
).split()  # fmt: skip
SEEDS = (1, 2, 3)
"""Orders of the warps and lanes between barriers."""
SHARED = ("-O1", "-fPIC", "-shared")


def build(root: Path, out: Path, sources: Iterable[str], *flags: str, objects: Iterable[Path] = ()) -> Path:
    """Compile C++ and CUDA sources, those of the latter as C++ too."""
    if COMPILER is None:
        pytest.skip("needs g++ on Linux")
    built = [str(path) for path in objects]
    done = subprocess.run(
        [COMPILER, *FLAGS, *flags, "-x", "c++", *sources, "-x", "none", *built, "-o", str(out)],
        cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out


def load(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    loaded.cuda_host_failure.restype = ctypes.c_char_p
    return loaded


Form = Callable[..., int]


def device_form(library: ctypes.CDLL, seed: int) -> Form:
    library.cuda_host_seed(ctypes.c_uint64(seed))

    def call(op: str, stream: int | None = None, **fields: torch.Tensor | int | None) -> int:
        return getattr(library, f"atts_{op}")(ctypes.byref(params(op, **fields)), ctypes.c_void_p(stream))

    return call


def cpu_form() -> Form:
    installed = native.library()
    if installed is None:
        pytest.skip("csrc/ was not built at installation: CMake and a C++ compiler are needed")
    library = ctypes.CDLL(installed._name)  # without the argument types that the ops have

    def call(op: str, **fields: torch.Tensor | int | None) -> int:
        return getattr(library, f"atts_{op}_cpu")(ctypes.byref(params(op, **fields)))

    return call


def counts(host: ctypes.CDLL) -> dict[str, int]:
    """What the host's CUDA was asked for since the test began."""
    names = ("launches", "behind", "batches", "batched", "rectangles", "copies")
    values = (ctypes.c_int64 * len(names))()
    host.cuda_host_counts(values)
    return dict(zip(names, values, strict=True))


def workspace(host: ctypes.CDLL, op: str, **fields: torch.Tensor | int | None) -> torch.Tensor:
    needed = ctypes.c_uint64()
    assert getattr(host, f"atts_{op}_workspace")(ctypes.byref(params(op, **fields)), ctypes.byref(needed)) == 0
    return torch.zeros(needed.value // 8 + 1, dtype=torch.int64)[: -(-needed.value // 8)]


def random(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * scale).to(dtype)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())
