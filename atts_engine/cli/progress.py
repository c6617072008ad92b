"""What a job has done so far: the state behind every view. It only counts; it shows nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from atts_engine.evaluation.grading import is_graded, is_right
from atts_engine.pipeline.events import ChainEvent, TokensEvent, VerdictEvent
from atts_engine.pipeline.records import Chain, Problem

TAIL = 400
"""Characters of a chain that are kept for showing."""

Grade = Callable[[str, str], bool]


@dataclass(slots=True)
class Tail:
    """The end of a chain's text in pieces (kind, text); kinds: draft, target, kept, taken."""

    pieces: list[tuple[str, str]] = field(default_factory=list)
    length: int = 0

    def add(self, kind: str, text: str) -> None:
        if self.pieces and self.pieces[-1][0] == kind and kind in ("draft", "target"):
            self.pieces[-1] = (kind, self.pieces[-1][1] + text)
        else:
            self.pieces.append((kind, text))
        self.length += len(text)
        while self.length - len(self.pieces[0][1]) >= TAIL:
            self.length -= len(self.pieces.pop(0)[1])


@dataclass(frozen=True, slots=True)
class Finished:
    """One finished problem. right: chains with the gold answer; None where nothing grades the problem."""

    problem: Problem
    answer: str | None
    answer_right: bool | None
    chains: int
    right: int | None
    verdicts: int
    takeovers: int
    errors: int
    seconds: float | None


class Progress:
    """Counts events. Implements the whole of `Observer` but for showing anything."""

    def __init__(
        self,
        problems: int,
        chains: int,
        vote: Callable[[Sequence[Chain]], str | None],
        same: Grade,
    ) -> None:
        self.problems = problems
        self.chains = chains
        self.problems_done = 0
        self.chains_done = 0
        self.restored = 0
        self.verdicts = 0
        self.takeovers = 0
        self.errors = 0
        self.tokens = {"draft": 0, "target": 0}
        self.active: dict[tuple[str, int], Tail] = {}
        self.last: list[Finished] = []
        self.answers_right = 0
        self.graded = 0
        self.began = time.perf_counter()
        self._vote = vote
        self._same = same
        self._starts: dict[str, float] = {}

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.began

    @property
    def rate(self) -> float | None:
        """Share of verdicts that were takeovers."""
        return self.takeovers / self.verdicts if self.verdicts else None

    def start(self, problem: Problem) -> None:
        self._starts[problem.id] = time.perf_counter()

    def take(self, event: TokensEvent | VerdictEvent | ChainEvent) -> None:
        if isinstance(event, ChainEvent):
            self.chains_done += 1
            self.errors += event.chain.error is not None
            self.active.pop((event.chain.problem_id, event.chain.chain), None)
            return
        tail = self.active.setdefault((event.problem_id, event.chain), Tail())
        if isinstance(event, TokensEvent):
            self.tokens[event.author] += event.n_tokens
            tail.add(event.author, event.text)
        else:
            self.verdicts += 1
            self.takeovers += event.takeover
            value = "" if event.p_value is None else f"{event.p_value:.2f}"
            tail.add("taken" if event.takeover else "kept", value)

    def finish(self, problem: Problem, chains: Sequence[Chain], restored: bool) -> Finished:
        if restored:
            self.restored += len(chains)
            self.chains_done += len(chains)
        answer = self._vote(chains)
        graded = is_graded(problem.id, problem.answer)
        right = sum(bool(self._right(problem, c.final_answer)) for c in chains) if graded else None
        done = Finished(
            problem=problem,
            answer=answer,
            answer_right=self._right(problem, answer),
            chains=len(chains),
            right=right,
            verdicts=sum(t.score is not None for c in chains for t in c.turns),
            takeovers=sum(t.takeover for c in chains for t in c.turns),
            errors=sum(c.error is not None for c in chains),
            seconds=None if restored else time.perf_counter() - self._starts.pop(problem.id),
        )
        self.problems_done += 1
        self.graded += graded
        self.answers_right += bool(done.answer_right)
        self.last = [*self.last[-3:], done]
        return done

    def _right(self, problem: Problem, answer: str | None) -> bool | None:
        return is_right(problem.id, problem.answer, answer, self._same)
