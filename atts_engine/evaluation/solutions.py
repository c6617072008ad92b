"""What a strategy answered to each problem: lines of solutions.jsonl."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from atts_engine.evaluation.jsonl import Line, read_lines

Told = int | float | str | None


@dataclass(frozen=True, slots=True)
class Ballot:
    """The answer of a problem, the weight of each answer that was voted for, and what else the strategy told.

    duration_s: from the problem's start to its answer; None where chains of an earlier, interrupted process are among
    its chains, whose share of the time is not known.
    """

    answer: str | None
    votes: Mapping[str, float]
    extra: Mapping[str, Told] = field(default_factory=dict)
    duration_s: float | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class SavedSolution:
    """chains: numbers of the chains that the problem ended with."""

    problem_id: str
    chains: tuple[int, ...]
    ballot: Ballot


def solution_to_json(solution: SavedSolution) -> dict[str, Any]:
    ballot = solution.ballot
    return {
        "problem_id": solution.problem_id,
        "answer": ballot.answer,
        "votes": dict(ballot.votes),
        "chains": list(solution.chains),
        "duration_s": ballot.duration_s,
        "extra": dict(ballot.extra),
    }


def read_solutions(path: str | os.PathLike[str], *, allow_torn_tail: bool = False) -> list[SavedSolution]:
    """The solutions of a run, in the order in which problems ended. `InputError` for a malformed line, unless it is a
    half-written last one and `allow_torn_tail`."""
    return [_from_line(line) for line in read_lines(path, allow_torn_tail=allow_torn_tail)]


def _from_line(line: Line) -> SavedSolution:
    numbers, votes, extra = (line.fields.get(name) for name in ("chains", "votes", "extra"))
    if not isinstance(numbers, list) or not all(isinstance(n, int) for n in numbers):
        raise line.error("field 'chains' must be a list of chain numbers")
    if not isinstance(votes, dict) or not all(isinstance(w, int | float) for w in votes.values()):
        raise line.error("field 'votes' must give each answer its weight")
    if not isinstance(extra, dict):
        raise line.error("field 'extra' must be an object")
    ballot = Ballot(line.optional_text("answer"), votes, extra, line.optional_number("duration_s"))
    return SavedSolution(line.text("problem_id"), tuple(numbers), ballot)
