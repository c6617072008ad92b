"""The algorithm, from top to bottom, as one chain lives it. Everything about batching is hidden behind `await`."""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from atts_engine.backends import Lane, Seq
from atts_engine.errors import ChainError, ContextFull
from atts_engine.pipeline.answers import find_answer, last_boxed
from atts_engine.pipeline.events import Event, TokensEvent, VerdictEvent
from atts_engine.pipeline.gate import Gate, Judged, Place
from atts_engine.pipeline.params import ATTSParams
from atts_engine.pipeline.records import Chain, ChunkScore, Problem, Turn
from atts_engine.pipeline.streams import stream_key
from atts_engine.pipeline.translation import Piece, Tongues, Translation, Words
from atts_engine.runtime.records import TokenChunk


class Prompts(NamedTuple):
    """The prompt of one problem as each lane's model wants it."""

    draft: tuple[int, ...]
    target: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ChainSpec:
    """What one chain is to do. `deadline`: time of the event loop after which a cancellation means "end where you
    are"."""

    problem: Problem
    chain: int
    params: ATTSParams
    tongues: Tongues
    prompts: Prompts
    emit: Callable[[Event], None]
    deadline: float | None = None

    def place(self, turn: int) -> Place:
        return Place(self.problem.id, self.chain, turn, self.problem.stream)

    @property
    def expired(self) -> bool:
        # A timer may fire early by the resolution of the clock.
        return self.deadline is not None and asyncio.get_running_loop().time() >= self.deadline - 1e-3


@dataclass(slots=True)
class _Span:
    """logprobs: of the tokens, where the lane tells them; ends: length of the span at the end of each chunk; wait_s:
    as in `TokenChunk`. given, given_bytes: tokens that the other lane was given to score, and the length of their text
    in UTF-8."""

    tokens: list[int] = field(default_factory=list)
    finish: str | None = None
    logprobs: list[float] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    wait_s: float | None = None
    given: int = 0
    given_bytes: int = 0

    def add(self, chunk: TokenChunk) -> None:
        self.tokens.extend(chunk.tokens)
        self.logprobs.extend(chunk.logprobs)
        if chunk.tokens:
            self.ends.append(len(self.tokens))
        self.finish = chunk.finish
        self.wait_s = chunk.wait_s

    def cut(self, n: int) -> None:
        """End it behind its first n tokens."""
        del self.tokens[n:], self.logprobs[n:]
        self.ends = [*(end for end in self.ends if end < n), n]
        self.finish = None


@dataclass(frozen=True, slots=True)
class _Mark:
    """A place to come back to: lengths of the text and of both sequences, and what waited to be given over."""

    text: int
    draft: int
    target: int
    across: Translation


class _Writer:
    """The text of one chain so far, and the clock it is timed with. across: draft to target; back: target to draft."""

    def __init__(self, spec: ChainSpec) -> None:
        self.spec = spec
        self.text = ""
        self.across, self.back = spec.tongues.translations(*spec.prompts)
        self.began = time.perf_counter()
        self.wait_s: float | None = 0.0

    def waited(self, seconds: float | None) -> None:
        """None: the lane does not tell, so the sum is not known either."""
        self.wait_s = None if self.wait_s is None or seconds is None else self.wait_s + seconds

    def elapsed(self) -> float:
        return time.perf_counter() - self.began

    def wrote(self, turn: int, author: str, piece: Piece, n_tokens: int) -> None:
        spec = self.spec
        self.text += piece.text
        if n_tokens or piece.text:
            spec.emit(TokensEvent(spec.problem.id, spec.chain, turn, author, piece.text, n_tokens))

    def mark(self, d: Seq, t: Seq) -> _Mark:
        return _Mark(len(self.text), d.length, t.length, self.across.copy())

    def back_to(self, mark: _Mark) -> None:
        self.text = self.text[: mark.text]
        across = mark.across.copy()
        if self.back is self.across:
            self.back = across
        self.across = across

    def answered_since(self, length: int) -> bool:
        """Whether the last box was closed behind the first `length` characters of the text."""
        box = last_boxed(self.text)
        return box is not None and box.end > length

    def result(self, turns: list[Turn], finish: str, error: str | None = None) -> Chain:
        spec = self.spec
        answer = find_answer(self.text)
        if finish == "stop" and answer is not None:
            finish = "answer"
        return Chain(
            problem_id=spec.problem.id,
            problem_index=spec.problem.index,
            chain=spec.chain,
            gold=spec.problem.answer,
            final_answer=answer,
            duration_s=self.elapsed(),
            turns=tuple(turns),
            strategy=spec.params.strategy,
            finish=finish,
            error=error,
            wait_s=self.wait_s,
        )


async def run_chain(spec: ChainSpec, draft: Lane, d: Seq, target: Lane, t: Seq, gate: Gate) -> Chain:
    """Draft a span while the target scores it, ask the gate, go on or take over, look for an answer, next turn.

    `d` and `t` hold the prompt on either lane. A chain that cannot go on ends with `error` set and harms no other.
    """
    params = spec.params
    writer = _Writer(spec)
    turns: list[Turn] = []
    finish, error = "turns", None
    try:
        for turn in range(params.turns):
            start = writer.mark(d, t)
            gate.enter(spec.place(turn))
            span, judged, drafted_at, early = await _draft_and_judge(writer, turn, start, draft, d, target, t, gate)
            record = _turn_record(spec, turn, span, judged, drafted_at, writer.elapsed(), early)
            turns.append(record)
            last, last_from, asked = span, start.text, params.draft_tokens
            held: tuple[int, ...] = ()
            if judged.takeover:
                await _hand_over(writer, turn, span, start, draft, d, target, t)
                # The record of the draft stands even if the target fails in mid-span.
                last_from = len(writer.text)
                last, held = await _target_span(writer, turn, draft, d, target, t)
                turns[-1] = replace(
                    record,
                    target=spec.tongues.target.codec.decode(last.tokens),
                    target_tokens=len(last.tokens),
                    t_target=writer.elapsed(),
                )
                asked = params.target_tokens
            if last.finish == "stop":
                finish = "stop"
                break
            if writer.answered_since(last_from):
                finish = "answer"
                break
            if len(last.tokens) < asked:
                finish = "length"
                break
            if judged.takeover and turn + 1 < params.turns:
                await _hand_back(writer, turn, held, draft, d, target, t)
    except ContextFull:
        finish = "length"
    except ChainError as failure:
        finish, error = "error", str(failure)
    except asyncio.CancelledError:
        if not spec.expired:
            raise
        finish = "deadline"
    finally:
        gate.leave(spec.place(len(turns)))
    return writer.result(turns, finish, error)


async def unwritten(spec: ChainSpec) -> Chain:
    """A chain whose deadline came before its lanes were ready for it."""
    return _Writer(spec).result([], "deadline")


async def run_single(spec: ChainSpec, lane: Lane, seq: Seq, author: str) -> Chain:
    """One model alone writes the whole chain: the draft-only and target-only strategies."""
    writer = _Writer(spec)
    words, said = _own_words(writer, author)
    span = _Span()
    finish, error = "length", None
    sampling = spec.params.sampling(_stream(spec, author))
    try:
        async with aclosing(lane.decode(seq, spec.params.token_limit, sampling)) as chunks:
            async for chunk in chunks:
                span.add(chunk)
                writer.wrote(0, author, said.push(chunk.tokens), len(chunk.tokens))
        writer.waited(span.wait_s)
        finish = span.finish or finish
    except ChainError as failure:
        finish, error = "error", str(failure)
    except asyncio.CancelledError:
        if not spec.expired:
            raise
        finish = "deadline"
    text, n = words.codec.decode(span.tokens), len(span.tokens)
    if author == "draft":
        turn = Turn(0, text, n, t_draft=writer.elapsed())
    else:
        turn = Turn(0, "", 0, target=text, target_tokens=n, t_target=writer.elapsed())
    return writer.result([turn], finish, error)


async def _draft_and_judge(
    writer: _Writer, turn: int, start: _Mark, draft: Lane, d: Seq, target: Lane, t: Seq, gate: Gate
) -> tuple[_Span, Judged, float, bool]:
    """The draft's span, its verdict, when the last draft token came, and whether the verdict was early. The target
    scores while the draft writes.

    An early verdict ends the span behind the token that settled it. What the draft had written beyond when the chain
    heard of it is taken back, so that chunks and the target's pace decide only how much work is spared.
    """
    spec, span = writer.spec, _Span()
    place, most = spec.place(turn), spec.params.draft_tokens
    sampling = spec.params.sampling(_stream(spec, "draft"), logprobs=True)

    async def settled(*, wait: bool) -> int | None:
        if not spec.params.early_verdict:
            return None
        return gate.settled(place, spec.params.seed, await target.scored(t, wait=wait), most)

    end: int | None = None
    async with aclosing(draft.decode(d, most, sampling)) as chunks:
        async for chunk in chunks:
            span.add(chunk)
            piece = writer.across.push(chunk.tokens)
            await _score(span, piece, target, t)
            writer.wrote(turn, "draft", piece, len(chunk.tokens))
            if chunk.finish is None and (end := await settled(wait=False)) is not None:
                break
    if not span.given:
        # All of it waits behind the boundary, and a verdict needs something to judge.
        await _score(span, writer.across.flush(), target, t)
        if not span.given:
            raise ChainError(
                f"the draft's span of {len(span.tokens)} tokens holds no text that the target could score; "
                "raise draft_tokens"
            )
    drafted_at = writer.elapsed()
    if span.finish is not None:
        writer.waited(span.wait_s)
        end = await settled(wait=True)
    if end is not None and (span.finish is None or end < len(span.tokens)):
        await _cut(writer, span, end, start, draft, d, target, t)
        judged = await gate.ask(target, t, place, spec.params.seed, most)
        if not judged.takeover:
            raise ChainError("a settled verdict came out otherwise: did the calibration change while chains ran?")
        early, said = True, writer.text[start.text :]
    else:
        judged = await gate.ask(target, t, place, spec.params.seed)
        early, said = False, None
    writer.waited(judged.wait_s)
    spec.emit(
        VerdictEvent(
            spec.problem.id, spec.chain, turn, judged.score, judged.p_value, judged.takeover, judged.decision, said
        )
    )
    return span, judged, drafted_at, early


async def _score(span: _Span, piece: Piece, target: Lane, t: Seq) -> None:
    if piece.ids:
        await target.append(t, piece.ids, score=True)
        span.given += len(piece.ids)
        span.given_bytes += piece.n_bytes


async def _cut(writer: _Writer, span: _Span, n: int, start: _Mark, draft: Lane, d: Seq, target: Lane, t: Seq) -> None:
    """End the span behind its first n tokens, in both lanes and in the text."""
    # The draft may hold tokens that were never handed over.
    await draft.truncate(d, start.draft + n)
    await _take_back(target, t, t.length - start.target - n)
    span.cut(n)
    writer.back_to(start)
    piece = writer.across.push(span.tokens)
    writer.text += piece.text
    span.given, span.given_bytes = n, piece.n_bytes


async def _hand_over(
    writer: _Writer, turn: int, span: _Span, start: _Mark, draft: Lane, d: Seq, target: Lane, t: Seq
) -> None:
    """Leave both lanes where the target is to go on from.

    `continue` keeps the span but for the mark that ended the text: the target must be free to say more, or to end it
    itself. `replace` takes the whole span back.
    """
    if writer.spec.params.takeover == "replace":
        await _take_back(target, t, t.length - start.target)
        await _take_back(draft, d, d.length - start.draft)
        writer.back_to(start)
    elif span.tokens[-1] in writer.spec.tongues.draft.ends:
        await _take_back(target, t, writer.across.end_ids)
        await _take_back(draft, d, 1)
    rest = writer.across.end()
    writer.wrote(turn, "draft", rest, 0)
    await _take_back(draft, d, writer.across.take_broken())
    if rest.ids:
        await target.append(t, rest.ids)


async def _target_span(
    writer: _Writer, turn: int, draft: Lane, d: Seq, target: Lane, t: Seq
) -> tuple[_Span, tuple[int, ...]]:
    """The target's span. The draft follows chunk by chunk; the last chunk is handed back, since only a chain that
    goes on needs it there."""
    spec, span = writer.spec, _Span()
    held: tuple[int, ...] = ()
    sampling = spec.params.sampling(_stream(spec, "target"))
    async with aclosing(target.decode(t, spec.params.target_tokens, sampling)) as chunks:
        async for chunk in chunks:
            if held:
                await draft.append(d, held)
            piece = writer.back.push(chunk.tokens)
            held = piece.ids
            span.add(chunk)
            writer.wrote(turn, "target", piece, len(chunk.tokens))
    writer.waited(span.wait_s)
    return span, held


async def _hand_back(
    writer: _Writer, turn: int, held: tuple[int, ...], draft: Lane, d: Seq, target: Lane, t: Seq
) -> None:
    """Leave both lanes where the draft is to go on from."""
    rest = writer.back.end()
    writer.wrote(turn, "target", rest, 0)
    await _take_back(target, t, writer.back.take_broken())
    if held or rest.ids:
        await draft.append(d, held + rest.ids)


async def _take_back(lane: Lane, seq: Seq, tokens: int) -> None:
    if tokens:
        await lane.truncate(seq, seq.length - tokens)


def _own_words(writer: _Writer, author: str) -> tuple[Words, Translation]:
    tongues = writer.spec.tongues
    return (tongues.draft, writer.across) if author == "draft" else (tongues.target, writer.back)


def _stream(spec: ChainSpec, author: str) -> int:
    return stream_key(spec.params.seed, spec.problem.stream_name, spec.chain, author)


def _turn_record(
    spec: ChainSpec, turn: int, span: _Span, judged: Judged, drafted_at: float, judged_at: float, early: bool
) -> Turn:
    return Turn(
        turn=turn,
        draft=spec.tongues.draft.codec.decode(span.tokens),
        draft_tokens=len(span.tokens),
        score=judged.score,
        score_per_byte=None if early else _per_byte(judged.sum_logprob, span.given_bytes),
        ppl=_perplexity(judged.score),
        percentile=judged.percentile,
        p_value=judged.p_value,
        takeover=judged.takeover,
        t_draft=drafted_at,
        t_verdict=judged_at,
        chunks=_chunk_scores(span, judged.logprobs, spec.tongues.codecs is None),
        early=early,
    )


def _chunk_scores(span: _Span, logprobs: Sequence[float], same: bool) -> tuple[ChunkScore, ...]:
    """Running means at the end of each chunk; none unless both lanes told the log-probability of the same tokens."""
    if not len(span.tokens) == len(span.logprobs) == len(logprobs) or not same:
        return ()
    # The order and precision of ops.span_mean: at the span's end the sum has the bits of the span's own.
    target = list(accumulate(logprobs, initial=0.0))
    draft = list(accumulate(span.logprobs, initial=0.0))
    return tuple(ChunkScore(n, _mean_nll(target[n], n), _mean_nll(draft[n], n)) for n in span.ends)


def _per_byte(sum_logprob: float | None, n_bytes: int) -> float | None:
    return None if sum_logprob is None or not n_bytes else -sum_logprob / n_bytes


def _mean_nll(sum_logprob: float, n: int) -> float:
    return float(np.float32(-sum_logprob / n))


def _perplexity(score: float) -> float:
    """exp(score), held at the largest double: a record must stay valid JSON however unlikely a span was."""
    return math.exp(score) if score < math.log(sys.float_info.max) else sys.float_info.max
