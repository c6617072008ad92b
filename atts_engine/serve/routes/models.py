"""`/v1/models`"""

from __future__ import annotations

from fastapi import APIRouter, Request

from atts_engine.serve.replies import ModelCard, ModelList
from atts_engine.serve.routes.common import ERRORS, service_of
from atts_engine.serve.service import Service

router = APIRouter(tags=["models"])


@router.get("/v1/models/", include_in_schema=False)
@router.get("/v1/models", responses={401: ERRORS[401]}, summary="The one model that there is: the pair")
async def models(request: Request) -> ModelList:
    return ModelList(object="list", data=[_card(service_of(request))])


@router.get("/v1/models/{name:path}", responses={401: ERRORS[401], 404: ERRORS[404]}, summary="That model by name")
async def model(name: str, request: Request) -> ModelCard:
    service = service_of(request)
    service.check_model(name)
    return _card(service)


def _card(service: Service) -> ModelCard:
    engine = service.engine
    return ModelCard(
        id=service.settings.model,
        object="model",
        created=service.created,
        owned_by="atts",
        root=engine.target_model.name,
        max_model_len=engine.context_tokens,
        draft=engine.draft_model.name,
    )
