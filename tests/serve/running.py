"""A real uvicorn on a loopback port, in a thread of its own, with the built-in pair behind it."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import uvicorn

from atts_engine import AsyncEngine, ATTSParams, EngineConfig
from atts_engine.conformal import Calibrator
from atts_engine.serve import ServerSettings, Tracing, create_app
from atts_engine.serve.service import Service

T = TypeVar("T")

MODEL = "tiny-pair"
PARAMS = ATTSParams(chains=3, turns=8, draft_tokens=24, target_tokens=24)
CONFIG = EngineConfig("tiny-draft", "tiny-target", kv_tokens=16384, threads=1)
SETTINGS = ServerSettings(MODEL, PARAMS, measure_rates=False)
QUESTION = "a = 85; b = a-43; c = b+11; c?"


class Running:
    """The server's parts, for a test on another thread to look at."""

    def __init__(self) -> None:
        self.url = ""
        self.engine: AsyncEngine
        self.service: Service
        self.server: uvicorn.Server
        self.loop: asyncio.AbstractEventLoop
        self.failure: BaseException | None = None

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run it on the server's event loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)

    def tasks(self) -> int:
        """How many asyncio tasks there are beside the one that counts."""

        async def count() -> int:
            return len(asyncio.all_tasks()) - 1

        return self.call(count())

    def open_sequences(self) -> dict[str, float]:
        return {name: lane["open_sequences"] for name, lane in self.engine.stats().items()}

    def used_pages(self) -> dict[str, float]:
        return {name: lane["used_pages"] for name, lane in self.engine.stats().items()}


def until(true: Callable[[], bool], seconds: float = 30.0) -> bool:
    """Whether it becomes true; generous, since nothing is timed here."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


@contextmanager
def serving(
    *,
    calibrator: Callable[[], Calibrator] | None = None,
    tracing: Tracing | None = None,
    config: EngineConfig = CONFIG,
    **settings: Any,
) -> Iterator[Running]:
    """A server while the block runs. settings: that differ from `SETTINGS`."""
    running, ready = Running(), threading.Event()

    async def main() -> None:
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        running.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        running.loop = asyncio.get_running_loop()
        async with await AsyncEngine.create(config) as engine:
            made = None if calibrator is None else calibrator()
            app = create_app(engine, replace(SETTINGS, **settings), calibrator=made, tracing=tracing)
            running.engine, running.service = engine, app.state.service
            running.server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=10))
            task = asyncio.create_task(running.server.serve(sockets=[listener]))
            while not running.server.started and not task.done():
                await asyncio.sleep(0.01)
            ready.set()
            await task

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            running.failure = error
        finally:
            ready.set()

    thread = threading.Thread(target=run, name="serve")
    thread.start()
    ready.wait(120)
    if running.failure is not None:
        raise running.failure
    try:
        yield running
    finally:
        running.server.should_exit = True
        thread.join(60)
        if running.failure is not None:
            raise running.failure
