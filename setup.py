"""Package list and the native library; everything else stands in pyproject.toml.

`triton_kernels/` is installed as `atts_triton`: serving stacks import a top-level package named triton_kernels
of their own.
"""

import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

kernels = [f"atts_triton.{name}" for name in find_packages(where="triton_kernels")]


class BuildNative(build_ext):
    """csrc/ for the CPU by CMake. Optional: where there is no CMake or C++ compiler the package does without, more
    slowly, and `atts doctor` says so."""

    def build_extension(self, ext: Extension) -> None:
        build = Path(self.build_temp).resolve() / "cmake"
        command = ["cmake", "-S", str(Path(__file__).parent.resolve()), "-B", str(build)]
        subprocess.run([*command, "-DATTS_CUDA=OFF", "-DCMAKE_BUILD_TYPE=Release"], check=True)
        subprocess.run(["cmake", "--build", str(build), "--config", "Release"], check=True)
        place = Path(self.get_ext_fullpath(ext.name))
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(next(build.glob("libatts.so"), build / "libatts.dylib"), place)


setup(
    packages=[*find_packages(include=["atts_engine", "atts_engine.*"]), "atts_triton", *kernels],
    package_dir={"atts_triton": "triton_kernels"},
    ext_modules=[Extension("atts_engine.ops._libatts", sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative},
)
