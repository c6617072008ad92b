"""From an address to a lane."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from atts_engine.backends.remote.address import Address
from atts_engine.backends.remote.client import Client
from atts_engine.backends.remote.lane import RemoteLane
from atts_engine.backends.remote.model import RemoteModel, check_tokenizer
from atts_engine.backends.remote.patience import Patience
from atts_engine.backends.remote.server import Server
from atts_engine.backends.remote.sglang import SGLangServer
from atts_engine.backends.remote.stats import RemoteStats
from atts_engine.backends.remote.vllm import VllmServer
from atts_engine.errors import InputError

T = TypeVar("T")


async def connect(
    text: str,
    *,
    lane: str,
    tokenizer: str | None = None,
    key: str | None = None,
    patience_s: float = 60.0,
    max_requests: int = 256,
    chunk_tokens: int = 64,
) -> RemoteLane:
    """The lane named `lane` on the server at an address (`Address.parse`); a server that is still starting is waited
    for.

    tokenizer: as in `RemoteModel.of`; key: bearer token; patience_s: seconds without any answer after which the server
    is given up; max_requests: open at a time. `InputError` for a tokenizer that is not here or not the server's,
    `LaneError` for a server that does not answer or has no such model.
    """
    address = Address.parse(text)
    if key is not None and not key.isprintable():
        raise InputError(f"{text}: ATTS_{lane.upper()}_API_KEY holds a line break or another control character")
    stats = RemoteStats()
    client = Client(text, address.base_url, key, max_requests=max_requests, silence_s=patience_s, stats=stats)
    server: Server = VllmServer(client, address.name) if address.kind == "vllm" else SGLangServer(client)
    patience = Patience(text, patience_s, stats)

    async def asked(question: Callable[[], Awaitable[T]]) -> T:
        tries = patience.tries()
        while not tries.done:
            async with tries:
                answer = await question()
        return answer

    try:
        served = await asked(server.describe)
        if served.name != address.name:
            raise InputError(f"{text}: the server has no model {address.name!r}, it has {served.name!r}")
        model = await asyncio.to_thread(RemoteModel.of, address, text, served, tokenizer)
        await check_tokenizer(model, lambda probe: asked(lambda: server.encode(probe)))
        return RemoteLane(lane, address, server, served, model, patience, stats, chunk_tokens=chunk_tokens)
    except BaseException:
        await server.close()
        raise
