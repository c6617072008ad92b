"""A calibration that does not depend on the order in which chains arrive, and levels at which runs cost the same."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace

from atts_engine.conformal import Calibrator, ColdStart, Meta, make_calibrator
from atts_engine.evaluation.job import JobResult
from atts_engine.pipeline.params import ATTSParams
from atts_engine.pipeline.records import Decision

KIND = "mondrian"
RunFrozen = Callable[[ATTSParams, Calibrator, str], Awaitable[JobResult]]
"""Runs the calibration problems with a frozen calibrator, under a name."""


def of_decisions(meta: Meta, alpha: float, decisions: Iterable[Decision]) -> Calibrator:
    """Smoothed p-values by key against the scores of these decisions, frozen at level alpha. meta: what they are of.

    The order of the decisions does not matter: a count over calibration scores does not either.
    """
    found = make_calibrator(KIND, alpha, meta=meta, cold=ColdStart("coin", 1))
    for decision in sorted(decisions, key=lambda d: (d.problem, d.chain, d.turn)):
        found.observe(decision.score, decision.key)
    found.frozen = True
    return found


async def settle(
    run: RunFrozen, meta: Meta, params: ATTSParams, passes: int, name: str
) -> tuple[Calibrator, JobResult]:
    """A frozen calibration at `params.alpha`, and the last run that its scores come from.

    A chain's scores after its first turn depend on the verdicts before them. The first pass therefore takes over by
    coins of probability alpha, and each further one by the scores of the pass before: after k passes the scores of the
    first k turns are those of chains that were judged as they will be. Everything is keyed by the seed.
    """
    calibrator = of_decisions(meta, params.alpha, ())
    result = await run(params, calibrator, f"{name}-pass-0")
    for number in range(1, passes):
        calibrator = of_decisions(meta, params.alpha, result.decisions)
        result = await run(params, calibrator, f"{name}-pass-{number}")
    return of_decisions(meta, params.alpha, result.decisions), result


async def match_level(
    spent: Callable[[ATTSParams], Awaitable[float]], params: ATTSParams, wanted: float, steps: int = 2
) -> ATTSParams:
    """`params` at the level at which a run spends `wanted`, where what it spends rises with the level from 0 at 0.

    Secant steps from alpha itself; the level is rounded to three digits and kept within 0.005 and 0.995.
    """

    def level(value: float) -> float:
        return round(min(0.995, max(0.005, value)), 3)

    points = [(0.0, 0.0)]
    alpha = params.alpha
    for _ in range(steps):
        points.append((alpha, await spent(replace(params, alpha=alpha))))
        (a0, s0), (a1, s1) = sorted(points, key=lambda p: abs(p[1] - wanted))[:2]
        guess = level(a0 + (wanted - s0) * (a1 - a0) / (s1 - s0)) if s1 != s0 else alpha
        if guess == alpha:
            break
        alpha = guess
    return replace(params, alpha=alpha)
