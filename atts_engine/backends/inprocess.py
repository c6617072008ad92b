"""The in-process lane: asyncio on this side, the scheduler thread on the other."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable, Hashable, Sequence
from dataclasses import asdict
from typing import Any

from atts_engine.backends.protocol import Seq
from atts_engine.conformal import GateRequest
from atts_engine.errors import InputError, LaneError
from atts_engine.models import Model
from atts_engine.runtime import kv_bytes_per_token
from atts_engine.runtime.commands import Append, Command, Decode, Fork, Propose, Reply, Scored, Truncate, Verdict
from atts_engine.runtime.lane import LaneCore
from atts_engine.runtime.loop import EngineLoop, Mailbox
from atts_engine.runtime.records import Proposal, SamplingParams, SpanResult, TokenChunk


class InProcessSeq:
    """Handle of a sequence on an in-process lane."""

    __slots__ = ("id", "length")

    def __init__(self, seq_id: int, length: int) -> None:
        self.id = seq_id
        self.length = length


class InProcessLane:
    """Implements `Verifier` and `EngineLane`. All methods belong to the event loop the lane was made on."""

    appends = True

    def __init__(self, core: LaneCore, loop: EngineLoop, mailbox: Mailbox, *, chunk_tokens: int = 64) -> None:
        self.core = core
        self._loop = loop
        self._mailbox = mailbox
        self._chunk_tokens = _checked_chunk(chunk_tokens)
        self._ids = itertools.count()

    @property
    def name(self) -> str:
        return self.core.name

    @property
    def model(self) -> Model:
        return self.core.model

    @property
    def max_length(self) -> int:
        return self.core.max_length

    @property
    def pool_tokens(self) -> int:
        return self.core.pool.tokens

    def stats(self) -> dict[str, float]:
        """`LaneStats` and `LaneTotals`, the pool's pages, and the open sequences. peak_kv_bytes: of the most pages that
        were in use on the device at once since `restart_peak`."""
        core = self.core
        return {
            **asdict(core.stats),
            **asdict(core.meter.totals),
            "free_pages": core.pool.free,
            "used_pages": core.pool.used,
            "peak_kv_bytes": core.pool.peak * core.pool.page_size * kv_bytes_per_token(core.model),
            "host_free_pages": core.host_pool.free,
            "host_used_pages": core.host_pool.used,
            "open_sequences": core.open_sequences,
        }

    def restart_peak(self) -> None:
        """Let `peak_kv_bytes` count from now on."""
        self.core.pool.restart_peak()

    async def aclose(self) -> None:
        """Ends the scheduler thread, and with it every lane that it drives."""
        await asyncio.to_thread(self._loop.stop)

    async def open(self, prompt: Sequence[int], *, group: Hashable = None, priority: int = 0) -> InProcessSeq:
        """Hold `prompt`; its forward pass begins at once and is awaited by whatever needs it."""
        tokens = tuple(int(t) for t in prompt)
        if not tokens:
            raise InputError(f"{self.core.name}: the prompt is empty; a sequence needs one token or more")
        if len(tokens) >= self.core.max_length:
            raise InputError(
                f"{self.core.name}: the prompt has {len(tokens)} tokens, and the model's context is "
                f"{self.core.max_length}; shorten the prompt or choose a model with a longer context"
            )
        bad = next((t for t in tokens if not 0 <= t < self.core.model.config.vocab_size), None)
        if bad is not None:
            raise InputError(
                f"{self.core.name}: token id {bad} is outside the vocabulary of {self.core.model.config.vocab_size}; "
                "was it made by another tokenizer?"
            )
        seq = InProcessSeq(next(self._ids), len(tokens))
        self._post(lambda: self.core.open(seq.id, tokens, group, priority))
        return seq

    async def fork(self, seq: Seq, n: int) -> list[Seq]:
        """`n` sequences that share every page of `seq` until they write."""
        children = [InProcessSeq(next(self._ids), seq.length) for _ in range(n)]
        forked = self._send(seq, lambda reply: Fork(tuple(c.id for c in children), reply))

        def abandon(answer: asyncio.Future[Any]) -> None:
            if not answer.cancelled() and answer.exception() is None:
                for child in children:
                    self._loop.post(lambda child=child: self.core.close(child.id))  # type: ignore[misc]

        try:
            await asyncio.shield(forked)
        except asyncio.CancelledError:
            # The fork may still happen when its caller is gone, and nobody else knows the children: they are closed
            # when they are there, for before that there is nothing to close.
            forked.add_done_callback(abandon)
            raise
        return list(children)

    async def decode(
        self, seq: Seq, max_tokens: int, sampling: SamplingParams, *, chunk_tokens: int | None = None
    ) -> AsyncGenerator[TokenChunk, None]:
        own = self._own(seq)
        if max_tokens < 1:
            raise InputError(f"max_tokens must be 1 or more, not {max_tokens}")
        chunk_tokens = _checked_chunk(self._chunk_tokens if chunk_tokens is None else chunk_tokens)
        chunks: asyncio.Queue[TokenChunk | BaseException | None] = asyncio.Queue()

        def emit(chunk: TokenChunk) -> None:
            self._mailbox.post(lambda: chunks.put_nowait(chunk))

        def reply(_: Any, error: BaseException | None) -> None:
            self._mailbox.post(lambda: chunks.put_nowait(error))

        command = Decode(max_tokens, sampling, chunk_tokens, emit, reply)
        asked_at = self.core.meter.clock()
        self._post(lambda: self.core.command(own.id, command, asked_at))
        running = True
        try:
            while (item := await chunks.get()) is not None:
                if isinstance(item, BaseException):
                    running = False
                    raise item
                own.length += len(item.tokens)
                yield item
            running = False
        finally:
            if running:
                self._loop.post(lambda: self.core.stop_decode(own.id))

    async def propose(
        self, seq: Seq, tokens: Sequence[int], max_tokens: int, sampling: SamplingParams, *, written: int = 0
    ) -> Proposal:
        if max_tokens < 1:
            raise InputError(f"max_tokens must be 1 or more, not {max_tokens}")
        own, proposed = self._own(seq), tuple(int(t) for t in tokens)
        result = await self._ask(seq, lambda reply: Propose(proposed, max_tokens, sampling, written, reply))
        assert isinstance(result, Proposal)
        own.length += len(result.tokens)
        return result

    async def append(self, seq: Seq, tokens: Sequence[int], *, score: bool = False) -> None:
        """Add tokens at the end; with `score` their log-probabilities join the next verdict."""
        own, added = self._own(seq), tuple(int(t) for t in tokens)
        await self._ask(seq, lambda reply: Append(added, score, reply))
        own.length += len(added)

    async def verdict(self, seq: Seq, gate: GateRequest | None) -> SpanResult:
        result = await self._ask(seq, lambda reply: Verdict(gate, reply))
        assert isinstance(result, SpanResult)
        return result

    async def scored(self, seq: Seq, *, wait: bool = False) -> tuple[float, ...]:
        logprobs = await self._ask(seq, lambda reply: Scored(wait, reply))
        assert isinstance(logprobs, tuple)
        return logprobs

    async def truncate(self, seq: Seq, length: int) -> None:
        own = self._own(seq)
        await self._ask(own, lambda reply: Truncate(length, reply))
        own.length = length

    async def close(self, seq: Seq) -> None:
        own = self._own(seq)
        self._loop.post(lambda: self.core.close(own.id))

    def _own(self, seq: Seq) -> InProcessSeq:
        if not isinstance(seq, InProcessSeq):
            raise InputError(f"{self.core.name}: this sequence belongs to a lane of another kind")
        return seq

    def _post(self, call: Callable[[], None]) -> None:
        if not self._loop.post(call):
            raise LaneError(f"{self.core.name}: the engine is closed")

    async def _ask(self, seq: Seq, make: Callable[[Reply], Command]) -> Any:
        return await self._send(seq, make)

    def _send(self, seq: Seq, make: Callable[[Reply], Command]) -> asyncio.Future[Any]:
        own = self._own(seq)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def resolve(value: Any, error: BaseException | None) -> None:
            if answer.done():
                return
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(value)

        def reply(value: Any, error: BaseException | None) -> None:
            self._mailbox.post(lambda: resolve(value, error))

        command = make(reply)
        asked_at = self.core.meter.clock()
        self._post(lambda: self.core.command(own.id, command, asked_at))
        return answer


def _checked_chunk(chunk_tokens: int) -> int:
    if chunk_tokens < 1:
        raise InputError(f"chunk_tokens must be 1 or more, not {chunk_tokens}")
    return chunk_tokens
