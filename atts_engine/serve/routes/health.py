"""`/health`, a question that both lanes answer with a token, and `/version`."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from atts_engine import __version__
from atts_engine.errors import LaneError, Unreachable
from atts_engine.serve.replies import Health, LaneHealth, Version
from atts_engine.serve.routes.common import ERRORS, service_of

router = APIRouter(tags=["health"])


@router.head("/health", include_in_schema=False)
@router.get(
    "/health",
    responses={
        200: {"model": Health},
        503: {"model": Health, "description": "A lane has failed, or the server drains"},
    },
    summary="Whether both lanes compute",
)
async def health(request: Request) -> Response:
    service = service_of(request)
    lanes = {}
    for name, found in (await service.health()).items():
        if isinstance(found, Unreachable):
            lanes[name] = LaneHealth(ok=False, error="its server does not answer; the log has the details")
        elif isinstance(found, LaneError):
            lanes[name] = LaneHealth(ok=False, error="failed; the server's log has the details")
        else:
            lanes[name] = LaneHealth(ok=True, seconds=found)
    if not all(lane.ok for lane in lanes.values()):
        reply = Health(status="failed", lanes=lanes)
    else:
        reply = Health(status="draining" if service.admission.draining else "ok", lanes=lanes)
    return Response(reply.json_bytes(), 200 if reply.status == "ok" else 503, media_type="application/json")


@router.get("/version", responses={401: ERRORS[401]}, summary="Of the server")
async def version() -> Version:
    return Version(version=__version__)
