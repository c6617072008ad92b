"""The loop of a study: propose, plan, run, save."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from atts_engine.evaluation.tuning.cost import Budget, Costs
from atts_engine.evaluation.tuning.folder import StudyFolder
from atts_engine.evaluation.tuning.proposer import Proposal, Proposer
from atts_engine.evaluation.tuning.pruning import hopeless
from atts_engine.evaluation.tuning.results import best
from atts_engine.evaluation.tuning.space import Configuration
from atts_engine.evaluation.tuning.trial import Measurement, Trial

Hopeless = Callable[[int, int], bool]
"""(right, seen) -> whether a trial should end."""


class Evaluator(Protocol):
    """What the loop needs of whatever runs configurations."""

    def planned(self, configuration: Configuration, history: Sequence[Trial]) -> Costs | None:
        """Costs to expect, from what the history has taught; None where it has taught nothing yet."""
        ...

    def measure(self, configuration: Configuration, hopeless: Hopeless | None) -> tuple[Measurement, bool]:
        """Run it. The flag: all problems were run, so `hopeless`, asked now and then, never ended it."""
        ...


def run_study(
    folder: StudyFolder,
    budget: Budget,
    proposer: Proposer,
    evaluator: Evaluator,
    *,
    trials: int,
    prune: bool = False,
    ended: Callable[[Trial], None] = lambda trial: None,
) -> None:
    """Go on until the folder holds `trials` trials, or the proposer has nothing left.

    Every proposal counts as a trial, those too that are over the budget by plan and never run. A configuration that was
    measured before is not run again. prune: end a trial when its accuracy cannot be expected to reach that of the best
    within the budget. ended: told of each trial once it is saved. An error or an interrupt loses the trial that was
    being run, and no other.
    """
    while len(folder.trials) < trials:
        proposal = proposer.propose(tuple(folder.trials))
        if proposal is None:
            return
        trial = _try(proposal, folder.trials, budget, evaluator, prune)
        folder.add(trial)
        ended(trial)


def _try(proposal: Proposal, history: Sequence[Trial], budget: Budget, evaluator: Evaluator, prune: bool) -> Trial:
    def trial(
        state: str, planned: float | None = None, found: Measurement | None = None, repeats: int | None = None
    ) -> Trial:
        return Trial(
            len(history) + 1,
            state,
            proposal.configuration,
            planned,
            found,
            repeats,
            proposal.insights,
            proposal.reason,
            proposal.complaints,
        )

    configuration = proposal.configuration
    if configuration is None:
        return trial("refused")
    costs = evaluator.planned(configuration, history)
    planned = None if costs is None else costs[budget.kind]
    for earlier in history:
        if earlier.configuration == configuration and earlier.measurement is not None and earlier.repeats is None:
            return trial(earlier.state, planned, earlier.measurement, earlier.number)
    if costs is not None and not budget.holds(costs):
        return trial("infeasible", planned)
    leader = best(history, budget) if prune else None
    watch: Hopeless | None = None
    if leader is not None:
        _, achieved = leader

        def watch(right: int, seen: int) -> bool:
            return hopeless(right, seen, achieved)

    measurement, whole = evaluator.measure(configuration, watch)
    return trial("measured" if whole else "pruned", planned, measurement)
