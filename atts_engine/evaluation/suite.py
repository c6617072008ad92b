"""Every strategy on the same problems: at its own defaults, at one takeover rate, and at one number of target tokens.

ATTS, SpecReason and reward-guided decoding are one loop with another score; compared at their own thresholds they
differ in how much they ask of the target before they differ in anything else. So the loops are also run with their
scores put through the same calibration at the same rate, and everything that can be is run at the number of target
tokens that ATTS takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from atts_engine.conformal import Calibrator
from atts_engine.errors import InputError
from atts_engine.evaluation.folder import RunFolder, check_resumed, write_json
from atts_engine.evaluation.frozen import match_level, settle
from atts_engine.evaluation.job import JobResult, Unwatched, job_settings
from atts_engine.evaluation.metered import Metered, run_metered
from atts_engine.pipeline.params import ATTSParams
from atts_engine.pipeline.records import Problem
from atts_engine.pipeline.settings import parse_strategy
from atts_engine.pipeline.task import Task

REFERENCE = "atts"
"""Its takeover rate and its target tokens are those that the others are held to."""


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of the table that are to be read against each other. strategies: as `parse_strategy` reads them.

    equal: None (every strategy as its authors run it), "rate" (calibrated strategies at alpha), or "tokens" (at the
    target tokens of the reference: calibrated strategies by their level, others by their number of chains).
    """

    name: str
    strategies: tuple[str, ...]
    equal: str | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: what was run, and what came of it."""

    block: str
    label: str
    params: ATTSParams
    result: JobResult


@dataclass(frozen=True, slots=True)
class Setting:
    """What the whole suite has in common. pilot: problems that calibrations and matched levels come from, none of which
    is among `problems`; passes: see `frozen.settle`."""

    models: tuple[str, str, str]
    params: ATTSParams
    problems: tuple[Problem, ...]
    pilot: tuple[Problem, ...]
    blocks: tuple[Block, ...]
    passes: int = 2
    concurrency: int = 8

    def __post_init__(self) -> None:
        if self.passes < 1:
            raise InputError(f"a calibration needs 1 pass or more, not {self.passes}")
        if not self.pilot:
            raise InputError("a suite needs problems to calibrate with: raise --pilot-problems")
        if both := {p.problem for p in self.problems} & {p.problem for p in self.pilot}:
            raise InputError(f"{len(both)} problems would be calibrated with and counted: choose other pilot problems")
        for block in self.blocks:
            for text in block.strategies:
                settings = self.of(text).settings
                if block.equal == "rate" and not settings.calibrated:
                    raise InputError(f"{text} has no calibrated level, so it cannot be held to a takeover rate")

    def of(self, text: str) -> ATTSParams:
        """The suite's parameters with the strategy that the text names."""
        name, options = parse_strategy(text)
        return replace(self.params, strategy=name, options=options)


class Suite:
    """Runs a suite into a folder, one run folder for each row, pass and pilot; a killed suite goes on with them."""

    def __init__(
        self, setting: Setting, folder: Path, engine: Metered, task: Task, say: Callable[[str], None], *, resume: bool
    ) -> None:
        """say: is told of each job as it begins. `InputError`: the folder cannot be written; it holds a suite and
        `resume` is off, or one with other settings."""
        self._setting = setting
        self._folder = folder
        self._engine = engine
        self._task = task
        self._say = say
        settings = suite_settings(setting)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.iterdir()):
                check_resumed(folder, settings, resume=resume)
            write_json(folder / "settings.json", settings)
        except OSError as error:
            raise InputError(f"cannot write to {folder}: {error.strerror or error}; choose another --out") from error
        self._calibrations: dict[ATTSParams, tuple[Calibrator, JobResult]] = {}
        # What stands in several blocks is run once.
        self._results: dict[ATTSParams, JobResult] = {}

    async def run(self) -> list[Row]:
        rows = []
        for block in self._setting.blocks:
            for text in block.strategies:
                rows.append(await self._row(block, text))
        return rows

    async def _row(self, block: Block, text: str) -> Row:
        params = self._setting.of(text)
        if block.equal == "tokens" and text != REFERENCE:
            params = await self._at_tokens(params, text)
        if params not in self._results:
            calibrator, terms = None, f"{params.chains}"
            if params.settings.calibrated:
                calibrator, terms = (await self._calibrated(params, text))[0], f"{params.alpha:g}"
            name = f"rows/{_file_name(text)}-{terms}"
            self._results[params] = await self._job(name, self._setting.problems, params, calibrator)
        return Row(block.name, text, params, self._results[params])

    async def _at_tokens(self, params: ATTSParams, text: str) -> ATTSParams:
        """The parameters at which the pilot problems take as many target tokens as by the reference."""
        reference = self._setting.of(REFERENCE)
        wanted = target_tokens((await self._calibrated(reference, REFERENCE))[1])
        if params.settings.calibrated:

            async def spent(at: ATTSParams) -> float:
                return target_tokens((await self._calibrated(at, text))[1])

            return await match_level(spent, params, wanted)
        result = await self._job(f"pilot/{_file_name(text)}", self._setting.pilot, params, None)
        spent_each = target_tokens(result) / params.chains
        if not spent_each:
            raise InputError(f"{text} asks nothing of the target, so it cannot be held to a number of its tokens")
        return replace(params, chains=max(1, round(wanted / spent_each)))

    async def _calibrated(self, params: ATTSParams, text: str) -> tuple[Calibrator, JobResult]:
        if params not in self._calibrations:

            async def run(own: ATTSParams, calibrator: Calibrator, name: str) -> JobResult:
                return await self._job(name, self._setting.pilot, own, calibrator)

            name = f"pilot/{_file_name(text)}-{params.alpha:g}"
            meta = self._engine.calibration_meta(params)
            self._calibrations[params] = await settle(run, meta, params, self._setting.passes, name)
        return self._calibrations[params]

    async def _job(
        self, name: str, problems: Sequence[Problem], params: ATTSParams, calibrator: Calibrator | None
    ) -> JobResult:
        draft, target, dtype = self._setting.models
        calibration = {} if calibrator is None else {"calibrator": calibrator.name, "frozen": True}
        settings = job_settings(draft, target, dtype, params, calibration, problems)
        folder = RunFolder.open(self._folder / name, settings, resume=True)
        began = len(folder.restored.solutions)
        if began < len(problems):
            self._say(f"{name}: {len(problems)} problems" + (f", {began} of them done" if began else ""))
        try:
            return await run_metered(
                self._engine,
                problems,
                params,
                Unwatched(),
                calibrator=calibrator,
                folder=folder,
                concurrency=self._setting.concurrency,
                task=self._task,
            )
        finally:
            folder.close()


def target_tokens(result: JobResult) -> float:
    """Tokens that the target generated for a problem, whatever for."""
    return sum(c.target_tokens for c in result.chains) / len(result.problems)


def suite_settings(setting: Setting) -> dict[str, Any]:
    draft, target, dtype = setting.models
    return {
        **job_settings(draft, target, dtype, setting.params, {}, setting.problems),
        "format": "atts-suite/1",
        "pilot": job_settings(draft, target, dtype, setting.params, {}, setting.pilot)["problems"],
        "passes": setting.passes,
        "blocks": [{"name": b.name, "equal": b.equal, "strategies": list(b.strategies)} for b in setting.blocks],
    }


def _file_name(text: str) -> str:
    return text.replace(":", ",")
