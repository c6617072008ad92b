"""Fixtures: the CUDA sources of csrc/ built for the host, and their forms for the device and the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cuda_host.calls import SEEDS, SHARED, Form, build, cpu_form, device_form, load


@pytest.fixture(scope="session")
def runtime(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What runs the grids, compiled; once for all files of tests."""
    out = tmp_path_factory.getbasetemp() / "host-cuda-run.o"
    return out if out.exists() else build(root, out, ["tests/cuda_host/run.cpp"], "-O1", "-fPIC", "-c")


@pytest.fixture(scope="session")
def host(root: Path, runtime: Path, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Every .cu of csrc/, and the host's CUDA."""
    out = tmp_path_factory.getbasetemp() / "host-cuda.so"
    if not out.exists():
        kernels = sorted(str(path.relative_to(root)) for path in root.glob("csrc/*.cu"))
        build(root, out, ["csrc/workspace.cpp", *kernels], *SHARED, objects=[runtime])
    return load(out)


@pytest.fixture
def device(host: ctypes.CDLL) -> Iterator[Form]:
    """device(op, **fields) -> status of the op's form for the device."""
    host.cuda_host_reset_counts()
    host.cuda_host_batches(1)
    yield device_form(host, 0)
    host.cuda_host_forget_memory()


@pytest.fixture(params=[*SEEDS, "cpu"])
def form(request: pytest.FixtureRequest, host: ctypes.CDLL) -> Form:
    """The form for the device under some orders of its warps, and that for the CPU."""
    return cpu_form() if request.param == "cpu" else device_form(host, request.param)
