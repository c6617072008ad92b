"""`atts calibrate`: run the pipeline online and keep what its calibrator has learnt."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atts_engine.cli import options
from atts_engine.cli.interrupt import Interrupted
from atts_engine.cli.tables import Table, check_json_target, count, human_stream, percent, show, write_json
from atts_engine.errors import InputError
from atts_engine.evaluation.files import check_file

if TYPE_CHECKING:
    from atts_engine.cli.job import CalibrationChoice
    from atts_engine.config import ATTSParams
    from atts_engine.evaluation.job import JobResult
    from atts_engine.pipeline.records import Problem


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `calibrate` to the commands."""
    text = "Solve problems with online calibration and save the calibration for `atts run --calibration FILE`."
    parser = subparsers.add_parser("calibrate", help="learn a calibration and save it", description=text)
    options.add_models(parser)
    options.add_problems(parser)
    options.add_sampling(parser)
    options.add_calibration(parser)
    options.add_output(parser)
    parser.add_argument(
        "--out", type=options.place, required=True, metavar="FILE.npz", help="where the calibration is saved"
    )


def run(args: argparse.Namespace) -> int:
    """Solve, save the calibrator's state, show what it holds."""
    from atts_engine.cli.job import CalibrationChoice

    options.fill_defaults(args)
    params = options.params(args, options.strategy_of(args))
    if not params.settings.calibrated:
        raise InputError(
            f"the strategy {params.strategy} asks no calibrator; give it gate=conformal, or choose another"
        )
    options.engine_config(args)
    check_json_target(args.json)
    if args.frozen:
        raise InputError("--frozen would learn nothing: leave it out to calibrate")
    check_file(Path(args.out), "--out")
    problems = options.problems(args)
    choice = CalibrationChoice.of(args)
    try:
        result, scores = asyncio.run(_job(args, problems, params, choice))
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; {args.out} was not written") from None
    found = _figures(result, scores, params, args.out)
    out = human_stream(args.json)
    show(_table(found), out, args.plain)
    out.write(f"saved: {args.out}\n")
    write_json(found, args.json)
    return 0


async def _job(
    args: argparse.Namespace, problems: tuple[Problem, ...], params: ATTSParams, choice: CalibrationChoice
) -> tuple[JobResult, list[int]]:
    from atts_engine.cli.job import watched_job
    from atts_engine.engine import AsyncEngine

    async with await AsyncEngine.create(options.engine_config(args)) as engine:
        calibrator = choice.make(engine, params)
        result = await watched_job(engine, args, problems, params, calibrator, None)
        calibrator.save(args.out)
        return result, [int(n) for n in calibrator.arrays()["size"]]


def _figures(result: JobResult, scores: list[int], params: ATTSParams, out: str) -> dict[str, Any]:
    from atts_engine.evaluation.measures import takeover_rates

    return {
        "out": out,
        "alpha": params.alpha,
        "problems": len(result.problems),
        "chains": len(result.chains),
        "scores_by_key": {str(key): n for key, n in enumerate(scores) if n},
        "scores": sum(scores),
        "takeovers": takeover_rates(result.chains),
        "wall_s": result.wall_s,
    }


def _table(found: dict[str, Any]) -> Table:
    by_turn = found["takeovers"]["by_turn"]
    rows = []
    for key, n in found["scores_by_key"].items():
        cell = by_turn.get(key)
        rows.append((f"turn {key}", count(n), percent(cell["rate"] if cell else None)))
    rows.append(("all", count(found["scores"]), percent(found["takeovers"]["rate"])))
    return Table(f"calibration at alpha {found['alpha']:g}", ("key", "scores", "taken over"), tuple(rows))
