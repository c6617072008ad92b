"""`/v1/completions`"""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from atts_engine.serve.asking import Ask, atts_ask, new_id, plain_ask
from atts_engine.serve.errors import bad_request
from atts_engine.serve.rendering import CompletionRenderer, Heading
from atts_engine.serve.replies import CompletionReply
from atts_engine.serve.requests import CompletionRequest
from atts_engine.serve.responding import respond
from atts_engine.serve.routes.common import ERRORS, STREAM, log_prompt, naming, now, service_of, text_ids
from atts_engine.serve.service import Service

router = APIRouter(tags=["generation"])

DEFAULT_TOKENS = 16
"""OpenAI's own default of max_tokens here."""


@router.post(
    "/v1/completions",
    responses={**ERRORS, 200: {"model": CompletionReply, "content": STREAM}},
    summary="Continue a text: by the target alone, or with `atts` by the vote of many chains",
)
async def completions(body: CompletionRequest, request: Request) -> Response:
    service = service_of(request)
    service.check_model(body.model)
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise bad_request("best_of must be as n: choices are not ranked", "best_of")
    ask = await _ask(service, body, new_id("cmpl"))
    log_prompt(service, ask.id, body.prompt)
    heading = Heading(ask.id, now(), service.settings.model)
    renderer = CompletionRenderer(heading, body.logprobs, service.token_bytes)
    return await respond(service, request, ask, renderer)


async def _ask(service: Service, body: CompletionRequest, ask_id: str) -> Ask:
    if body.atts is None:
        ids = [await text_ids(service, prompt) for prompt in body.prompts]
        limit = body.max_tokens if body.max_tokens is not None else DEFAULT_TOKENS
        return plain_ask(service, body, ask_id, "text_completion", ids, limit, body.logprobs)
    if not isinstance(body.prompt, str):
        raise bad_request("with atts the prompt must be one text: each model has tokens of its own", "prompt")
    text = body.prompt
    with naming("prompt"):
        prompts = await service.off_loop(len(text), lambda: service.engine.prompts(text))
    return atts_ask(service, body, body.atts, ask_id, "text_completion", prompts, body.max_tokens, body.logprobs)
