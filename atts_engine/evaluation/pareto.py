"""Which strategies are worth their cost: those that no other beats in accuracy at no higher cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

COSTS = {"target_tokens": ("tokens_per_problem", "target"), "latency_s": ("latency_s", "mean")}
"""Costs of a problem, and where `summary.figures` holds the interval of each."""


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, accuracy) that none dominates, by rising cost.

    A point dominates another if it costs no more, is no less accurate, and is better in one of the two; so equal points
    stand side by side.
    """
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    kept: list[int] = []
    for i in order:
        if not kept or points[i][1] > points[kept[-1]][1] or points[i] == points[kept[-1]]:
            kept.append(i)
    return kept


def placed(
    strategies: Mapping[str, Mapping[str, Any]], cost: str
) -> dict[str, tuple[dict[str, float], dict[str, float]]]:
    """{name: (interval of the cost, interval of the accuracy of its answers)} of the strategies that have both.

    strategies: {name: `summary.figures`}; cost: one of `COSTS`.
    """
    group, name = COSTS[cost]
    return {
        strategy: (figures[group][name], figures["voted"])
        for strategy, figures in strategies.items()
        if figures[group] is not None and figures["voted"] is not None
    }


def fronts(strategies: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """{cost: names of the strategies on its front, by rising cost}, judged by the means."""
    found = {}
    for cost in COSTS:
        points = placed(strategies, cost)
        names = list(points)
        found[cost] = [names[i] for i in front([(x["mean"], y["mean"]) for x, y in points.values()])]
    return found
