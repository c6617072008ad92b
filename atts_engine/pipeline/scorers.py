"""What a draft span is worth: the scores that a gate can test in the place of the mean negative log-likelihood."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from atts_engine.backends import Lane, Seq
from atts_engine.errors import InputError
from atts_engine.pipeline.asking import Question
from atts_engine.pipeline.gate import Place
from atts_engine.pipeline.records import Problem
from atts_engine.pipeline.streams import stream_key
from atts_engine.pipeline.task import Task
from atts_engine.pipeline.translation import Codec
from atts_engine.runtime.records import SpanResult

RATING_PROMPT = (
    "\n\nHow good is the last step of the reasoning above: is it correct, and does it help to solve the problem? "
    "Rate it with one digit, from 0 (wrong or useless) to 9 (certainly correct and useful).\n\nRating: "
)
BEST_RATING = 9
DIGITS = tuple(str(digit) for digit in range(BEST_RATING + 1))


@dataclass(frozen=True, slots=True)
class Drafted:
    """A draft span that awaits its verdict.

    before, text: of the chain up to the span, and of the span; n_tokens: of the span, as the draft counts them.
    end_ids: tokens at the end of the target's sequence that mark the end of the text; waiting: ids of text that the
    target was not given yet, since what follows may still spell it otherwise.
    """

    problem: Problem
    place: Place
    seed: int
    before: str
    text: str
    n_tokens: int
    end_ids: int = 0
    waiting: tuple[int, ...] = ()


class Score(NamedTuple):
    """value: higher is worse; written, read: tokens that the target wrote and read for it alone."""

    value: float
    written: int = 0
    read: int = 0


class Scorer(Protocol):
    """by_turn: a score means something within its turn; if not, spans of all turns are compared with one another."""

    by_turn: bool

    async def score(self, drafted: Drafted, lane: Lane, seq: Seq, result: SpanResult) -> Score:
        """`lane`, `seq`: the target's, which holds the span and is left as it is; `result`: the target's log-likelihood
        of the span. `ChainError` where this span cannot be scored."""
        ...


class TargetRating:
    """9 less the rating from 0 to 9 that the target gives when it is asked, as SpecReason does (arXiv 2504.07891).

    The question is put on a fork of the target's sequence, and the ten digits are compared with each other alone: the
    likeliest one is the rating, or, with `expected`, their mean under their probabilities. One digit counts as written.
    """

    by_turn = True

    def __init__(self, codec: Codec, *, expected: bool = False, prompt: str = RATING_PROMPT) -> None:
        try:
            self._question = Question(codec, prompt, DIGITS)
        except InputError as error:
            reason = str(error).partition(";")[0]
            raise InputError(
                f"the target cannot be asked for a rating, for {reason}: choose another judge or scorer"
            ) from error
        self._expected = expected

    async def score(self, drafted: Drafted, lane: Lane, seq: Seq, result: SpanResult) -> Score:
        logprobs, read = await self._question.ask(lane, seq, end_ids=drafted.end_ids, waiting=drafted.waiting)
        rating = expected_rating(logprobs) if self._expected else float(likeliest_rating(logprobs))
        return Score(BEST_RATING - rating, written=1, read=read)


def likeliest_rating(logprobs: Sequence[float]) -> int:
    """The digit of the highest log-probability, the lowest among equals."""
    return max(range(len(logprobs)), key=lambda digit: logprobs[digit])


def expected_rating(logprobs: Sequence[float]) -> float:
    """Mean of the digits 0, 1, ... under probabilities in proportion to exp(logprobs)."""
    top = max(logprobs)
    weights = [math.exp(value - top) for value in logprobs]
    return sum(digit * weight for digit, weight in enumerate(weights)) / math.fsum(weights)


class TaskReward:
    """`scale` less `scale` times what the task's checker says of the span: where RSD has a process reward model, and
    where SpecReason has its judge (scale 9)."""

    by_turn = True

    def __init__(self, task: Task, scale: float = 1.0) -> None:
        self._task = task
        self._scale = scale

    async def score(self, drafted: Drafted, lane: Lane, seq: Seq, result: SpanResult) -> Score:
        reward = self._task.reward(drafted.problem, drafted.before, drafted.text)
        return Score(self._scale - self._scale * reward)


class Coin:
    """A control: uniform on [0, 1), keyed by (seed, problem, chain, turn). Nothing of the span goes into it."""

    by_turn = True

    async def score(self, drafted: Drafted, lane: Lane, seq: Seq, result: SpanResult) -> Score:
        place = drafted.place
        bits = stream_key(drafted.seed, place.stream_name, place.chain, "coin", place.turn) & 0xFFFFFFFF
        return Score(bits / 2**32)


class SpanLength:
    """A control: the span's length in tokens of the draft; longer is worse."""

    by_turn = True

    async def score(self, drafted: Drafted, lane: Lane, seq: Seq, result: SpanResult) -> Score:
        return Score(float(drafted.n_tokens))


class TurnNumber:
    """A control: how many turns came before; later is worse. Within one turn all are equal, so turns are pooled."""

    by_turn = False

    async def score(self, drafted: Drafted, lane: Lane, seq: Seq, result: SpanResult) -> Score:
        return Score(float(drafted.place.turn))


SCORERS = (
    "mean-nll",
    "target-rating",
    "expected-target-rating",
    "task-rating",
    "task-reward",
    "coin",
    "span-length",
    "turn-number",
)
"""Names of the scores, as `conformal.Meta.score` holds them. Perplexity ranks as mean-nll does."""


def make_scorer(name: str, codec: Codec, task: Task) -> Scorer | None:
    """The scorer of a name of `SCORERS`; None for mean-nll, which a gate tests by itself. codec: the target's.

    `InputError` for a name that there is none of, and where the target cannot spell the question.
    """
    match name:
        case "mean-nll":
            return None
        case "target-rating" | "expected-target-rating":
            return TargetRating(codec, expected=name.startswith("expected"))
        case "task-rating":
            return TaskReward(task, float(BEST_RATING))
        case "task-reward":
            return TaskReward(task)
        case "coin":
            return Coin()
        case "span-length":
            return SpanLength()
        case "turn-number":
            return TurnNumber()
    raise InputError(f"no scorer {name!r}; there are {', '.join(SCORERS)}")
