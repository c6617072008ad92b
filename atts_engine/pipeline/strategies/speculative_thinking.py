"""Speculative Thinking: the draft's own words, at the beginning of a paragraph, call the target."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from atts_engine.backends import Seq
from atts_engine.errors import ChainError, InputError
from atts_engine.pipeline.duet import Duet
from atts_engine.pipeline.events import Solution, VerdictEvent
from atts_engine.pipeline.records import Chain, Turn
from atts_engine.pipeline.settings import SpeculativeThinking
from atts_engine.pipeline.strategies.takeover import in_pairs
from atts_engine.pipeline.strategies.work import Work
from atts_engine.pipeline.translation import Words
from atts_engine.pipeline.writer import STEP_END, ChainSpec, Writer, finish_of

VERIFY = "verify, verifying, check, checking, double-check, confirm, make sure, plug back, substitute back"
REFLECT = "wait, hold on, however, but, alternatively, mistake, wrong, incorrect, not right, confused, hmm, try again"
AFFIRM = "yes, yeah, indeed, correct, right, exactly, clearly, great, good, makes sense, therefore, final answer"

RECAP = (
    "Let me stop here, look again at what has been found so far, take out what was wrong, and finish from there.\n\n"
)
RECAP_GROWTH, RECAP_MOST = 25, 200
"""Tokens by which each recap of a chain is longer than the one before, and of the longest."""


def _any_of(words: str) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{'|'.join(re.escape(word) for word in words.split(', '))})\b", re.IGNORECASE)


_KINDS = {"verify": _any_of(VERIFY), "reflect": _any_of(REFLECT), "affirm": _any_of(AFFIRM)}


def sentiment(text: str) -> str:
    """ "verify", "reflect", "affirm" or "neutral": the first of them in this order that the text has a word of."""
    return next((kind for kind, words in _KINDS.items() if words.search(text)), "neutral")


async def think_speculatively(work: Work, settings: SpeculativeThinking) -> Solution:
    """The rule is that of arXiv 2504.12329; the word lists and the text of the recap are our own."""

    async def run(spec: ChainSpec, d: Seq, t: Seq) -> Chain:
        duet = Duet(Writer(spec), work.pair.draft, d, work.pair.target, t)
        thought = _Thought(duet, settings)
        finish, error = await finish_of(spec, thought.write())
        return duet.writer.result(thought.turns, finish, error)

    return await in_pairs(work, run)


class _Thought:
    """One chain. A turn of its record is a paragraph of the draft with what follows it: the draft's own tokens, or the
    target's in their place."""

    def __init__(self, duet: Duet, settings: SpeculativeThinking) -> None:
        self.turns: list[Turn] = []
        self._duet = duet
        self._writer = duet.writer
        self._spec = duet.writer.spec
        self._settings = settings
        self._left = self._spec.params.token_limit
        self._reflections = 0
        self._recaps = 0

    async def write(self) -> str:
        """Turns are added as they are judged; returns how the chain ended."""
        while self._left > 0:
            if (ended := await self._turn()) is not None:
                return ended
        return "length"

    async def _turn(self) -> str | None:
        duet, writer, turn, settings = self._duet, self._writer, len(self.turns), self._settings
        began = len(writer.text)
        kept = await self._draft(self._left, (STEP_END,))
        writer.tell(turn, "draft", writer.text[began:], len(kept))
        ended, drafted_at = self._ended(kept, self._spec.tongues.draft, began), writer.elapsed()
        kind, tested = "neutral", None
        if ended is None and self._left > 0:
            before = duet.mark()
            proposal = await self._draft(min(settings.propose, self._left))
            said = writer.text[before.text :]
            kind, drafted_at = sentiment(said), writer.elapsed()
            tested = float(kind != "neutral")
            if kind == "neutral":
                kept += proposal
                writer.tell(turn, "draft", said, len(proposal))
                ended = self._ended(proposal, self._spec.tongues.draft, before.text)
            else:
                await duet.back_to(before)
                writer.costs["discarded_draft_tokens"] += len(proposal)
            place = self._spec.place(turn)
            self._spec.emit(VerdictEvent(*place[:3], tested, None, kind != "neutral", None))
        self.turns.append(
            Turn(
                turn=turn,
                draft=self._spec.tongues.draft.codec.decode(kept),
                draft_tokens=len(kept),
                takeover=kind != "neutral",
                t_draft=drafted_at,
                t_verdict=writer.elapsed(),
                tested=tested,
            )
        )
        if kind == "neutral":
            return ended
        writer.tell(turn, "draft", await duet.hand_over(), 0)
        ended = await self._target(settings.propose + (settings.verify if kind == "verify" else 0))
        self._reflections += kind == "reflect"
        if ended is None and settings.reflections and self._reflections >= settings.reflections:
            ended = await self._recap()
        return ended

    async def _recap(self) -> str | None:
        most = self._settings.recap + RECAP_GROWTH * self._recaps
        self._reflections, self._recaps = 0, self._recaps + 1
        try:
            ids = tuple(self._spec.tongues.target.codec.encode(RECAP))
        except InputError as error:
            raise ChainError(f"the recap cannot be asked for: {error}; set reflections=0") from error
        duet, turn = self._duet, len(self.turns) - 1
        await duet.target.append(duet.t, ids)
        piece = self._writer.back.push(ids)
        self._writer.wrote(turn, "target", piece, 0)
        if piece.ids:
            await duet.draft.append(duet.d, piece.ids)
        self._add_target(ids, written=False)
        return await self._target(min(most, max(RECAP_MOST, self._settings.recap)))

    async def _draft(self, most: int, stop: tuple[str, ...] = ()) -> list[int]:
        span = await self._duet.draft_span(most, stop)
        self._left -= len(span.tokens)
        return span.tokens

    async def _target(self, most: int) -> str | None:
        """The target goes on, and its words join the turn's; how the chain ended."""
        if self._left <= 0:
            return "length"
        began = len(self._writer.text)
        span, held = await self._duet.target_span(len(self.turns) - 1, min(most, self._left))
        self._left -= len(span.tokens)
        self._add_target(span.tokens, written=True)
        ended = self._ended(span.tokens, self._spec.tongues.target, began)
        if ended is None:
            await self._duet.hand_back(len(self.turns) - 1, held)
        return ended

    def _add_target(self, ids: Sequence[int], *, written: bool) -> None:
        record = self.turns[-1]
        self.turns[-1] = replace(
            record,
            target=(record.target or "") + self._spec.tongues.target.codec.decode(ids),
            target_tokens=record.target_tokens + (len(ids) if written else 0),
            t_target=self._writer.elapsed(),
        )

    def _ended(self, tokens: Sequence[int], words: Words, began: int) -> str | None:
        if tokens and tokens[-1] in words.ends:
            return "stop"
        return "answer" if self._writer.answered_since(began) else None
