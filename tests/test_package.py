"""The repository itself: what is installed, and what every tracked file must keep to."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

import atts_engine

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 500
SOURCE_SUFFIXES = {".py", ".cu", ".cuh", ".cpp", ".h", ".md", ".toml", ".txt", ".json", ""}
EXAMPLES = sorted(p.name for p in (ROOT / "examples").glob("*.py") if p.name != "train_tiny_pair.py")
# Built from parts, so that this file is not its own first finding.
MACHINE_PATHS = re.compile("|".join(rf"(?<![\w.])/{top}/" for top in ("work", "root", "home", "Users", "farm", "tmp")))


@cache
def tracked() -> tuple[Path, ...]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: there is no list of tracked files")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return tuple(p for name in listed.stdout.split("\0") if name and (p := ROOT / name).is_file())


def text_of(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def test_version_is_the_installed_one() -> None:
    assert importlib.metadata.version("atts-engine") == atts_engine.__version__


def test_console_script_starts() -> None:
    script = Path(sys.executable).with_name("atts")
    assert script.exists(), "the environment of the tests has no `atts`: pip install -e ."
    done = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert atts_engine.__version__ in done.stdout


def test_kernels_are_installed_under_their_own_name() -> None:
    # In a new interpreter outside the repository: the folder triton_kernels must not be what makes it work.
    code = "import importlib.util as u; print(u.find_spec('atts_triton') is not None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(sys.prefix))
    assert done.stdout.strip() == "True", done.stderr


def test_light_import() -> None:
    code = "import sys, atts_engine, atts_engine.conformal; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_public_names_resolve() -> None:
    for name in atts_engine.__all__:
        assert getattr(atts_engine, name).__name__ == name


def test_extras_are_those_that_the_readme_names() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = set(project["optional-dependencies"])
    assert {"gpu", "serve", "eval", "dev"} <= extras
    readme = (ROOT / "README.md").read_text()
    assert {e for e in extras if f"`{e}`" not in readme} == set()


def test_no_file_is_over_the_limit() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in tracked()
        if path.suffix in {".py", ".cu", ".cuh", ".cpp", ".h", ".md"}
        and (lines := len(path.read_text(encoding="utf-8").splitlines())) > MAX_LINES
    }
    assert long == {}


def test_no_machine_paths() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in tracked()
        if path.suffix in SOURCE_SUFFIXES and (text := text_of(path)) is not None
        for number, line in enumerate(text.splitlines(), 1)
        if MACHINE_PATHS.search(line)
    ]
    assert found == []


def test_no_stubs() -> None:
    words = re.compile("|".join(("TO" + "DO", "FIX" + "ME", "raise NotImplemented" + "Error")))
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in tracked()
        if path.suffix in {".py", ".cu", ".cuh", ".cpp", ".h"}
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if words.search(line)
    ]
    assert found == []


def headings(markdown: str) -> set[str]:
    """The anchors of a page, made as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", markdown, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_relative_links_of_the_docs_exist() -> None:
    broken = []
    for page in (p for p in tracked() if p.suffix == ".md"):
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"[a-z]+:", link):
                continue
            name, _, anchor = link.partition("#")
            there = page.parent / name if name else page
            known = headings(there.read_text(encoding="utf-8")) if anchor and there.suffix == ".md" else {anchor}
            if not there.exists() or anchor not in known:
                broken.append(f"{page.relative_to(ROOT)}: {link}")
    assert broken == []


def test_results_in_the_readme_come_from_their_file() -> None:
    from bench import readme

    text = (ROOT / "README.md").read_text()
    if readme.RESULTS.exists():
        assert readme.updated(text, json.loads(readme.RESULTS.read_text())) == text, "run python -m bench.readme"
    else:
        between = text.split(readme.BEGIN)[1].split(readme.END)[0]
        assert between.strip() == "", "figures without the file that they were read from"


def test_strategies_in_the_readme_come_from_their_file() -> None:
    from bench import readme

    text = (ROOT / "README.md").read_text()
    record = json.loads(readme.STRATEGIES.read_text())
    assert readme.strategies_updated(text, record) == text, "run python -m bench.readme"
    assert all(len(block["rows"]) > 6 for block in record["blocks"])


def test_decode_in_the_readme_comes_from_its_file() -> None:
    from bench import readme

    text = (ROOT / "README.md").read_text()
    assert readme.decode_updated(text, readme.decode_records()) == text, "run python -m bench.readme"


def test_commands_in_the_docs_exist() -> None:
    from atts_engine.cli.main import COMMANDS

    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    blocks = [block for page in pages for block in re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL)]
    assert blocks
    makefile = (ROOT / "Makefile").read_text()
    for line in "\n".join(blocks).splitlines():
        words = line.split()
        if words[:1] == ["atts"]:
            assert words[1] in COMMANDS or words[1].startswith("--"), line
        if words[:1] == ["make"]:
            assert re.search(rf"^{words[1]}:", makefile, flags=re.MULTILINE), line


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name: str) -> None:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name)], capture_output=True, text=True, timeout=300, env=env
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert done.stderr == ""
