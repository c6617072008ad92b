"""Part 2: csrc/ built by CMake for this device, put in place where none is installed, and `atts doctor` behind it."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path

import torch

import atts_engine.ops
from atts_engine.ops import cuda
from bench.gpu_proof.context import Context, Found, Line, ran
from bench.provenance import ROOT

NVCC_FOLDERS = ("/usr/local/cuda/bin",)
MODULE = "atts_tvm_ffi.so"
"""The CUDA kernels for Python, as CMake builds them where apache-tvm-ffi is installed."""


def measure(ctx: Context, found: Found) -> None:
    cmake = shutil.which("cmake")
    if cmake is None:
        found["csrc"] = "left out: cmake is not on the PATH"
    else:
        try:
            _build(cmake, ctx, found)
        finally:
            shutil.rmtree(ctx.out / "build-csrc", ignore_errors=True)
    ctx.check()
    # A process of its own: it imports the package as it is now.
    found["doctor"] = json.loads(_output([sys.executable, "-m", "atts_engine.cli.main", "doctor", "--json", "-"], ctx))


def _build(cmake: str, ctx: Context, found: Found) -> None:
    """A dry run configures and does not compile: the suite compiles csrc/ elsewhere."""
    began, folder = time.perf_counter(), ctx.out / "build-csrc"
    flags = ["-DCMAKE_BUILD_TYPE=Release", *cuda_flags(ctx.device, find_nvcc())]
    _output([cmake, "-S", str(ROOT), "-B", str(folder), *flags], ctx)
    if not ctx.dry:
        _output([cmake, "--build", str(folder), "--parallel", str(os.cpu_count() or 1)], ctx)
    found |= {"csrc": "configured" if ctx.dry else "built", "csrc_s": time.perf_counter() - began}
    found["libraries"] = {path.name: path.stat().st_size for path in sorted(folder.glob("*.so"))}
    if (folder / MODULE).is_file() and cuda.built() is None:
        shutil.copyfile(folder / MODULE, Path(atts_engine.ops.__file__).with_name("_libatts_cuda.so"))
        cuda.lacking.cache_clear()
        found["csrc"] += ", the module for Python put in place"


def find_nvcc() -> str | None:
    return shutil.which("nvcc") or next((p for f in NVCC_FOLDERS if (p := shutil.which("nvcc", path=f))), None)


def cuda_flags(device: torch.device, nvcc: str | None) -> list[str]:
    """What CMake is told: code for this device alone; Hopper and Blackwell have features of their own ("a")."""
    if device.type != "cuda" or nvcc is None:
        return ["-DATTS_CUDA=OFF"]
    major, minor = torch.cuda.get_device_capability(device)
    code = f"{major}{minor}" + ("a-real" if major >= 9 else "-real")
    own = [f"-DATTS_CUDA_ARCHITECTURES={code}", f"-DPython_EXECUTABLE={sys.executable}"]
    return ["-DATTS_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}", *own]


def _output(command: list[str], ctx: Context) -> str:
    done = ran(command, ctx.left())
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise RuntimeError(f"{Path(command[0]).name} {' '.join(command[1:4])}: {said[-1] if said else done.returncode}")
    return done.stdout.strip()


def lines(found: Found) -> list[Line]:
    told: list[Line] = []
    if "csrc" in found:
        told.append(("csrc", found["csrc"], f"{found['csrc_s']:.1f} s" if "csrc_s" in found else ""))
    if "doctor" in found:
        chosen = [op["chosen"] for op in found["doctor"]["ops"].values()]
        kind = "cuda" if any("cuda" in c for c in chosen) else "cpu"
        names = sorted({c[kind] for c in chosen})
        runs = ", ".join(f"{sum(c[kind] == name for c in chosen)} {name}" for name in names)
        told.append((f"ops chosen on {kind}", runs, f"of {len(chosen)}"))
    return told
