"""`atts run`: one strategy over a file of problems, into a folder that can be resumed."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Coroutine
from contextlib import closing
from typing import TYPE_CHECKING, Any

from atts_engine.cli import options
from atts_engine.cli.tables import Table, check_json_target, count, human_stream, percent, seconds, show, write_json

if TYPE_CHECKING:
    from atts_engine.cli.job import CalibrationChoice
    from atts_engine.config import ATTSParams, EngineConfig
    from atts_engine.engine import AsyncEngine
    from atts_engine.evaluation.fleet import Fleet
    from atts_engine.evaluation.folder import RunFolder
    from atts_engine.evaluation.job import JobResult
    from atts_engine.pipeline.records import Problem


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `run` to the commands."""
    text = "Solve a file of problems and write decisions, chains, figures and a report into a folder."
    parser = subparsers.add_parser("run", help="solve problems into a folder", description=text)
    options.add_models(parser)
    options.add_problems(parser)
    options.add_sampling(parser)
    options.add_calibration(parser)
    options.add_early_verdict(parser)
    options.add_output(parser)
    options.add_ray(parser)
    parser.add_argument("--out", type=options.place, required=True, metavar="DIR", help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on with the run that DIR holds")


def run(args: argparse.Namespace) -> int:
    """Solve, save, report. `InputError` before any work for anything that cannot be used."""
    from atts_engine.cli.job import CalibrationChoice, lane_tables, resumable
    from atts_engine.evaluation.folder import RunFolder
    from atts_engine.evaluation.folder import write_json as save_json
    from atts_engine.evaluation.job import job_settings
    from atts_engine.evaluation.report import run_report, write_report
    from atts_engine.evaluation.summary import figures

    options.fill_defaults(args)
    params = options.params(args, options.strategy_of(args), args.early_verdict)
    config = options.engine_config(args)
    options.check_ray(args)
    check_json_target(args.json)
    problems = options.problems(args)
    choice = CalibrationChoice.of(args)
    choice.check_early(args)
    settings = job_settings(args.draft, args.target, args.dtype, params, choice.settings(), problems)
    folder = RunFolder.open(args.out, settings, resume=args.resume)
    job = _job if args.ray is None else _fleet_job
    with resumable(args, lambda: f"{folder.saved_chains} chains are saved in {folder.path}"):
        with closing(folder):
            result = job(args, config, problems, params, choice, folder)
        found = {**figures(result, params), "settings": settings}
        save_json(folder.path / "summary.json", found)
        write_report(folder.path / "report.html", run_report(result, found))
        out = human_stream(args.json)
        show(_table(found), out, args.plain)
        for table in lane_tables({found["strategy"]: found}):
            show(table, out, args.plain)
        out.write(f"report: {folder.path / 'report.html'}\n")
        write_json(found, args.json)
    return 0


def _job(
    args: argparse.Namespace,
    config: EngineConfig,
    problems: tuple[Problem, ...],
    params: ATTSParams,
    choice: CalibrationChoice,
    folder: RunFolder,
) -> JobResult:
    from atts_engine.engine import AsyncEngine

    return asyncio.run(_on(AsyncEngine.create(config), args, problems, params, choice, folder))


def _fleet_job(
    args: argparse.Namespace,
    config: EngineConfig,
    problems: tuple[Problem, ...],
    params: ATTSParams,
    choice: CalibrationChoice,
    folder: RunFolder,
) -> JobResult:
    """The same on the workers of a Ray cluster."""
    from atts_engine.evaluation.fleet import Fleet, on_ray

    need = on_ray.demand(config)
    with on_ray.cluster(args.ray) as cluster:
        workers = on_ray.worker_count(args.ray_workers, need)
        human_stream(args.json).write(f"Ray cluster {cluster}: {workers} worker{'' if workers == 1 else 's'}\n")
        fleet = Fleet.create(on_ray.launcher(need), workers, config, params)
        return asyncio.run(_on(fleet, args, problems, params, choice, folder))


async def _on(
    made: Coroutine[Any, Any, AsyncEngine | Fleet],
    args: argparse.Namespace,
    problems: tuple[Problem, ...],
    params: ATTSParams,
    choice: CalibrationChoice,
    folder: RunFolder,
) -> JobResult:
    from atts_engine.cli.job import watched_job

    async with await made as engine:
        calibrator = choice.make(engine, params) if params.settings.calibrated else None
        return await watched_job(engine, args, problems, params, calibrator, folder)


def _table(found: dict[str, Any]) -> Table:
    """The figures of the run, one a row, with their intervals over problems."""
    from atts_engine.cli.job import accuracy_cell, figure_cell

    takeovers, tokens = found["takeovers"], found["tokens_per_problem"]
    rows: list[tuple[str, str]] = [
        ("problems", count(found["problems"])),
        ("chains", f"{count(found['chains'])}, {count(found['answered'])} with an answer"),
    ]
    if found["errors"]:
        rows.append(("chains that failed", count(found["errors"])))
    for name, key in (
        ("chain accuracy", "chain_accuracy"),
        ("vote", "voted"),
        ("any of a problem's chains", "any_of"),
    ):
        if (cell := found[key]) is not None:
            rows.append((name, accuracy_cell(cell)))
    if takeovers["decisions"]:
        rate = accuracy_cell(takeovers["interval"])
        rows.append(("spans taken over", f"{rate} of {count(takeovers['decisions'])}"))
    if takeovers["early"]:
        rows.append(("settled before the span was whole", count(takeovers["early"])))
    if found["drift_alarms"]:
        first = found["drift_alarms"][0]["decision"]
        rows.append(("drift alarms", f"{count(len(found['drift_alarms']))}, the first at decision {count(first)}"))
    rows += [
        ("tokens by draft, a problem", figure_cell(tokens["draft"])),
        ("tokens by target, a problem", figure_cell(tokens["target"])),
        *((f"time of a problem, {name}", figure_cell(cell, " s")) for name, cell in found["latency_s"].items()),
        ("time", seconds(found["wall_s"])),
    ]
    if (cell := found["throughput"]) is not None:
        rows.append(("tokens a second", figure_cell(cell)))
    for what in ("chains", "steps"):
        if (cell := found[f"auc_{what}"]) is not None:
            rows.append((f"score tells wrong {what}, AUC", figure_cell(cell)))
    if (cell := found["waiting"]) is not None:
        rows.append(("a chain waited", f"{seconds(cell['mean_s'])}, {percent(cell['share'])} of its time"))
    note = f"in brackets: {100 * found['level']:g}% intervals, problems drawn again"
    if found["restored_chains"]:
        note += f"\n{count(found['restored_chains'])} chains were saved by an earlier process"
    title = f"{found['strategy']}, alpha {found['alpha']:g}"
    return Table(title, ("", ""), tuple(rows), left=2, note=note)
