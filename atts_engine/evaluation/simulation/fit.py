"""Step times of the lanes of recorded runs, fitted to what their meters counted."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from atts_engine.errors import InputError
from atts_engine.evaluation.lanes import HOST
from atts_engine.evaluation.simulation.cost import LinearCost, StepCost, TableCost
from atts_engine.evaluation.simulation.lanes import LaneModel
from atts_engine.evaluation.simulation.work import Recorded, recorded_turns
from atts_engine.evaluation.traces import read_chains
from atts_engine.models.config import read_json

FORMAT = "atts-lanes/1"
NAMES = ("draft", "target")
Table = tuple[tuple[int, ...], tuple[float, ...]]


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What a folder of `atts run` tells. lanes: `evaluation.lanes.lane_figures` of either lane."""

    folder: Path
    recorded: Recorded
    chains: int
    strategy: str
    wall_s: float
    lanes: Mapping[str, Mapping[str, Any]]

    @classmethod
    def read(cls, folder: str | Path) -> RunRecord:
        """`InputError` for a folder without a summary, for a run of one model or in several processes, whose lanes
        do not tell what its chains cost, and for one whose lanes worked at the same time, which no fit has them do."""
        path = Path(folder)
        found = read_json(path / "summary.json")
        if found.get("strategy") not in ("atts", "atts-sync"):
            raise InputError(f"{path} is a run of {found.get('strategy')!r}: lanes are fitted to atts or atts-sync")
        if found.get("restored_chains"):
            raise InputError(
                f"{path} was resumed, and its lanes tell of the last process alone: fit a run in one piece"
            )
        lanes = found.get("lanes", {})
        if any(not lanes.get(name, {}).get("steps") for name in NAMES):
            raise InputError(f"{path / 'summary.json'} does not hold the lanes of a run")
        recorded = recorded_turns(read_chains(path / "chains.jsonl"))
        run = cls(path, recorded, found["chains_per_problem"], found["strategy"], found["wall_s"], lanes)
        if (work_s := sum(map(run.work_s, NAMES))) > run.wall_s:
            raise InputError(
                f"the lanes of {path} worked side by side ({work_s:.1f} s of work in {run.wall_s:.1f} s), and a fit "
                "has them take turns: run it with --lane-threads one and --no-overlap, on one device"
            )
        return run

    def work_s(self, lane: str) -> float:
        """Seconds in which the lane worked: its passes and the host's part of its steps."""
        times: Mapping[str, float] = self.lanes[lane]["time_s"]
        return times["pass"] + sum(times[name] for name in HOST)

    @property
    def prompt_tokens(self) -> float:
        """Of a mean prompt: what the target computed once, less the text of all chains."""
        beside = self.lanes["target"]["distinct_tokens"] - self.recorded.draft_tokens - self.recorded.target_tokens
        return max(0.0, beside / len(self.recorded.job))


@dataclass(frozen=True, slots=True)
class FittedLanes:
    """Step times of both lanes of one machine, and prompts of as many tokens as the runs had."""

    draft: LinearCost
    target: LinearCost
    prompt_tokens: int

    def to_json(self) -> dict[str, Any]:
        lanes = {"draft": asdict(self.draft), "target": asdict(self.target)}
        return {"format": FORMAT, "prompt_tokens": self.prompt_tokens, "lanes": lanes}


def fit(runs: Sequence[RunRecord]) -> FittedLanes:
    """Least squares, for each lane, of its seconds of work against its steps and the rows of them:
    work_s = base_s * steps + row_s * rows, neither below 0. Runs count alike whatever their length.

    `InputError` for fewer than two runs, or runs that all have the same rows a step.
    """
    if len(runs) < 2:
        raise InputError("--fit needs two runs or more, at different numbers of chains")
    costs = []
    for lane in NAMES:
        steps = np.array([run.lanes[lane]["steps"] for run in runs], dtype=np.float64)
        rows = np.array([run.lanes[lane]["computed_tokens"] for run in runs], dtype=np.float64)
        work = np.array([run.work_s(lane) for run in runs])
        if np.ptp(rows / steps) < 0.1 * float(np.mean(rows / steps)):
            raise InputError("the runs of --fit have the same rows a step: run them at different numbers of chains")
        costs.append(_line(steps, rows, work))
    prompt = round(sum(run.prompt_tokens for run in runs) / len(runs))
    return FittedLanes(costs[0], costs[1], prompt)


def _line(steps: np.ndarray, rows: np.ndarray, work: np.ndarray) -> LinearCost:
    # Divided by the work, each run's equation asks for 1, so that errors are shares of a run.
    terms = np.stack([steps / work, rows / work], axis=1)
    (base, row), *_ = np.linalg.lstsq(terms, np.ones(len(work)), rcond=None)
    if row < 0.0:
        base, row = 1.0 / float(np.mean(terms[:, 0])), 0.0
    elif base < 0.0:
        base, row = 0.0, 1.0 / float(np.mean(terms[:, 1]))
    return LinearCost(float(base), float(row))


def pooled(runs: Sequence[RunRecord]) -> Recorded:
    """The chains of all runs as one recording; a problem that several runs have is there several times."""
    job = [problem for run in runs for problem in run.recorded.job]
    turns = [turn for problem in job for chain in problem for turn in chain]
    rate = sum(turn.target > 0 for turn in turns) / len(turns)
    tokens = [sum(run.recorded.draft_tokens for run in runs), sum(run.recorded.target_tokens for run in runs)]
    return Recorded(job, tokens[0], tokens[1], rate, any(run.recorded.estimated for run in runs))


def read_lanes(path: str | Path) -> tuple[dict[str, LinearCost | Table], int | None]:
    """Step times by lane, and tokens of a prompt where the file tells: of a file {"format": "atts-lanes/1", "lanes":
    {"draft" or "target": {"base_s", "row_s"} or {"rows": [...], "seconds": [...]}}}, or of what `atts simulate --fit
    --json` wrote, which holds one. `InputError` for anything else."""
    raw = read_json(Path(path))
    raw = raw.get("fit", raw)
    if raw.get("format") != FORMAT or not isinstance(raw.get("lanes"), dict):
        raise InputError(f'{path} holds no lanes: it must have "format": "{FORMAT}" and "lanes"')
    if unknown := sorted(raw["lanes"].keys() - set(NAMES)):
        raise InputError(f"{path}: no lane {unknown[0]!r}, only draft and target")
    found = {name: _cost(lane, f"{path}: lane {name}") for name, lane in raw["lanes"].items()}
    prompt = raw.get("prompt_tokens")
    return found, prompt if isinstance(prompt, int) else None


def _cost(lane: Any, where: str) -> LinearCost | Table:
    if isinstance(lane, dict) and lane.keys() >= {"rows", "seconds"}:
        rows, seconds = ([_number(x, where) for x in lane[key]] for key in ("rows", "seconds"))
        table = tuple(int(r) for r in rows), tuple(seconds)
        TableCost(*table)
        return table
    if isinstance(lane, dict) and "base_s" in lane:
        return LinearCost(_number(lane["base_s"], where), _number(lane.get("row_s", 0.0), where))
    raise InputError(f"{where} must have base_s and row_s, or rows and seconds")


def _number(value: Any, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
        raise InputError(f"{where}: {json.dumps(value)} is no number of 0 or more")
    return float(value)


def lane_model(cost: LinearCost | Table) -> LaneModel:
    """One copy, without bounds on sequences and KV."""
    step: StepCost = cost if isinstance(cost, LinearCost) else TableCost(*cost)
    return LaneModel(step)
