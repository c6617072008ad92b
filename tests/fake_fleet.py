"""Workers without models, as a driver sees them: real `Worker`s over an engine of random scores, and their faults."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import numpy as np

from atts_engine import __version__
from atts_engine.config import EngineConfig
from atts_engine.conformal import Calibrator, Meta
from atts_engine.evaluation.fleet import Fleet, Identity, Remote, Worker, WorkerLost
from atts_engine.evaluation.fleet.messages import Answer, Message, Order, Snapshot
from atts_engine.evaluation.lanes import COUNTED, TIMED
from atts_engine.pipeline import (
    ATTSParams,
    Chain,
    ChainEvent,
    ConformalGate,
    Decision,
    Event,
    Problem,
    Solution,
    SolutionEvent,
    Task,
    Turn,
)
from atts_engine.pipeline.gate import Gate, Place
from atts_engine.runtime import Rates, SpanResult

META = Meta(draft="d", target="t")
CONFIG = EngineConfig("tiny-draft", "tiny-target")


class _Lane:
    def __init__(self, score: float) -> None:
        self._score = score

    async def verdict(self, seq: object, request: object) -> SpanResult:
        return SpanResult(-self._score, 1, self._score)


class GatedEngine:
    """Scores depend on (seed, problem, chain, turn) alone, verdicts on the gate; chains of a problem take turns."""

    def __init__(self) -> None:
        self.listeners: list[Callable[[Decision], None]] = []
        self.steps = 0

    async def generate(
        self,
        problem: Problem,
        params: ATTSParams,
        *,
        calibrator: Calibrator | None,
        chains: Sequence[int] | None,
        task: Task | None,
        gate: Gate | None = None,
    ) -> AsyncGenerator[Event, None]:
        if gate is None:
            assert calibrator is not None and calibrator.frozen
            gate = ConformalGate.under(params.policy, calibrator, self.listeners[0])
        numbers = range(params.chains) if chains is None else chains
        gate.begin(problem.id, numbers)
        tasks = [asyncio.create_task(self._chain(problem, n, params, gate)) for n in numbers]
        ended = []
        try:
            for chain in asyncio.as_completed(tasks):
                ended.append(await chain)
                yield ChainEvent(ended[-1])
        finally:
            for running in tasks:
                running.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            gate.end(problem.id)
        yield SolutionEvent(Solution(problem.id, None, {}, tuple(ended), 1.0))

    async def _chain(self, problem: Problem, number: int, params: ATTSParams, gate: Gate) -> Chain:
        rng = random.Random(f"{params.seed}/{problem.id}/{number}")
        turns = []
        for turn in range(rng.randint(1, 4)):
            place = Place(problem.id, number, turn)
            gate.enter(place)
            self.steps += 1
            for _ in range(rng.randint(0, 4)):
                await asyncio.sleep(0)
            score = float(np.float32(rng.expovariate(1.0)))
            if isinstance(gate, ConformalGate):
                decision = gate.decide(score, place, gate.calibrator.key_of(turn), place.uniform(params.seed))
            else:
                decision = (await gate.ask(_Lane(score), object(), place, params.seed)).decision  # type: ignore[arg-type]
            turns.append(
                Turn(turn, "x", 1, score=score, p_value=decision.p_value, takeover=decision.verdict == "takeover")
            )
        gate.leave(Place(problem.id, number, len(turns)))
        answer = str(rng.randint(0, 2))
        return Chain(problem.id, problem.index, number, None, answer, 1.0, tuple(turns))


class FakeWorker(Worker):
    """dies_after: exchanges after which it is lost, and every one that waits with it; 0: it never comes up. poison: a
    problem that it does not survive. again: every end of a chain is told twice."""

    def __init__(
        self, dies_after: int | None = None, *, poison: str = "", meta: Meta = META, again: bool = False
    ) -> None:
        super().__init__()
        self.orders: list[Order] = []
        self.snapshots: list[Snapshot] = []
        self.closed = False
        self._left = dies_after
        self._died = asyncio.Event()
        self._meta = meta
        self._again = again
        self._poison = poison

    async def open(self, config: EngineConfig, params: ATTSParams) -> Identity:
        if self._left == 0:
            raise WorkerLost("it never came up")
        self.fake = GatedEngine()
        self.fake.listeners.append(self._decided)
        stand_in: Any = self.fake
        stand_in.stats = self._stats
        self._engine = stand_in
        return Identity(__version__, self._meta, {"draft": Rates(1.0, 1.0)}, {}, self._stats())

    async def hold(self, snapshot: Snapshot) -> None:
        self.snapshots.append(snapshot)
        self._calibrator = snapshot.load(META)

    async def start(self, number: int, order: Order) -> None:
        self._check()
        self.orders.append(order)
        if order.problem.id == self._poison:
            self._left = 0
        self._check()
        await super().start(number, order)

    async def exchange(self, number: int, answers: Sequence[Answer]) -> list[Message]:
        self._check()
        if self._left is not None:
            self._left -= 1
            if self._left == 0:
                self._died.set()
        asked = asyncio.create_task(super().exchange(number, answers))
        died = asyncio.create_task(self._died.wait())
        await asyncio.wait([asked, died], return_when=asyncio.FIRST_COMPLETED)
        died.cancel()
        if not asked.done():
            asked.cancel()
            raise WorkerLost("its host is gone")
        told = asked.result()
        return [m for m in told for _ in range(1 + (self._again and isinstance(m, ChainEvent)))]

    async def stop(self, number: int) -> None:
        await super().stop(number)
        self._check()

    async def close(self) -> None:
        self.closed = True
        for number in tuple(self._running):
            await super().stop(number)

    def _check(self) -> None:
        if self._left == 0:
            raise WorkerLost("its host is gone")

    def _stats(self) -> dict[str, dict[str, float]]:
        counters = dict.fromkeys((*COUNTED, *(f"{name}_s" for name in TIMED)), 0.0)
        return {"draft": counters | {"steps": float(self.fake.steps), "peak_kv_bytes": 5.0}}


async def fleet_of(workers: Sequence[Remote], at_first: int, params: ATTSParams) -> Fleet:
    """`at_first` of the workers, the others for those that are lost; then `WorkerLost`."""
    waiting = iter(workers)
    return await Fleet.create(lambda: next(waiting, FakeWorker(0)), at_first, CONFIG, params)
