"""How a server that does not answer is asked again: when, by whom, and for how long.

All chains of a lane share what is known of its server. A request that fails is made again after a pause that doubles
(exponential back-off with full jitter). After `LIMIT` failures in a row the server counts as away, and the circuit is
open: one request at a time probes it, and the others wait for that one. When it has been away for longer than the
lane's patience, everybody who waits is told so at once.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self

from atts_engine.backends.remote.stats import RemoteStats
from atts_engine.errors import ChainError, Unreachable

LIMIT = 5
FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 8.0


class Patience:
    """With one server. server: its name in messages; patience_s: seconds without any answer. clock, sleep, draw
    (uniform in [0, 1)): for tests."""

    def __init__(
        self,
        server: str,
        patience_s: float,
        stats: RemoteStats,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self.server = server
        self.patience_s = patience_s
        self.stats = stats
        self.clock = clock
        self._sleep = sleep
        self._draw = draw
        self._failures = 0
        self._away_since: float | None = None
        self._failed_at = -math.inf
        self._last = ""
        self._retry_after: float | None = None
        self.given_up = 0
        """Times that somebody found the server to have been away for too long."""
        self.probe = asyncio.Lock()
        self._closed = asyncio.Event()

    @property
    def away(self) -> bool:
        """Whether one request at a time probes the server."""
        return self._failures >= LIMIT

    @property
    def over(self) -> bool:
        return self._away_since is not None and self.clock() - self._away_since >= self.patience_s

    def tries(self) -> Tries:
        return Tries(self)

    def answered(self) -> None:
        self._failures, self._away_since, self._retry_after = 0, None, None

    def asking(self) -> None:
        """A request is about to be made, or made again."""
        if not self.away and self.clock() - self._failed_at >= self.patience_s:
            # Nobody has asked since that failure: it says nothing of the time between. Told by when the next request
            # begins, not by when it fails: a silent server lets each one wait for as long as the patience.
            self._failures, self._away_since = 0, None

    def failed(self, error: Unreachable) -> None:
        now = self.clock()
        self._failures += 1
        self._failed_at = now
        self._last, self._retry_after = str(error).removeprefix(f"{self.server}: "), error.retry_after
        if self._away_since is None:
            self._away_since = now
        if self._failures == LIMIT:
            self.stats.breaker_opened += 1

    async def pause(self, failures: int) -> None:
        """Before a request that has failed so many times is made again."""
        longest = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(failures - 1, 16))
        seconds = max(self._draw() * longest, self._retry_after or 0.0)
        began = self.clock()
        try:
            # Whoever is out of patience says so then, not a long pause later.
            left = self.patience_s if self._away_since is None else self._away_since + self.patience_s - began
            await self._sleep_or_close(min(seconds, max(0.0, left)))
        finally:
            self.stats.waiting_s += self.clock() - began

    def close(self) -> None:
        """Nobody pauses any more: whoever waits finds the lane closed at once."""
        self._closed.set()

    async def _sleep_or_close(self, seconds: float) -> None:
        either = {asyncio.ensure_future(self._sleep(seconds)), asyncio.ensure_future(self._closed.wait())}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in either:
                one.cancel()

    async def pause_as_probe(self) -> None:
        await self.pause(self._failures)

    def gone(self) -> Unreachable:
        seconds = 0.0 if self._away_since is None else self.clock() - self._away_since
        return Unreachable(
            f"{self.server} has not answered for {seconds:.0f} seconds (last: {self._last}); see that it runs, and ask "
            "again",
            self._retry_after or LONGEST_PAUSE_S,
        )


class Tries:
    """One request, made until it is answered: `while not tries.done: async with tries: ...`.

    A block that ends with `Unreachable` counts as a failure, which is swallowed while there is patience. One that ends
    in any other way has its answer, and what it raises passes on.
    """

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._failures = 0
        self._since = 0.0
        self._probing = False
        self.done = False

    async def __aenter__(self) -> Self:
        patience = self._patience
        patience.asking()
        if self._failures:
            patience.stats.retries += 1
            if not patience.away:
                await patience.pause(self._failures)
        if patience.away:
            await self._take_turn()
        return self

    def answered(self) -> None:
        """The server has begun to answer: nobody needs to wait for the end of it."""
        self._patience.answered()
        self._failures = 0
        self._release()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        try:
            if isinstance(error, Unreachable):
                self._failed(error)
                return True
            if error is None or isinstance(error, ChainError):
                self.answered()
            self.done = True
            return False
        finally:
            self._release()

    def _failed(self, error: Unreachable) -> None:
        patience = self._patience
        patience.failed(error)
        self._failures += 1
        now = patience.clock()
        if self._failures == 1:
            self._since = now
        if patience.over:
            patience.given_up += 1
            patience.stats.failures += 1
            raise patience.gone() from error
        if now - self._since >= patience.patience_s:
            # Others are answered: it is this request that the server cannot do.
            patience.stats.failures += 1
            raise ChainError(f"{patience.server} failed one request {self._failures} times (last: {error})") from error

    async def _take_turn(self) -> None:
        patience, given_up = self._patience, self._patience.given_up
        began = patience.clock()
        await patience.probe.acquire()
        self._probing = True
        patience.stats.waiting_s += patience.clock() - began
        try:
            if patience.given_up != given_up:
                patience.stats.failures += 1
                raise patience.gone()
            if not patience.away:
                # It came back while this one waited.
                self._release()
            elif not patience.over:
                await patience.pause_as_probe()
        except BaseException:
            self._release()
            raise

    def _release(self) -> None:
        if self._probing:
            self._probing = False
            self._patience.probe.release()
