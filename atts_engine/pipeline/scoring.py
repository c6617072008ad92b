"""How likely a lane finds a span after a prefix. Prefixes stay open, so that the next span of one computes its own
tokens alone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from atts_engine.backends import Lane, Seq
from atts_engine.errors import ChainError, InputError


@dataclass(frozen=True, slots=True)
class SpanScore:
    """sum_logprob: nats, under the model itself (temperature 1), summed in a fixed order over the `n_tokens` of the
    span, the first included; score: -sum_logprob / n_tokens as float32, the mean negative log-likelihood; logprobs:
    float32, one for each token. cached_tokens: of the prefix, those that had been given to the lane before."""

    score: float
    sum_logprob: float
    n_tokens: int
    logprobs: tuple[float, ...]
    cached_tokens: int


@dataclass(slots=True, eq=False)
class _Prefix:
    tokens: tuple[int, ...]
    seq: Seq
    users: int = 0
    failed: bool = False


class PrefixStore:
    """Open sequences of one lane by the tokens that they hold. At most `max_tokens` of them in all stay open, those
    used last; under pressure the lane may take an idle one's pages like anybody's, and computes them again when they
    are wanted."""

    def __init__(self, lane: Lane, max_tokens: int) -> None:
        self._lane = lane
        self._max_tokens = max_tokens
        self._open: OrderedDict[tuple[int, ...], _Prefix] = OrderedDict()
        self.queried_tokens = 0
        self.hit_tokens = 0
        """Prefix tokens that were asked for, and of those the ones that were there already, since the store began."""

    @property
    def held_tokens(self) -> int:
        return sum(len(tokens) for tokens in self._open)

    async def score(self, prefix: Sequence[int], span: Sequence[int]) -> SpanScore:
        """`InputError` where the span is empty; what the lane raises otherwise."""
        if not span:
            raise InputError("the span is empty; a score needs one token or more")
        tokens = tuple(prefix)
        held, cached = await self._hold(tokens)
        try:
            (child,) = await self._lane.fork(held.seq, 1)
            try:
                await self._lane.append(child, span, score=True)
                result = await self._lane.verdict(child, None)
            finally:
                await self._lane.close(child)
        except ChainError:
            # The prefix itself may be what cannot go on.
            self._forget(held)
            raise
        finally:
            await self._release(held)
        self.queried_tokens += len(tokens)
        self.hit_tokens += cached
        return SpanScore(result.score, result.sum_logprob, result.n_tokens, result.logprobs, cached)

    async def clear(self) -> None:
        """Give the pages of every prefix back that no score is being taken of."""
        await self._trim(0)

    async def _hold(self, tokens: tuple[int, ...]) -> tuple[_Prefix, int]:
        """The open prefix, in use once more, and how many of its tokens had been there."""
        known = self._open.get(tokens)
        if known is not None:
            self._open.move_to_end(tokens)
            known.users += 1
            return known, len(tokens)
        base = self._longest(tokens)
        seq = await self._lane.open(tokens) if base is None else await self._extend(base, tokens[len(base.tokens) :])
        cached = 0 if base is None else len(base.tokens)
        made = self._open.setdefault(tokens, _Prefix(tokens, seq))
        made.users += 1
        if made.seq is not seq:
            # Another request has opened it meanwhile.
            await self._lane.close(seq)
        return made, cached

    def _longest(self, tokens: tuple[int, ...]) -> _Prefix | None:
        found = (p for p in self._open.values() if tokens[: len(p.tokens)] == p.tokens)
        return max(found, key=lambda p: len(p.tokens), default=None)

    async def _extend(self, base: _Prefix, more: tuple[int, ...]) -> Seq:
        base.users += 1
        try:
            (seq,) = await self._lane.fork(base.seq, 1)
        except ChainError:
            self._forget(base)
            raise
        finally:
            await self._release(base)
        try:
            await self._lane.append(seq, more)
        except BaseException:
            await self._lane.close(seq)
            raise
        return seq

    def _forget(self, prefix: _Prefix) -> None:
        prefix.failed = True
        if self._open.get(prefix.tokens) is prefix:
            del self._open[prefix.tokens]

    async def _release(self, prefix: _Prefix) -> None:
        prefix.users -= 1
        if prefix.failed and not prefix.users:
            await self._lane.close(prefix.seq)
        await self._trim()

    async def _trim(self, limit: int | None = None) -> None:
        limit = self._max_tokens if limit is None else limit
        held = self.held_tokens
        for prefix in [p for p in self._open.values() if not p.users]:
            if held <= limit:
                return
            del self._open[prefix.tokens]
            held -= len(prefix.tokens)
            await self._lane.close(prefix.seq)
