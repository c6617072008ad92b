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
from atts_engine.evaluation import measures
from atts_engine.evaluation.files import cannot_write
from atts_engine.evaluation.folder import RunFolder, check_resumed, write_json
from atts_engine.evaluation.frozen import match_level, of_decisions, settle
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

    equal: None (every strategy as its authors run it), "rate" (the same takeover rate), or "tokens" (the target tokens
    of the reference: calibrated strategies by their level, others by their number of chains). A calibrated strategy
    has the rate `ATTSParams.alpha` unless its tokens are matched.
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
    """What the whole suite has in common. pilot: problems that calibration scores come from, none of which is among
    `problems`; passes: see `frozen.settle`."""

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
            raise cannot_write(folder, error) from error
        self._pilots: dict[ATTSParams, JobResult] = {}
        self._levels: dict[tuple[ATTSParams, Callable[[JobResult], float], float], float] = {}
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
        if not params.settings.calibrated:
            if block.equal == "tokens":
                params = await self._as_many_chains(params, text)
        elif block.equal == "tokens" and text != REFERENCE:
            wanted = target_tokens(await self._at_rate(REFERENCE))
            params = await self._matched(params, text, target_tokens, wanted)
        else:
            params = await self._matched(params, text, takeover_rate, params.alpha, full=1.0)
        return Row(block.name, text, params, await self._result(params, text))

    async def _at_rate(self, text: str) -> JobResult:
        """A calibrated strategy at the suite's rate of takeovers."""
        params = self._setting.of(text)
        return await self._result(await self._matched(params, text, takeover_rate, params.alpha, full=1.0), text)

    async def _matched(
        self,
        params: ATTSParams,
        text: str,
        measure: Callable[[JobResult], float],
        wanted: float,
        full: float | None = None,
    ) -> ATTSParams:
        """The parameters at the level at which the table's problems come to what is wanted. No answer is looked at."""
        key = params, measure, wanted
        if key not in self._levels:

            async def reached(level: float) -> float:
                return measure(await self._result(replace(params, alpha=level), text))

            self._levels[key] = await match_level(reached, params.alpha, wanted, full=full)
        return replace(params, alpha=self._levels[key])

    async def _as_many_chains(self, params: ATTSParams, text: str) -> ATTSParams:
        """The parameters with as many chains as come nearest to the reference's target tokens.

        Where a strategy stops early its tokens do not rise with the number it may write, so neighbours are tried.
        """
        wanted = target_tokens(await self._at_rate(REFERENCE))
        each = target_tokens(await self._result(params, text)) / params.chains
        if not each:
            raise InputError(f"{text} asks nothing of the target, so it cannot be held to a number of its tokens")

        async def off(chains: int) -> float:
            return abs(target_tokens(await self._result(replace(params, chains=chains), text)) - wanted)

        best = max(1, round(wanted / each))
        while best > 1 and await off(best - 1) < await off(best):
            best -= 1
        return replace(params, chains=best)

    async def _result(self, params: ATTSParams, text: str) -> JobResult:
        """The table's problems at these parameters."""
        if params not in self._results:
            calibrator, terms = None, f"{params.chains}"
            if params.settings.calibrated:
                calibrator, terms = await self._calibrator(params, text), f"{params.alpha:g}"
            name = f"rows/{_file_name(text)}-{terms}"
            self._results[params] = await self._job(name, self._setting.problems, params, calibrator)
        return self._results[params]

    async def _calibrator(self, params: ATTSParams, text: str) -> Calibrator:
        """The pilot's scores, settled at the suite's own level, tested at that of the parameters."""
        settled = self._setting.of(text)
        meta = self._engine.calibration_meta(settled)
        if settled not in self._pilots:

            async def run(own: ATTSParams, calibrator: Calibrator, name: str) -> JobResult:
                return await self._job(name, self._setting.pilot, own, calibrator)

            name = f"pilot/{_file_name(text)}"
            self._pilots[settled] = await settle(run, meta, settled, self._setting.passes, name)
        return of_decisions(meta, params.alpha, self._pilots[settled].in_force())

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


def takeover_rate(result: JobResult) -> float:
    """Of the judged spans, how many were taken over; 0 where none was judged."""
    return measures.takeover_rates(result.chains)["rate"] or 0.0


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
