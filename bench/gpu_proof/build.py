"""Part 2: csrc/ built by CMake for this device, the package imported afresh, and what `atts doctor` says."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import torch

from bench.gpu_proof.context import Context, Found, Line, ran
from bench.provenance import ROOT

NVCC_FOLDERS = ("/usr/local/cuda/bin",)


def measure(ctx: Context, found: Found) -> None:
    began = time.perf_counter()
    found["doctor"] = json.loads(
        _output([sys.executable, "-m", "atts_engine.cli.main", "doctor", "--json", "-"], ctx.left())
    )
    found["doctor_s"] = time.perf_counter() - began
    ctx.check()
    cmake, nvcc = shutil.which("cmake"), find_nvcc()
    if cmake is None:
        found["csrc"] = "left out: cmake is not on the PATH"
        return
    began = time.perf_counter()
    folder = ctx.out / "build-csrc"
    # A dry run configures and does not compile: the suite compiles csrc/ elsewhere.
    flags = ["-DCMAKE_BUILD_TYPE=Release", *cuda_flags(ctx.device, nvcc)]
    _output([cmake, "-S", str(ROOT), "-B", str(folder), *flags], ctx.left())
    if not ctx.dry:
        _output([cmake, "--build", str(folder), "--parallel"], ctx.left())
    found["csrc"] = "configured" if ctx.dry else "built"
    found["csrc_s"] = time.perf_counter() - began
    found["libraries"] = {path.name: path.stat().st_size for path in sorted(folder.glob("*.so"))}


def find_nvcc() -> str | None:
    return shutil.which("nvcc") or next((p for f in NVCC_FOLDERS if (p := shutil.which("nvcc", path=f))), None)


def cuda_flags(device: torch.device, nvcc: str | None) -> list[str]:
    """What CMake is told: code for this device alone; Hopper and Blackwell have features of their own ("a")."""
    if device.type != "cuda" or nvcc is None:
        return ["-DATTS_CUDA=OFF"]
    major, minor = torch.cuda.get_device_capability(device)
    suffix = "a" if major >= 9 else ""
    return ["-DATTS_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCMAKE_CUDA_ARCHITECTURES={major}{minor}{suffix}"]


def _output(command: list[str], seconds: float) -> str:
    done = ran(command, seconds)
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
