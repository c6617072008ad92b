"""One chain while it is written: what it is to be, its text and its spans so far, what it has cost."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from atts_engine.backends import Lane, Seq
from atts_engine.errors import ChainError, ContextFull
from atts_engine.pipeline.answers import find_answer, last_boxed
from atts_engine.pipeline.events import Event, TokensEvent
from atts_engine.pipeline.gate import Place
from atts_engine.pipeline.params import ATTSParams
from atts_engine.pipeline.records import COSTS, Chain, Problem, Turn
from atts_engine.pipeline.streams import stream_key
from atts_engine.pipeline.translation import Piece, Tongues, Translation, Words
from atts_engine.runtime.records import TokenChunk

STEP_END = "\n\n"
"""What ends a reasoning step: it belongs to the step."""


class Prompts(NamedTuple):
    """The prompt of one problem as each lane's model wants it."""

    draft: tuple[int, ...]
    target: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ChainSpec:
    """What one chain is to do. `deadline`: time of the event loop after which a cancellation means "end where you
    are". step: spans end behind `STEP_END` too."""

    problem: Problem
    chain: int
    params: ATTSParams
    tongues: Tongues
    prompts: Prompts
    emit: Callable[[Event], None]
    deadline: float | None = None
    step: bool = False

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end a span."""
        return (STEP_END,) if self.step else ()

    def place(self, turn: int) -> Place:
        return Place(self.problem.id, self.chain, turn, self.problem.stream)

    @property
    def expired(self) -> bool:
        # A timer may fire early by the resolution of the clock.
        return self.deadline is not None and asyncio.get_running_loop().time() >= self.deadline - 1e-3


@dataclass(slots=True)
class Span:
    """What one author has written at a stretch. logprobs: of the tokens, where the lane tells them; ends: length of the
    span at the end of each chunk; wait_s: as in `TokenChunk`. given, given_bytes: tokens that the other lane was given
    to score, and the length of their text in UTF-8."""

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

    def ended(self, words: Words) -> bool:
        """Whether its author ended the text, and not a step alone."""
        return self.finish == "stop" and self.tokens[-1] in words.ends

    def cut(self, n: int) -> None:
        """End it behind its first n tokens."""
        del self.tokens[n:], self.logprobs[n:]
        self.ends = [*(end for end in self.ends if end < n), n]
        self.finish = None


@dataclass(frozen=True, slots=True)
class Mark:
    """A place to come back to: lengths of the text and of both sequences, and what waited to be given over."""

    text: int
    draft: int
    target: int
    across: Translation


class Writer:
    """The text of one chain so far, and the clock it is timed with. across: draft to target; back: target to draft.
    costs: tokens beside those of the spans on record, by the names of `records.COSTS`."""

    def __init__(self, spec: ChainSpec) -> None:
        self.spec = spec
        self.text = ""
        self.across, self.back = spec.tongues.translations(*spec.prompts)
        self.began = time.perf_counter()
        self.wait_s: float | None = 0.0
        self.costs: Counter[str] = Counter()

    def waited(self, seconds: float | None) -> None:
        """None: the lane does not tell, so the sum is not known either."""
        self.wait_s = None if self.wait_s is None or seconds is None else self.wait_s + seconds

    def elapsed(self) -> float:
        return time.perf_counter() - self.began

    def own(self, author: str) -> tuple[Words, Translation]:
        """How the author "draft" or "target" spells, and the translation of what it writes."""
        tongues = self.spec.tongues
        return (tongues.draft, self.across) if author == "draft" else (tongues.target, self.back)

    def wrote(self, turn: int, author: str, piece: Piece, n_tokens: int) -> None:
        self.text += piece.text
        self.tell(turn, author, piece.text, n_tokens)

    def tell(self, turn: int, author: str, text: str, n_tokens: int) -> None:
        """Announce what the text holds already."""
        if n_tokens or text:
            self.spec.emit(TokensEvent(self.spec.problem.id, self.spec.chain, turn, author, text, n_tokens))

    def judged(self, written: int, read: int) -> None:
        """The target wrote and read so many tokens to judge."""
        self.costs["judge_tokens"] += written
        self.costs["judge_prompt_tokens"] += read

    def mark(self, d: Seq, t: Seq) -> Mark:
        return Mark(len(self.text), d.length, t.length, self.across.copy())

    def back_to(self, mark: Mark) -> None:
        self.text = self.text[: mark.text]
        across = mark.across.copy()
        if self.back is self.across:
            self.back = across
        self.across = across

    def answered_since(self, length: int) -> bool:
        """Whether the last box was closed behind the first `length` characters of the text."""
        box = last_boxed(self.text)
        return box is not None and box.end > length

    def result(
        self, turns: list[Turn], finish: str, error: str | None = None, extra: Mapping[str, Any] | None = None
    ) -> Chain:
        """The record of the chain. extra: see `Chain`; its costs are added to it."""
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
            extra={**(extra or {}), **{name: self.costs[name] for name in COSTS if self.costs[name]}},
            wait_s=self.wait_s,
        )


async def finish_of(spec: ChainSpec, body: Awaitable[str]) -> tuple[str, str | None]:
    """How a chain ended, and its error: as `body` says, unless that cannot go on. A cancellation that is no deadline is
    passed on."""
    try:
        return await body, None
    except ContextFull:
        return "length", None
    except ChainError as failure:
        return "error", str(failure)
    except asyncio.CancelledError:
        if not spec.expired:
            raise
        return "deadline", None


async def take_back(lane: Lane, seq: Seq, tokens: int) -> None:
    """Forget the sequence's last tokens."""
    if tokens:
        await lane.truncate(seq, seq.length - tokens)


def stream_of(spec: ChainSpec, author: str) -> int:
    """Key of the chain's noise on the lane of one author."""
    return stream_key(spec.params.seed, spec.problem.stream_name, spec.chain, author)
