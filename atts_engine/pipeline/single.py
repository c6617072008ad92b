"""A chain that one model writes alone, and what a strategy adds to it while its sequence is open."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace

from atts_engine.backends import Lane, Seq
from atts_engine.pipeline.records import Chain, Turn
from atts_engine.pipeline.writer import ChainSpec, Span, Writer, finish_of, stream_of
from atts_engine.runtime.records import SamplingParams, TokenChunk


class Solo:
    """One chain, its only author's lane and the sequence there.

    given: the text so far in the other lane's ids, but for what waits (`rest`). aside: tokens that the author decoded
    beside the text, which count as its own. extra: as in `Chain`.
    """

    def __init__(self, spec: ChainSpec, lane: Lane, seq: Seq, author: str) -> None:
        self.spec, self.lane, self.seq, self.author = spec, lane, seq, author
        self.writer = Writer(spec)
        self.span = Span()
        self.given: list[int] = []
        self.aside = 0
        self.extra: dict[str, float | int | str | None] = {}
        self.words, self._said = self.writer.own(author)

    def sampling(self, *, logprobs: bool = False, confidence: int = 0) -> SamplingParams:
        drawn = self.spec.params.sampling(stream_of(self.spec, self.author), logprobs=logprobs)
        return replace(drawn, confidence=confidence)

    @property
    def room(self) -> int:
        """Tokens that the chain may still grow by."""
        return self.spec.params.token_limit - len(self.span.tokens)

    async def write(
        self, max_tokens: int, sampling: SamplingParams, cut: Callable[[TokenChunk], int | None] | None = None
    ) -> str:
        """Write on to the end or for `max_tokens`; how it ended: "stop", "length" or "stopped".

        cut: asked of every chunk how many of its tokens stand; None: all, and the chain goes on. What was written
        behind the last token that stands is dropped, so that chunks decide only how much work is spared.
        """
        async with aclosing(self.lane.decode(self.seq, max_tokens, sampling)) as chunks:
            async for chunk in chunks:
                kept = cut(chunk) if cut is not None else None
                if kept is not None:
                    self._add(TokenChunk(chunk.tokens[:kept], None, chunk.logprobs[:kept]))
                    self.writer.waited(None)  # the lane tells it with the last chunk alone
                    return "stopped"
                self._add(chunk)
        self.writer.waited(self.span.wait_s)
        return self.span.finish or "length"

    def add(self, tokens: Sequence[int]) -> None:
        """Put tokens behind the text that were written elsewhere."""
        self._add(TokenChunk(tuple(tokens)))

    def rest(self) -> tuple[int, ...]:
        """What of the text still waits to be given to the other lane."""
        return self._said.flush().ids

    def ended(self) -> bool:
        """Whether the last token is one that ends a text."""
        return bool(self.span.tokens) and self.span.tokens[-1] in self.words.ends

    def result(self, finish: str, error: str | None) -> Chain:
        text, n = self.words.codec.decode(self.span.tokens), len(self.span.tokens) + self.aside
        if self.author == "draft":
            turn = Turn(0, text, n, t_draft=self.writer.elapsed())
        else:
            turn = Turn(0, "", 0, target=text, target_tokens=n, t_target=self.writer.elapsed())
        return self.writer.result([turn], finish, error, self.extra)

    def _add(self, chunk: TokenChunk) -> None:
        self.span.add(chunk)
        piece = self._said.push(chunk.tokens)
        self.given += piece.ids
        self.writer.wrote(0, self.author, piece, len(chunk.tokens))


Body = Callable[[Solo], Awaitable[str]]
"""Writes a chain; returns how it finished."""


async def whole(solo: Solo) -> str:
    return await solo.write(solo.room, solo.sampling())


async def run_single(spec: ChainSpec, lane: Lane, seq: Seq, author: str, body: Body = whole) -> Chain:
    """One model alone writes a chain in the way of `body`. Its sequence is closed when it has ended; an error of the
    chain's own is in its record."""
    solo = Solo(spec, lane, seq, author)
    try:
        finish, error = await finish_of(spec, body(solo))
    finally:
        await lane.close(seq)
    return solo.result(finish, error)


async def unwritten(spec: ChainSpec) -> Chain:
    """A chain whose deadline came before its lanes were ready for it."""
    return Writer(spec).result([], "deadline")
