"""The application: routes, limits, and one engine behind them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from atts_engine import __version__
from atts_engine.conformal import Calibrator
from atts_engine.engine import AsyncEngine
from atts_engine.serve import errors
from atts_engine.serve.middleware import BearerKeys, BodyLimit
from atts_engine.serve.routes import chat, completions, health, metrics, models, score, tokens
from atts_engine.serve.service import Service
from atts_engine.serve.settings import ServerSettings
from atts_engine.serve.tracing import Tracing

ROUTES = (models, chat, completions, score, tokens, health, metrics)
_SCHEMES = {"bearer": {"type": "http", "scheme": "bearer"}}


def create_app(
    engine: AsyncEngine,
    settings: ServerSettings,
    *,
    calibrator: Calibrator | None = None,
    tracing: Tracing | None = None,
) -> FastAPI:
    """An ASGI application over a running engine, on the event loop that the engine belongs to. The engine stays the
    caller's: close it after the server has ended.

    calibrator: of requests with `atts`; None: calibrations that learn online, one for each setting. tracing: of
    requests; None: none.
    """
    service = Service(engine, settings, calibrator, tracing)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if settings.measure_rates:
            service.metrics.lanes.rates = await engine.rates()
        try:
            yield
        finally:
            service.close()

    app = FastAPI(
        title="atts-engine",
        version=__version__,
        description="OpenAI's interface over a pair of models, and asynchronous test-time scaling with it.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    for module in ROUTES:
        app.include_router(module.router)
    errors.install(app)
    app.add_middleware(BodyLimit, limit=settings.max_body_bytes)
    if settings.key_digests:
        # Around the routes: nothing of a request without a key is read.
        app.add_middleware(BearerKeys, digests=settings.key_digests)
    if settings.allowed_origins:
        # Before the keys: a browser asks without one whether it may ask.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allowed_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["retry-after"],
        )
    app.openapi = lambda: _description(app, bool(settings.key_digests))  # type: ignore[method-assign]
    return app


def _description(app: FastAPI, keys: bool) -> dict[str, Any]:
    """FastAPI's own, less the 422 that this server never answers, and with the key that it may ask for."""
    if app.openapi_schema is None:
        made = FastAPI.openapi(app)
        for path in made["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            made["components"]["schemas"].pop(name, None)
        if keys:
            made["components"]["securitySchemes"] = _SCHEMES
            made["security"] = [{"bearer": []}]
    assert app.openapi_schema is not None
    return app.openapi_schema
