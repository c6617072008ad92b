"""A calibration that does not depend on the order in which chains arrive, and levels at which runs cost the same."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

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


async def settle(run: RunFrozen, meta: Meta, params: ATTSParams, passes: int, name: str) -> JobResult:
    """The last of the runs whose decisions make a calibration at `params.alpha` (`of_decisions`).

    A chain's scores after its first turn depend on the verdicts before them. The first pass therefore takes over by
    coins of probability alpha, and each further one by the scores of the pass before: after k passes the scores of the
    first k turns are those of chains that were judged as they will be. Everything is keyed by the seed.
    """
    calibrator = of_decisions(meta, params.alpha, ())
    result = await run(params, calibrator, f"{name}-pass-0")
    for number in range(1, passes):
        calibrator = of_decisions(meta, params.alpha, result.in_force())
        result = await run(params, calibrator, f"{name}-pass-{number}")
    return result


async def match_level(
    reached: Callable[[float], Awaitable[float]],
    level: float,
    wanted: float,
    *,
    full: float | None = None,
    tolerance: float = 0.02,
    runs: int = 6,
) -> float:
    """The level, three digits in 0.005 .. 0.995, at which a run reaches `wanted`, by secant steps from `level`.

    reached: what a run at a level comes to; it rises with the level from 0 at level 0, to `full` at level 1 where that
    is known. At most `runs` runs; the one that comes nearest counts, and one within the share `tolerance` of `wanted`
    ends the search.
    """
    points = [(0.0, 0.0)] if full is None else [(0.0, 0.0), (1.0, full)]
    tried: dict[float, float] = {}

    def off(point: tuple[float, float]) -> float:
        return abs(point[1] - wanted)

    while len(tried) < runs and level not in tried:
        tried[level] = await reached(level)
        points.append((level, tried[level]))
        if off(points[-1]) <= tolerance * wanted:
            break
        # Of levels that come to the same, the one nearer to what is wanted: from the other the search would come back.
        below = max((p for p in points if p[1] <= wanted), key=lambda p: (p[1], p[0]), default=None)
        above = min((p for p in points if p[1] > wanted), key=lambda p: (p[1], p[0]), default=None)
        (a0, r0), (a1, r1) = (below, above) if below and above else sorted(points, key=off)[:2]
        if r1 != r0:
            level = round(min(0.995, max(0.005, a0 + (wanted - r0) * (a1 - a0) / (r1 - r0))), 3)
    return min(tried.items(), key=off)[0]
