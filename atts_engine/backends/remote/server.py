"""What a remote lane asks of a server, whatever engine runs there."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol

from atts_engine.runtime.records import Alternatives, SamplingParams


@dataclass(frozen=True, slots=True)
class Served:
    """What a server says of the model that it serves.

    name: to ask for it by; root: folder or hub name of its weights, tokenizer: of its tokenizer, as the server sees
    them, None where it does not tell; context: tokens that a sequence may have; version: of the engine;
    seeded: whether a request's seed decides what is drawn.
    """

    name: str
    root: str | None
    tokenizer: str | None
    context: int
    version: str
    seeded: bool = True


@dataclass(frozen=True, slots=True)
class Written:
    """New tokens of a span that a server writes. logprobs, confidences, alternatives, finish: as in `TokenChunk`.
    prompt_tokens, cached_tokens: of the prompt, and of them those that the server found in its prefix cache, on the
    first piece that tells; None where the server does not."""

    tokens: tuple[int, ...]
    finish: str | None = None
    logprobs: tuple[float, ...] = ()
    confidences: tuple[float, ...] = ()
    alternatives: tuple[Alternatives, ...] = ()
    prompt_tokens: int | None = None
    cached_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Scores:
    """logprobs: nats, of the tokens asked for, or of the first of them, one at the least. prompt_tokens: that the
    server was sent; cached_tokens: of them those that it did not compute again; None where it does not tell."""

    logprobs: tuple[float, ...]
    prompt_tokens: int
    cached_tokens: int | None


class Server(Protocol):
    """One model on one server. Every call is a request that may be made again: the server keeps nothing but a cache.

    Every method raises `Unreachable` for a server that cannot be asked now (refused, reset, timed out, 5xx, 429),
    `Refused` for a request that this server will never answer otherwise, and `LaneError` for an answer that does
    not hold what its protocol promises. Cancelling a call, or closing the generator, ends the request on the server.
    """

    @property
    def appends(self) -> bool:
        """Whether scoring leans on the server's prefix cache, so that a span costs its own tokens alone."""
        ...

    async def describe(self) -> Served: ...

    async def encode(self, text: str) -> list[int]:
        """Ids of a text by the server's own tokenizer, nothing added around it."""
        ...

    def decode(self, tokens: Sequence[int], max_tokens: int, sampling: SamplingParams) -> AsyncGenerator[Written, None]:
        """Write on from `tokens`, as `Lane.decode` does; the last piece has `finish`. The stream of noise begins with
        this call: the same tokens and the same seed draw the same."""
        ...

    async def score(self, tokens: Sequence[int], start: int) -> Scores:
        """Log-probabilities of `tokens[start:]`, start >= 1, under the model itself (temperature 1)."""
        ...

    async def close(self) -> None: ...
