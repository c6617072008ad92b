"""What a driver and its workers say to each other. All of it can be pickled."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from atts_engine.config import EngineConfig
from atts_engine.conformal import Calibrator, Meta, load_calibrator
from atts_engine.errors import AttsError, InputError
from atts_engine.evaluation.lanes import Counters
from atts_engine.pipeline import ATTSParams, Decision, Event, Problem, Task
from atts_engine.pipeline.gate import Place
from atts_engine.pipeline.shared_gate import GateMessage
from atts_engine.runtime import Rates


class WorkerLost(AttsError):
    """A worker cannot be asked any more: its process, its host or its engine has failed."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What a worker is: its code, the conditions that its scores are taken under, its lanes.

    version: of this package; rates, servers, counters: `AsyncEngine.rates`, `servers` and `stats` at the start.
    """

    version: str
    meta: Meta
    rates: Mapping[str, Rates]
    servers: Mapping[str, dict[str, Any]]
    counters: Mapping[str, Counters]

    def differences(self, expect: Identity) -> list[str]:
        """One "field: is X, expected Y" for each condition that differs from those of another worker."""
        found = [] if self.version == expect.version else [f"version: is {self.version}, expected {expect.version}"]
        return found + self.meta.differences(expect.meta)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A frozen calibration as it travels: the bytes of its file, and their sha256 (hex), which is its version."""

    sha256: str
    data: bytes

    @classmethod
    def of(cls, calibrator: Calibrator) -> Snapshot:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "calibration.npz"
            calibrator.save(path)
            data = path.read_bytes()
        return cls(hashlib.sha256(data).hexdigest(), data)

    def load(self, expect: Meta) -> Calibrator:
        """The calibrator, frozen. `InputError` for bytes that are not those that were sent, `StateError` where it was
        made under other conditions."""
        if (found := hashlib.sha256(self.data).hexdigest()) != self.sha256:
            raise InputError(f"the calibration arrived as {found[:12]}, but {self.sha256[:12]} was sent; run it again")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "calibration.npz"
            path.write_bytes(self.data)
            return load_calibrator(path, expect, frozen=True)


@dataclass(frozen=True, slots=True)
class Order:
    """Chains to write. chains: their numbers, None for all. shared: verdicts are asked of the driver; otherwise the
    worker gives them, by the snapshot that it holds where the strategy is calibrated."""

    problem: Problem
    params: ATTSParams
    chains: tuple[int, ...] | None
    task: Task | None
    shared: bool


@dataclass(frozen=True, slots=True)
class Answer:
    place: Place
    decision: Decision


@dataclass(frozen=True, slots=True)
class Counted:
    """`AsyncEngine.stats` of the worker, told before each solution."""

    counters: Mapping[str, Counters]


Message = Event | Decision | GateMessage | Counted
"""From a worker: in order; a chain's decisions come before its `ChainEvent`, `SolutionEvent` is the last."""


class Remote(Protocol):
    """A worker as its driver sees it. Every method raises `WorkerLost` where the worker is gone, and `LaneError` where
    its engine has failed."""

    async def open(self, config: EngineConfig, params: ATTSParams) -> Identity:
        """Make the engine. Errors of `AsyncEngine.create`."""
        ...

    async def hold(self, snapshot: Snapshot) -> None:
        """Load a frozen calibration, for all orders from now on that are not shared. Errors of `Snapshot.load`."""
        ...

    async def start(self, number: int, order: Order) -> None:
        """Begin an order under a number that no other order has."""
        ...

    async def exchange(self, number: int, answers: Sequence[Answer]) -> list[Message]:
        """Bring answers to what was asked, and wait for what the order has to say: one message or more. Errors of
        `AsyncEngine.generate`, once all messages before them were told."""
        ...

    async def stop(self, number: int) -> None:
        """Cancel the order, if it still runs."""
        ...

    async def close(self) -> None:
        """End the worker."""
        ...
