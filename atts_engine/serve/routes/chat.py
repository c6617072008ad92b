"""`/v1/chat/completions`"""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from atts_engine.serve.asking import Ask, atts_ask, new_id, plain_ask
from atts_engine.serve.errors import bad_request
from atts_engine.serve.rendering import ChatRenderer, Heading
from atts_engine.serve.replies import ChatReply
from atts_engine.serve.requests import ChatRequest
from atts_engine.serve.responding import respond
from atts_engine.serve.routes.common import ERRORS, STREAM, chat_ids, log_prompt, naming, now, service_of
from atts_engine.serve.service import Service

router = APIRouter(tags=["generation"])


@router.post(
    "/v1/chat/completions",
    responses={**ERRORS, 200: {"model": ChatReply, "content": STREAM}},
    summary="Answer a chat: by the target alone, or with `atts` by the vote of many chains",
)
async def chat(body: ChatRequest, request: Request) -> Response:
    service = service_of(request)
    service.check_model(body.model)
    if body.top_logprobs and not body.logprobs:
        raise bad_request("top_logprobs are told beside logprobs: set logprobs to true", "top_logprobs")
    ask = await _ask(service, body, new_id("chatcmpl"))
    log_prompt(service, ask.id, [message.plain() for message in body.messages])
    heading = Heading(ask.id, now(), service.settings.model)
    renderer = ChatRenderer(heading, bool(body.logprobs), service.token_bytes)
    return await respond(service, request, ask, renderer)


async def _ask(service: Service, body: ChatRequest, ask_id: str) -> Ask:
    if body.atts is None:
        ids = await chat_ids(service, body.messages)
        return plain_ask(service, body, ask_id, "chat", [ids], body.limit, body.alternatives)
    plain = [message.plain() for message in body.messages]
    size = sum(len(message["content"]) for message in plain)
    with naming("messages"):
        prompts = await service.off_loop(size, lambda: service.engine.prompts(plain))
    return atts_ask(service, body, body.atts, ask_id, "chat", prompts, body.limit, body.alternatives)
