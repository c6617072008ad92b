"""Runs configurations on real problems through real engines."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from types import TracebackType
from typing import Self

from atts_engine.config import EngineConfig
from atts_engine.conformal import Calibrator
from atts_engine.engine import AsyncEngine
from atts_engine.errors import InputError
from atts_engine.evaluation import measures
from atts_engine.evaluation.grading import Grader
from atts_engine.evaluation.intervals import wilson
from atts_engine.evaluation.job import Unwatched, run_job
from atts_engine.evaluation.tuning.cost import Sizes, Unit, Workload, computed_costs, planned_work
from atts_engine.evaluation.tuning.space import Configuration
from atts_engine.evaluation.tuning.study import Hopeless
from atts_engine.evaluation.tuning.trial import Measurement, Trial
from atts_engine.pipeline import ATTSParams, Chain, Problem

LOOKS = 4
"""Parts in which a trial's problems are run where it may be ended early."""

MakeCalibrator = Callable[[AsyncEngine, ATTSParams], Calibrator]


class EngineEvaluator:
    """One engine at a time: that of the last pair stays open until another is wanted. Use as a context manager.

    configs, sizes: by name of the pair. base: parameters that are not tuned. make_calibrator: a fresh one for each
    trial, so that no trial learns from another's scores. `InputError` where a problem has no gold answer.
    """

    def __init__(
        self,
        configs: Mapping[str, EngineConfig],
        sizes: Mapping[str, Sizes],
        unit: Unit,
        problems: Sequence[Problem],
        base: ATTSParams,
        make_calibrator: MakeCalibrator,
        concurrency: int,
    ) -> None:
        check_gold(problems)
        self._configs = configs
        self._sizes = sizes
        self._unit = unit
        self._problems = problems
        self._base = base
        self._make_calibrator = make_calibrator
        self._concurrency = concurrency
        self._same = Grader().equal
        self._runner = asyncio.Runner()
        self._open: tuple[str, AsyncEngine] | None = None

    def planned(self, configuration: Configuration, history: Sequence[Trial]) -> dict[str, float] | None:
        """Costs from the median over trials of a chain's length, and from the mean prompt; seconds at the best rate
        that any trial reached.

        Trials that ran out of turns make the median smaller than a whole solution. That is the side to err on: what is
        planned too cheap is measured and found out, what is planned too dear is never run.
        """
        known = [t.measurement for t in history if t.measurement is not None]
        if not known:
            return None
        own = [t.measurement for t in history if t.measurement is not None and _pair(t) == configuration.pair]
        prompts = [m.work.prompt_tokens for m in own or known]
        prompt = sum(p[0] for p in prompts) / len(prompts), sum(p[1] for p in prompts) / len(prompts)
        work = planned_work(configuration, median(m.text_tokens for m in known), prompt)
        costs = computed_costs(work, self._sizes[configuration.pair], self._unit)
        return {**costs, "seconds": costs["flops"] * min(m.costs["seconds"] / m.costs["flops"] for m in known)}

    def measure(self, configuration: Configuration, hopeless: Hopeless | None) -> tuple[Measurement, bool]:
        """Run the tuning problems, in parts with a look after each where `hopeless` is given."""
        return self._runner.run(self._measure(configuration, self._problems, hopeless))

    def validate(self, configuration: Configuration, problems: Sequence[Problem]) -> Measurement:
        """The same on other problems, all of them."""
        check_gold(problems)
        return self._runner.run(self._measure(configuration, problems, None))[0]

    def close(self) -> None:
        """Close the engine that is open."""
        try:
            self._runner.run(self._shut())
        finally:
            self._runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def _measure(
        self, configuration: Configuration, problems: Sequence[Problem], hopeless: Hopeless | None
    ) -> tuple[Measurement, bool]:
        engine = await self._engine(configuration.pair)
        params = configuration.params(self._base)
        calibrator = self._make_calibrator(engine, params)
        size = len(problems) if hopeless is None else -(-len(problems) // LOOKS)
        chains: list[Chain] = []
        wall_s = 0.0
        for first in range(0, len(problems), size):
            part = problems[first : first + size]
            result = await run_job(
                engine, part, params, Unwatched(), calibrator=calibrator, concurrency=self._concurrency
            )
            chains += result.chains
            wall_s += result.wall_s
            seen = first + len(part)
            if hopeless is not None and seen < len(problems) and hopeless(sum(self._right(chains, params)), seen):
                return self._measurement(engine, configuration, problems[:seen], chains, wall_s), False
        return self._measurement(engine, configuration, problems, chains, wall_s), True

    async def _engine(self, pair: str) -> AsyncEngine:
        if self._open is None or self._open[0] != pair:
            await self._shut()
            self._open = pair, await AsyncEngine.create(self._configs[pair])
        return self._open[1]

    async def _shut(self) -> None:
        if self._open is not None:
            _, engine = self._open
            self._open = None
            await engine.close()

    def _right(self, chains: Sequence[Chain], params: ATTSParams) -> list[bool]:
        return [bool(getattr(outcome, params.vote)) for outcome in measures.grade(chains, self._same)]

    def _measurement(
        self,
        engine: AsyncEngine,
        configuration: Configuration,
        problems: Sequence[Problem],
        chains: Sequence[Chain],
        wall_s: float,
    ) -> Measurement:
        right = self._right(chains, configuration.params(self._base))
        interval = wilson(sum(right), len(right))
        prompts = [engine.prompt_lengths(problem) for problem in problems]
        count, n = len(chains), len(problems)
        work = Workload(
            configuration.chains,
            (sum(p[0] for p in prompts) / n, sum(p[1] for p in prompts) / n),
            sum(c.draft_tokens for c in chains) / count,
            sum(c.target_tokens for c in chains) / count,
        )
        costs = computed_costs(work, self._sizes[configuration.pair], self._unit)
        return Measurement(
            problems=n,
            right=sum(right),
            accuracy=interval.mean,
            low=interval.low,
            high=interval.high,
            takeover_rate=measures.takeover_rates(chains)["rate"],
            text_tokens=sum(_text_tokens(c, configuration.takeover) for c in chains) / count,
            work=work,
            costs={**costs, "seconds": wall_s / n},
            wall_s=wall_s,
        )


def check_gold(problems: Sequence[Problem]) -> None:
    """`InputError` for a problem without a gold answer: there is no accuracy to tune then."""
    for problem in problems:
        if problem.answer is None:
            raise InputError(f"tuning needs gold answers, and problem {problem.id!r} has none")


def _pair(trial: Trial) -> str | None:
    return None if trial.configuration is None else trial.configuration.pair


def _text_tokens(chain: Chain, takeover: str) -> int:
    replaced = sum(t.draft_tokens for t in chain.turns if t.takeover) if takeover == "replace" else 0
    return chain.draft_tokens + chain.target_tokens - replaced
