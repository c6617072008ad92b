"""csrc/ as a C library for others: the installed package, its example, what the libraries export, the header alone."""

from __future__ import annotations

import ctypes
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import abi


def _run(*command: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _symbols(path: Path, *options: str) -> dict[str, str]:
    """Kind by name, as nm prints them."""
    if shutil.which("nm") is None:
        pytest.skip("needs nm")
    lines = (line.split() for line in _run("nm", *options, path).splitlines())
    return {line[-1].partition("@")[0]: line[-2] for line in lines if len(line) >= 2 and not line[-1].endswith(":")}


@pytest.mark.parametrize("language", [("c", "-std=c11"), ("c++", "-std=c++17")], ids=["C11", "C++17"])
def test_the_header_compiles_on_its_own(root: Path, tmp_path: Path, language: tuple[str, str]) -> None:
    compiler = shutil.which("cc" if language[0] == "c" else "c++")
    if compiler is None:
        pytest.skip("needs a C and a C++ compiler")
    (tmp_path / "only").write_text("#include <atts/atts.h>\n", encoding="utf-8")
    flags = ("-Wall", "-Wextra", "-pedantic", "-Werror", "-fsyntax-only", f"-I{root / 'csrc' / 'include'}")
    _run(compiler, "-x", *language, *flags, tmp_path / "only")


def test_another_project_finds_links_and_runs_both_libraries(csrc_install: Path, root: Path, tmp_path: Path) -> None:
    _run("cmake", "-S", root / "tests" / "csrc_consumer", "-B", tmp_path, f"-Datts_ROOT={csrc_install}")
    _run("cmake", "--build", tmp_path)
    said = _run("ctest", "--test-dir", tmp_path, "--verbose")
    assert said.count("success: p = 0.50, takeover = 1, ring holds 4") == 4
    assert "100% tests passed" in said
    assert "libatts.so" in _run("ldd", tmp_path / "atts_cpp")
    assert "libatts.so" not in _run("ldd", tmp_path / "atts_static_cpp")


def test_the_example_is_built_and_says_what_its_page_says(csrc_install: Path, root: Path, tmp_path: Path) -> None:
    page = (root / "docs" / "c-library.md").read_text(encoding="utf-8")
    commands, shown = re.search(r"```bash\n(cmake -S examples/cpp .*?)```\n\n```\n(.*?)```", page, re.DOTALL).groups()  # type: ignore[union-attr]
    commands = commands.replace('"$PWD/build/atts"', f"'{csrc_install}'").replace("build/example", f"'{tmp_path}'")
    said = _run("bash", "-ec", f"export CXXFLAGS=-Werror\n{commands}", cwd=root)
    lines = re.search(r"^atts \d.*", said, re.DOTALL | re.MULTILINE).group().splitlines()  # type: ignore[union-attr]
    assert lines == shown.splitlines()
    rows = [line.split(maxsplit=6) for line in lines[2:5]]
    # exp(margin) over itself and 999 ones, and 100 calibration scores from 0.5 in steps of 0.02.
    scores = [math.log1p(999 * math.exp(-margin)) for margin in (8.0, 6.0, 4.5)]
    above = [sum(0.5 + 0.02 * i > score for i in range(100)) for score in scores]
    assert [row[2] for row in rows] == [f"{score:.3f}" for score in scores]
    assert [row[3:6] for row in rows] == [[str(count), "100", f"{(count + 1) / 101:.3f}"] for count in above]
    assert [row[6] for row in rows] == ["the draft goes on", "the draft goes on", "the target takes over"]
    assert lines[-1].endswith("the store holds 103 scores now")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("find_package(atts 0.1 CONFIG REQUIRED)", "compatible"),
        ("find_package(atts CONFIG REQUIRED nonsense)", "nonsense"),
    ],
    ids=["another version", "an unknown component"],
)
def test_what_the_package_does_not_have_is_refused(csrc_install: Path, tmp_path: Path, asked: str, words: str) -> None:
    text = f"cmake_minimum_required(VERSION 3.24)\nproject(asks LANGUAGES CXX)\n{asked}\n"
    (tmp_path / "CMakeLists.txt").write_text(text, encoding="utf-8")
    command = ["cmake", "-S", str(tmp_path), "-B", str(tmp_path / "b"), f"-Datts_ROOT={csrc_install}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and words in done.stderr


def test_the_package_names_no_folder_of_the_machine_that_built_it(csrc_install: Path, root: Path) -> None:
    for path in (csrc_install / "lib" / "cmake" / "atts").iterdir():
        text = path.read_text(encoding="utf-8")
        assert str(root) not in text and str(csrc_install.parent) not in text, path


def test_cuda_that_was_asked_for_and_cannot_be_had_is_an_error(root: Path, tmp_path: Path) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake")
    command = ["cmake", "-S", str(root), "-B", str(tmp_path), "-DATTS_CUDA=ON"]
    # The folders of the C++ compiler stay on the PATH; nvcc hides behind names that do not exist.
    done = subprocess.run([*command, "-DCMAKE_CUDA_COMPILER=NOTFOUND"], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "no CUDA compiler was found" in done.stderr


def test_the_shared_library_exports_what_the_header_declares_and_nothing_else(csrc_install: Path) -> None:
    exported = _symbols(csrc_install / "lib" / "libatts.so", "-D", "--defined-only")
    assert sorted(exported) == abi.FUNCTIONS
    assert set(exported.values()) == {"T"}


def test_the_static_library_defines_the_same_functions(csrc_install: Path) -> None:
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf")
    table = _run("readelf", "--symbols", "--wide", csrc_install / "lib" / "libatts.a")
    visible = re.findall(r" GLOBAL +DEFAULT +\d+ (\S+)", table)
    assert sorted(set(visible)) == abi.FUNCTIONS


@pytest.mark.parametrize("name", ["libatts.so", "libatts.a"])
def test_nothing_of_torch_or_python_is_in_it_or_asked_for(csrc_install: Path, name: str) -> None:
    found = _symbols(csrc_install / "lib" / name, *(("-D",) if name.endswith(".so") else ()))
    assert "atts_gate" in found
    # torch::, c10:: and at:: as C++ mangles them, CPython's API, pybind11, apache-tvm-ffi.
    foreign = re.compile(r"torch|3c10|2at[0-9]|^_?Py[A-Z_]|pybind|TVMFFI")
    assert not [symbol for symbol in found if foreign.search(symbol)]


def test_the_shared_library_needs_only_the_c_and_cpp_runtime(csrc_install: Path) -> None:
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf")
    table = _run("readelf", "--dynamic", "--wide", csrc_install / "lib" / "libatts.so")
    needed = {name.partition(".so")[0] for name in re.findall(r"\(NEEDED\).*\[(.+?)\]", table)}
    assert needed <= {"libc", "libm", "libstdc++", "libgcc_s", "libpthread", "libdl", "librt", "ld-linux-x86-64"}
    assert re.findall(r"\(SONAME\).*\[(.+?)\]", table) == ["libatts.so.{}.{}".format(*abi.VERSION)]
    assert not re.search(r"\((RPATH|RUNPATH)\)", table)


def test_one_version_in_header_library_and_package(csrc_install: Path) -> None:
    library = ctypes.CDLL(str(csrc_install / "lib" / "libatts.so"))
    major, minor, patch = abi.VERSION
    assert library.atts_version() == major * 10000 + minor * 100 + patch
    said = (csrc_install / "lib" / "cmake" / "atts" / "atts-config-version.cmake").read_text(encoding="utf-8")
    assert f'set(PACKAGE_VERSION "{major}.{minor}.{patch}")' in said


_SPANS_BY_TORCH = """
import ctypes, sys
sys.path.insert(0, sys.argv[1])
import torch
from tests.abi import params
library, score, total = ctypes.CDLL(sys.argv[2]), torch.zeros(2), torch.zeros(2, dtype=torch.float64)
logprob, bounds = torch.tensor([-1.0, -2.0, -6.0]), torch.tensor([0, 1, 3])
call = params("span_mean", logprob=logprob, cu_seqlens=bounds, score=score, sum=total, tokens=3, batch=2)
print(torch.__version__, library.atts_span_mean_cpu(ctypes.byref(call)), score.tolist())
"""


def test_one_library_serves_two_versions_of_torch(csrc_install: Path, root: Path) -> None:
    other = os.environ.get("ATTS_OTHER_PYTHON")
    if other is None:
        pytest.skip("ATTS_OTHER_PYTHON does not name a Python with another version of torch")
    library = csrc_install / "lib" / "libatts.so"
    found = [_run(python, "-c", _SPANS_BY_TORCH, root, library).split(maxsplit=1) for python in (sys.executable, other)]
    assert found[0][0] != found[1][0]
    assert found[0][1].strip() == found[1][1].strip() == "0 [1.0, 4.0]"
