"""Retry, back-off and circuit breaking, on a clock that stands still unless somebody sleeps."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import Awaitable, Callable, Iterator
from email.utils import formatdate
from typing import Any

import pytest

from atts_engine.backends.remote.client import _seconds
from atts_engine.backends.remote.patience import FIRST_PAUSE_S, LIMIT, LONGEST_PAUSE_S, Patience
from atts_engine.backends.remote.stats import RemoteStats
from atts_engine.errors import ChainError, LaneError, Unreachable


class Clock:
    """Moves to the next sleeper's time when nobody can run. slept: how long each slept, in order."""

    def __init__(self) -> None:
        self.now, self.slept = 0.0, list[float]()
        self._sleepers: list[tuple[float, int, asyncio.Event]] = []
        self._order = itertools.count()

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        woken = asyncio.Event()
        heapq.heappush(self._sleepers, (self.now + seconds, next(self._order), woken))
        await woken.wait()

    async def run(self, *work: Awaitable[Any]) -> list[Any]:
        """Results or errors of what is to be done."""
        tasks = [asyncio.ensure_future(one) for one in work]
        while not all(task.done() for task in tasks):
            for _ in range(20):
                await asyncio.sleep(0)
            if self._sleepers and not all(task.done() for task in tasks):
                self.now, _, woken = heapq.heappop(self._sleepers)
                woken.set()
        return await asyncio.gather(*tasks, return_exceptions=True)


class Server:
    """Answers as `script` has it: an error to raise, or a value; what is last goes on."""

    def __init__(self, clock: Clock, *script: Any, takes_s: float = 0.0) -> None:
        self.clock, self.takes_s = clock, takes_s
        self.script: Iterator[Any] = itertools.chain(script[:-1], itertools.repeat(script[-1]))
        self.asked: list[float] = []
        self.running = self.most = 0

    async def ask(self) -> Any:
        self.asked.append(self.clock.now)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            if self.takes_s:
                await self.clock.sleep(self.takes_s)
            answer = next(self.script)
            if isinstance(answer, Exception):
                raise answer
            return answer
        finally:
            self.running -= 1


AWAY = Unreachable("connection refused")


def patience_on(clock: Clock, *, draw: Callable[[], float] = lambda: 1.0, patience_s: float = 60.0) -> Patience:
    return Patience("vllm://box/m", patience_s, RemoteStats(), clock=clock, sleep=clock.sleep, draw=draw)


async def made(patience: Patience, ask: Callable[[], Awaitable[Any]]) -> Any:
    tries = patience.tries()
    while not tries.done:
        async with tries:
            answer = await ask()
    return answer


def test_pauses_double_up_to_a_bound_with_full_jitter() -> None:
    async def run(draw: float) -> list[float]:
        clock = Clock()
        server = Server(clock, *[AWAY] * 9, "here")
        assert await clock.run(made(patience_on(clock, draw=lambda: draw), server.ask)) == ["here"]
        return clock.slept

    bounds = [min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0**n) for n in range(9)]
    assert asyncio.run(run(1.0)) == pytest.approx(bounds)
    assert asyncio.run(run(0.25)) == pytest.approx([bound / 4 for bound in bounds])


def test_a_server_may_say_when() -> None:
    async def run() -> None:
        clock = Clock()
        patience = patience_on(clock, draw=lambda: 0.0)
        server = Server(clock, Unreachable("429", 3.0), AWAY, "here")
        assert await clock.run(made(patience, server.ask)) == ["here"]
        assert server.asked == [0.0, 3.0, 3.0] and patience.stats.retries == 2 and patience.stats.waiting_s == 3.0

    asyncio.run(run())
    assert _seconds("7") == 7.0 and _seconds("soon") is None and _seconds(None) is None
    assert _seconds("inf") is _seconds("1e400") is _seconds("nan") is None  # a reply quotes it as a whole number
    assert _seconds(formatdate(time.time() + 30, usegmt=True)) == pytest.approx(30, abs=2)


def test_one_at_a_time_probes_a_server_that_is_away() -> None:
    async def run() -> None:
        clock = Clock()
        patience = patience_on(clock)
        server = Server(clock, *[AWAY] * (LIMIT + 4), "here", takes_s=0.01)
        answers = await clock.run(*(made(patience, server.ask) for _ in range(LIMIT)))
        # All failed once side by side, which opened the circuit; the rest of the failures were probes.
        assert answers == ["here"] * LIMIT and patience.stats.breaker_opened == 1
        probes = server.asked[LIMIT : LIMIT + 5]
        assert server.most == LIMIT and probes == sorted(set(probes))
        # Whoever waited goes on at once when the probe is answered, and together.
        assert max(server.asked[LIMIT + 5 :]) - probes[-1] < 0.05

    asyncio.run(run())


def test_all_who_wait_are_told_at_once_when_patience_ends() -> None:
    async def run() -> None:
        clock = Clock()
        patience = patience_on(clock, patience_s=20.0)
        server = Server(clock, AWAY)
        ended: list[float] = []

        async def chain() -> None:
            try:
                await made(patience, server.ask)
            finally:
                ended.append(clock.now)

        errors = await clock.run(*(chain() for _ in range(30)))
        assert {type(error) for error in errors} == {Unreachable}
        said = (
            "vllm://box/m has not answered for 20 seconds (last: connection refused); see that it runs, and ask again"
        )
        assert {str(e) for e in errors} == {said} and {e.retry_after for e in errors} == {LONGEST_PAUSE_S}
        assert ended == [20.0] * 30 and patience.stats.failures == 30
        # Whoever comes later tries once, and is told at once.
        asked = len(server.asked)
        (late,) = await clock.run(chain())
        assert isinstance(late, LaneError) and len(server.asked) == asked + 1 and ended[-1] == 20.0

    asyncio.run(run())


def test_a_request_that_fails_while_others_are_answered_ends_its_chain_alone() -> None:
    async def run() -> None:
        clock = Clock()
        patience = patience_on(clock, patience_s=20.0)
        good, bad = Server(clock, "here"), Server(clock, Unreachable("500 assertion"))

        async def others() -> int:
            for _ in range(60):
                await made(patience, good.ask)
                await clock.sleep(0.5)
            return len(good.asked)

        found, error = await clock.run(others(), made(patience, bad.ask))
        assert found == 60 and isinstance(error, ChainError) and "500 assertion" in str(error)

    asyncio.run(run())


def test_refusals_are_answers() -> None:
    async def run() -> None:
        clock = Clock()
        patience = patience_on(clock)
        refusal = ChainError("400 too long")
        for _ in range(LIMIT + 1):
            server = Server(clock, AWAY, refusal)
            assert await clock.run(made(patience, server.ask)) == [refusal]
        assert patience.stats.breaker_opened == 0

    asyncio.run(run())


def test_a_probe_that_is_cancelled_leaves_its_turn_to_the_next() -> None:
    async def run() -> None:
        clock = Clock()
        patience = patience_on(clock)
        server = Server(clock, *[AWAY] * LIMIT, "here")
        for _ in range(LIMIT):
            patience.failed(AWAY)
        never = asyncio.Event()

        async def stuck() -> None:
            await never.wait()

        probe = asyncio.ensure_future(made(patience, stuck))
        waiter = asyncio.ensure_future(made(patience, Server(clock, "here").ask))

        async def cancel() -> None:
            await clock.sleep(30.0)
            assert not waiter.done()
            probe.cancel()

        answers = await clock.run(probe, waiter, cancel())
        assert isinstance(answers[0], asyncio.CancelledError) and answers[1] == "here"
        assert not patience.away
        assert server.running == 0

    asyncio.run(run())


def test_counters() -> None:
    now = [0.0]
    stats = RemoteStats(clock=lambda: now[0])
    with stats.request():
        now[0] = 2.0
        with stats.request():
            now[0] = 3.0
            assert stats.as_dict()["busy_s"] == 3.0 and stats.in_flight == 2
    now[0] = 10.0
    stats.sent(10, None)
    stats.sent(20, 16, score=True)
    counted = stats.as_dict()
    assert counted["busy_s"] == 3.0 and counted["requests"] == 2 and counted["in_flight"] == 0
    assert counted["sent_tokens"] == 30 and counted["told_tokens"] == counted["score_sent_tokens"] == 20
    assert counted["cached_tokens"] == counted["score_cached_tokens"] == 16


def test_a_failure_long_ago_is_not_held_against_the_server() -> None:
    """Who met it was cancelled before the server was asked again."""

    async def run() -> None:
        clock = Clock()
        patience = patience_on(clock)
        tries = patience.tries()
        async with tries:
            raise AWAY
        clock.now = 3600.0
        server = Server(clock, AWAY, "here")
        assert await clock.run(made(patience, server.ask)) == ["here"]
        assert patience.stats.failures == 0

    asyncio.run(run())


def test_a_server_that_is_silent_for_the_whole_patience_is_away() -> None:
    """Each failure comes a patience after the one before; that is no time in which nobody asked."""

    async def run() -> None:
        clock = Clock()
        patience = patience_on(clock)
        (error,) = await clock.run(made(patience, Server(clock, AWAY, takes_s=60.0).ask))
        assert isinstance(error, LaneError) and "has not answered" in str(error)

    asyncio.run(run())
