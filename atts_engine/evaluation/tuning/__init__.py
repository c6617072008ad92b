"""Settings of ATTS under a budget: search space, cost model, proposers, and the study that runs them."""

from __future__ import annotations

from atts_engine.evaluation.tuning.cost import (
    KINDS,
    Budget,
    Sizes,
    Unit,
    Workload,
    computed_costs,
    samples_within,
    unit_cost,
)
from atts_engine.evaluation.tuning.evaluator import EngineEvaluator
from atts_engine.evaluation.tuning.folder import StudyFolder
from atts_engine.evaluation.tuning.proposer import GridSearch, Proposal, Proposer, RandomSearch
from atts_engine.evaluation.tuning.results import best, best_so_far, pareto
from atts_engine.evaluation.tuning.space import Choice, Configuration, Range, Space, dimension
from atts_engine.evaluation.tuning.study import Evaluator, run_study
from atts_engine.evaluation.tuning.trial import Measurement, Trial

__all__ = [
    "KINDS",
    "Budget",
    "Choice",
    "Configuration",
    "EngineEvaluator",
    "Evaluator",
    "GridSearch",
    "Measurement",
    "Proposal",
    "Proposer",
    "RandomSearch",
    "Range",
    "Sizes",
    "Space",
    "StudyFolder",
    "Trial",
    "Unit",
    "Workload",
    "best",
    "best_so_far",
    "computed_costs",
    "dimension",
    "pareto",
    "run_study",
    "samples_within",
    "unit_cost",
]
