"""The worker's side: one engine, orders from a driver."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace

from atts_engine import __version__
from atts_engine.config import EngineConfig
from atts_engine.conformal import Calibrator
from atts_engine.engine import AsyncEngine
from atts_engine.evaluation.fleet.messages import Answer, Counted, Identity, Message, Order, Snapshot
from atts_engine.pipeline import ATTSParams, Decision, SolutionEvent
from atts_engine.pipeline.shared_gate import SharedGate


class Worker:
    """A `Remote` in this process. Everything runs on one event loop, that of `open`."""

    def __init__(self) -> None:
        self._running: dict[int, _Running] = {}
        self._calibrator: Calibrator | None = None

    async def open(self, config: EngineConfig, params: ATTSParams) -> Identity:
        self._engine = engine = await AsyncEngine.create(config)
        self._params = params
        engine.add_decision_listener(self._decided)
        rates = await engine.rates()
        return Identity(__version__, engine.calibration_meta(params), rates, engine.servers(), engine.stats())

    async def hold(self, snapshot: Snapshot) -> None:
        meta = replace(self._engine.calibration_meta(self._params), alpha=self._params.alpha)
        self._calibrator = snapshot.load(meta)

    async def start(self, number: int, order: Order) -> None:
        running = self._running[number] = _Running(order)
        running.task = asyncio.create_task(self._run(running))

    async def exchange(self, number: int, answers: Sequence[Answer]) -> list[Message]:
        running = self._running[number]
        for answer in answers:
            running.gate.answer(answer.place, answer.decision)
        said = [await running.said.get()]
        while not running.said.empty():
            said.append(running.said.get_nowait())
        messages = [message for message in said if not isinstance(message, Exception)]
        if isinstance(last := said[-1], Exception):
            if not messages:
                del self._running[number]
                raise last
            running.said.put_nowait(last)
        elif isinstance(last, SolutionEvent):
            del self._running[number]
        return messages

    async def stop(self, number: int) -> None:
        running = self._running.pop(number, None)
        if running is not None and running.task is not None:
            running.task.cancel()
            await asyncio.gather(running.task, return_exceptions=True)

    async def close(self) -> None:
        for number in tuple(self._running):
            await self.stop(number)
        await self._engine.close()

    async def _run(self, running: _Running) -> None:
        order = running.order
        stream = self._engine.generate(
            order.problem,
            order.params,
            calibrator=self._calibrator,
            chains=order.chains,
            task=order.task,
            gate=running.gate if order.shared else None,
        )
        try:
            async with aclosing(stream) as events:
                async for event in events:
                    if isinstance(event, SolutionEvent):
                        running.said.put_nowait(Counted(self._engine.stats()))
                    running.said.put_nowait(event)
        except Exception as error:
            running.said.put_nowait(error)

    def _decided(self, decision: Decision) -> None:
        # A decision that comes when its order has been stopped is nobody's: a frozen calibration loses nothing by it.
        for running in self._running.values():
            if running.order.problem.id == decision.problem:
                running.said.put_nowait(decision)


class _Running:
    def __init__(self, order: Order) -> None:
        self.order = order
        self.said: asyncio.Queue[Message | Exception] = asyncio.Queue()
        self.gate = SharedGate(self.said.put_nowait)
        self.task: asyncio.Task[None] | None = None
