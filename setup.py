"""Package list and the native libraries; everything else stands in pyproject.toml.

`triton_kernels/` is installed as `atts_triton`: serving stacks import a top-level package named triton_kernels
of their own.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

kernels = [f"atts_triton.{name}" for name in find_packages(where="triton_kernels")]

CPU = Extension("atts_engine.ops._libatts", sources=[], optional=True)
CUDA = Extension("atts_engine.ops._libatts_cuda", sources=[], optional=True)


def nvcc() -> str | None:
    return os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def missing_for_cuda() -> list[str]:
    """What keeps the CUDA kernels from being built; ATTS_CUDA=0 in the environment is a reason too."""
    if os.environ.get("ATTS_CUDA") == "0":
        return ["ATTS_CUDA is 0"]
    found = [] if nvcc() else ["nvcc was not found"]
    if importlib.util.find_spec("tvm_ffi") is None:
        found.append("apache-tvm-ffi is not installed where the package is built (--no-build-isolation sees what is)")
    return found


class BuildNative(build_ext):
    """csrc/ by CMake, the CPU's kernels and the GPU's apart. Each is optional: what cannot be built is left out, other
    implementations run in its place, and `atts doctor` says so."""

    def run(self) -> None:
        missing = missing_for_cuda()
        if missing:
            self.warn(f"building without the CUDA kernels of csrc/: {'; '.join(missing)}")
        super().run()

    def build_extension(self, ext: Extension) -> None:
        if ext is CUDA:
            options = ["-DATTS_CUDA=ON", "-DATTS_TVM_FFI=ON", f"-DCMAKE_CUDA_COMPILER={nvcc()}"]
            self._cmake(ext, "atts_tvm_ffi", [*options, f"-DPython_EXECUTABLE={sys.executable}"])
        else:
            self._cmake(ext, "libatts", ["-DATTS_CUDA=OFF"])

    def _cmake(self, ext: Extension, name: str, options: list[str]) -> None:
        """Build one library and put it where `ext` belongs."""
        build = Path(self.build_temp).resolve() / name
        source = str(Path(__file__).parent.resolve())
        configure = ["cmake", "-S", source, "-B", str(build), "-DCMAKE_BUILD_TYPE=Release", *options]
        target = ["--target", name.removeprefix("lib"), "-j", str(os.cpu_count() or 1)]
        try:
            for command in (configure, ["cmake", "--build", str(build), "--config", "Release", *target]):
                subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(f"{name}: {error}") from error
        place = Path(self.get_ext_fullpath(ext.name))
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(next(build.glob(f"{name}.so"), build / f"{name}.dylib"), place)


setup(
    packages=[*find_packages(include=["atts_engine", "atts_engine.*"]), "atts_triton", *kernels],
    package_dir={"atts_triton": "triton_kernels"},
    ext_modules=[CPU] if missing_for_cuda() else [CPU, CUDA],
    cmdclass={"build_ext": BuildNative},
)
