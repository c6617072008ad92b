"""One lane alone: samples of one prompt as text, each ended by a stop string, a length or a deadline."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from atts_engine.backends import Lane, Seq
from atts_engine.errors import InputError
from atts_engine.pipeline.strategies.work import forked
from atts_engine.pipeline.translation import Codec
from atts_engine.runtime.records import Alternatives, SamplingParams


@dataclass(frozen=True, slots=True)
class CompletionEvent:
    """New tokens of sample `index`.

    text: what later tokens cannot change and what cannot be the beginning of a stop string, which is no part of the
    text. logprobs, alternatives: one for each token where the sampling asked for them (`TokenChunk`). finish, on a
    sample's last event only: "stop" (end of text, stop id or stop string), "length" or "deadline"; stop: the stop
    string that was met.
    """

    index: int
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...] = ()
    finish: str | None = None
    stop: str | None = None
    alternatives: tuple[Alternatives, ...] = ()


class StopText:
    """Text of one sample as its tokens come, held back where it may be the beginning of a stop string."""

    def __init__(self, codec: Codec, stops: Sequence[str]) -> None:
        self._stream = codec.detokenizer()
        self._stops = tuple(stops)
        self._held = ""
        self.met: str | None = None

    def push(self, tokens: Sequence[int]) -> str:
        """Text that is certain now. Once a stop string is met (`met`), nothing more is."""
        return self._take(self._stream.push(tokens))

    def end(self) -> str:
        """What was held back; no token follows."""
        text = self._take(self._stream.flush())
        if self.met is None:
            text, self._held = text + self._held, ""
        return text

    def _take(self, text: str) -> str:
        if self.met is not None:
            return ""
        text = self._held + text
        found = [(at, s) for s in self._stops if (at := text.find(s)) >= 0]
        if found:
            at, self.met = min(found)
            self._held = ""
            return text[:at]
        sure = len(text) - max((_overlap(text, s) for s in self._stops), default=0)
        self._held = text[sure:]
        return text[:sure]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


async def complete(
    lane: Lane,
    codec: Codec,
    prompt: Sequence[int],
    samplings: Sequence[SamplingParams],
    max_tokens: int,
    *,
    priority: int = 0,
    deadline_s: float | None = None,
    chunk_tokens: int | None = None,
) -> AsyncGenerator[CompletionEvent, None]:
    """One sample of `prompt` for each of `samplings`, events in the order they happen. Leaving the iterator frees the
    pages of all samples. Raises what the lane raises: one sample that cannot go on ends the others."""
    loop = asyncio.get_running_loop()
    deadline = None if deadline_s is None else loop.time() + deadline_s
    events: asyncio.Queue[CompletionEvent | Exception] = asyncio.Queue()

    async def one(index: int, seq: Seq) -> None:
        sampling = samplings[index]
        said = StopText(codec, sampling.stop)
        async with aclosing(lane.decode(seq, max_tokens, sampling, chunk_tokens=chunk_tokens)) as chunks:
            async for chunk in chunks:
                text = said.push(chunk.tokens)
                finish = "stop" if said.met is not None else chunk.finish
                if finish is not None:
                    text += said.end()
                if len(chunk.logprobs) < sampling.logprobs * len(chunk.tokens):
                    raise InputError(
                        f"log-probabilities cannot be had at temperature {sampling.temperature:g}: the model's server "
                        "tells those of the tempered distribution (docs/remote-sglang.md); leave them out, or sample "
                        "at 0 or 1"
                    )
                told = chunk.logprobs, finish, said.met, chunk.alternatives
                events.put_nowait(CompletionEvent(index, text, chunk.tokens, *told))
                if finish is not None:
                    return

    async def work() -> None:
        try:
            async with forked(lane, prompt, len(samplings), priority) as seqs, asyncio.TaskGroup() as group:
                for index, seq in enumerate(seqs):
                    group.create_task(one(index, seq))
        except* Exception as failures:
            events.put_nowait(_first(failures))

    task = asyncio.create_task(work())
    running = set(range(len(samplings)))
    try:
        while running:
            try:
                async with asyncio.timeout_at(deadline):
                    event = await events.get()
            except TimeoutError:
                for index in sorted(running):
                    yield CompletionEvent(index, "", (), finish="deadline")
                return
            if isinstance(event, Exception):
                raise event
            if event.finish is not None:
                running.discard(event.index)
            yield event
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _first(failures: ExceptionGroup[Exception]) -> Exception:
    failure = failures.exceptions[0]
    return _first(failure) if isinstance(failure, ExceptionGroup) else failure
