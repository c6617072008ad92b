"""What `atts run`, `atts calibrate` and `atts eval` have in common: one job, watched and saved."""

from __future__ import annotations

import argparse
import hashlib
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atts_engine.cli import options
from atts_engine.cli.interrupt import Interrupted
from atts_engine.cli.tables import Table, count, human_stream, percent, rounded, seconds
from atts_engine.errors import InputError, LaneError
from atts_engine.evaluation.files import FULL

if TYPE_CHECKING:
    from atts_engine.config import ATTSParams
    from atts_engine.conformal import Calibrator, ColdStart
    from atts_engine.evaluation.folder import RunFolder
    from atts_engine.evaluation.job import JobResult
    from atts_engine.evaluation.metered import Metered
    from atts_engine.pipeline.records import Problem
    from atts_engine.pipeline.task import Task


@dataclass(frozen=True, slots=True)
class CalibrationChoice:
    """The calibrator that the user asked for, checked as far as that goes without the models."""

    name: str
    file: str | None
    frozen: bool
    cold: ColdStart | None

    @classmethod
    def of(cls, args: argparse.Namespace) -> CalibrationChoice:
        from atts_engine.conformal import load_calibrator, make_calibrator

        if args.frozen and args.calibration is None:
            raise InputError(
                "--frozen needs --calibration FILE: an empty calibration that learns nothing decides nothing"
            )
        cold = options.cold_start(args)
        make_calibrator(args.calibrator, args.alpha, cold=cold)
        if args.calibration is not None:
            if cold is not None:
                raise InputError("a saved calibration brings its own cold start: leave --cold-start out")
            saved = load_calibrator(args.calibration)
            if saved.name != args.calibrator:
                raise InputError(
                    f"{args.calibration} holds a calibration of {saved.name}: add --calibrator {saved.name}"
                )
        if args.policy != "threshold" and args.calibrator == "tracker":
            raise InputError("the tracker tests scores, not p-values: it takes no policy but threshold")
        return cls(args.calibrator, args.calibration, args.frozen, cold)

    def check_early(self, args: argparse.Namespace) -> None:
        """`InputError` where --early-verdict cannot be had with this calibration."""
        if args.early_verdict and not self.frozen:
            raise InputError(
                "--early-verdict needs --calibration FILE --frozen: a span that ends early has no whole score to learn "
                "from"
            )
        if args.early_verdict and args.monitor:
            raise InputError("--early-verdict leaves --monitor no p-values of whole spans to watch: leave one out")

    def settings(self) -> dict[str, Any]:
        """For settings.json: the file by its content, not by its name."""
        digest = None if self.file is None else hashlib.sha256(Path(self.file).read_bytes()).hexdigest()
        cold = None if self.cold is None else [self.cold.rule, self.cold.minimum]
        return {"calibrator": self.name, "cold_start": cold, "frozen": self.frozen, "start_sha256": digest}

    def make(self, engine: Metered, params: ATTSParams) -> Calibrator:
        """A fresh calibrator for one job; a saved one must fit the engine's models and the parameters."""
        from atts_engine.conformal import load_calibrator, make_calibrator

        meta = engine.calibration_meta(params)
        if self.file is None:
            return make_calibrator(self.name, params.alpha, meta=meta, cold=self.cold)
        return load_calibrator(self.file, replace(meta, alpha=params.alpha), frozen=self.frozen)


def task_of(args: argparse.Namespace) -> Task:
    """What is known of the task that the problems are of."""
    from atts_engine.evaluation.grading import GradedTask
    from atts_engine.evaluation.register_task import RegisterTask

    return RegisterTask() if args.task == "registers" else GradedTask()


async def watched_job(
    engine: Metered,
    args: argparse.Namespace,
    problems: Sequence[Problem],
    params: ATTSParams,
    calibrator: Calibrator | None,
    folder: RunFolder | None,
) -> JobResult:
    """Run one job with the view that the user's terminal allows, and read the meters of both lanes."""
    from atts_engine.cli.progress import Progress
    from atts_engine.cli.view import Heading, make_view
    from atts_engine.conformal import Monitored
    from atts_engine.evaluation.metered import run_metered
    from atts_engine.evaluation.summary import voter

    task = task_of(args)
    same = task.equal
    detail = f"{len(problems)} problems x {params.chains} chains, seed {params.seed}"
    heading = Heading(params.strategy, args.draft, args.target, params.alpha, detail)
    progress = Progress(len(problems), len(problems) * params.chains, voter(params, same), same)
    with make_view(heading, progress, human_stream(args.json), args.plain) as view:
        if args.monitor and calibrator is not None:
            calibrator = Monitored(calibrator, on_alarm=lambda alarm: view.notice(str(alarm)))
        return await run_metered(
            engine,
            problems,
            params,
            view,
            calibrator=calibrator,
            folder=folder,
            concurrency=args.concurrency,
            task=task,
        )


def lane_tables(figures: Mapping[str, dict[str, Any]]) -> Iterator[Table]:
    """The lanes of each strategy, those in this process and those on servers. figures: {name of the strategy:
    `summary.figures`}."""
    from atts_engine.evaluation import lanes, servers

    here: list[tuple[str, ...]] = []
    away: list[tuple[str, ...]] = []
    notes = ["a scored token: prompt tokens sent to have it scored; a lane in this process computes 1"]
    for name, found in figures.items():
        prefix = f"{name} " if len(figures) > 1 else ""
        here += lanes.lane_rows(found["lanes"], prefix)
        away += servers.server_rows(found["servers"], prefix)
        notes += [prefix + note for note in servers.server_notes(found["servers"])]
    if here:
        yield Table("lanes", lanes.COLUMNS, tuple(here))
    if away:
        yield Table("servers", servers.COLUMNS, tuple(away), note="\n".join(notes))


@contextmanager
def resumable(args: argparse.Namespace, saved: Callable[[], str]) -> Iterator[None]:
    """Work that `--resume` goes on with: Ctrl-C, a file that cannot be written and a lane that fails end it with a line
    that says so. saved: what is saved by then."""
    words = ["atts", *args.command_line]
    if "--resume" not in words:
        words.append("--resume")
    go_on = f"go on with: {shlex.join(words)}"
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; {saved()}; {go_on}") from None
    except BrokenPipeError:
        raise
    except OSError as error:
        error.add_note(f"{saved()}; {'free some space, then ' if error.errno in FULL else ''}{go_on}")
        raise
    except LaneError as error:
        error.add_note(f"{saved()}; {go_on}")
        raise


def accuracy_cell(interval: dict[str, float] | None) -> str:
    """A rate over problems with its interval, "82.6% (77.4 to 87.4)"; "-" where there is none."""
    if interval is None:
        return "-"
    return f"{percent(interval['mean'])} ({100 * interval['low']:.1f} to {100 * interval['high']:.1f})"


def figure_cell(interval: dict[str, float] | None, unit: str = "") -> str:
    """A figure with its interval in three digits, "1,230 (1,180 to 1,290)"; "-" where there is none."""
    if interval is None:
        return "-"
    mean, low, high = (rounded(interval[name]) for name in ("mean", "low", "high"))
    return f"{mean}{unit} ({low} to {high})"


def strategy_row(figures: dict[str, Any]) -> tuple[str, ...]:
    """The row of one strategy in a table with the columns of `STRATEGY_COLUMNS`."""
    tokens = figures["tokens"]
    time = seconds(figures["wall_s"]) + (" *" if figures["restored_chains"] else "")
    return (
        figures["strategy"],
        accuracy_cell(figures["chain_accuracy"]),
        accuracy_cell(figures["voted"]),
        accuracy_cell(figures["any_of"]),
        percent(figures["takeovers"]["rate"]),
        count(tokens["target"] if tokens else None),
        time,
    )


def strategy_columns(chains: int) -> tuple[str, ...]:
    """Column names for `strategy_row`."""
    return ("strategy", "chain accuracy", "vote", f"any of {chains}", "taken over", "target tokens", "time")


RESUMED_NOTE = "* this process only; chains of an earlier one are among them"
