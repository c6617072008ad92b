"""One scheduler thread drives every lane of an engine; asyncio stays outside."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable

from atts_engine.errors import LaneError
from atts_engine.runtime.lane import DecisionListener, LaneCore


class Mailbox:
    """Hands calls from the scheduler thread to an event loop, in order, with one wake-up for many."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._calls: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()
        self._scheduled = False

    def post(self, call: Callable[[], None]) -> None:
        with self._lock:
            self._calls.append(call)
            if self._scheduled:
                return
            self._scheduled = True
        try:
            self._loop.call_soon_threadsafe(self._drain)
        except RuntimeError:
            # The event loop is closed: nobody is left to hear it.
            return

    def _drain(self) -> None:
        with self._lock:
            calls, self._calls = self._calls, deque()
            self._scheduled = False
        for call in calls:
            call()


class EngineLoop:
    """Runs posted calls and lane steps in turns until it is stopped."""

    def __init__(self, lanes: list[tuple[LaneCore, DecisionListener]]) -> None:
        self._lanes = lanes
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="atts-scheduler", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def post(self, call: Callable[[], None]) -> bool:
        """Have `call` run between two steps; False when the loop has ended and never will."""
        with self._wake:
            if self._stopping:
                return False
            self._inbox.append(call)
            self._wake.notify()
            return True

    def stop(self) -> None:
        """End the thread; sequences that are still open end with a `LaneError`."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        while self._accept():
            worked = False
            for lane, listener in self._lanes:
                worked |= lane.step(listener)
            if not worked:
                with self._wake:
                    self._wake.wait_for(lambda: self._inbox or self._stopping)
        for lane, _ in self._lanes:
            lane.fail(LaneError("the engine was closed"))

    def _accept(self) -> bool:
        with self._wake:
            calls, self._inbox = self._inbox, deque()
            stopping = self._stopping
        for call in calls:
            call()
        return not stopping
