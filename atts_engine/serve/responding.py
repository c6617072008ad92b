"""Runs what a request asks for and answers it, whole or as a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import Request
from starlette.responses import Response

from atts_engine.serve.asking import Ask
from atts_engine.serve.generation import Counts
from atts_engine.serve.rendering import Renderer, Whole, usage_of
from atts_engine.serve.replies import Usage, Vote
from atts_engine.serve.service import Service
from atts_engine.serve.streaming import EventStream, event, unless_gone


async def respond(service: Service, request: Request, ask: Ask, renderer: Renderer) -> Response:
    """Raises `ClientGone` when the client leaves first; pages are free by then or soon after."""
    if ask.stream:
        return EventStream(_events(service, request, ask, renderer))
    return await unless_gone(request.receive, _whole(service, request, ask, renderer))


async def _events(service: Service, request: Request, ask: Ask, renderer: Renderer) -> AsyncGenerator[bytes, None]:
    with service.account(ask.id, ask.operation, ask.demand, request.headers, ask.attributes) as account:
        account.counts.prompt = ask.prompt_tokens
        async with aclosing(service.watched(account, ask.source(account))) as deltas:
            async for delta in deltas:
                running = _usage(ask, account.counts) if ask.running_usage else None
                yield event(renderer.chunk(delta, running).json_bytes())
        _learn(ask, account.counts)
        if ask.usage:
            yield event(renderer.usage_chunk(_usage(ask, account.counts)).json_bytes())


async def _whole(service: Service, request: Request, ask: Ask, renderer: Renderer) -> Response:
    choices = [Whole(index) for index in range(ask.choices)]
    vote: Vote | None = None
    with service.account(ask.id, ask.operation, ask.demand, request.headers, ask.attributes) as account:
        account.counts.prompt = ask.prompt_tokens
        async with aclosing(service.watched(account, ask.source(account))) as deltas:
            async for delta in deltas:
                choices[delta.index].add(delta)
                if delta.atts is not None and delta.atts.vote is not None:
                    vote = delta.atts.vote
        _learn(ask, account.counts)
        reply = renderer.whole(choices, _usage(ask, account.counts), vote)
    return Response(reply.json_bytes(), media_type="application/json")


def _learn(ask: Ask, counts: Counts) -> None:
    if ask.guess is not None:
        ask.guess.learn(counts.completion / ask.demand["target"].chains)


def _usage(ask: Ask, counts: Counts) -> Usage:
    return usage_of(counts, by_model=ask.by_chains)
