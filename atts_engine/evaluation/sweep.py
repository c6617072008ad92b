"""The asynchronous arithmetic intensity over chains and turns, with a barrier per turn and without one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from atts_engine.errors import InputError
from atts_engine.evaluation import growth
from atts_engine.evaluation.files import cannot_write
from atts_engine.evaluation.folder import check_resumed, write_json
from atts_engine.evaluation.job import JobResult
from atts_engine.evaluation.jsonl import JsonlWriter, read_lines
from atts_engine.evaluation.lanes import lane_figures, waiting
from atts_engine.evaluation.measures import tokens_by_author
from atts_engine.pipeline.params import ATTSParams

MODES = {"async": "atts", "sync": "atts-sync"}
LANES = ("draft", "target")
TIMES = ("T_c", "T_m", "T_s", "T_other", "r")
LAWS = (("power", "power"), ("power", "exponential"), ("exponential", "power"), ("exponential", "exponential"))
"""Of (chains, turns). The paper says linear in samples, exponential in rounds: the second, with a first slope of 1."""

RunCell = Callable[[ATTSParams], Awaitable[JobResult]]


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of the grid: `chains` a problem, at most `turns` turns a chain."""

    mode: str
    chains: int
    turns: int
    repeat: int

    @property
    def name(self) -> str:
        return f"{self.mode}, {self.chains} chains, {self.turns} turns, run {self.repeat + 1}"


def grid(chains: Sequence[int], turns: Sequence[int], repeats: int) -> list[Cell]:
    """Every cell in the order in which they run: modes take turns, so that a drift of the machine falls on both."""
    for name, values in (("chains", chains), ("turns", turns)):
        if not values or any(v < 1 for v in values) or len(set(values)) != len(values):
            raise InputError(f"a sweep needs different numbers of {name}, each 1 or more, not {list(values)}")
    if repeats < 1:
        raise InputError(f"a sweep needs 1 repeat or more, not {repeats}")
    return [Cell(mode, c, t, r) for r in range(repeats) for t in turns for c in chains for mode in MODES]


class SweepFolder:
    """settings.json and cells.jsonl, a line for each finished cell: a killed sweep goes on where it was."""

    def __init__(self, path: Path, settings: dict[str, Any], *, resume: bool) -> None:
        """`InputError`: it cannot be written; it holds a sweep and `resume` is off, or one with other settings."""
        self.path = path
        self.done: dict[Cell, dict[str, Any]] = {}
        cells = path / "cells.jsonl"
        try:
            path.mkdir(parents=True, exist_ok=True)
            if any(path.iterdir()):
                check_resumed(path, settings, resume=resume)
            if cells.exists():
                for line in read_lines(cells, allow_torn_tail=True):
                    cell = Cell(line.text("mode"), *(line.integer(n) for n in ("chains", "turns", "repeat")))
                    self.done[cell] = line.fields
            write_json(path / "settings.json", settings)
        except OSError as error:
            raise cannot_write(path, error) from error
        self._cells = JsonlWriter(cells, append=True)

    def add(self, cell: Cell, figures: dict[str, Any]) -> None:
        self._cells.write(figures)
        self.done[cell] = figures

    def close(self) -> None:
        self._cells.close()


async def run_sweep(
    cells: Sequence[Cell], params: ATTSParams, folder: SweepFolder, run: RunCell, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Figures of each cell in the order of `cells`; those that the folder holds are not run again. say: is told of each
    cell as it begins."""
    for number, cell in enumerate(cells):
        if cell not in folder.done:
            say(f"{number + 1} of {len(cells)}: {cell.name}")
            result = await run(replace(params, strategy=MODES[cell.mode], chains=cell.chains, turns=cell.turns))
            folder.add(cell, cell_figures(cell, result))
    return [folder.done[cell] for cell in cells]


def cell_figures(cell: Cell, result: JobResult) -> dict[str, Any]:
    """JSON of one run. lanes: {name: `lanes.lane_figures`}; accounted: of each lane, what its measured times come to
    over wall time: passes, host, idle, blocked (docs/intensity.md); waiting: `lanes.waiting`; wait_s: seconds that
    chains waited, summed; tokens by author."""
    lanes = {name: lane_figures(use) for name, use in result.lanes.items()}
    waits = [c.wait_s for c in result.chains if c.wait_s is not None]
    return {
        **asdict(cell),
        "wall_s": result.wall_s,
        "lanes": lanes,
        "accounted": {name: _accounted(lane) / result.wall_s for name, lane in lanes.items()},
        "waiting": waiting(result.chains),
        "wait_s": sum(waits),
        "tokens": tokens_by_author(result.chains),
        "turns_written": sum(len(c.turns) for c in result.chains),
    }


def _accounted(lane: Mapping[str, Any]) -> float:
    times = lane["time_s"]
    return float(times["pass"] + times["idle"] + times["blocked"] + lane["T_other"])


def sweep_figures(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """{"cells": medians over repeats of each (mode, chains, turns), "growth": {mode: {quantity: laws}}}.

    growth: of T_s of either lane and of the chains' waiting time, over chains and turns together (`LAWS`, the best by
    AIC first). A quantity that is 0 somewhere follows none of them and is left out.
    """
    groups: dict[tuple[str, int, int], list[Mapping[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["mode"], cell["chains"], cell["turns"]), []).append(cell)
    found = [_medians(*key, group) for key, group in groups.items()]
    laws: dict[str, dict[str, Any]] = {}
    for mode in MODES:
        own = [cell for cell in cells if cell["mode"] == mode]
        x = [(cell["chains"], cell["turns"]) for cell in own]
        quantities = {f"T_s {lane}": [c["lanes"][lane]["T_s"] for c in own] for lane in LANES}
        quantities["chains waiting"] = [c["wait_s"] for c in own]
        laws[mode] = {name: _laws(x, y) for name, y in quantities.items() if all(v > 0 for v in y)}
    return {"cells": found, "growth": laws}


def _laws(x: Sequence[tuple[int, int]], y: Sequence[float]) -> list[dict[str, Any]]:
    return [asdict(law) for law in sorted((growth.fit(kinds, x, y) for kinds in LAWS), key=lambda law: law.aic)]


def _medians(mode: str, chains: int, turns: int, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    def middle(*path: str) -> float | None:
        values = [value for run in runs if (value := _at(run, path)) is not None]
        return median(values) if values else None

    return {
        "mode": mode,
        "chains": chains,
        "turns": turns,
        "repeats": len(runs),
        "wall_s": middle("wall_s"),
        "wait_s": middle("wait_s"),
        "wait_share": middle("waiting", "share"),
        "lanes": {
            lane: {
                **{name: middle("lanes", lane, name) for name in TIMES},
                "pass": middle("lanes", lane, "time_s", "pass"),
                "blocked": middle("lanes", lane, "time_s", "blocked"),
                "accounted": middle("accounted", lane),
            }
            for lane in LANES
        },
    }


def _at(figures: Any, path: Sequence[str]) -> float | None:
    for name in path:
        if figures is None:
            return None
        figures = figures[name]
    found: float | None = figures
    return found
