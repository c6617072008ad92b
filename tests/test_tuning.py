"""Tuning tables: what a file may say, where it is found, how kernels and dispatch follow it, and the search."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from atts_engine import ops
from atts_engine.cli import main as cli
from atts_engine.config import EngineConfig
from atts_engine.engine import Engine
from atts_engine.errors import InputError
from atts_engine.ops import dispatch, tuning
from atts_engine.ops.tuning import search

pytest.importorskip("triton", reason="triton is not installed")

H100 = "NVIDIA H100 80GB HBM3"


def document(**entry: Any) -> dict[str, Any]:
    known = {
        "when": {"dtype": "float32", "T": [1, 64], "V": [97, 97]},
        "config": {"block_t": 16, "num_warps": 2},
        "time_us": 12.5,
        "alternatives": [{"config": {"block_t": 64}, "time_us": 13}],
    }
    return {
        "schema": 1,
        "device": H100,
        "date": "2026-01-01",
        "versions": {"triton": "3.6.0"},
        "implementations": {"sample": "reference"},
        "entries": {"score_tokens": [known | entry]},
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / tuning.file_name(H100)


@pytest.fixture
def restored() -> Iterator[None]:
    yield
    tuning.put_in_force(None)


def loaded(path: Path, document: dict[str, Any]) -> tuning.Table:
    path.write_text(json.dumps(document))
    return tuning.load(path)


def test_a_table_is_named_by_its_device_and_read_back_as_it_was(path: Path) -> None:
    assert path.name == "nvidia_h100_80gb_hbm3.json"
    table = loaded(path, document())
    tuning.save(table, path)
    assert tuning.load(path) == table and json.loads(path.read_text()) == document()
    assert tuning.find(H100, path.parent) == path
    assert tuning.find("another device", path.parent) is None
    entry = table.entries["score_tokens"][0]
    assert entry.bounds == {"T": (1, 64), "V": (97, 97)} and entry.alternatives == (({"block_t": 64}, 13.0),)


def test_the_example_in_the_docs_is_a_table(root: Path, path: Path) -> None:
    page = (root / "docs" / "kernels.md").read_text(encoding="utf-8")
    path.write_text(page.partition("```json\n")[2].partition("```")[0])
    assert tuning.load(path).entries["score_tokens"][0].config["block_t"] == 64


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"config": {"block_v": 128}}, "may not choose block_v of score_tokens, only block_t, num_warps, num_stages"),
        ({"config": {"tiles_per_split": 1}}, "may not choose tiles_per_split"),
        ({"config": {"block_t": 24}}, "block_t must be one of"),
        ({"config": [1]}, "config must be an object"),
        ({"when": {"dtype": "float64"}}, "when.dtype must be one of float32"),
        ({"when": {"dtype": "float32", "T": [9, 1]}}, r"when.T must be \[low, high\]"),
        ({"when": {"dtype": "float32", "B": [1, 9]}}, "when.B must be"),
        ({"time_us": 0}, "time_us must be a positive number, not 0"),
        ({"time_us": float("nan")}, "time_us must be a positive number, not nan"),
        ({"alternatives": [{"config": {}}]}, "alternatives must hold"),
        ({"why": "because"}, "must have the fields"),
    ],
)
def test_what_an_entry_may_not_say(path: Path, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=f"{path.name}: entries.score_tokens.0..*{said}"):
        loaded(path, document(**changed))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"schema": 2}, "schema must be 1"),
        ({"speed": "fast"}, "a table has the fields"),
        ({"entries": {"matmul": [{}]}}, "no kernel 'matmul' can be tuned"),
        ({"entries": []}, "entries must hold a list for each kernel"),
        ({"implementations": {"sample": "cutlass"}}, "'sample' cannot be 'cutlass'"),
    ],
)
def test_what_a_table_may_not_say(path: Path, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        loaded(path, document() | changed)


def test_what_is_no_table_at_all(path: Path) -> None:
    with pytest.raises(InputError, match="no tuning table"):
        tuning.load(path)
    path.write_text("{")
    with pytest.raises(InputError, match="no tuning table"):
        tuning.load(path)


@pytest.mark.usefixtures("restored")
def test_a_launch_follows_the_first_choice_that_fits(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from atts_triton import score_tokens as module_function
    from atts_triton import tuning as kernels

    table = loaded(path, document())
    tuning.put_in_force(table, path)
    assert tuning.in_force() == (table, path)
    fits = {"T": 64, "V": 97, "H": 32}
    assert kernels.settings("score_tokens", torch.float32, **fits) == {"block_t": 16, "num_warps": 2}
    assert not kernels.settings("score_tokens", torch.float32, **fits | {"T": 65})
    assert not kernels.settings("score_tokens", torch.float16, **fits)
    assert not kernels.settings("gate", torch.float32)

    kernel = module_function.__globals__["_split_kernel"]
    seen: list[dict[str, Any]] = []

    class Spy:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **kwargs: (seen.append(kwargs), kernel[grid](*args, **kwargs))

    monkeypatch.setitem(module_function.__globals__, "_split_kernel", Spy())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden, weight = torch.randn(40, 32, device=device), torch.randn(97, 32, device=device)
    with ops.use("triton"):
        tuned = ops.score_tokens(hidden, weight, torch.arange(40, device=device))
        tuning.put_in_force(None)
        default = ops.score_tokens(hidden, weight, torch.arange(40, device=device))
    assert (seen[0]["BLOCK_T"], seen[0]["num_warps"]) == (16, 2)
    assert seen[1]["num_warps"] != 2 and seen[0]["BLOCK_V"] == seen[1]["BLOCK_V"]
    torch.testing.assert_close(tuned, default, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("restored")
def test_a_table_names_implementations_for_the_gpu_only(path: Path) -> None:
    before = ops.chosen("gate", "cpu")
    table = loaded(path, document() | {"implementations": {"gate": "reference", "sample": "native"}})
    tuning.put_in_force(table)
    assert ops.chosen("gate", "cuda") == "reference" and ops.chosen("gate", "cpu") == before
    with pytest.raises(InputError, match="sample: the tuning table asks for native: native kernels run"):
        ops.chosen("sample", "cuda")
    dispatch.prefer({})
    assert ops.chosen("sample", "cuda") in ("triton", "reference")


def test_new_entries_replace_those_of_the_same_model(path: Path) -> None:
    old = loaded(path, document())
    same = tuning.Entry("float32", {"T": (1, 9), "V": (97, 97)}, {"block_t": 32}, 1.0)
    other = tuning.Entry("float16", {"T": (1, 9)}, {"block_t": 32}, 1.0)
    assert tuning.merged(old, H100, {"score_tokens": [same]}).entries["score_tokens"] == (same,)
    both = tuning.merged(old, H100, {"score_tokens": [other]})
    assert both.entries["score_tokens"] == (other, *old.entries["score_tokens"])
    assert both.implementations == {"sample": "reference"} and "triton" in both.versions
    assert tuning.merged(None, H100, {}).entries == {}
    with pytest.raises(InputError, match="holds a table of NVIDIA H100"):
        tuning.merged(old, "another", {})


def test_the_search_keeps_what_is_quicker_and_has_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    import atts_triton

    tried: list[dict[str, int]] = []

    def timer(launch: Any, config: dict[str, int]) -> float:
        tried.append(dict(config))
        return {16: 3e-6, 32: 5e-6, 64: 9e-6}.get(config.get("block_t", 0), 8e-6)

    def score(hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        from atts_triton.tuning import settings

        found = settings("score_tokens", hidden.dtype, T=len(ids), V=9, H=4)
        return ids.float() + (1e-6 if found.get("block_t") == 16 else 0)  # the quickest is a little off

    monkeypatch.setattr(atts_triton, "score_tokens", score)
    said: list[str] = []
    problem = search.Problem(9, 4, torch.float32, (2, 8))
    entries = search.score_tokens(problem, torch.device("cpu"), timer, said.append)
    assert [entry.config["block_t"] for entry in entries] == [32, 32]
    assert [entry.bounds["T"] for entry in entries] == [(1, 2), (3, 8)]
    assert entries[0].time_us == pytest.approx(5.0) and len(entries[0].alternatives) == 3
    assert {"block_t": 16, "num_warps": 2, "num_stages": 2} not in tried
    assert len(said) == 2 and "12 candidates dropped" in said[0]

    slow = search.score_tokens(problem, torch.device("cpu"), lambda launch, config: 1.0, said.append)
    assert slow == [] and "the default stays" in said[-1]


def test_the_command_without_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", "--tune"]) == 2
    assert capsys.readouterr().err.startswith("atts: error: tuning needs a CUDA device, and torch sees none here")
    assert cli.main(["bench"]) == 2
    assert "name what to do: --tune" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="made-up times are for machines without a GPU")
def test_a_dry_run_searches_and_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--tune", "--dry-run"]) == 0
    assert "times are made up, nothing was written" in capsys.readouterr().out


def test_the_engine_refuses_a_file_that_is_no_table(path: Path) -> None:
    path.write_text("[]")
    with pytest.raises(InputError, match="schema must be 1"):
        Engine(EngineConfig("tiny-draft", "tiny-target", tuning=str(path)))
