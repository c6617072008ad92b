"""One scenario at several numbers of GPUs, chains or turns, every strategy at each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from atts_engine.errors import InputError
from atts_engine.evaluation.simulation.figures import dominated_at, figures
from atts_engine.evaluation.simulation.lanes import LaneModel
from atts_engine.evaluation.simulation.placement import Half, Placement, place_alone, place_shared, place_split
from atts_engine.evaluation.simulation.simulator import Machine, Rules, simulate
from atts_engine.evaluation.simulation.work import Job, Recorded, alone, cut, resample, tokens_of


class Hardware(Protocol):
    """Has a place for the lanes of a strategy."""

    def place(self, strategy: str, gpus: int | None, job: Job, rules: Rules) -> Placement: ...


@dataclass(frozen=True, slots=True)
class Gpus:
    """A pair on GPUs. placement: "shared", "split", or "auto", which splits where there are enough GPUs for it."""

    draft: Half
    target: Half
    placement: str = "auto"
    draft_gpus: int | None = None
    target_gpus: int | None = None

    def place(self, strategy: str, gpus: int | None, job: Job, rules: Rules) -> Placement:
        """`InputError` where that many GPUs do not hold the models of the strategy."""
        d, t, rows = self.draft, self.target, rules.max_batch_tokens
        n = gpus or 1
        if strategy in ("draft", "target"):
            return place_alone(d if strategy == "draft" else t, n, rows, draft=strategy == "draft")
        chosen = self.draft_gpus is not None or self.target_gpus is not None
        if self.placement == "shared" or (self.placement == "auto" and not chosen and n < d.tp + t.tp):
            return place_shared(d, t, n, rows)
        return place_split(
            d, t, n, rows, job, rules.in_flight, draft_gpus=self.draft_gpus, target_gpus=self.target_gpus
        )


@dataclass(frozen=True, slots=True)
class OneMachine:
    """Both lanes in turns on the machine whose steps were measured."""

    draft: LaneModel
    target: LaneModel

    def place(self, strategy: str, gpus: int | None, job: Job, rules: Rules) -> Placement:
        if strategy in ("draft", "target"):
            return Placement(Machine(self.draft if strategy == "draft" else self.target), 0, 0, 0, 0)
        return Placement(Machine(self.draft, self.target, shared=True), 0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Scenario:
    """problems None: the recorded chains themselves, once each; otherwise that many, drawn from them with `seed`."""

    recorded: Recorded
    hardware: Hardware
    rules: Rules
    strategies: tuple[str, ...]
    problems: int | None = None
    seed: int = 0
    price_per_hour: float | None = None

    def job(self, chains: int | None, turns: int | None) -> Job:
        """chains, turns: of each problem, and of each chain at most; None: as recorded. `InputError` where the
        recording has fewer chains and none are to be drawn."""
        recorded = self.recorded.job
        most = max(len(chain) for problem in recorded for chain in problem)
        width = max(map(len, recorded))
        if self.problems is not None:
            return resample(
                recorded, problems=self.problems, chains=chains or width, turns=turns or most, seed=self.seed
            )
        if chains is not None and any(len(problem) < chains for problem in recorded):
            fewest = min(map(len, recorded))
            raise InputError(
                f"a problem of the recording has {fewest} chains, not {chains}: add --problems to draw them"
            )
        return cut(recorded, problems=len(recorded), chains=chains or width, turns=turns or most)


def run_point(scenario: Scenario, gpus: int | None, chains: int | None, turns: int | None) -> dict[str, Any]:
    """The strategies on one machine: {"gpus", "chains", "turns", "problems", "tokens", "strategies": {name: figures}}.

    A strategy that the machine cannot hold has {"does_not_fit": reason} in place of figures.
    """
    job = scenario.job(chains, turns)
    found: dict[str, Any] = {}
    for strategy in scenario.strategies:
        try:
            found[strategy] = _run(scenario, strategy, gpus, job)
        except InputError as error:
            found[strategy] = {"does_not_fit": str(error)}
    return {
        "gpus": gpus,
        "chains": max(map(len, job)),
        "turns": turns or max(len(chain) for problem in job for chain in problem),
        "problems": len(job),
        "tokens": sum(tokens_of(job)),
        "strategies": found,
    }


def _run(scenario: Scenario, strategy: str, gpus: int | None, job: Job) -> dict[str, Any]:
    rules = replace(scenario.rules, barrier="problem" if strategy == "atts-sync" else "none")
    placement = scenario.hardware.place(strategy, gpus, job, rules)
    work = alone(job) if placement.machine.target is None else job
    outcome = simulate(work, placement.machine, rules)
    found = figures(outcome, strategy, placement.machine, gpus, scenario.price_per_hour)
    return found | {"placement": placement.describe()} if gpus is not None else found


def run_sweep(
    scenario: Scenario, gpus: Sequence[int | None], chains: Sequence[int | None], turns: Sequence[int | None]
) -> dict[str, Any]:
    """{"axis", "points", "synchronisation_dominates_at"}, over the one of the three that has several values.

    `InputError` where more than one has, and where no strategy fits at any point.
    """
    several = [name for name, values in (("gpus", gpus), ("chains", chains), ("turns", turns)) if len(values) > 1]
    if len(several) > 1:
        raise InputError(f"one sweep at a time: {' and '.join('--' + name for name in several)} have several values")
    points = [run_point(scenario, g, c, t) for g in gpus for c in chains for t in turns]
    cells = [cell for point in points for cell in point["strategies"].values()]
    if all("does_not_fit" in cell for cell in cells):
        raise InputError(cells[0]["does_not_fit"])
    axis = several[0] if several else "gpus" if gpus[0] is not None else "chains"
    return {"axis": axis, "points": points, "synchronisation_dominates_at": dominated_at(points, axis)}
