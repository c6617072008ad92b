"""The algorithm, from top to bottom, as one chain lives it. Everything about batching is hidden behind `await`."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from itertools import accumulate

import numpy as np

from atts_engine.backends import Lane, Seq
from atts_engine.errors import ChainError
from atts_engine.pipeline.duet import Duet
from atts_engine.pipeline.events import VerdictEvent
from atts_engine.pipeline.gate import Appraisal, Gate, Judged, Place
from atts_engine.pipeline.records import Chain, ChunkScore, Turn
from atts_engine.pipeline.scorers import Drafted, Scorer
from atts_engine.pipeline.translation import Piece
from atts_engine.pipeline.writer import ChainSpec, Mark, Span, Writer, finish_of, stream_of
from atts_engine.runtime.records import SpanResult


async def run_chain(
    spec: ChainSpec, draft: Lane, d: Seq, target: Lane, t: Seq, gate: Gate, scorer: Scorer | None = None
) -> Chain:
    """Draft a span while the target scores it, ask the gate, go on or take over, look for an answer, next turn.

    scorer: gives the gate what it tests; None: the span's mean negative log-likelihood. `d` and `t` hold the prompt on
    either lane. A chain that cannot go on ends with `error` set and harms no other.
    """
    duet, turns = Duet(Writer(spec), draft, d, target, t), list[Turn]()
    try:
        finish, error = await finish_of(spec, _write(duet, gate, scorer, turns))
    finally:
        gate.leave(spec.place(len(turns)))
    return duet.writer.result(turns, finish, error)


async def _write(duet: Duet, gate: Gate, scorer: Scorer | None, turns: list[Turn]) -> str:
    """Turns are added as they are judged; returns how the chain ended."""
    writer, spec = duet.writer, duet.writer.spec
    params = spec.params
    for turn in range(params.turns):
        start = duet.mark()
        gate.enter(spec.place(turn))
        span, judged, drafted_at, early = await _draft_and_judge(duet, turn, start, gate, scorer)
        record = _turn_record(spec, turn, span, judged, drafted_at, writer.elapsed(), early)
        turns.append(record)
        last, last_from, asked, words = span, start.text, params.draft_tokens, spec.tongues.draft
        held: tuple[int, ...] = ()
        if judged.takeover:
            if params.takeover == "replace":
                await duet.back_to(start)
            else:
                await duet.take_end_off(span)
            writer.tell(turn, "draft", await duet.hand_over(), 0)
            # The record of the draft stands even if the target fails in mid-span.
            last_from = len(writer.text)
            last, held = await duet.target_span(turn, params.target_tokens, spec.stop)
            turns[-1] = replace(
                record,
                target=spec.tongues.target.codec.decode(last.tokens),
                target_tokens=len(last.tokens),
                t_target=writer.elapsed(),
            )
            asked, words = params.target_tokens, spec.tongues.target
        if last.ended(words):
            return "stop"
        if writer.answered_since(last_from):
            return "answer"
        if last.finish != "stop" and len(last.tokens) < asked:
            return "length"
        if judged.takeover and turn + 1 < params.turns:
            await duet.hand_back(turn, held)
    return "turns"


async def _draft_and_judge(
    duet: Duet, turn: int, start: Mark, gate: Gate, scorer: Scorer | None
) -> tuple[Span, Judged, float, bool]:
    """The draft's span, its verdict, when the last draft token came, and whether the verdict was early. The target
    scores while the draft writes.

    An early verdict ends the span behind the token that settled it. What the draft had written beyond when the chain
    heard of it is taken back, so that chunks and the target's pace decide only how much work is spared.
    """
    writer, target, t, span = duet.writer, duet.target, duet.t, Span()
    spec = writer.spec
    place, most = spec.place(turn), spec.params.draft_tokens
    sampling = spec.params.sampling(stream_of(spec, "draft"), logprobs=True, stop=spec.stop)

    async def settled(*, wait: bool) -> int | None:
        if not spec.params.early_verdict:
            return None
        return gate.settled(place, spec.params.seed, await target.scored(t, wait=wait), most)

    end: int | None = None
    async with aclosing(duet.draft.decode(duet.d, most, sampling)) as chunks:
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
        await duet.cut(span, end, start)
        judged = await gate.ask(target, t, place, spec.params.seed, most)
        if not judged.takeover:
            raise ChainError("a settled verdict came out otherwise: did the calibration change while chains ran?")
        early, said = True, writer.text[start.text :]
    else:
        appraisal = None if scorer is None else _appraisal(duet, scorer, place, start, span)
        judged = await gate.ask(target, t, place, spec.params.seed, appraisal=appraisal)
        early, said = False, None
    writer.waited(judged.wait_s)
    tested = judged.score if judged.tested is None else judged.tested
    spec.emit(VerdictEvent(*place[:3], tested, judged.p_value, judged.takeover, judged.decision, said))
    return span, judged, drafted_at, early


def _appraisal(duet: Duet, scorer: Scorer, place: Place, start: Mark, span: Span) -> Appraisal:
    writer = duet.writer
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
        found = await scorer.score(drafted, duet.target, duet.t, result)
        writer.judged(found.written, found.read)
        return found.value

    return Appraisal(score, scorer.by_turn)


async def _score(span: Span, piece: Piece, target: Lane, t: Seq) -> None:
    if piece.ids:
        await target.append(t, piece.ids, score=True)
        span.given += len(piece.ids)
        span.given_bytes += piece.n_bytes


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
