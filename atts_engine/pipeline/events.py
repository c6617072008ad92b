"""What a caller sees while chains are written. All frozen; text is what the tokens of the event say."""

from __future__ import annotations

from dataclasses import dataclass, field

from atts_engine.pipeline.records import Chain, Decision


@dataclass(frozen=True, slots=True)
class TokensEvent:
    """New tokens of a chain by `author` ("draft" or "target"). text: what later tokens cannot change; a character comes
    with the event that ends it."""

    problem_id: str
    chain: int
    turn: int
    author: str
    text: str
    n_tokens: int


@dataclass(frozen=True, slots=True)
class VerdictEvent:
    """A span was scored and judged. `p_value` and `decision` are None where no calibrated gate decided (atts-sync).
    draft: where the verdict was early, the text of the span; what `TokensEvent`s told of it beyond is taken back."""

    problem_id: str
    chain: int
    turn: int
    score: float
    p_value: float | None
    takeover: bool
    decision: Decision | None
    draft: str | None = None


@dataclass(frozen=True, slots=True)
class ChainEvent:
    """A chain has ended."""

    chain: Chain


@dataclass(frozen=True, slots=True)
class Solution:
    """The vote over a problem's chains. `answer` is None when no chain gave one; votes: weight of each answer; extra:
    what the strategy has to tell, such as why it stopped."""

    problem_id: str
    answer: str | None
    votes: dict[str, float]
    chains: tuple[Chain, ...]
    duration_s: float
    extra: dict[str, int | float | str | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SolutionEvent:
    """The problem is done: always the last event."""

    solution: Solution


Event = TokensEvent | VerdictEvent | ChainEvent | SolutionEvent
