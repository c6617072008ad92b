"""`atts eval --sweep-chains A,B,... --sweep-turns A,B,...`: where the lanes' time goes as chains and turns grow."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atts_engine.cli import options
from atts_engine.cli.tables import Table, human_stream, percent, seconds, show, write_json
from atts_engine.errors import InputError

if TYPE_CHECKING:
    from atts_engine.config import ATTSParams
    from atts_engine.evaluation.job import JobResult
    from atts_engine.evaluation.sweep import Cell, SweepFolder
    from atts_engine.pipeline.records import Problem


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags that make `atts eval` a sweep."""
    group = parser.add_argument_group("sweep of the asynchronous arithmetic intensity")
    group.add_argument("--sweep-chains", metavar="A,B,...", help="chains a problem, in async and in sync mode")
    group.add_argument("--sweep-turns", metavar="A,B,...", help="turns a chain has at most")
    group.add_argument("--repeats", type=int, default=1, metavar="N", help="runs of each cell (default: %(default)s)")


def wanted(args: argparse.Namespace) -> bool:
    return args.sweep_chains is not None or args.sweep_turns is not None


def run(args: argparse.Namespace) -> int:
    """Run the cells that are missing, fit, draw."""
    from atts_engine.backends.remote.address import is_address
    from atts_engine.cli.job import CalibrationChoice, resumable
    from atts_engine.evaluation.folder import write_json as save_json
    from atts_engine.evaluation.job import job_settings
    from atts_engine.evaluation.plots import can_plot
    from atts_engine.evaluation.sweep import SweepFolder, grid, sweep_figures
    from atts_engine.evaluation.sweep_plot import draw_sweep

    options.fill_defaults(args)
    params = options.params(args, "atts")
    for name in ("draft", "target"):
        if is_address(getattr(args, name)):
            raise InputError(f"a sweep measures lanes in this process, and --{name} is on a server")
    options.engine_config(args)
    cells = grid(
        _numbers("--sweep-chains", args.sweep_chains, args.chains),
        _numbers("--sweep-turns", args.sweep_turns, args.turns),
        args.repeats,
    )
    if args.out is None:
        raise InputError("--out is missing: name a folder for the sweep")
    problems = options.problems(args)
    choice = CalibrationChoice.of(args)
    settings = {
        **job_settings(args.draft, args.target, args.dtype, params, choice.settings(), problems),
        "format": "atts-sweep/1",
        "concurrency": args.concurrency,
    }
    folder = SweepFolder(Path(args.out), settings, resume=args.resume)
    with resumable(args, lambda: f"{len(folder.done)} runs are saved in {args.out}"):
        with closing(folder):
            runs = asyncio.run(_cells(args, problems, params, choice, cells, folder))
        found = {**sweep_figures(runs), "runs": runs, "settings": settings}
        save_json(folder.path / "sweep.json", found)
        out = human_stream(args.json)
        show(_table(found), out, args.plain)
        show(_laws(found["growth"]), out, args.plain)
        if can_plot():
            out.write("plots: " + ", ".join(str(path) for path in draw_sweep(found, folder.path)) + "\n")
        write_json(found, args.json)
    return 0


def _numbers(flag: str, text: str | None, otherwise: int) -> list[int]:
    if text is None:
        return [otherwise]
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{flag} must be whole numbers with commas between, such as 2,4,8, not {text!r}") from None


async def _cells(
    args: argparse.Namespace,
    problems: tuple[Problem, ...],
    params: ATTSParams,
    choice: Any,
    cells: list[Cell],
    folder: SweepFolder,
) -> list[dict[str, Any]]:
    from atts_engine.engine import AsyncEngine
    from atts_engine.evaluation.grading import GradedTask
    from atts_engine.evaluation.job import Unwatched
    from atts_engine.evaluation.metered import run_metered
    from atts_engine.evaluation.sweep import run_sweep

    async with await AsyncEngine.create(options.engine_config(args)) as engine:

        async def one(own: ATTSParams) -> JobResult:
            calibrator = choice.make(engine, own) if own.strategy == "atts" else None
            return await run_metered(
                engine,
                problems,
                own,
                Unwatched(),
                calibrator=calibrator,
                concurrency=args.concurrency,
                task=GradedTask(),
            )

        out = human_stream(args.json)

        def say(text: str) -> None:
            out.write(text + "\n")
            out.flush()

        return await run_sweep(cells, params, folder, one, say)


def _table(found: Mapping[str, Any]) -> Table:
    rows = []
    for cell in found["cells"]:
        for lane, times in cell["lanes"].items():
            rows.append(
                (
                    f"{cell['mode']} {lane}",
                    str(cell["chains"]),
                    str(cell["turns"]),
                    seconds(cell["wall_s"]),
                    *(f"{times[name]:.3g} s" for name in ("pass", "T_c", "T_m", "T_s", "T_other", "blocked")),
                    "-" if times["r"] is None else f"{times['r']:.3g}",
                    percent(times["accounted"]),
                    "-" if cell["wait_share"] is None else percent(cell["wait_share"]),
                )
            )
    columns = (
        *("", "chains", "turns", "time", "passes", "T_c", "T_m", "T_s", "T_other", "blocked", "r", "accounted"),
        "waits",
    )
    note = (
        "medians over repeats. accounted: passes, T_s, T_other and blocked over the run's time, each measured. waits: "
        "share of the chains' time in which they waited. The other columns: docs/intensity.md"
    )
    return Table("asynchronous arithmetic intensity", columns, tuple(rows), note=note)


def _laws(growth: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = []
    for mode, quantities in growth.items():
        for name, laws in quantities.items():
            for law in laws:
                slopes = zip(law["kinds"], law["slopes"], law["errors"], law["doubling"], strict=True)
                rows.append(
                    (
                        f"{mode} {name}",
                        *(_slope(kind, b, error, doubling) for kind, b, error, doubling in slopes),
                        f"{law['r2']:.3f}",
                        f"{law['aic'] - laws[0]['aic']:.1f}",
                    )
                )
    note = (
        "n^b: a power of it; e^(bn): exponential in it; +- one standard error; x: by what twice as many multiply it. "
        "AIC: above the best law of the same quantity"
    )
    return Table("growth", ("", "in chains", "in turns", "R2 of log", "AIC"), tuple(rows), note=note)


def _slope(kind: str, b: float, error: float, doubling: tuple[float, float]) -> str:
    law = f"n^{b:.2f}" if kind == "power" else f"e^({b:.3f} n)"
    low, high = doubling
    times = f"x{low:.2f}" if kind == "power" else f"x{low:.2f} to {high:.2f}"
    return f"{law} +- {error:.2g} ({times})"
