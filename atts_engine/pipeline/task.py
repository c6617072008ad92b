"""What is known of a problem's task beyond its text: when two answers are one, and whether a step is right."""

from __future__ import annotations

from typing import Protocol

from atts_engine.errors import InputError
from atts_engine.pipeline.records import Problem


class Task(Protocol):
    """Called on the event loop's thread: neither method may take long."""

    def equal(self, gold: str, answer: str) -> bool:
        """Whether the two answers are one; the gold answer, where there is one, comes first."""
        ...

    def reward(self, problem: Problem, before: str, span: str) -> float:
        """How right `span` is after the text `before`, from 0 (wrong) to 1: what a process reward model or a judge
        estimates. `InputError` where the task has no checker of steps."""
        ...


class PlainTask:
    """Answers are one where their texts are; steps cannot be checked."""

    def equal(self, gold: str, answer: str) -> bool:
        return gold == answer

    def reward(self, problem: Problem, before: str, span: str) -> float:
        raise InputError(
            "this strategy needs a judge of steps, and the problems' task has none: use --task registers, or a "
            "strategy whose judge is the target model"
        )
