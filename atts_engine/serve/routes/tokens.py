"""`/tokenize` and `/detokenize`, by the target's tokenizer."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from atts_engine.serve.errors import bad_request
from atts_engine.serve.rendering import as_text
from atts_engine.serve.replies import DetokenizeReply, TokenizeReply
from atts_engine.serve.requests import DetokenizeRequest, TokenizeRequest
from atts_engine.serve.routes.common import ERRORS, chat_ids, naming, one_of_two, service_of

router = APIRouter(tags=["tokens"])


@router.post("/tokenize", responses={**ERRORS, 200: {"model": TokenizeReply}}, summary="Text or chat into token ids")
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    service = service_of(request)
    service.check_model(body.model)
    one_of_two(body.prompt, body.messages)
    if body.prompt is not None:
        text = body.prompt
        with naming("prompt"):
            ids = await service.off_loop(len(text), lambda: service.engine.target_model.tokenizer.encode(text))
    else:
        assert body.messages is not None
        ids = await chat_ids(service, body.messages)
    strs = None
    if body.return_token_strs:
        strs = await service.off_loop(len(ids), lambda: [as_text(service.token_bytes(i)) for i in ids])
    reply = TokenizeReply(
        count=len(ids),
        max_model_len=service.engine.context_tokens,
        tokens=ids,
        token_strs=strs,
    )
    return Response(reply.json_bytes(), media_type="application/json")


@router.post("/detokenize", responses={**ERRORS, 200: {"model": DetokenizeReply}}, summary="Token ids into text")
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    service = service_of(request)
    service.check_model(body.model)
    model, ids = service.engine.target_model, body.tokens
    if (bad := next((i for i in ids if i >= model.vocab_size), None)) is not None:
        raise bad_request(f"token id {bad} is outside the vocabulary of {model.vocab_size}", "tokens")
    text = await service.off_loop(len(ids), lambda: model.tokenizer.decode(ids, skip_special=False))
    return Response(DetokenizeReply(prompt=text).json_bytes(), media_type="application/json")
