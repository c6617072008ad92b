"""A fake vLLM server in a thread of its own, which can be killed and started again."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from atts_engine.models import load_model, resolve
from tests.fake_vllm import FakeVllm, serving


class Site:
    """A fake server in a thread of its own, which can be killed and started again at the same port."""

    def __init__(self, name: str, **flags: Any) -> None:
        self.fake = FakeVllm(load_model(name), root=str(resolve(name)), **flags)
        self._port = 0
        self.start()

    @property
    def address(self) -> str:
        return f"vllm://127.0.0.1:{self._port}/tiny"

    def start(self) -> None:
        up, self._down = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(up)))
        self._thread.start()
        assert up.wait(30)

    async def _serve(self, up: threading.Event) -> None:
        async with serving(self.fake, self._port) as place:
            self._port = int(place.rpartition(":")[2])
            up.set()
            while not self._down.is_set():
                await asyncio.sleep(0.01)

    def kill(self) -> None:
        self._down.set()
        self._thread.join()

    def kill_after(self, requests: int, away_s: float | None = None) -> threading.Thread:
        """Once it has been asked for so much more; away_s: until it is started again, None: it is not."""
        heard = len(self.fake.heard) + requests

        def watch() -> None:
            while len(self.fake.heard) < heard:
                time.sleep(0.002)
            self.kill()
            if away_s is not None:
                time.sleep(away_s)
                self.start()

        thread = threading.Thread(target=watch)
        thread.start()
        return thread


@contextmanager
def site(name: str, **flags: Any) -> Iterator[Site]:
    made = Site(name, **flags)
    try:
        yield made
    finally:
        made.kill()
