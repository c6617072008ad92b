"""A scheduler thread drives one lane or several; asyncio stays outside."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence

from atts_engine.errors import LaneError
from atts_engine.runtime.lane import DecisionListener, LaneCore

_POLL_S = 50e-6
"""How long a thread with several lanes sleeps while all of them wait for their devices. A wait for one lane's event
would leave the other lane's device idle."""


class Mailbox:
    """Hands calls from scheduler threads to an event loop, with one wake-up for many; those of one thread in order."""

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
            try:
                call()
            except Exception as error:
                # As of a callback of the loop's own: it is told, and those behind it are for others.
                told = {"message": "what a lane handed over could not be taken", "exception": error}
                self._loop.call_exception_handler(told)


class EngineLoop:
    """Runs posted calls and lane steps in turns until it is stopped.

    A lane belongs to one loop: its core is touched by that loop's thread alone, and its listener is called there.
    """

    def __init__(self, lanes: Sequence[tuple[LaneCore, DecisionListener]]) -> None:
        self._lanes = lanes
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        name = "+".join(lane.name for lane, _ in lanes)
        self._thread = threading.Thread(target=self._run, name=f"atts-{name}", daemon=True)

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
        alone = len(self._lanes) == 1
        while self._accept():
            worked = False
            for lane, listener in self._lanes:
                worked |= lane.step(listener, wait=alone)
            if not worked:
                # In flight and not worked: every device is busy, and there is nothing to launch behind that.
                timeout = _POLL_S if any(lane.in_flight for lane, _ in self._lanes) else None
                with self._wake:
                    self._wake.wait_for(lambda: self._inbox or self._stopping, timeout)
        for lane, _ in self._lanes:
            lane.fail(LaneError("the engine was closed"))

    def _accept(self) -> bool:
        with self._wake:
            calls, self._inbox = self._inbox, deque()
            stopping = self._stopping
        for call in calls:
            try:
                call()
            except Exception as error:
                # A call that fails has left a lane in an unknown state, and this thread must live to say so.
                for lane, _ in self._lanes:
                    lane.fail(LaneError(f"{lane.name} lane failed: {type(error).__name__}: {error}"), error)
        return not stopping
