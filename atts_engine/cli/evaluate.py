"""`atts eval`: several strategies on the same problems, side by side; or the figures of recorded traces."""

from __future__ import annotations

import argparse
import asyncio
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atts_engine.cli import options, suite, sweep
from atts_engine.cli.tables import Table, check_json_target, human_stream, percent, show, write_json
from atts_engine.errors import InputError

if TYPE_CHECKING:
    from atts_engine.cli.job import CalibrationChoice
    from atts_engine.config import ATTSParams
    from atts_engine.evaluation.folder import RunFolder
    from atts_engine.evaluation.job import JobResult
    from atts_engine.pipeline.records import Problem

COSTS = {"target tokens": "target_tokens", "time": "latency_s"}
DEFAULT = "draft,target,atts,atts-sync"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `eval` to the commands."""
    text = "Run several strategies on the same problems and compare them; or show the figures of recorded traces."
    parser = subparsers.add_parser("eval", help="compare strategies on the same problems", description=text)
    options.add_models(parser)
    options.add_problems(parser)
    options.add_sampling(parser, strategy=False)
    options.add_calibration(parser)
    options.add_early_verdict(parser)
    options.add_output(parser)
    parser.add_argument(
        "--strategies",
        metavar="A,B,...",
        help=f"each as NAME[:OPTION=VALUE...] (docs/strategies.md); default: {DEFAULT}, or all with --suite",
    )
    parser.add_argument(
        "--out", type=options.place, metavar="DIR", help="folder: a run of each strategy, summary.json and report.html"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the runs that DIR holds")
    parser.add_argument("--traces", metavar="FILE", help="figures of a trace file; no model is run")
    sweep.add_options(parser)
    suite.add_options(parser)
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("DIR_A", "DIR_B"),
        help="two finished runs on the same problems, problem by problem; no model is run",
    )


def run(args: argparse.Namespace) -> int:
    """Compare strategies, describe traces, or compare two finished runs."""
    check_json_target(args.json)
    if args.compare is not None:
        from atts_engine.cli.compare import compare

        return compare(args)
    if args.traces is not None:
        return _of_traces(args)
    if sweep.wanted(args):
        return sweep.run(args)
    return suite.run(args) if args.suite else _compare(args)


def _strategies(text: str) -> tuple[str, ...]:
    """Each as it is written, its options included."""
    from atts_engine.pipeline.settings import parse_strategy

    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        parse_strategy(name)
    if not names or len(set(names)) != len(names):
        raise InputError(f"--strategies must name each strategy once, not {text!r}")
    return names


def _compare(args: argparse.Namespace) -> int:
    from atts_engine.cli.job import CalibrationChoice, lane_tables, resumable
    from atts_engine.evaluation.folder import RunFolder
    from atts_engine.evaluation.folder import write_json as save_json
    from atts_engine.evaluation.grading import Grader
    from atts_engine.evaluation.job import job_settings
    from atts_engine.evaluation.report import comparison_report, write_report
    from atts_engine.evaluation.summary import comparison

    options.fill_defaults(args)
    names = _strategies(DEFAULT if args.strategies is None else args.strategies)
    if args.early_verdict and "atts" not in names:
        raise InputError("--early-verdict belongs to the strategy atts, which --strategies leaves out")
    params = {name: options.params(args, name, args.early_verdict and name == "atts") for name in names}
    options.engine_config(args)
    if args.out is None:
        raise InputError("--out is missing: name a folder for the runs and the report")
    problems = options.problems(args)
    choice = CalibrationChoice.of(args)
    choice.check_early(args)
    folders: dict[str, RunFolder] = {}

    def saved() -> str:
        return f"{sum(folder.saved_chains for folder in folders.values())} chains are saved in {args.out}"

    with resumable(args, saved):
        with ExitStack() as stack:
            for name in names:
                settings = job_settings(args.draft, args.target, args.dtype, params[name], choice.settings(), problems)
                folders[name] = RunFolder.open(Path(args.out) / name, settings, resume=args.resume)
                stack.callback(folders[name].close)
            results = asyncio.run(_jobs(args, problems, params, choice, folders))
        found = {
            **comparison(results, params, Grader().equal),
            "settings": {name: _settings_of(folder) for name, folder in folders.items()},
        }
        for name, folder in folders.items():
            save_json(folder.path / "summary.json", found["strategies"][name])
        save_json(Path(args.out) / "summary.json", found)
        page = Path(args.out) / "report.html"
        write_report(page, comparison_report(results, found))
        out = human_stream(args.json)
        show(_table(found, args.chains), out, args.plain)
        for table in lane_tables(found["strategies"]):
            show(table, out, args.plain)
        out.write(f"report: {page}\n")
        write_json(found, args.json)
    return 0


def _settings_of(folder: RunFolder) -> dict[str, Any]:
    import json

    loaded: dict[str, Any] = json.loads((folder.path / "settings.json").read_text(encoding="utf-8"))
    return loaded


async def _jobs(
    args: argparse.Namespace,
    problems: tuple[Problem, ...],
    params: dict[str, ATTSParams],
    choice: CalibrationChoice,
    folders: dict[str, RunFolder],
) -> dict[str, JobResult]:
    from atts_engine.cli.job import watched_job
    from atts_engine.engine import AsyncEngine

    results = {}
    async with await AsyncEngine.create(options.engine_config(args)) as engine:
        for name, folder in folders.items():
            # Each strategy learns from its own scores alone.
            calibrator = choice.make(engine, params[name]) if params[name].settings.calibrated else None
            results[name] = await watched_job(engine, args, problems, params[name], calibrator, folder)
    return results


def _table(found: dict[str, Any], chains: int) -> Table:
    from atts_engine.cli.job import RESUMED_NOTE, strategy_columns, strategy_row

    each = found["strategies"]
    notes = [against_line(name, cell) for name, cell in found["against"].items()]
    fronts = (f"by {cost}: {', '.join(found['pareto'][key])}" for cost, key in COSTS.items() if found["pareto"][key])
    if line := "; ".join(fronts):
        notes.append(f"on the Pareto front {line}")
    if any(figures["restored_chains"] for figures in each.values()):
        notes.append(RESUMED_NOTE)
    first = next(iter(each.values()))
    title = f"{first['problems']} problems x {chains} chains, alpha {first['alpha']:g}"
    rows = tuple(strategy_row(figures) for figures in each.values())
    return Table(title, strategy_columns(chains), rows, note="\n".join(notes) or None)


def against_line(name: str, cell: dict[str, Any]) -> str:
    """A strategy against the baseline in one line, with the interval of their difference."""
    d = cell["difference"]
    share = cell["target_token_share"]
    tokens = "" if share is None else f", at {percent(share)} of its target tokens"
    low, high = 100 * d["low"], 100 * d["high"]
    return f"{name} - {cell['baseline']}: vote {100 * d['mean']:+.1f} points (95%: {low:+.1f} to {high:+.1f}){tokens}"


def _of_traces(args: argparse.Namespace) -> int:
    from atts_engine.evaluation.measures import summary
    from atts_engine.evaluation.traces import read_chains

    chains = read_chains(args.traces)
    found = {"traces": args.traces, **summary(chains)}
    show(_trace_table(found), human_stream(args.json), args.plain)
    write_json(found, args.json)
    return 0


def _trace_table(found: dict[str, Any]) -> Table:
    from atts_engine.cli.job import accuracy_cell, figure_cell

    takeovers = found["takeovers"]
    rows = [
        ("problems", f"{found['problems']:,}"),
        ("chains", f"{found['chains']:,}"),
        ("chain accuracy", accuracy_cell(found["chain_accuracy"])),
        ("majority", accuracy_cell(found["majority"])),
        ("majority by spelling", accuracy_cell(found["majority_by_spelling"])),
        ("weighted vote", accuracy_cell(found["weighted"])),
    ]
    rows += [(f"any of {k}", accuracy_cell(cell)) for k, cell in (found["any_of_k"] or {}).items() if k != "1"]
    if takeovers["decisions"]:
        rows.append(("taken over", f"{accuracy_cell(takeovers['interval'])} of {takeovers['decisions']:,} spans"))
    for author, cell in (found["tokens_per_problem"] or {}).items():
        rows.append((f"tokens by {author}, a problem", figure_cell(cell)))
    for name, cell in found["latency_s"].items():
        rows.append((f"time of a problem, {name}", figure_cell(cell, " s")))
    if (cell := found["auc_chains"]) is not None:
        rows.append(("score tells wrong chains, AUC", figure_cell(cell)))
    note = f"in brackets: {100 * found['level']:g}% intervals, problems drawn again"
    return Table(f"traces in {found['traces']}", ("", ""), tuple(rows), left=2, note=note)
