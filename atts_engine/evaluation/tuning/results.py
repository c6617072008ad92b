"""What a history says: the best under a budget, the Pareto set, and how a search came along."""

from __future__ import annotations

from collections.abc import Sequence

from atts_engine.evaluation.pareto import front
from atts_engine.evaluation.tuning.cost import Budget
from atts_engine.evaluation.tuning.trial import Measurement, Trial

Measured = tuple[Trial, Measurement]


def measured(trials: Sequence[Trial]) -> list[Measured]:
    """Trials that were run to their end, each configuration once."""
    return [
        (t, t.measurement) for t in trials if t.state == "measured" and t.repeats is None and t.measurement is not None
    ]


def best(trials: Sequence[Trial], budget: Budget) -> Measured | None:
    """Of the measured trials within the budget the one with the highest accuracy; among equals the cheapest, then the
    first. None where there is none."""
    inside = [(t, m) for t, m in measured(trials) if budget.holds(m.costs)]
    return min(inside, key=lambda tm: (-tm[1].accuracy, tm[1].costs[budget.kind], tm[0].number), default=None)


def pareto(trials: Sequence[Trial], kind: str) -> list[Measured]:
    """Measured trials that no other beats in accuracy or cost without losing in the other, from cheap to dear; of equal
    ones the first."""
    found = measured(trials)
    points = [(m.costs[kind], m.accuracy) for _, m in found]
    return [found[i] for i in front(points) if points.index(points[i]) == i]


def best_so_far(trials: Sequence[Trial], budget: Budget) -> list[float | None]:
    """Behind each trial the accuracy of the best within the budget up to there; None before there is one."""
    found: list[float | None] = []
    top: float | None = None
    for trial in trials:
        m = trial.measurement
        if trial.state == "measured" and m is not None and budget.holds(m.costs):
            top = m.accuracy if top is None else max(top, m.accuracy)
        found.append(top)
    return found


def merit(trial: Trial, budget: Budget) -> float | None:
    """One number to rank trials by: within the budget the accuracy, and over it below 0, the lower the more it is over.

    Any trial within the budget is above any over it (K. Deb, "An efficient constraint handling method for genetic
    algorithms", 2000). None where nothing is known of the trial's cost.
    """
    cost = trial.planned_cost if trial.measurement is None else trial.measurement.costs[budget.kind]
    if trial.measurement is not None and budget.holds(trial.measurement.costs):
        return trial.measurement.accuracy
    return None if cost is None else -cost / budget.limit
