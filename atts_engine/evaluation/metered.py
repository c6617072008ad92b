"""A job, and what both lanes did meanwhile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from atts_engine.conformal import Calibrator, Meta
from atts_engine.evaluation.folder import RunFolder
from atts_engine.evaluation.job import JobResult, Observer, Solver, run_job
from atts_engine.evaluation.lanes import Counters, LaneUse
from atts_engine.evaluation.servers import ServerUse
from atts_engine.pipeline.params import ATTSParams
from atts_engine.pipeline.records import Problem
from atts_engine.pipeline.task import Task
from atts_engine.runtime import Rates


class Metered(Solver, Protocol):
    """An engine that counts what its lanes do."""

    def restart_peaks(self) -> None: ...

    def stats(self) -> Mapping[str, Counters]: ...

    def calibration_meta(self, params: ATTSParams) -> Meta: ...

    async def rates(self) -> Mapping[str, Rates]: ...

    def servers(self) -> Mapping[str, Mapping[str, Any]]: ...


async def run_metered(
    engine: Metered,
    problems: Sequence[Problem],
    params: ATTSParams,
    observer: Observer,
    *,
    calibrator: Calibrator | None = None,
    folder: RunFolder | None = None,
    concurrency: int = 8,
    task: Task | None = None,
) -> JobResult:
    """`run_job` with the lanes of the engine in its result."""
    engine.restart_peaks()
    before = engine.stats()
    result = await run_job(
        engine,
        problems,
        params,
        observer,
        calibrator=calibrator,
        folder=folder,
        concurrency=concurrency,
        task=task,
    )
    after, rates = engine.stats(), await engine.rates()
    return replace(
        result,
        lanes={name: LaneUse.between(before[name], after[name], rate) for name, rate in rates.items()},
        servers={name: ServerUse.between(before[name], after[name], about) for name, about in engine.servers().items()},
    )
