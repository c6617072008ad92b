"""What a request meets before its route: the limit on its body, and the question for a key. Plain ASGI, so that a
stream passes through untouched and a disconnect is heard."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from atts_engine.serve.errors import ApiError
from atts_engine.serve.settings import key_digest

OPEN_PATHS = frozenset({"/health"})
"""Answered without a key: they tell nothing of anybody's work."""


class BodyLimit:
    """413 for a body of more than `limit` bytes, whether it announces its length or not."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit
        self._message = f"the body is larger than the {limit} bytes that are taken; shorten it"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isdecimal() and int(announced) > self._limit:
            await ApiError(413, self._message, code="request_too_large").reply()(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._limit:
                # The one kind that FastAPI lets through while it reads a body.
                raise HTTPException(413, self._message)
            return message

        await self._app(scope, counted, send)


class BearerKeys:
    """401 for a request without one of the keys. Every key is compared, in constant time."""

    def __init__(self, app: ASGIApp, digests: Sequence[bytes]) -> None:
        self._app = app
        self._digests = tuple(digests)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS and not self._known(Headers(scope=scope)):
            refusal = ApiError(
                401,
                "no valid key; send one as `Authorization: Bearer KEY`",
                code="invalid_api_key",
            )
            await refusal.reply()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _known(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = key_digest(key.strip())
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return any(matches) and scheme.lower() == "bearer"
