"""One job on many engines: the driver owns the run folder and the calibration, each worker an engine."""

from atts_engine.evaluation.fleet.driver import Fleet
from atts_engine.evaluation.fleet.messages import Identity, Order, Remote, Snapshot, WorkerLost
from atts_engine.evaluation.fleet.worker import Worker

__all__ = ["Fleet", "Identity", "Order", "Remote", "Snapshot", "Worker", "WorkerLost"]
