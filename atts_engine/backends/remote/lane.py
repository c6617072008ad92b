"""A lane on a server. The history of a sequence lives here: every request sends the whole of it, and the server's
prefix cache finds what it has seen."""

from __future__ import annotations

import asyncio
import hashlib
import math
from bisect import bisect_left
from collections.abc import AsyncGenerator, Hashable, Sequence
from contextlib import aclosing
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import numpy as np
import torch

from atts_engine.backends.protocol import Seq
from atts_engine.backends.remote.address import Address
from atts_engine.backends.remote.model import RemoteModel
from atts_engine.backends.remote.patience import Patience
from atts_engine.backends.remote.server import Served, Server, Written
from atts_engine.backends.remote.stats import RemoteStats
from atts_engine.conformal import GateRequest
from atts_engine.errors import ChainError, ContextFull, InputError, LaneError
from atts_engine.runtime.commands import Decode
from atts_engine.runtime.decoding import DecodeState
from atts_engine.runtime.gating import DeviceGate, ScoredSpan
from atts_engine.runtime.records import SamplingParams, SpanResult, TokenChunk

_CPU = torch.device("cpu")


class RemoteSeq:
    """Handle of a sequence on a remote lane. to_score: positions of the tokens to be scored since the last verdict;
    logprobs: of the first of them, those that are known."""

    __slots__ = ("logprobs", "scoring", "to_score", "tokens")

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.to_score: list[int] = []
        self.logprobs: list[float] = []
        self.scoring: asyncio.Task[None] | None = None

    @property
    def length(self) -> int:
        return len(self.tokens)

    def stop_scoring(self) -> None:
        if self.scoring is not None:
            self.scoring.cancel()
            self.scoring = None


class RemoteLane:
    """Implements `EngineLane` over a `Server`. All methods belong to the event loop that the lane was made on.

    Opening, forking, appending, truncating and closing cost no request. Where scores lean on the server's prefix cache
    (`appends`), they are asked for while the draft still writes, one request of a sequence at a time; where they do
    not, once, at the verdict. Verdicts are the caller's to give: `outcome` is always None. Groups and priorities are
    not told to the server, which has a scheduler of its own.

    A server that goes away is asked again (`patience.py`); a span that it had begun is written on from the tokens that
    have come. The noise of a request is keyed by (seed, length of the sequence at its start). So a chain is the same at
    any concurrency as far as the server's own arithmetic does not depend on its batches, and as long as no request of
    it was broken off.
    """

    pool_tokens = None

    def __init__(
        self,
        name: str,
        address: Address,
        server: Server,
        served: Served,
        model: RemoteModel,
        patience: Patience,
        stats: RemoteStats,
        *,
        chunk_tokens: int = 64,
    ) -> None:
        if chunk_tokens < 1:
            raise InputError(f"chunk_tokens must be 1 or more, not {chunk_tokens}")
        self.name = name
        self.address = address
        self.server = server
        self.served = served
        self.model = model
        self._patience = patience
        self._stats = stats
        self._chunk_tokens = chunk_tokens
        self._eos = frozenset(model.eos_token_ids)
        self._closed = False

    @property
    def max_length(self) -> int:
        return self.model.context

    @property
    def appends(self) -> bool:
        return self.server.appends

    def stats(self) -> dict[str, float]:
        """See `RemoteStats`."""
        return self._stats.as_dict()

    def about(self) -> dict[str, Any]:
        """What there is to say of the server, as JSON: see `AsyncEngine.servers`."""
        return {
            "address": self.address.base_url,
            "engine": self.address.kind,
            "version": self.served.version,
            "model": self.served.name,
            "root": self.served.root,
            "context": self.served.context,
            "scores": "append" if self.appends else "recompute",
            "seeded": self.served.seeded,
        }

    async def open(self, prompt: Sequence[int], *, group: Hashable = None, priority: int = 0) -> RemoteSeq:
        tokens = [int(t) for t in prompt]
        if not tokens:
            raise InputError(f"{self.name}: the prompt is empty; a sequence needs one token or more")
        if len(tokens) >= self.max_length:
            raise InputError(
                f"{self.name}: the prompt has {len(tokens)} tokens, and the server's context is {self.max_length}; "
                "shorten the prompt or serve the model with a longer one"
            )
        bad = next((t for t in tokens if not 0 <= t < self.model.vocab_size), None)
        if bad is not None:
            raise InputError(
                f"{self.name}: token id {bad} is outside the vocabulary of {self.model.vocab_size}; "
                "was it made by another tokenizer?"
            )
        self._check_open()
        return RemoteSeq(tokens)

    async def fork(self, seq: Seq, n: int) -> list[Seq]:
        own = self._own(seq)
        return [RemoteSeq(list(own.tokens)) for _ in range(n)]

    async def decode(
        self, seq: Seq, max_tokens: int, sampling: SamplingParams, *, chunk_tokens: int | None = None
    ) -> AsyncGenerator[TokenChunk, None]:
        own = self._own(seq)
        size = self._chunk_tokens if chunk_tokens is None else chunk_tokens
        if max_tokens < 1 or size < 1:
            raise InputError(f"max_tokens and chunk_tokens must be 1 or more, not {max_tokens} and {size}")
        room = self.max_length - own.length
        if room < 1:
            raise ContextFull(f"{self.name}: the chain has filled the server's context of {self.max_length} tokens")
        self._stats.decode_requests += 1
        # What ends a span is found here too, as an in-process lane finds it: the server may have another idea of what
        # ends a text, and does not know what came before it was asked again.
        state = DecodeState(Decode(max_tokens, sampling, size, _unheard, _unheard), limit=min(max_tokens, room))
        async with aclosing(self._written(own, state)) as pieces:
            async for piece in pieces:
                finish = self._take(own, state, piece) or piece.finish
                if finish is not None or len(state.buffer) >= size:
                    yield state.hand_over(finish)
                if finish is not None:
                    return

    async def append(self, seq: Seq, tokens: Sequence[int], *, score: bool = False) -> None:
        own, added = self._own(seq), [int(t) for t in tokens]
        self._check_open()
        end = own.length + len(added)
        if end > self.max_length:
            raise ContextFull(f"{self.name}: {end} tokens are more than the server's context of {self.max_length}")
        if score:
            own.to_score.extend(range(own.length, end))
        own.tokens.extend(added)
        if score and self.appends:
            self._score_on(own)

    async def verdict(self, seq: Seq, gate: GateRequest | None) -> SpanResult:
        own = self._own(seq)
        if not own.to_score:
            raise InputError(f"{self.name}: a verdict was asked for, but nothing was scored")
        await self._all_scored(own)
        span = ScoredSpan(np.array(own.logprobs, np.float32), None)
        own.to_score, own.logprobs = [], []
        # Without a gate this is the sum and the mean alone, in the order and precision of an in-process lane.
        (result,) = DeviceGate(_CPU).decide([span])
        return result

    async def scored(self, seq: Seq, *, wait: bool = False) -> tuple[float, ...]:
        own = self._own(seq)
        if wait:
            await self._all_scored(own)
        return tuple(np.array(own.logprobs, np.float32).tolist())

    async def truncate(self, seq: Seq, length: int) -> None:
        own = self._own(seq)
        if not 1 <= length <= own.length:
            raise InputError(f"{self.name}: a sequence of {own.length} tokens cannot be cut to {length}")
        own.stop_scoring()
        kept = bisect_left(own.to_score, length)
        del own.to_score[kept:], own.logprobs[kept:], own.tokens[length:]
        if self.appends:
            self._score_on(own)

    async def close(self, seq: Seq) -> None:
        self._own(seq).stop_scoring()

    async def aclose(self) -> None:
        if not self._closed:
            self._closed = True
            self._patience.close()
            await self.server.close()

    async def _written(self, own: RemoteSeq, state: DecodeState) -> AsyncGenerator[Written, None]:
        """Pieces of the span as they come, of as many requests as it takes."""
        sampling, tries = state.command.sampling, self._patience.tries()
        ends = () if sampling.ignore_eos else self.model.eos_token_ids
        asked = replace(sampling, stop_token_ids=tuple(sorted({*sampling.stop_token_ids, *ends})))
        while not tries.done:
            async with tries:
                self._check_open()
                noisy, begun = replace(asked, seed=request_seed(sampling.seed, own.length)), False
                left = state.limit - state.produced
                async with aclosing(self.server.decode(tuple(own.tokens), left, noisy)) as pieces:
                    async for piece in pieces:
                        # An event without a token is no progress: a server that dies behind it each time is away.
                        if not begun and (piece.tokens or piece.finish):
                            begun = True
                            tries.answered()
                            self._stats.resumed_spans += state.produced > 0
                        if piece.prompt_tokens is not None:
                            self._stats.sent(piece.prompt_tokens, piece.cached_tokens)
                        yield piece

    def _take(self, own: RemoteSeq, state: DecodeState, piece: Written) -> str | None:
        """The piece's tokens up to one that ends the span; returns how it does."""
        if not all(map(math.isfinite, (*piece.logprobs, *piece.confidences))):
            raise ChainError(f"{self.name}: the log-probability of a sampled token is not finite")
        told = piece.logprobs, piece.confidences, piece.alternatives
        for token, logprob, confidence, alternatives in zip_longest(piece.tokens, *told):
            own.tokens.append(token)
            self._stats.sampled_tokens += 1
            finish = state.take(token, logprob, confidence, alternatives, self._eos, self.model.tokenizer)
            if finish is not None:
                return finish
        return None

    def _score_on(self, own: RemoteSeq) -> None:
        """Have all that is to be scored scored, if nobody is at it."""
        if len(own.logprobs) == len(own.to_score):
            return
        if own.scoring is None or (own.scoring.done() and not own.scoring.exception()):
            own.scoring = asyncio.get_running_loop().create_task(self._score(own))
            # Its failure is told to whoever asks for the verdict; a chain that has ended asks no more.
            own.scoring.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _all_scored(self, own: RemoteSeq) -> None:
        self._score_on(own)
        if own.scoring is not None:
            # Whoever stops waiting leaves the score to those who still want it; closing the sequence ends it.
            await asyncio.shield(own.scoring)

    async def _score(self, own: RemoteSeq) -> None:
        while positions := own.to_score[len(own.logprobs) :]:
            start, end = positions[0], positions[-1] + 1
            self._stats.score_requests += 1
            tries = self._patience.tries()
            while not tries.done:
                async with tries:
                    self._check_open()
                    found = await self.server.score(tuple(own.tokens[:end]), start)
            self._stats.sent(found.prompt_tokens, found.cached_tokens, score=True)
            if not found.logprobs:
                raise LaneError(f"{self.name}: the server scored nothing of {end - start} tokens")
            logprobs = [found.logprobs[at - start] for at in positions if at - start < len(found.logprobs)]
            if not all(map(math.isfinite, logprobs)):
                raise ChainError(f"{self.name}: the span's log-probabilities hold NaN or infinity")
            own.logprobs.extend(logprobs)
            self._stats.scored_tokens += len(logprobs)

    def _own(self, seq: Seq) -> RemoteSeq:
        if not isinstance(seq, RemoteSeq):
            raise InputError(f"{self.name}: this sequence belongs to a lane of another kind")
        return seq

    def _check_open(self) -> None:
        if self._closed:
            raise LaneError(f"{self.name}: the engine is closed")


def _unheard(*_: object) -> None:
    """Nobody listens to a command that is not a lane thread's."""


def request_seed(seed: int, length: int) -> int:
    """Of the noise of one request, 63 bits: of the chain's stream, for a sequence of `length` tokens."""
    digest = hashlib.blake2b(f"{seed}\x1f{length}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
