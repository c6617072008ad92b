"""Problem sets, wherever they come from: a file, the Hugging Face hub, a reasoning-gym task, the register task."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from atts_engine.evaluation import gym, hub, registers
from atts_engine.evaluation.grading import Grader, is_right
from atts_engine.evaluation.traces import read_problems
from atts_engine.pipeline.records import Problem


@dataclass(frozen=True, slots=True)
class Dataset:
    """Problems in order, and what is a right answer to one of them."""

    name: str
    problems: tuple[Problem, ...]
    _grader: Grader = field(default_factory=Grader, repr=False, compare=False)

    def equal(self, first: str, second: str) -> bool:
        """Whether two answers are one, as a vote counts them."""
        return self._grader.equal(first, second)

    def right(self, problem: Problem, answer: str | None) -> bool | None:
        """Whether the answer solves the problem; None where nothing says so. No answer is a wrong one."""
        return is_right(problem.id, problem.answer, answer, self.equal)


def from_file(path: str | os.PathLike[str], limit: int | None = None) -> Dataset:
    """A problem file (docs/formats.md), or its first `limit` problems."""
    return Dataset(os.fspath(path), tuple(read_problems(path, limit)))


def from_hub(
    reference: str, *, question: str | None = None, answer: str | None = None, limit: int | None = None
) -> Dataset:
    """A set of the Hugging Face hub, `NAME[:CONFIG][/SPLIT]`: see `hub.problems`."""
    return Dataset(reference, hub.problems(reference, question=question, answer=answer, limit=limit))


def from_gym(name: str, seed: int, size: int) -> Dataset:
    """A reasoning-gym task: see `gym.problems`."""
    return Dataset(f"{gym.PREFIX}:{name}", gym.problems(name, seed, size))


def from_registers(seed: int, size: int, steps: tuple[int, int]) -> Dataset:
    """`size` different held-out problems of the register task with `steps` = (fewest, most) operations."""
    drawn = registers.heldout(size, seed, steps)
    return Dataset("registers", tuple(Problem(p.id, p.problem, p.answer, i) for i, p in enumerate(drawn)))
