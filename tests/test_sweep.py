"""A sweep over chains and turns: its cells, its resumption, its figures, and the command."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from atts_engine.cli.main import main as atts
from atts_engine.errors import InputError
from atts_engine.evaluation.growth import Law
from atts_engine.evaluation.job import JobResult
from atts_engine.evaluation.lanes import COUNTED, TIMED, LaneUse
from atts_engine.evaluation.sweep import Cell, SweepFolder, grid, run_sweep, sweep_figures
from atts_engine.pipeline import ATTSParams, Chain, Turn
from atts_engine.runtime import Rates

CELLS = grid((1, 2, 4), (1, 2, 3), 2)


def a_run(params: ATTSParams) -> JobResult:
    """A run whose waiting time is chains^2 * turns, and whose lanes were idle for chains * turns^2 milliseconds."""
    m, n = params.chains, params.turns
    counters = dict.fromkeys(COUNTED, 10.0) | {f"{name}_s": 0.25 for name in TIMED}
    counters["idle_s"] = m * n * n / 1000
    use = LaneUse(counters, Rates(flop_s=100.0, bytes_s=50.0))
    turns = tuple(Turn(t, "a", 5, 0.1, target_tokens=2) for t in range(n))
    chains = tuple(Chain("p", 0, c, "1", "1", 2.0, turns, wait_s=float(m * n)) for c in range(m))
    return JobResult(params.strategy, (), chains, (), 4.0, 0, lanes={"draft": use, "target": use})


def sweep(folder: Path, cells: list[Cell], *, resume: bool = False, dies_after: int | None = None) -> list[Cell]:
    """The cells that were run."""
    ran: list[Cell] = []

    async def one(params: ATTSParams) -> JobResult:
        if len(ran) == dies_after:
            raise KeyboardInterrupt
        mode = {"atts": "async", "atts-sync": "sync"}[params.strategy]
        ran.append(Cell(mode, params.chains, params.turns, 0))
        return a_run(params)

    opened = SweepFolder(folder, {"seed": 3}, resume=resume)
    try:
        asyncio.run(run_sweep(cells, ATTSParams(), opened, one, lambda _: None))
    finally:
        opened.close()
    return ran


def test_modes_take_turns_in_a_grid_of_everything() -> None:
    assert len(CELLS) == len(set(CELLS)) == 2 * 3 * 3 * 2
    assert [c.mode for c in CELLS] == ["async", "sync"] * 18
    assert CELLS[0] == Cell("async", 1, 1, 0) and CELLS[-1] == Cell("sync", 4, 3, 1)


@pytest.mark.parametrize(
    ("chains", "turns", "repeats", "says"),
    [((), (1,), 1, "chains"), ((1, 1), (1,), 1, "different"), ((1,), (0,), 1, "turns"), ((1,), (1,), 0, "repeat")],
)
def test_a_grid_that_makes_no_sense_is_refused(
    chains: tuple[int, ...], turns: tuple[int, ...], repeats: int, says: str
) -> None:
    with pytest.raises(InputError, match=says):
        grid(chains, turns, repeats)


def test_a_killed_sweep_goes_on(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path, CELLS, dies_after=7)
    with (tmp_path / "cells.jsonl").open("a") as file:
        file.write('{"mode": "sy')
    assert len(sweep(tmp_path, CELLS, resume=True)) == len(CELLS) - 7
    assert sweep(tmp_path, CELLS, resume=True) == []
    with pytest.raises(InputError, match="--resume"):
        sweep(tmp_path, CELLS)
    with pytest.raises(InputError, match="seed: was 3, is 4"):
        SweepFolder(tmp_path, {"seed": 4}, resume=True)


def test_figures_and_laws(tmp_path: Path) -> None:
    sweep(tmp_path, CELLS)
    folder = SweepFolder(tmp_path, {"seed": 3}, resume=True)
    found = sweep_figures([folder.done[cell] for cell in CELLS])
    folder.close()
    cell = next(c for c in found["cells"] if (c["mode"], c["chains"], c["turns"]) == ("sync", 4, 3))
    assert cell["repeats"] == 2
    assert cell["wait_s"] == pytest.approx(4 * 4 * 3)
    assert cell["wait_share"] == pytest.approx(4 * 3 / 2.0)
    lane = cell["lanes"]["target"]
    assert lane["T_s"] == pytest.approx(0.036)
    assert lane["T_c"] == pytest.approx(0.1) and lane["T_m"] == pytest.approx(0.2)
    assert lane["r"] == pytest.approx(0.1 / 0.236)
    # Passes, idle, blocked, and the five times of the host.
    assert lane["accounted"] == pytest.approx((0.25 + 0.036 + 0.25 + 5 * 0.25) / 4.0)
    waiting = Law(**found["growth"]["sync"]["chains waiting"][0])
    assert waiting.kinds == ("power", "power")
    assert waiting.slopes == pytest.approx((2.0, 1.0))
    idle = Law(**found["growth"]["async"]["T_s draft"][0])
    assert idle.slopes == pytest.approx((1.0, 2.0))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        *("eval", "--task", "registers", "--steps", "4", "--problems-count", "8", "--threads", "1", "--out"),
        *(str(tmp_path / "s"), "--sweep-chains", "1,2", "--sweep-turns", "1,2", "--draft-tokens", "24"),
        *("--target-tokens", "24", "--json", str(tmp_path / "figures.json")),
    ]
    assert atts(words) == 0
    said = capsys.readouterr().out
    assert "8 of 8: sync, 2 chains, 2 turns, run 1" in said
    assert "asynchronous arithmetic intensity" in said and "growth" in said
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found == json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert [c["mode"] for c in found["runs"]] == ["async", "sync"] * 4
    for cell in found["cells"]:
        for lane in cell["lanes"].values():
            assert lane["accounted"] > 0.0
    assert {p.name for p in (tmp_path / "s").iterdir()} >= {"cells.jsonl", "settings.json", "sweep.json", "growth.svg"}
    assert atts([*words, "--resume"]) == 0
    assert " of 8:" not in capsys.readouterr().out
    assert atts([*words[:-4], "--sweep-turns", "2,x"]) == 2
    assert "--sweep-turns must be whole numbers" in capsys.readouterr().err
