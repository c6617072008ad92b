"""Package list; everything else stands in pyproject.toml.

`triton_kernels/` is installed as `atts_triton`: serving stacks import a top-level package named triton_kernels
of their own.
"""

from setuptools import find_packages, setup

kernels = [f"atts_triton.{name}" for name in find_packages(where="triton_kernels")]

setup(
    packages=[*find_packages(include=["atts_engine", "atts_engine.*"]), "atts_triton", *kernels],
    package_dir={"atts_triton": "triton_kernels"},
)
