"""The register task as a strategy sees it: when two answers are one, and how right a span is."""

from __future__ import annotations

from atts_engine.evaluation.grading import plainly_equal
from atts_engine.evaluation.registers import operations, written_steps
from atts_engine.pipeline.answers import last_boxed
from atts_engine.pipeline.records import Problem
from atts_engine.pipeline.task import PlainTask


class RegisterTask(PlainTask):
    """Answers are integers, and one where they are `plainly_equal`; steps are checked one by one. `InputError` for a
    problem of another task."""

    def equal(self, gold: str, answer: str) -> bool:
        return plainly_equal(gold, answer) is True

    def reward(self, problem: Problem, before: str, span: str) -> float:
        """The share of what the span states that is right: its steps, those that it only goes on with too, and the box
        that it closes.

        A step that the span leaves unfinished is right as long as it begins as the right one does. A span that states
        nothing (a blank line, the beginning of a paragraph) has said nothing wrong: 1.
        """
        text = before + span
        said = [step.right for step in written_steps(problem.problem, text) if step.end > len(before)]
        box = last_boxed(text)
        if box is not None and box.end > len(before):
            said.append(box.content == str(operations(problem.problem)[-1].after))
        return sum(said) / len(said) if said else 1.0
