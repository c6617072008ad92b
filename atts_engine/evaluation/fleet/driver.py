"""The driver's side: many workers, seen as the one engine that `run_job` asks for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from atts_engine.config import EngineConfig
from atts_engine.conformal import Calibrator, Meta
from atts_engine.errors import InputError, LaneError
from atts_engine.evaluation.fleet.messages import Answer, Counted, Identity, Order, Remote, Snapshot, WorkerLost
from atts_engine.evaluation.job import CutOff
from atts_engine.evaluation.lanes import Counters
from atts_engine.pipeline import (
    ATTSParams,
    Chain,
    ChainEvent,
    ConformalGate,
    Decision,
    Event,
    PlainTask,
    Problem,
    Solution,
    SolutionEvent,
    Task,
    tally,
    winner,
)
from atts_engine.pipeline.shared_gate import Asked, Began, Ended, Entered, Left, take
from atts_engine.runtime import Rates

ATTEMPTS = 3
"""Workers that a problem may lose before its chains fail."""

RESTARTS = 3
"""Times that one worker is started again before it is given up."""

REOPEN_S = 900.0
"""Seconds that a worker which is started again may take; a host that went for good would let it wait for ever."""


class Fleet:
    """Made by `await Fleet.create(...)` for one job; belongs to that event loop. Close it or use `async with`.

    Each problem goes to the worker with the fewest. A calibration that learns stays here, and every verdict is asked of
    it, so there is one order of decisions and one store; a frozen one is sent to each worker once. A worker that is
    lost is started again, and its chains that had not ended are given to another; a chain counts once, whoever sent it.
    """

    def __init__(self, places: Sequence[_Place]) -> None:
        self._places = places
        self._listeners: list[Callable[[Decision], None]] = []
        self._gate: ConformalGate | None = None
        self._snapshot: tuple[Calibrator, Snapshot] | None = None
        self._orders = 0
        self._decisions = 0

    @classmethod
    async def create(
        cls, launch: Callable[[], Remote], workers: int, config: EngineConfig, params: ATTSParams
    ) -> Fleet:
        """Start `workers` engines. launch: makes a worker that is not open yet.

        Errors of `AsyncEngine.create`; `LaneError` for a worker that is lost meanwhile, `InputError` where two workers
        differ in what decides a score.
        """
        places = [_Place(number, launch, config, params) for number in range(workers)]
        fleet = cls(places)
        try:
            errors = await asyncio.gather(*(place.open() for place in places), return_exceptions=True)
            for place, error in zip(places, errors, strict=True):
                if isinstance(error, WorkerLost):
                    raise LaneError(f"worker {place.number} was lost while it started: {error}") from error
                if error is not None:
                    raise error
            for place in places:
                _check_same(place.identity, places[0].identity, place.number)
        except BaseException:
            await fleet.close()
            raise
        return fleet

    async def generate(
        self,
        problem: Problem,
        params: ATTSParams,
        *,
        calibrator: Calibrator | None,
        chains: Sequence[int] | None,
        task: Task | None,
    ) -> AsyncGenerator[Event | CutOff, None]:
        """As `AsyncEngine.generate`, and a `CutOff` of chains that a worker was lost with. Chains whose workers were
        lost `ATTEMPTS` times end with an error. `LaneError` when no worker is left."""
        if calibrator is None and params.settings.calibrated:
            raise InputError(f"{params.strategy} on many workers needs a calibrator: their own would all differ")
        began = time.perf_counter()
        numbers = tuple(range(params.chains) if chains is None else chains)
        ended: dict[int, Chain] = {}
        losses: list[str] = []
        while len(losses) < ATTEMPTS:
            left = chains
            if losses and params.settings.per_chain:
                left = [number for number in numbers if number not in ended]
                if not left:
                    break
            place = await self._freest()
            order = Order(
                problem,
                params,
                None if left is None else tuple(left),
                task,
                calibrator is not None and not calibrator.frozen,
            )
            stream = self._attempt(place, order, calibrator)
            try:
                async with aclosing(stream) as events:
                    async for event in events:
                        if isinstance(event, SolutionEvent):
                            solution = event.solution
                            if losses:
                                solution = _whole(solution, ended, params, task, time.perf_counter() - began)
                            yield SolutionEvent(solution)
                            return
                        if isinstance(event, ChainEvent):
                            if event.chain.chain in ended:
                                continue
                            ended[event.chain.chain] = event.chain
                        yield event
            except (WorkerLost, LaneError) as error:
                losses.append(f"worker {place.number}: {error}")
                yield CutOff(problem.id, tuple(number for number in numbers if number not in ended))
        for number in numbers:
            if number not in ended:
                ended[number] = _failed(problem, number, params, losses)
                yield ChainEvent(ended[number])
        empty = Solution(problem.id, None, {}, (), 0.0)
        yield SolutionEvent(_whole(empty, ended, params, task, time.perf_counter() - began))

    async def _attempt(self, place: _Place, order: Order, calibrator: Calibrator | None) -> AsyncGenerator[Event, None]:
        number = self._orders = self._orders + 1
        worker = place.worker
        assert worker is not None
        gate = self._gate_of(calibrator, order.params) if calibrator is not None and order.shared else None
        open_problem = False
        place.orders += 1
        try:
            if calibrator is not None and calibrator.frozen:
                await place.hold(self._snapshot_of(calibrator))
            await worker.start(number, order)
            answers: list[Answer] = []
            while True:
                messages, answers = await worker.exchange(number, answers), []
                for message in messages:
                    match message:
                        case Counted(counters):
                            place.counted(counters)
                        case Decision():
                            self._heard(message, calibrator)
                        case SolutionEvent():
                            yield message
                            return
                        case Began() | Entered() | Asked() | Left() | Ended():
                            assert gate is not None
                            decision = take(gate, message)
                            if isinstance(message, Asked) and decision is not None:
                                answers.append(Answer(message.place, decision))
                            open_problem = isinstance(message, Began) or (
                                open_problem and not isinstance(message, Ended)
                            )
                        case _:
                            yield message
        except (WorkerLost, LaneError) as error:
            place.lost(worker, str(error))
            raise
        finally:
            place.orders -= 1
            if gate is not None and open_problem:
                gate.end(order.problem.id)
            with suppress(WorkerLost, LaneError):
                await worker.stop(number)

    def add_decision_listener(self, listener: Callable[[Decision], None]) -> Callable[[], None]:
        """Have `listener` called with every verdict, in the order that the driver gives them and numbers them by."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def calibration_meta(self, params: ATTSParams) -> Meta:
        """As `AsyncEngine.calibration_meta`; `params` are those of `create`."""
        return self._places[0].identity.meta

    def restart_peaks(self) -> None:
        """Nothing: a fleet is made for one job, and its peaks count from each worker's start."""

    def stats(self) -> dict[str, Counters]:
        """`AsyncEngine.stats` of each worker's lanes, named "draft 0", "target 0", "draft 1", ..., as of the last
        problem that it solved. A worker that was started again goes on counting."""
        return {f"{lane} {p.number}": counters for p in self._places for lane, counters in p.stats().items()}

    async def rates(self) -> dict[str, Rates]:
        """As `AsyncEngine.rates`, under the names of `stats`; measured when each worker began."""
        return {f"{lane} {p.number}": rates for p in self._places for lane, rates in p.identity.rates.items()}

    def servers(self) -> dict[str, dict[str, Any]]:
        """As `AsyncEngine.servers`, under the names of `stats`; as each worker found them when it began."""
        return {f"{lane} {p.number}": about for p in self._places for lane, about in p.identity.servers.items()}

    async def close(self) -> None:
        """End all workers."""
        await asyncio.gather(*(place.close() for place in self._places))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _freest(self) -> _Place:
        """The open worker with the fewest orders; waits for one that is being started again where there is no other."""
        while True:
            if open_places := [place for place in self._places if place.worker is not None]:
                return min(open_places, key=lambda place: place.orders)
            reopening = [place.reopening for place in self._places if place.reopening is not None]
            if not reopening:
                raise LaneError(f"all workers were lost, the last one: {self._places[-1].why}")
            await asyncio.wait(reopening, return_when=asyncio.FIRST_COMPLETED)

    def _gate_of(self, calibrator: Calibrator, params: ATTSParams) -> ConformalGate:
        if self._gate is None or self._gate.calibrator is not calibrator:
            self._gate = ConformalGate.under(params.policy, calibrator, self._announce)
        return self._gate

    def _snapshot_of(self, calibrator: Calibrator) -> Snapshot:
        if self._snapshot is None or self._snapshot[0] is not calibrator:
            self._snapshot = calibrator, Snapshot.of(calibrator)
        return self._snapshot[1]

    def _heard(self, decision: Decision, calibrator: Calibrator | None) -> None:
        """A worker's own verdict. It moves no calibration, but whoever watches its p-values is told."""
        if calibrator is not None:
            takeover = decision.verdict == "takeover"
            calibrator.observe(decision.score, decision.key, takeover, decision.problem, decision.p_value)
        self._announce(decision)

    def _announce(self, decision: Decision) -> None:
        decision = replace(decision, decision_seq=self._decisions, batch=self._decisions)
        self._decisions += 1
        for listener in tuple(self._listeners):
            listener(decision)


class _Place:
    """Where a worker is, or will be again. worker: None while it is not open."""

    def __init__(self, number: int, launch: Callable[[], Remote], config: EngineConfig, params: ATTSParams) -> None:
        self.number = number
        self.orders = 0
        self.worker: Remote | None = None
        self.reopening: asyncio.Task[None] | None = None
        self.why = ""
        self._launch = launch
        self._config = config
        self._params = params
        self._restarts = 0
        self._held: tuple[Remote, str] | None = None
        self._holding = asyncio.Lock()
        self._past: list[Mapping[str, Counters]] = []
        self._counters: Mapping[str, Counters] = {}

    async def open(self, expect: Identity | None = None) -> None:
        """expect: what the worker must be, as `_check_same` compares it."""
        worker = self._launch()
        try:
            identity = await worker.open(self._config, self._params)
            if expect is not None:
                _check_same(identity, expect, self.number)
        except BaseException:
            with suppress(WorkerLost, LaneError):
                await worker.close()
            raise
        self.identity, self._counters, self.worker = identity, identity.counters, worker

    async def hold(self, snapshot: Snapshot) -> None:
        """Send the calibration, unless the worker has it."""
        async with self._holding:
            worker = self.worker
            if worker is None:
                raise WorkerLost(self.why)
            if self._held != (worker, snapshot.sha256):
                await worker.hold(snapshot)
                self._held = worker, snapshot.sha256

    def counted(self, counters: Mapping[str, Counters]) -> None:
        self._counters = counters

    def lost(self, worker: Remote, why: str) -> None:
        """The worker has failed an order: start another in its place, once for all its orders."""
        if worker is self.worker:
            self.worker, self.why = None, why
            self._past.append(self._counters)
            self.reopening = asyncio.create_task(self._reopen(worker))

    async def _reopen(self, old: Remote) -> None:
        try:
            with suppress(WorkerLost, LaneError):
                await old.close()
            while self.worker is None and self._restarts < RESTARTS:
                self._restarts += 1
                try:
                    async with asyncio.timeout(REOPEN_S):
                        await self.open(self.identity)
                except TimeoutError:
                    self.why = f"it did not start again within {REOPEN_S:g} seconds"
                except (WorkerLost, LaneError, InputError) as error:
                    self.why = str(error)
        finally:
            self.reopening = None

    def stats(self) -> dict[str, Counters]:
        lives = [*self._past, self._counters] if self.worker is not None else self._past
        return {lane: _summed([life[lane] for life in lives]) for lane in lives[-1]}

    async def close(self) -> None:
        if self.reopening is not None:
            self.reopening.cancel()
            await asyncio.gather(self.reopening, return_exceptions=True)
        if self.worker is not None:
            worker, self.worker = self.worker, None
            with suppress(WorkerLost, LaneError):
                await worker.close()


def _summed(lives: Sequence[Counters]) -> Counters:
    """Counters of one lane over the lives of its worker; peaks are the highest, not the sum."""
    return {name: (max if name.startswith("peak") else sum)(life[name] for life in lives) for name in lives[-1]}


def _check_same(identity: Identity, expect: Identity, number: int) -> None:
    if differences := identity.differences(expect):
        raise InputError(
            f"worker {number} differs from the others ({'; '.join(differences)}): give every host the same models and "
            "the same version of atts-engine"
        )


def _failed(problem: Problem, number: int, params: ATTSParams, losses: Sequence[str]) -> Chain:
    return Chain(
        problem.id,
        problem.index,
        number,
        problem.answer,
        None,
        0.0,
        (),
        strategy=params.strategy,
        finish="error",
        error=f"{len(losses)} workers were lost with this problem, the last one {losses[-1]}",
    )


def _whole(
    solution: Solution, ended: Mapping[int, Chain], params: ATTSParams, task: Task | None, duration_s: float
) -> Solution:
    """The solution of a problem that took several workers: a chain that had ended stands as it was, the time is that
    since the first began, and chains that do not depend on one another vote anew."""
    chains = tuple(ended[number] for number in sorted(ended))
    solution = replace(solution, chains=chains, duration_s=duration_s)
    if params.settings.per_chain or not solution.votes:
        votes = tally(chains, params.vote, (task or PlainTask()).equal)
        solution = replace(solution, votes=votes, answer=winner(votes))
    return solution
