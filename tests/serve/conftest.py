"""One server for the tests that leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.serve.running import Running, serving, until


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving() as running:
        yield running
        # Whatever a module did: what remains open are the prefixes that scores keep.
        running.call(running.engine.forget_prefixes())
        assert until(lambda: not any(running.open_sequences().values())), running.open_sequences()
        assert until(lambda: not any(running.used_pages().values())), running.used_pages()
        assert running.service.admission.requests == 0


@pytest.fixture
def http(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60.0) as client:
        yield client
