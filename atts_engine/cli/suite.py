"""`atts eval --suite`: every strategy on the same problems, at its own defaults and at equal terms."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from atts_engine.cli import options
from atts_engine.cli.tables import Table, human_stream, show, write_json
from atts_engine.errors import InputError

if TYPE_CHECKING:
    from atts_engine.evaluation.suite import Row, Setting
    from atts_engine.pipeline.records import Problem


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags that make `atts eval` a suite."""
    group = parser.add_argument_group("suite of all strategies")
    group.add_argument(
        "--suite",
        action="store_true",
        help="every strategy (or those of --strategies) at its own defaults, at one takeover rate, and at one number "
        "of target tokens; calibrations are frozen, so the table does not depend on the order of arrival",
    )
    group.add_argument(
        "--pilot-problems",
        type=int,
        default=16,
        metavar="N",
        help="problems beside those of the table that calibrations come from (default: %(default)s)",
    )
    group.add_argument(
        "--passes", type=int, default=2, metavar="N", help="passes of a calibration over them (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Run what is missing of the suite, and show its tables."""
    from atts_engine.cli.job import resumable, task_of
    from atts_engine.evaluation.folder import write_json as save_json
    from atts_engine.evaluation.plan import blocks
    from atts_engine.evaluation.report import write_report
    from atts_engine.evaluation.suite import Setting
    from atts_engine.evaluation.suite_report import suite_report
    from atts_engine.evaluation.suite_table import COLUMNS, TITLES, note, suite_figures, table_rows

    options.fill_defaults(args)
    only = _names(args.strategies)
    options.engine_config(args)
    if args.out is None:
        raise InputError("--out is missing: name a folder for the suite")
    problems, pilot = _problems(args)
    setting = Setting(
        models=(args.draft, args.target, args.dtype),
        params=options.params(args, "atts"),
        problems=problems,
        pilot=pilot,
        blocks=blocks(checked=args.task == "registers", only=only),
        passes=args.passes,
        concurrency=args.concurrency,
    )
    with resumable(args, lambda: f"what had ended is saved in {args.out}"):
        rows = asyncio.run(_rows(args, setting))
        same = task_of(args).equal
        found = suite_figures(rows, setting.blocks, same)
        save_json(Path(args.out) / "suite.json", found)
        page = Path(args.out) / "report.html"
        write_report(page, suite_report(setting, rows, found))
        out = human_stream(args.json)
        for block in found["blocks"]:
            show(
                Table(TITLES[block["equal"]], COLUMNS, tuple(table_rows(block)), left=2, note=note(block)),
                out,
                args.plain,
            )
            out.write("\n")
        out.write(f"report: {page}\n")
        write_json(found, args.json)
    return 0


def _names(text: str | None) -> tuple[str, ...]:
    """Names of --strategies; none for all. The suite itself says which options it runs them with."""
    from atts_engine.pipeline.settings import parse_strategy

    names = () if text is None else tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if parse_strategy(name)[1]:
            raise InputError(f"--suite brings the options of each strategy itself: write {name.split(':')[0]}")
    if len(set(names)) != len(names):
        raise InputError(f"--strategies must name each strategy once, not {text!r}")
    return names


def _problems(args: argparse.Namespace) -> tuple[tuple[Problem, ...], tuple[Problem, ...]]:
    """Those of the table, and those of the pilot: the ones after them in the same file or task."""
    count = args.pilot_problems
    if count < 1:
        raise InputError(f"--pilot-problems must be 1 or more, not {count}")
    wider = argparse.Namespace(**vars(args))
    if args.task is not None:
        wanted = options.DEFAULT_COUNT if args.problems_count is None else args.problems_count
        if wanted < 1:
            raise InputError(f"--problems-count must be 1 or more, not {wanted}")
        wider.problems_count = wanted + count
    elif args.limit is not None:
        wanted, wider.limit = args.limit, args.limit + count
    else:
        wanted = len(options.problems(args)) - count
    everything = options.problems(wider)
    if wanted < 1 or len(everything) < wanted + count:
        raise InputError(
            f"there are {len(everything)} problems: too few for {count} to calibrate with beside those of the table; "
            "lower --limit or --pilot-problems"
        )
    return everything[:wanted], everything[wanted:]


async def _rows(args: argparse.Namespace, setting: Setting) -> list[Row]:
    from atts_engine.cli.job import task_of
    from atts_engine.engine import AsyncEngine
    from atts_engine.evaluation.suite import Suite

    out = human_stream(args.json)

    def say(text: str) -> None:
        out.write(text + "\n")
        out.flush()

    async with await AsyncEngine.create(options.engine_config(args)) as engine:
        suite = Suite(setting, Path(args.out), engine, task_of(args), say, resume=args.resume)
        return await suite.run()
