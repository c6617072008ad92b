"""The algorithm, from top to bottom, as one chain lives it. Everything about batching is hidden behind `await`."""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from itertools import accumulate

import numpy as np

from atts_engine.backends import Lane, Seq
from atts_engine.errors import ChainError, ContextFull
from atts_engine.pipeline.events import VerdictEvent
from atts_engine.pipeline.gate import Appraisal, Gate, Judged, Place
from atts_engine.pipeline.records import Chain, ChunkScore, Turn
from atts_engine.pipeline.scorers import Drafted, Scorer
from atts_engine.pipeline.translation import Piece
from atts_engine.pipeline.writer import ChainSpec, Mark, Span, Writer, stream_of, take_back
from atts_engine.runtime.records import SpanResult


async def run_chain(
    spec: ChainSpec, draft: Lane, d: Seq, target: Lane, t: Seq, gate: Gate, scorer: Scorer | None = None
) -> Chain:
    """Draft a span while the target scores it, ask the gate, go on or take over, look for an answer, next turn.

    scorer: gives the gate what it tests; None: the span's mean negative log-likelihood. `d` and `t` hold the prompt on
    either lane. A chain that cannot go on ends with `error` set and harms no other.
    """
    params = spec.params
    writer = Writer(spec)
    turns: list[Turn] = []
    finish, error = "turns", None
    try:
        for turn in range(params.turns):
            start = writer.mark(d, t)
            gate.enter(Place(spec.problem.id, spec.chain, turn))
            span, judged, drafted_at, early = await _draft_and_judge(
                writer, turn, start, draft, d, target, t, gate, scorer
            )
            record = _turn_record(spec, turn, span, judged, drafted_at, writer.elapsed(), early)
            turns.append(record)
            last, last_from, asked, words = span, start.text, params.draft_tokens, spec.tongues.draft
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
                asked, words = params.target_tokens, spec.tongues.target
            if last.ended(words):
                finish = "stop"
                break
            if writer.answered_since(last_from):
                finish = "answer"
                break
            if last.finish != "stop" and len(last.tokens) < asked:
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
        gate.leave(Place(spec.problem.id, spec.chain, len(turns)))
    return writer.result(turns, finish, error)


async def _draft_and_judge(
    writer: Writer,
    turn: int,
    start: Mark,
    draft: Lane,
    d: Seq,
    target: Lane,
    t: Seq,
    gate: Gate,
    scorer: Scorer | None,
) -> tuple[Span, Judged, float, bool]:
    """The draft's span, its verdict, when the last draft token came, and whether the verdict was early. The target
    scores while the draft writes.

    An early verdict ends the span behind the token that settled it. What the draft had written beyond when the chain
    heard of it is taken back, so that chunks and the target's pace decide only how much work is spared.
    """
    spec, span = writer.spec, Span()
    place, most = Place(spec.problem.id, spec.chain, turn), spec.params.draft_tokens
    sampling = spec.params.sampling(stream_of(spec, "draft"), logprobs=True, stop=spec.stop)

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
        appraisal = None if scorer is None else _appraisal(writer, scorer, place, start, span, target, t)
        judged = await gate.ask(target, t, place, spec.params.seed, appraisal=appraisal)
        early, said = False, None
    writer.waited(judged.wait_s)
    tested = judged.score if judged.tested is None else judged.tested
    spec.emit(VerdictEvent(*place, tested, judged.p_value, judged.takeover, judged.decision, said))
    return span, judged, drafted_at, early


def _appraisal(
    writer: Writer, scorer: Scorer, place: Place, start: Mark, span: Span, target: Lane, t: Seq
) -> Appraisal:
    drafted = Drafted(
        problem=writer.spec.problem,
        place=place,
        seed=writer.spec.params.seed,
        before=writer.text[: start.text],
        text=writer.text[start.text :],
        n_tokens=len(span.tokens),
        end_ids=writer.across.end_ids,
        waiting=writer.across.copy().end().ids,
    )

    async def score(result: SpanResult) -> float:
        found = await scorer.score(drafted, target, t, result)
        writer.costs["judge_tokens"] += found.written
        writer.costs["judge_prompt_tokens"] += found.read
        return found.value

    return Appraisal(score, scorer.by_turn)


async def _score(span: Span, piece: Piece, target: Lane, t: Seq) -> None:
    if piece.ids:
        await target.append(t, piece.ids, score=True)
        span.given += len(piece.ids)
        span.given_bytes += piece.n_bytes


async def _cut(writer: Writer, span: Span, n: int, start: Mark, draft: Lane, d: Seq, target: Lane, t: Seq) -> None:
    """End the span behind its first n tokens, in both lanes and in the text."""
    # The draft may hold tokens that were never handed over.
    await draft.truncate(d, start.draft + n)
    await take_back(target, t, t.length - start.target - n)
    span.cut(n)
    writer.back_to(start)
    piece = writer.across.push(span.tokens)
    writer.text += piece.text
    span.given, span.given_bytes = n, piece.n_bytes


async def _hand_over(
    writer: Writer, turn: int, span: Span, start: Mark, draft: Lane, d: Seq, target: Lane, t: Seq
) -> None:
    """Leave both lanes where the target is to go on from.

    `continue` keeps the span but for the mark that ended the text: the target must be free to say more, or to end it
    itself. `replace` takes the whole span back.
    """
    if writer.spec.params.takeover == "replace":
        await take_back(target, t, t.length - start.target)
        await take_back(draft, d, d.length - start.draft)
        writer.back_to(start)
    elif span.tokens[-1] in writer.spec.tongues.draft.ends:
        await take_back(target, t, writer.across.end_ids)
        await take_back(draft, d, 1)
    rest = writer.across.end()
    writer.wrote(turn, "draft", rest, 0)
    await take_back(draft, d, writer.across.take_broken())
    if rest.ids:
        await target.append(t, rest.ids)


async def _target_span(
    writer: Writer, turn: int, draft: Lane, d: Seq, target: Lane, t: Seq
) -> tuple[Span, tuple[int, ...]]:
    """The target's span. The draft follows chunk by chunk; the last chunk is handed back, since only a chain that
    goes on needs it there."""
    spec, span = writer.spec, Span()
    held: tuple[int, ...] = ()
    sampling = spec.params.sampling(stream_of(spec, "target"), stop=spec.stop)
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
    writer: Writer, turn: int, held: tuple[int, ...], draft: Lane, d: Seq, target: Lane, t: Seq
) -> None:
    """Leave both lanes where the draft is to go on from."""
    rest = writer.back.end()
    writer.wrote(turn, "target", rest, 0)
    await take_back(target, t, writer.back.take_broken())
    if held or rest.ids:
        await draft.append(d, held + rest.ids)


def _turn_record(
    spec: ChainSpec, turn: int, span: Span, judged: Judged, drafted_at: float, judged_at: float, early: bool
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
        tested=judged.tested,
    )


def _chunk_scores(span: Span, logprobs: Sequence[float], same: bool) -> tuple[ChunkScore, ...]:
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
