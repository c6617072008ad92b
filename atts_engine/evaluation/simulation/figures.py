"""The figures of a simulated job, ready for JSON, and where synchronisation dominates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from atts_engine.evaluation.simulation.lanes import LaneModel, LaneUse
from atts_engine.evaluation.simulation.simulator import Machine, Outcome

STRATEGIES = ("atts", "atts-sync", "draft", "target")


def figures(
    outcome: Outcome, strategy: str, machine: Machine, gpus: int | None, price_per_hour: float | None
) -> dict[str, Any]:
    """JSON of one job. gpus None: it ran on no GPU, and nobody knows its GPU-hours. docs/simulate.md names each."""
    names = ("draft", "target") if machine.target is not None else (strategy,)
    models = [machine.draft, machine.target]
    uses = [outcome.draft, outcome.target]
    lanes = {
        name: _lane(use, model, outcome.seconds)
        for name, use, model in zip(names, uses, models, strict=False)
        if use is not None and model is not None
    }
    tokens = {name: lanes[name]["sampled_tokens"] if name in lanes else 0 for name in ("draft", "target")}
    hours = None if gpus is None else gpus * outcome.seconds / 3600
    shares = _shares(outcome)
    return {
        "strategy": strategy,
        "wall_s": outcome.seconds,
        "latency_s": {
            "mean": float(np.mean(outcome.latency_s)),
            "p50": float(np.percentile(outcome.latency_s, 50)),
            "p99": float(np.percentile(outcome.latency_s, 99)),
        },
        "tokens": tokens,
        "tokens_per_s": {
            "draft": tokens["draft"] / outcome.seconds,
            "target": tokens["target"] / outcome.seconds,
            "all": sum(tokens.values()) / outcome.seconds,
        },
        "chain_time": shares,
        "synchronisation_dominates": _dominated(shares, lanes),
        "lanes": lanes,
        "gpu_hours": hours,
        "cost": None if hours is None or price_per_hour is None else hours * price_per_hour,
    }


def _dominated(shares: Mapping[str, float], lanes: Mapping[str, Mapping[str, Any]]) -> dict[str, bool | None]:
    """chains: they spend more time at barriers than in steps that compute their rows. Of a lane: T_s > T_c + T_m; None
    where the latter are not known."""
    found: dict[str, bool | None] = {"chains": shares["barrier"] > shares["computing"]}
    for name, lane in lanes.items():
        found[name] = None if lane["T_c"] is None else lane["T_s"] > lane["T_c"] + lane["T_m"]
    return found


def _shares(o: Outcome) -> dict[str, float]:
    """Of the chains' time: by phase (drafting, verifying, at barriers, in target spans), which sum to 1; and by what
    happened (computing, waiting of which `barrier` is a part), which do too."""
    whole = o.chain_s or 1.0
    waiting = (o.barrier_s + o.queued_s) / whole
    return {
        "mean_s": o.chain_s / o.chains,
        "draft": o.draft_s / whole,
        "verify": o.verify_s / whole,
        "barrier": o.barrier_s / whole,
        "target": o.target_s / whole,
        "waiting": waiting,
        "computing": 1.0 - waiting,
    }


def _lane(use: LaneUse, model: LaneModel, seconds: float) -> dict[str, Any]:
    """T_c, T_m, T_s in seconds, summed over the copies; T_c and T_m are None where the lane's cost knows no device."""
    known = use.compute_s > 0.0
    return {
        "copies": use.replicas,
        "gpus_per_copy": model.gpus,
        "steps": use.steps,
        "rows_per_step": use.computed / use.steps if use.steps else 0.0,
        "computed_tokens": use.computed,
        "scored_tokens": use.scored,
        "sampled_tokens": use.sampled,
        "busy_share": use.busy_s / (use.replicas * seconds) if seconds else 0.0,
        "T_c": use.compute_s if known else None,
        "T_m": use.memory_s if known else None,
        "T_s": use.idle_s,
        "r": use.compute_s / (use.memory_s + use.idle_s) if known else None,
        "peak_kv_tokens": use.peak_kv,
        "kv_room_tokens": model.kv_tokens,
        "peak_kv_bytes_per_gpu": use.peak_kv * model.kv_token_bytes if model.kv_token_bytes else None,
    }


def dominated_at(points: Sequence[Mapping[str, Any]], axis: str) -> dict[str, dict[str, list[int]]]:
    """{strategy: {"chains", "draft" or "target": values of the sweep's axis where synchronisation dominates}}."""
    found: dict[str, dict[str, list[int]]] = {}
    for point in points:
        for strategy, cell in point["strategies"].items():
            for what, dominated in cell.get("synchronisation_dominates", {}).items():
                at = found.setdefault(strategy, {}).setdefault(what, [])
                if dominated:
                    at.append(point[axis])
    return found
