"""Lookahead Reasoning: the draft runs ahead by steps while the target writes its own behind each of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import NamedTuple

from atts_engine.backends import Seq
from atts_engine.errors import InputError
from atts_engine.pipeline.asking import Question
from atts_engine.pipeline.duet import Duet
from atts_engine.pipeline.events import Solution, VerdictEvent
from atts_engine.pipeline.records import Chain, Turn
from atts_engine.pipeline.settings import Lookahead
from atts_engine.pipeline.strategies.takeover import in_pairs
from atts_engine.pipeline.strategies.work import Work
from atts_engine.pipeline.translation import Words
from atts_engine.pipeline.writer import STEP_END, ChainSpec, Mark, Span, Writer, finish_of, stream_of

SAME_PROMPT = (
    "\n\nHere are two versions of the next step.\n\nVersion A: {draft}\n\nVersion B: {target}\n\nDo both say the same "
    "and come to the same result? Answer Yes or No.\n\nAnswer:"
)
ANSWERS = (" Yes", " No")


class Ahead(NamedTuple):
    """A step of the draft that is not verified yet. start: where it begins; before, text: of the chain up to it, and
    its own; drafted_at: seconds since the chain began."""

    start: Mark
    span: Span
    before: str
    text: str
    drafted_at: float


class Own(NamedTuple):
    """The target's step behind the same words. seq: holds them, and the step behind them."""

    seq: Seq
    span: Span
    text: str


Judge = Callable[[Duet, Ahead, Own], Awaitable[bool]]
"""Whether the draft's step is worth as much as the target's."""


async def look_ahead(work: Work, settings: Lookahead) -> Solution:
    """The rule is that of arXiv 2506.19830 with one draft at a time (width 1); the judge's question is our own."""
    judge = _judge(work, settings.judge)

    async def run(spec: ChainSpec, d: Seq, t: Seq) -> Chain:
        duet = Duet(Writer(spec), work.pair.draft, d, work.pair.target, t)
        chain = _Lookahead(duet, settings.depth, judge)
        try:
            finish, error = await finish_of(spec, chain.write())
        finally:
            if duet.t is not t:
                await duet.target.close(duet.t)
        return duet.writer.result(chain.turns, finish, error)

    return await in_pairs(work, run)


def _judge(work: Work, name: str) -> Judge:
    codec = work.pair.tongues.target.codec

    async def exact(duet: Duet, ahead: Ahead, own: Own) -> bool:
        return ahead.text.strip() == own.text.strip()

    async def by_task(duet: Duet, ahead: Ahead, own: Own) -> bool:
        rewards = [work.task.reward(work.problem, ahead.before, text) for text in (ahead.text, own.text)]
        return await exact(duet, ahead, own) or rewards == [1.0, 1.0]

    async def by_target(duet: Duet, ahead: Ahead, own: Own) -> bool:
        asked = SAME_PROMPT.format(draft=ahead.text.strip(), target=own.text.strip())
        found = await Question(codec, asked, ANSWERS).ask(duet.target, own.seq, end_ids=len(own.span.tokens))
        duet.writer.judged(written=1, read=found.read)
        return found.logprobs[0] > found.logprobs[1]

    if name == "exact":
        return exact
    if name == "task":
        return by_task
    try:
        Question(codec, SAME_PROMPT, ANSWERS)
    except InputError as error:
        reason = str(error).partition(";")[0]
        raise InputError(
            f"the target cannot be asked about steps, for {reason}: set judge=task or judge=exact"
        ) from error
    return by_target


class _Lookahead:
    """One chain. A turn of its record is a step: the draft's where it was kept, or the draft's and the target's in its
    place. Text is announced when it is verified, and nothing else is ever part of the chain."""

    def __init__(self, duet: Duet, depth: int, judge: Judge) -> None:
        self.turns: list[Turn] = []
        self._duet = duet
        self._writer = duet.writer
        self._spec = duet.writer.spec
        self._depth = depth
        self._judge = judge

    async def write(self) -> str:
        """Turns are added as they are verified; returns how the chain ended."""
        while len(self.turns) < self._spec.params.turns:
            if (ended := await self._round()) is not None:
                return ended
        return "turns"

    async def _round(self) -> str | None:
        """The draft runs ahead, and as much as the judge keeps joins the chain, with the target's step behind it. All
        of the target's steps are waited for, so that what a round costs does not depend on the clock."""
        duet, writer, verified = self._duet, self._writer, len(self._writer.text)
        forks: list[Seq] = []
        runs: list[asyncio.Task[Own]] = []
        ahead: list[Ahead] = []
        kept = 0
        try:
            while len(ahead) < min(self._depth, self._spec.params.turns - len(self.turns)):
                forks += await duet.target.fork(duet.t, 1)
                runs.append(asyncio.create_task(self._own_step(forks[-1])))
                ahead.append(await self._step_ahead())
                if self._ended(ahead[-1].span, ahead[-1].start.text, "draft"):
                    break
            await asyncio.wait(runs)
            for step, run in zip(ahead, runs, strict=True):
                own = run.result()
                if step.span.ended(self._words("draft")) != own.span.ended(self._words("target")):
                    break
                if not await self._judge(duet, step, own):
                    break
                kept += 1
        except BaseException:
            writer.text = writer.text[:verified]
            self._discard(ahead, runs)
            raise
        else:
            return await self._join(ahead, runs, kept, forks)
        finally:
            for run in runs:
                run.cancel()
            # Before anything that another cancellation could interrupt.
            for fork in forks:
                await duet.target.close(fork)
            await asyncio.gather(*runs, return_exceptions=True)

    async def _join(self, ahead: list[Ahead], runs: list[asyncio.Task[Own]], kept: int, forks: list[Seq]) -> str | None:
        """The first `kept` steps stay; the target's own takes the place of the next one, if there is one. The fork that
        holds it goes on as the chain's sequence, and leaves `forks`."""
        duet, writer = self._duet, self._writer
        for step in ahead[:kept]:
            self._record(step, takeover=False)
        if kept == len(ahead):
            self._discard([], runs)
            return self._ended(ahead[-1].span, ahead[-1].start.text, "draft")
        step, own = ahead[kept], runs[kept].result()
        self._discard(ahead[kept + 1 :], runs[:kept] + runs[kept + 1 :])
        turn = len(self.turns)
        self._record(step, takeover=True)
        await duet.back_to(step.start)
        former, duet.t = duet.t, own.seq
        forks.remove(own.seq)
        await duet.target.close(former)
        piece = writer.back.push(own.span.tokens)
        writer.wrote(turn, "target", piece, len(own.span.tokens))
        self.turns[turn] = replace(
            self.turns[turn], target=own.text, target_tokens=len(own.span.tokens), t_target=writer.elapsed()
        )
        ended = self._ended(own.span, step.start.text, "target")
        if ended is None:
            await duet.hand_back(turn, piece.ids)
        return ended

    async def _step_ahead(self) -> Ahead:
        writer, start = self._writer, self._duet.mark()
        span = await self._duet.draft_span(self._spec.params.draft_tokens, (STEP_END,))
        await self._duet.hand_over()
        return Ahead(start, span, writer.text[: start.text], writer.text[start.text :], writer.elapsed())

    async def _own_step(self, seq: Seq) -> Own:
        span, params = Span(), self._spec.params
        sampling = params.sampling(stream_of(self._spec, "target"), stop=(STEP_END,))
        async with aclosing(self._duet.target.decode(seq, params.target_tokens, sampling)) as chunks:
            async for chunk in chunks:
                span.add(chunk)
        return Own(seq, span, self._words("target").codec.decode(span.tokens))

    def _record(self, step: Ahead, *, takeover: bool) -> None:
        writer, turn, n = self._writer, len(self.turns), len(step.span.tokens)
        tested, at = float(takeover), writer.elapsed()
        self.turns.append(
            Turn(turn, step.text, n, takeover=takeover, t_draft=step.drafted_at, t_verdict=at, tested=tested)
        )
        writer.tell(turn, "draft", step.text, n)
        place = self._spec.place(turn)
        self._spec.emit(VerdictEvent(*place[:3], tested, None, takeover, None))

    def _discard(self, ahead: Sequence[Ahead], runs: Sequence[asyncio.Task[Own]]) -> None:
        ended = [run for run in runs if run.done() and not run.cancelled() and run.exception() is None]
        self._writer.costs["discarded_draft_tokens"] += sum(len(step.span.tokens) for step in ahead)
        self._writer.costs["discarded_target_tokens"] += sum(len(run.result().span.tokens) for run in ended)

    def _ended(self, span: Span, began: int, author: str) -> str | None:
        """How the chain ends with this step, if it does."""
        params = self._spec.params
        if span.ended(self._words(author)):
            return "stop"
        if self._writer.answered_since(began):
            return "answer"
        asked = params.draft_tokens if author == "draft" else params.target_tokens
        return "length" if span.finish != "stop" and len(span.tokens) < asked else None

    def _words(self, author: str) -> Words:
        tongues = self._spec.tongues
        return tongues.draft if author == "draft" else tongues.target
