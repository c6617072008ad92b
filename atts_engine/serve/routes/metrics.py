"""`/metrics`, for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from atts_engine.serve.metrics import CONTENT_TYPE
from atts_engine.serve.routes.common import ERRORS, service_of

router = APIRouter(tags=["metrics"])


@router.get(
    "/metrics",
    response_class=PlainTextResponse,
    responses={401: ERRORS[401]},
    summary="Figures of the server and both lanes, in Prometheus' format",
)
async def metrics(request: Request) -> Response:
    return Response(service_of(request).metrics.text(), headers={"content-type": CONTENT_TYPE})
