"""Optuna's TPE sampler as a proposer (Optuna: arXiv 1907.10902; TPE: Bergstra et al., NeurIPS 2011)."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from atts_engine.errors import InputError
from atts_engine.evaluation.tuning.cost import Budget
from atts_engine.evaluation.tuning.proposer import Proposal, seeded
from atts_engine.evaluation.tuning.results import merit
from atts_engine.evaluation.tuning.space import NAMES, Choice, Dimension, Space
from atts_engine.evaluation.tuning.trial import Trial

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


class OptunaProposer:
    """Tells a fresh study the whole history and asks it once, with a seed of that trial's own: what it proposes depends
    on the history and the seed alone, so nothing of Optuna's state has to be saved for resuming.

    startup: trials that are drawn at random before TPE has something to model. Trials over the budget are ranked below
    all that keep to it (`results.merit`); TPE looks at ranks only. `InputError` where Optuna is not installed.
    """

    def __init__(self, space: Space, budget: Budget, seed: int, startup: int = 6) -> None:
        if importlib.util.find_spec("optuna") is None:
            raise InputError("the proposer optuna needs Optuna: pip install 'atts-engine[tune]'")
        self._space = space
        self._budget = budget
        self._seed = seed
        self._startup = startup
        self._distributions = {name: _distribution(space.dimensions[name]) for name in NAMES}

    def propose(self, history: Sequence[Trial]) -> Proposal:
        """What TPE expects most of."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        seed = seeded(self._seed, len(history)).getrandbits(32)
        sampler = optuna.samplers.TPESampler(n_startup_trials=self._startup, seed=seed)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        study.add_trials([told for trial in history if (told := self._told(trial)) is not None])
        asked = study.ask(self._distributions)
        values = dict(asked.params)
        alpha = self._space.dimensions["alpha"]
        if not isinstance(alpha, Choice):
            values["alpha"] = alpha.nearest(values["alpha"])
        return Proposal(self._space.configuration(values))

    def _told(self, trial: Trial) -> Any:
        from optuna.trial import create_trial

        value = merit(trial, self._budget)
        if trial.configuration is None or value is None:
            return None
        params = {name: getattr(trial.configuration, name) for name in NAMES}
        return create_trial(params=params, distributions=self._distributions, value=value)


def _distribution(dimension: Dimension) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(dimension, Choice):
        return CategoricalDistribution(dimension.values)
    if dimension.whole:
        return IntDistribution(int(dimension.low), int(dimension.high), log=True)
    return FloatDistribution(dimension.low, dimension.high)
