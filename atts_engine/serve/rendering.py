"""Deltas as OpenAI's objects, chunk by chunk or whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol

from atts_engine.runtime import Alternatives
from atts_engine.serve.generation import Counts, Delta
from atts_engine.serve.replies import (
    AttsChunk,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatReply,
    CompletionChoice,
    CompletionLogprobs,
    CompletionReply,
    CompletionTokensDetails,
    Reply,
    TokenLogprob,
    TopLogprob,
    Usage,
    Vote,
)

TokenBytes = Callable[[int], bytes]


def as_text(data: bytes) -> str:
    """Of a token's bytes; U+FFFD for what is no character by itself."""
    return data.decode("utf-8", "replace")


@dataclass(slots=True)
class Whole:
    """One choice of an answer that is not streamed."""

    index: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    alternatives: list[Alternatives] = field(default_factory=list)
    finish: str = "stop"
    stop_reason: str | None = None

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.tokens.extend(delta.tokens)
        self.logprobs.extend(delta.logprobs)
        self.alternatives.extend(delta.alternatives)
        if delta.finish is not None:
            self.finish, self.stop_reason = delta.finish, delta.stop_reason


class Renderer(Protocol):
    """Of one request."""

    def chunk(self, delta: Delta, usage: Usage | None) -> Reply: ...

    def usage_chunk(self, usage: Usage) -> Reply:
        """The last one of a stream whose client asked for usage: no choices."""
        ...

    def whole(self, choices: Sequence[Whole], usage: Usage, vote: Vote | None) -> Reply: ...


def usage_of(counts: Counts, *, by_model: bool) -> Usage:
    """by_model: tell who wrote the tokens."""
    details = CompletionTokensDetails(draft_tokens=counts.draft, target_tokens=counts.target)
    return Usage(
        prompt_tokens=counts.prompt,
        completion_tokens=counts.completion,
        total_tokens=counts.prompt + counts.completion,
        completion_tokens_details=details if by_model else None,
    )


@dataclass(frozen=True, slots=True)
class Heading:
    """What every object of one answer begins with."""

    id: str
    created: int
    model: str


class ChatRenderer:
    """logprobs: told; token_bytes: of one token."""

    def __init__(self, heading: Heading, logprobs: bool, token_bytes: TokenBytes) -> None:
        self._heading = heading
        self._logprobs = logprobs
        self._token_bytes = token_bytes
        self._begun: set[int] = set()

    def chunk(self, delta: Delta, usage: Usage | None) -> ChatChunk:
        first = delta.index not in self._begun
        self._begun.add(delta.index)
        choice = ChatChunkChoice(
            index=delta.index,
            delta=ChatDelta(
                role="assistant" if first else None,
                content=delta.text if delta.text or first else None,
            ),
            logprobs=self._told(delta),
            finish_reason=delta.finish,
            stop_reason=delta.stop_reason,
        )
        return self._chunk([choice], usage, delta.atts)

    def usage_chunk(self, usage: Usage) -> ChatChunk:
        return self._chunk([], usage, None)

    def whole(self, choices: Sequence[Whole], usage: Usage, vote: Vote | None) -> ChatReply:
        made = [
            ChatChoice(
                index=c.index,
                message=ChatMessage(role="assistant", content=c.text),
                logprobs=self._told(c),
                finish_reason=c.finish,
                stop_reason=c.stop_reason,
            )
            for c in choices
        ]
        head = self._heading
        return ChatReply(
            id=head.id,
            object="chat.completion",
            created=head.created,
            model=head.model,
            choices=made,
            usage=usage,
            atts=vote,
        )

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | None, atts: AttsChunk | None) -> ChatChunk:
        head = self._heading
        return ChatChunk(
            id=head.id,
            object="chat.completion.chunk",
            created=head.created,
            model=head.model,
            choices=choices,
            usage=usage,
            atts=atts,
        )

    def _told(self, said: Delta | Whole) -> ChatLogprobs | None:
        if not self._logprobs:
            return None
        content = []
        for token, logprob, others in _places(said):
            top = [TopLogprob(**self._entry(*other)) for other in others]
            content.append(TokenLogprob(**self._entry(token, logprob), top_logprobs=top))
        return ChatLogprobs(content=content)

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        data = self._token_bytes(token)
        return {"token": as_text(data), "logprob": logprob, "bytes": list(data)}


class CompletionRenderer:
    """As `ChatRenderer`, for text. logprobs: likeliest tokens that are told beside each; None: nothing is."""

    def __init__(self, heading: Heading, logprobs: int | None, token_bytes: TokenBytes) -> None:
        self._heading = heading
        self._logprobs = logprobs
        self._token_bytes = token_bytes
        self._lengths: dict[int, int] = {}

    def chunk(self, delta: Delta, usage: Usage | None) -> CompletionReply:
        choice = CompletionChoice(
            index=delta.index,
            text=delta.text,
            logprobs=self._told(delta),
            finish_reason=delta.finish,
            stop_reason=delta.stop_reason,
        )
        return self._reply([choice], usage, delta.atts)

    def usage_chunk(self, usage: Usage) -> CompletionReply:
        return self._reply([], usage, None)

    def whole(self, choices: Sequence[Whole], usage: Usage, vote: Vote | None) -> CompletionReply:
        made = [
            CompletionChoice(
                index=c.index,
                text=c.text,
                logprobs=self._told(c),
                finish_reason=c.finish,
                stop_reason=c.stop_reason,
            )
            for c in choices
        ]
        return self._reply(made, usage, vote)

    def _reply(
        self, choices: list[CompletionChoice], usage: Usage | None, atts: Vote | AttsChunk | None
    ) -> CompletionReply:
        head = self._heading
        return CompletionReply(
            id=head.id,
            object="text_completion",
            created=head.created,
            model=head.model,
            choices=choices,
            usage=usage,
            atts=atts,
        )

    def _told(self, said: Delta | Whole) -> CompletionLogprobs | None:
        if self._logprobs is None:
            return None
        texts = [self._text(token) for token in said.tokens]
        ends = list(accumulate((len(text) for text in texts), initial=self._lengths.get(said.index, 0)))
        self._lengths[said.index] = ends[-1]
        return CompletionLogprobs(
            tokens=texts,
            token_logprobs=list(said.logprobs),
            top_logprobs=[self._by_text(*place) for place in _places(said)] if self._logprobs else None,
            text_offset=ends[:-1],
        )

    def _by_text(self, token: int, logprob: float, others: Alternatives) -> dict[str, float]:
        """The token itself comes first: where several have one text, it is told, or else the likeliest of them."""
        told: dict[str, float] = {}
        for one, value in ((token, logprob), *others):
            told.setdefault(self._text(one), value)
        return told

    def _text(self, token: int) -> str:
        return as_text(self._token_bytes(token))


def _places(said: Delta | Whole) -> Iterator[tuple[int, float, Alternatives]]:
    """Token, log-probability and likeliest tokens, none where these were not asked for."""
    return zip(said.tokens, said.logprobs, said.alternatives or [()] * len(said.tokens), strict=True)
