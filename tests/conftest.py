"""Fixtures and settings of the whole suite."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from atts_engine import ops
from atts_engine.errors import InputError
from atts_engine.ops import native

# Triton reads it when a kernel is defined: without a GPU the suite runs every kernel in the interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).resolve().parent.parent

# The same examples on every run and no clock in any verdict: a slow machine must not fail a test.
settings.register_profile(
    "suite", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")


def pytest_configure(config: pytest.Config) -> None:
    # Small tensors everywhere: a second thread costs more than it brings, and tests may share the machine.
    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        # Tests of kernels that run on the device where there is one: there `-m gpu` means them too.
        if getattr(getattr(item, "module", None), "DEVICE", None) == "cuda":
            item.add_marker("gpu")
    if "long" not in config.option.markexpr:
        long = [item for item in items if item.get_closest_marker("long") is not None]
        items[:] = [item for item in items if item not in long]
        config.hook.pytest_deselected(items=long)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; torch sees none here")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root folder."""
    return ROOT


@pytest.fixture(scope="session")
def csrc_install(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """csrc/ built for the CPU by CMake and installed: a folder with include/ and lib/, moved after the installation."""
    if shutil.which("cmake") is None or not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("needs cmake and a C++ compiler")
    build, place = tmp_path_factory.mktemp("csrc-build"), tmp_path_factory.mktemp("csrc")
    for command in (
        ["cmake", "-S", str(root), "-B", str(build), "-DATTS_CUDA=OFF", "-DATTS_TVM_FFI=OFF"],
        ["cmake", "--build", str(build), "-j", "2"],
        ["cmake", "--install", str(build), "--prefix", str(place / "first")],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return (place / "first").rename(place / "moved")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared` beside the repository (recorded traces, problem sets); its tests skip where it is missing."""
    path = ROOT.parent / "shared"
    if not (path / "data").is_dir():
        pytest.skip("the folder ../shared with recorded traces and problem sets is not here")
    return path


@pytest.fixture(params=native.ISAS)
def native_ops(request: pytest.FixtureRequest) -> Iterator[None]:
    """The kernels of csrc/ for each instruction set that this processor has, in turn."""
    try:
        native.use_isa(request.param)
    except InputError as reason:
        pytest.skip(str(reason))
    with ops.use("native"):
        yield
    native.use_isa(None)
