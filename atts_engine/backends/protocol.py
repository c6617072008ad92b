"""What the pipeline knows of a lane."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Hashable, Sequence
from typing import Protocol, runtime_checkable

from atts_engine.conformal import GateRequest
from atts_engine.models import Tokenizer
from atts_engine.runtime.records import Proposal, SamplingParams, SpanResult, TokenChunk


class Seq(Protocol):
    """A sequence held by a lane: an opaque handle with its length in tokens (prompt included)."""

    @property
    def length(self) -> int: ...


class Lane(Protocol):
    """A model that holds sequences and their KV. Tokens in; tokens, scores and verdicts out.

    A sequence is one token behind: its last token is forwarded with whatever comes next, so the first token of
    an appended span is scored, after a fork or a truncate too. Every method raises `ChainError` when this
    sequence cannot go on and `LaneError` when the whole lane is gone; closing twice is allowed.
    """

    async def open(self, prompt: Sequence[int], *, group: Hashable = None, priority: int = 0) -> Seq:
        """Sequences of a group, and all that are forked from them, have one claim together to the lane's time; None: a
        group for this sequence and its forks. A lower priority number is served first and preempted last."""
        ...

    async def fork(self, seq: Seq, n: int) -> list[Seq]: ...

    def decode(
        self, seq: Seq, max_tokens: int, sampling: SamplingParams, *, chunk_tokens: int | None = None
    ) -> AsyncGenerator[TokenChunk, None]:
        """chunk_tokens: handed over at a time; None: the lane's own number."""
        ...

    async def append(self, seq: Seq, tokens: Sequence[int], *, score: bool = False) -> None: ...

    async def verdict(self, seq: Seq, gate: GateRequest | None) -> SpanResult:
        """Result for all tokens scored since the last verdict. A lane that cannot count leaves `outcome` None whatever
        the gate: then the asker counts."""
        ...

    async def scored(self, seq: Seq, *, wait: bool = False) -> tuple[float, ...]:
        """Log-probabilities (nats, float32) of the tokens to be scored since the last verdict, in order: of those that
        are scored by now, which nobody is kept waiting for, or with `wait` of all of them."""
        ...

    async def truncate(self, seq: Seq, length: int) -> None: ...

    async def close(self, seq: Seq) -> None: ...


@runtime_checkable
class Verifier(Lane, Protocol):
    """A lane that can tell at once which of several proposed tokens it would have drawn itself.

    A remote server cannot: its noise is not keyed by (seed, position, token id).
    """

    async def propose(
        self, seq: Seq, tokens: Sequence[int], max_tokens: int, sampling: SamplingParams, *, written: int = 0
    ) -> Proposal:
        """Write on as `decode` does with the same `sampling`, token for token, but forward the proposed tokens together
        where `decode` forwards them one by one. The span grows by those of them that the lane draws as well, up to the
        first that it does not, and by the lane's own token in that one's place, or behind them all. What else was
        proposed leaves no trace. Any tokens may be proposed, or none.

        max_tokens: that the span may still grow by. written: tokens at the end of the sequence that belong to the span
        already: a stop string may begin in them. Whoever stops waiting for the answer does not know what the sequence
        holds, and truncates or closes it.
        """
        ...


class ModelInfo(Protocol):
    """What there is to know of a lane's model beside its sequences. eos_token_ids: that end a text; fingerprint: of
    all that decides what its scores mean."""

    @property
    def name(self) -> str: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...

    @property
    def fingerprint(self) -> str: ...


class EngineLane(Lane, Protocol):
    """A lane as an engine is made of two of them.

    name: "draft" or "target"; max_length: tokens of the model's context; pool_tokens: that all its sequences may hold
    together, None where a server keeps that to itself. All belongs to the event loop that the lane was made on.
    """

    @property
    def name(self) -> str: ...

    @property
    def model(self) -> ModelInfo: ...

    @property
    def max_length(self) -> int: ...

    @property
    def pool_tokens(self) -> int | None: ...

    @property
    def appends(self) -> bool:
        """Whether a score costs the tokens of its span alone, those before it being held."""
        ...

    def stats(self) -> dict[str, float]:
        """Counters since the lane began."""
        ...

    async def aclose(self) -> None:
        """End the lane; its open sequences end with `LaneError`. Closing twice is allowed."""
        ...
