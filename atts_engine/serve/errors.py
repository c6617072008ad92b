"""Every failure as OpenAI's error object, with a status that says whose fault it is."""

from __future__ import annotations

import json
import logging
import math

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from atts_engine.conformal import CalibrationError
from atts_engine.errors import ChainError, InputError, LaneError, QueueFull, Refused, Unreachable
from atts_engine.serve.invalid import explain
from atts_engine.serve.replies import ErrorBody, ErrorReply

log = logging.getLogger("atts.serve")

INVALID = "invalid_request_error"
TOO_LONG = "context_length_exceeded"
"""OpenAI's code, by which clients know that they may shorten a chat and ask again."""
CLIENT_CLOSED = 499
"""nginx's status of a request whose client has left. Nobody reads it but the log."""


class ApiError(Exception):
    """An answer that is an error. retry_after_s: sent as Retry-After; allow: as Allow."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
        allow: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = ErrorBody(message=message, type=kind, param=param, code=code)
        self.retry_after_s = retry_after_s
        self.allow = allow

    @property
    def headers(self) -> dict[str, str]:
        told = {
            "retry-after": None if self.retry_after_s is None else str(self.retry_after_s),
            "allow": self.allow,
            "www-authenticate": "Bearer" if self.status == 401 else None,
        }
        return {name: value for name, value in told.items() if value is not None}

    def json_bytes(self) -> bytes:
        # In ASCII: a message may quote what no UTF-8 can hold.
        return json.dumps(ErrorReply(error=self.body).model_dump()).encode("ascii")

    def reply(self) -> Response:
        return Response(self.json_bytes(), self.status, self.headers, media_type="application/json")


class ClientGone(Exception):
    """The client closed the connection before its answer was there."""


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def overloaded(message: str, code: str, retry_after_s: int) -> ApiError:
    return ApiError(503, message, kind="server_error", code=code, retry_after_s=retry_after_s)


def as_api_error(error: Exception) -> ApiError:
    """What an exception means to a client. What nobody foresaw is told to the log alone."""
    match error:
        case ApiError():
            return error
        case InputError() | CalibrationError() | Refused():
            return bad_request(str(error))
        case QueueFull():
            return overloaded(str(error), "overloaded", 1)
        case Unreachable():
            log.warning("%s", error)
            return overloaded(str(error), "server_unreachable", max(1, math.ceil(error.retry_after or 1)))
        case LaneError():
            log.error("a lane has failed", exc_info=error)
            return ApiError(
                500, "a lane has failed; the server's log has the details", kind="server_error", code="lane_failed"
            )
        case ChainError():
            return ApiError(500, str(error), kind="server_error", code="chain_failed")
        case ClientGone():
            return ApiError(CLIENT_CLOSED, "the client has closed the connection", code="client_closed")
        case HTTPException():
            code = "request_too_large" if error.status_code == 413 else None
            return ApiError(error.status_code, str(error.detail), code=code)
        case RequestValidationError():
            return bad_request(*explain(error.errors()))
    log.error("unexpected error", exc_info=error)
    return ApiError(500, "internal error; the server's log has the details", kind="server_error", code="internal")


def install(app: FastAPI) -> None:
    """Have every exception of a route answered in this shape."""

    async def answer(request: Request, error: Exception) -> Response:
        return as_api_error(error).reply()

    async def invalid(request: Request, error: Exception) -> Response:
        kind = request.headers.get("content-type", "")
        if not kind.partition(";")[0].strip().lower().endswith("json"):
            return bad_request(f"send the body under content-type: application/json, not {kind!r}").reply()
        return await answer(request, error)

    async def no_route(request: Request, error: HTTPException) -> Response:
        """Starlette's own, which names nothing."""
        path = request.url.path
        if error.status_code == 404:
            # A base URL with too little or too much of /v1 is what happens most.
            meant = {f"/v1{path}", path.removeprefix("/v1")} & app.openapi()["paths"].keys()
            hint = f"is {meant.pop()} meant?" if meant else "/openapi.json tells what there is"
            return ApiError(404, f"nothing is at {path}; {hint}", code="not_found").reply()
        if error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "")
            message = f"{request.method} is not for {path}; use {allowed}"
            return ApiError(405, message, code="method_not_allowed", allow=allowed).reply()
        return await answer(request, error)

    for kind in (ApiError, InputError, CalibrationError, QueueFull, LaneError, ChainError, ClientGone):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(HTTPException, no_route)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, answer)
