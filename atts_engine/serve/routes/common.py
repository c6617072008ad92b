"""What several routes need."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fastapi import Request

from atts_engine.errors import InputError
from atts_engine.serve.errors import bad_request
from atts_engine.serve.replies import ErrorReply
from atts_engine.serve.requests import Message
from atts_engine.serve.service import Service, log

ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorReply, "description": "The request cannot be had as it is"},
    401: {"model": ErrorReply, "description": "No valid key"},
    404: {"model": ErrorReply, "description": "No such model"},
    413: {"model": ErrorReply, "description": "The body is too large"},
    500: {"model": ErrorReply, "description": "A lane or a chain has failed"},
    503: {
        "model": ErrorReply,
        "description": "Too much is open already, a model's server is away, or this one goes down; see Retry-After",
    },
}

STREAM = {"text/event-stream": {"schema": {"type": "string"}}}


def service_of(request: Request) -> Service:
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


def now() -> int:
    return int(time.time())


def one_of_two(prompt: object, messages: object) -> None:
    """`ApiError` 400 unless exactly one of them is there."""
    if (prompt is None) == (messages is None):
        raise bad_request("give either prompt or messages", "prompt")


@contextmanager
def naming(param: str) -> Iterator[None]:
    """What the block does not take, for whatever reason, is this field's fault."""
    try:
        yield
    except InputError as error:
        raise bad_request(str(error), param) from error


async def text_ids(service: Service, text: str | Sequence[int], param: str = "prompt") -> list[int]:
    """The target's tokens of a text; ids as they are, if the model has them."""
    model = service.engine.target_model
    if isinstance(text, str):
        with naming(param):
            ids = await service.off_loop(len(text), lambda: model.tokenizer.encode(text))
    else:
        ids = list(text)
        if (bad := next((i for i in ids if i >= model.vocab_size), None)) is not None:
            raise bad_request(
                f"token id {bad} is outside the vocabulary of {model.vocab_size}: was it made by another tokenizer?",
                param,
            )
    if not ids:
        raise bad_request(f"{param} has no tokens: give it one or more", param)
    return ids


async def chat_ids(service: Service, messages: Sequence[Message]) -> list[int]:
    """The target's tokens of a chat, up to where its answer begins."""
    plain = [message.plain() for message in messages]
    tokenizer = service.engine.target_model.tokenizer
    with naming("messages"):
        ids = await service.off_loop(sum(len(m["content"]) for m in plain), lambda: tokenizer.chat_prompt(plain))
    if not ids:
        raise bad_request("the model's chat template makes nothing of these messages", "messages")
    return ids


def log_prompt(service: Service, ask_id: str, prompt: object) -> None:
    """Only where the server was told to."""
    if service.settings.log_prompts:
        log.info("%s prompt: %r", ask_id, prompt)
