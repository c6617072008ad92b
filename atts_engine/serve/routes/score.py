"""`/v1/score`: log-likelihood of spans."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from starlette.responses import Response

from atts_engine.serve.admission import Demand
from atts_engine.serve.asking import new_id
from atts_engine.serve.errors import TOO_LONG, ApiError, bad_request
from atts_engine.serve.replies import ErrorReply, ScoreReply, SpanReply, Usage
from atts_engine.serve.requests import ScoreRequest
from atts_engine.serve.routes.common import ERRORS, chat_ids, log_prompt, one_of_two, service_of, text_ids
from atts_engine.serve.service import Service
from atts_engine.serve.streaming import unless_gone

router = APIRouter(tags=["scoring"])
DEADLINE = {"model": ErrorReply, "description": "The time is up"}
T = TypeVar("T")


@router.post(
    "/v1/score",
    responses={**ERRORS, 200: {"model": ScoreReply}, 504: DEADLINE},
    summary="Mean log-likelihood of spans after a prefix, whose KV is kept for the next request",
)
async def score(body: ScoreRequest, request: Request) -> Response:
    service = service_of(request)
    service.check_model(body.model)
    one_of_two(body.prompt, body.messages)
    if body.prompt is not None:
        prefix = await text_ids(service, body.prompt)
    else:
        assert body.messages is not None
        prefix = await chat_ids(service, body.messages)
    spans = [await text_ids(service, span, f"spans.{i}") for i, span in enumerate(body.spans)]
    for i, span in enumerate(spans):
        if len(prefix) + len(span) > service.engine.context_tokens:
            raise bad_request(
                f"prefix and span have {len(prefix) + len(span)} tokens, and there is room for "
                f"{service.engine.context_tokens}",
                f"spans.{i}",
                TOO_LONG,
            )
    ask_id = new_id("score")
    log_prompt(service, ask_id, body.prompt if body.prompt is not None else body.messages)
    work = _score(service, request, body, ask_id, prefix, spans)
    return await unless_gone(request.receive, work)


async def _score(
    service: Service, request: Request, body: ScoreRequest, ask_id: str, prefix: list[int], spans: list[list[int]]
) -> Response:
    tokens = len(prefix) + sum(len(span) for span in spans)
    demand = {"target": Demand(len(spans), tokens)}
    with service.account(ask_id, "score", demand, request.headers, {}) as account:
        account.counts.prompt = tokens
        deadline_s = service.deadline_s(body.timeout_s)
        try:
            async with asyncio.timeout(deadline_s):
                scores = await _all([service.engine.score(prefix, span) for span in spans])
        except TimeoutError as error:
            raise ApiError(
                504, f"not every span was scored within {deadline_s:g} seconds", kind="server_error", code="deadline"
            ) from error
        service.metrics.prompt(tokens)
    data = []
    for index, found in enumerate(scores):
        data.append(
            SpanReply(
                index=index,
                mean_logprob=-found.score,
                sum_logprob=found.sum_logprob,
                n_tokens=found.n_tokens,
                cached_tokens=found.cached_tokens,
                logprobs=list(found.logprobs) if body.logprobs else None,
            )
        )
    usage = Usage(prompt_tokens=tokens, completion_tokens=0, total_tokens=tokens)
    reply = ScoreReply(id=ask_id, object="score", model=service.settings.model, data=data, usage=usage)
    return Response(reply.json_bytes(), media_type="application/json")


async def _all(works: list[Coroutine[Any, Any, T]]) -> list[T]:
    """Results of all; the first failure ends the others, and is raised when they have ended."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
