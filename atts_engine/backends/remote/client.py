"""HTTP to one server: JSON out, JSON or server-sent events back, and what went wrong in the engine's own errors."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, TypeVar

from atts_engine.backends.remote.stats import RemoteStats
from atts_engine.errors import InputError, LaneError, Refused, Unreachable

if TYPE_CHECKING:
    import aiohttp

T = TypeVar("T")

CONNECT_S = 10.0
IDLE_S = 4.0
"""A connection that idles longer is not used again: uvicorn closes it after 5 seconds."""
LOST, LOST_S = 10, 600.0
"""Times `silence_s`, and seconds at the least, without a byte after which a request is lost, whatever /health says. No
less, for a busy server is silent too: a score says nothing before it is done, and behind 256 others of 8,000 tokens
each, at 20,000 tokens a second, it waits for 100 seconds; one that is asked again queues up anew."""
END_S = 1.0
"""That the end of an answer may come behind its "[DONE]"."""
HEALTH_S = 25.0
"""SGLang's /health runs a request, and a busy server takes up to 20 seconds."""
ASIDE = 1 << 20
"""Bytes of JSON from which on it is parsed on another thread: about two of the intervals at which threads take turns
(5 ms). A shorter stall is not made shorter by a thread."""
AGAIN = frozenset({408, 425, 429})
"""Statuses, beside all from 500 on, of a server that may answer the same request later."""
LONGEST = 300
"""Characters of a server's message that are quoted."""


class Client:
    """server: its name in messages; key: sent as a bearer token. max_requests: open at a time; others wait. silence_s:
    a request that hears nothing for so long asks /health whether it may go on waiting, until it is lost (`LOST`): a
    long queue is no fault."""

    def __init__(
        self, server: str, base_url: str, key: str | None, *, max_requests: int, silence_s: float, stats: RemoteStats
    ) -> None:
        try:
            import aiohttp
        except ImportError as error:
            raise InputError(
                f"{server}: a lane on a server needs aiohttp: pip install 'atts-engine[remote]'"
            ) from error
        self.server = server
        self._base_url = base_url
        self._silence_s = silence_s
        self._waits = max(LOST, math.ceil(LOST_S / silence_s))
        self._stats = stats
        self._places = asyncio.Semaphore(max_requests)
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )

    async def get(self, path: str) -> Any:
        return await self._whole("GET", path, None)

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The answer's JSON. `Unreachable` for a server that cannot be asked now, `Refused` for a request that it
        refuses, `LaneError` for one that it does not know or for an answer that is no JSON."""
        return await self._whole("POST", path, body)

    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[Any, None]:
        """The JSON of each event until "[DONE]"; errors as in `post`, and `Unreachable` where the answer breaks off.
        Closing it ends the request."""
        async with self._places:
            with self._stats.request():
                answer = await self._begun("POST", path, body)
                try:
                    async for event in self._events(answer):
                        yield event
                    # All has been said: an end that does not come costs the connection and nothing else.
                    with suppress(Unreachable, TimeoutError):
                        async with asyncio.timeout(END_S):
                            await self._heard(answer.content.readany())
                finally:
                    # Read to its end, the connection is in the pool by now. Any other is closed, which the server
                    # takes for the end of the request.
                    answer.close()

    async def close(self) -> None:
        await self._http.close()

    async def _whole(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        async with self._places:
            with self._stats.request():
                answer = await self._begun(method, path, body)
                async with answer:
                    text = await self._body(answer)
        return await self._json(text)

    async def _begun(self, method: str, path: str, body: Mapping[str, Any] | None) -> aiohttp.ClientResponse:
        if self._http.closed:
            raise LaneError(f"{self.server}: the engine is closed")
        answer = await self._patiently(lambda: self._http.request(method, self._base_url + path, json=body))
        if answer.status == 200:
            return answer
        async with answer:
            text = (await self._body(answer)).decode("utf-8", "replace")
        raise self._refusal(answer.status, f"{path}: {_message(text)}", answer.headers.get("Retry-After"))

    async def _events(self, answer: aiohttp.ClientResponse) -> AsyncGenerator[Any, None]:
        async for line in self._lines(answer):
            if not line.startswith(b"data:"):
                # Comments keep a connection alive.
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            event = await self._json(data)
            if isinstance(event, dict) and isinstance(event.get("error"), dict):
                code = event["error"].get("code")
                raise self._refusal(code if isinstance(code, int) else 500, _message(data.decode("utf-8", "replace")))
            yield event
        raise Unreachable(f"{self.server}: the answer broke off")

    async def _lines(self, answer: aiohttp.ClientResponse) -> AsyncGenerator[bytes, None]:
        # Not `readline`: that has a limit on the length of a line, which one with many log-probabilities exceeds.
        begun: list[bytes] = []
        async for block in self._blocks(answer):
            rest, *later = block.split(b"\n")
            begun.append(rest)
            for next_one in later:
                yield b"".join(begun)
                begun = [next_one]

    async def _body(self, answer: aiohttp.ClientResponse) -> bytes:
        return b"".join([block async for block in self._blocks(answer)])

    async def _blocks(self, answer: aiohttp.ClientResponse) -> AsyncGenerator[bytes, None]:
        """An answer's bytes as they come; each may be waited for as long as the request itself."""
        while block := await self._patiently(answer.content.readany):
            yield block

    async def _patiently(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Wait for an answer, or for more of it, for as long as the server says that it lives. One that has been silent
        for too long all the same is lost: `Unreachable`, so that it is asked for again."""
        task, waits = asyncio.ensure_future(ask()), 0
        try:
            while not (await asyncio.wait({task}, timeout=self._silence_s))[0]:
                waits += 1
                if waits == self._waits:
                    self._stats.lost_requests += 1
                    seconds = self._waits * self._silence_s
                    raise Unreachable(
                        f"{self.server}: no word of a request for {seconds:g} seconds, while /health answers; if its "
                        "queue is as long as that, raise --patience"
                    )
                if not await self._alive():
                    raise Unreachable(f"{self.server}: no word for {self._silence_s:g} seconds")
            return await self._heard(task)
        finally:
            task.cancel()

    async def _heard(self, answer: Awaitable[T]) -> T:
        import aiohttp

        try:
            return await answer
        except (aiohttp.ClientSSLError, aiohttp.ClientConnectorCertificateError, aiohttp.InvalidURL) as error:
            raise LaneError(f"{self.server}: {error}; is the address right, and its certificate known here?") from error
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise Unreachable(f"{self.server}: {str(error) or type(error).__name__}") from error

    async def _alive(self) -> bool:
        import aiohttp

        try:
            async with asyncio.timeout(HEALTH_S), self._http.get(self._base_url + "/health") as answer:
                return answer.status == 200
        except (aiohttp.ClientError, OSError, TimeoutError):
            return False

    async def _json(self, text: bytes) -> Any:
        try:
            return await asyncio.to_thread(_parsed_aside, text) if len(text) >= ASIDE else json.loads(text)
        except ValueError as error:
            said = " ".join(text[:LONGEST].decode("utf-8", "replace").split())
            raise LaneError(
                f"{self.server}: the answer is no JSON: {said!r}; is another program on this port?"
            ) from error

    def _refusal(self, status: int, said: str, retry_after: str | None = None) -> Exception:
        if status in AGAIN or status >= 500:
            return Unreachable(f"{self.server}: {status} {said}", _seconds(retry_after))
        if status in (401, 403):
            return LaneError(
                f"{self.server}: {status} {said}; its key goes into ATTS_DRAFT_API_KEY or ATTS_TARGET_API_KEY"
            )
        if status == 404:
            return LaneError(f"{self.server}: {status} {said}")
        return Refused(f"{self.server}: {status} {said}")


def _parsed_aside(text: bytes) -> Any:
    """As `json.loads`, which holds the interpreter's lock from end to end: a thread alone would spare the event loop
    nothing. Where the parser calls Python, here for each number with a point, the lock can be had."""
    return json.loads(text, parse_float=lambda number: float(number))


def _seconds(retry_after: str | None) -> float | None:
    """Of a Retry-After header: a finite number of seconds, or a date (RFC 9110, section 10.2.3). None for others."""
    if retry_after is None:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        pass
    else:
        return seconds if math.isfinite(seconds) else None
    try:
        return parsedate_to_datetime(retry_after).timestamp() - time.time()
    except ValueError:
        return None


def _message(text: str) -> str:
    """What an error's body says, in one line."""
    try:
        found = json.loads(text)
    except ValueError:
        found = text
    while isinstance(found, dict):
        found = next((found[name] for name in ("error", "message", "detail") if name in found), str(found))
    return " ".join(str(found).split())[:LONGEST]
