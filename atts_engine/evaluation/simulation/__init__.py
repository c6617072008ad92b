"""A simulator of both lanes: what a job takes on machines that are not there (docs/simulate.md)."""

from atts_engine.evaluation.simulation.cost import Device, Efficiency, LinearCost, RooflineCost, TableCost
from atts_engine.evaluation.simulation.lanes import LaneModel, LaneUse
from atts_engine.evaluation.simulation.simulator import Machine, Outcome, Rules, Scope, simulate
from atts_engine.evaluation.simulation.work import Job, Recorded, TurnWork

__all__ = [
    "Device",
    "Efficiency",
    "Job",
    "LaneModel",
    "LaneUse",
    "LinearCost",
    "Machine",
    "Outcome",
    "Recorded",
    "RooflineCost",
    "Rules",
    "Scope",
    "TableCost",
    "TurnWork",
    "simulate",
]
