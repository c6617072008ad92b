"""Both lanes of one chain: how they come to hold one text, whoever writes."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass

from atts_engine.backends import Lane, Seq
from atts_engine.pipeline.writer import Mark, Span, Writer, stream_of, take_back


@dataclass(slots=True)
class Duet:
    """draft, target: the lanes; d, t: the chain's sequences on them; writer: the text that both hold."""

    writer: Writer
    draft: Lane
    d: Seq
    target: Lane
    t: Seq

    def mark(self) -> Mark:
        return self.writer.mark(self.d, self.t)

    async def back_to(self, mark: Mark) -> None:
        """Take back all that was written since, in both lanes and in the text."""
        self.writer.back_to(mark)
        await take_back(self.target, self.t, self.t.length - mark.target)
        await take_back(self.draft, self.d, self.d.length - mark.draft)

    async def cut(self, span: Span, n: int, start: Mark) -> None:
        """End the draft's span, begun at `start`, behind its first n tokens."""
        # The draft may hold tokens that were never handed over.
        await self.draft.truncate(self.d, start.draft + n)
        await take_back(self.target, self.t, self.t.length - start.target - n)
        span.cut(n)
        self.writer.back_to(start)
        piece = self.writer.across.push(span.tokens)
        self.writer.text += piece.text
        span.given, span.given_bytes = n, piece.n_bytes

    async def draft_span(self, most: int, stop: tuple[str, ...] = ()) -> Span:
        """The draft writes up to `most` tokens, and the target follows without scoring them. They are announced by
        `Writer.tell` once they are to stay."""
        writer, span = self.writer, Span()
        sampling = writer.spec.params.sampling(stream_of(writer.spec, "draft"), stop=stop)
        async with aclosing(self.draft.decode(self.d, most, sampling)) as chunks:
            async for chunk in chunks:
                span.add(chunk)
                piece = writer.across.push(chunk.tokens)
                writer.text += piece.text
                if piece.ids:
                    await self.target.append(self.t, piece.ids)
        writer.waited(span.wait_s)
        return span

    async def take_end_off(self, span: Span) -> None:
        """Take the mark that ended the text off the draft's span, so that the target is free to say more, or to end it
        itself."""
        if span.tokens[-1] in self.writer.spec.tongues.draft.ends:
            await take_back(self.target, self.t, self.writer.across.end_ids)
            await take_back(self.draft, self.d, 1)

    async def hand_over(self) -> str:
        """Leave both lanes where the target is to go on from; returns the text that was still to come of the draft."""
        writer = self.writer
        rest = writer.across.end()
        writer.text += rest.text
        await take_back(self.draft, self.d, writer.across.take_broken())
        if rest.ids:
            await self.target.append(self.t, rest.ids)
        return rest.text

    async def target_span(self, turn: int, most: int, stop: tuple[str, ...] = ()) -> tuple[Span, tuple[int, ...]]:
        """The target writes up to `most` tokens. The draft follows chunk by chunk; the last chunk is handed back, since
        only a chain that goes on needs it there."""
        writer, span = self.writer, Span()
        held: tuple[int, ...] = ()
        sampling = writer.spec.params.sampling(stream_of(writer.spec, "target"), stop=stop)
        async with aclosing(self.target.decode(self.t, most, sampling)) as chunks:
            async for chunk in chunks:
                if held:
                    await self.draft.append(self.d, held)
                piece = writer.back.push(chunk.tokens)
                held = piece.ids
                span.add(chunk)
                writer.wrote(turn, "target", piece, len(chunk.tokens))
        writer.waited(span.wait_s)
        return span, held

    async def hand_back(self, turn: int, held: tuple[int, ...]) -> None:
        """Leave both lanes where the draft is to go on from."""
        writer = self.writer
        rest = writer.back.end()
        writer.wrote(turn, "target", rest, 0)
        await take_back(self.target, self.t, writer.back.take_broken())
        if held or rest.ids:
            await self.draft.append(self.d, held + rest.ids)
