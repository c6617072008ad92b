"""Tasks of reasoning-gym (arXiv 2505.24760) by name and seed, graded by each task's own `score_answer`.

A problem's id holds all that makes it, ``reasoning-gym/NAME/SEED/SIZE/INDEX``, so a trace file alone
suffices to grade its chains. SIZE belongs to it: one task (`acre`) draws other problems where more are asked for.
"""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from typing import Any

from atts_engine.errors import InputError
from atts_engine.pipeline.records import Problem

PREFIX = "reasoning-gym"
_ID = re.compile(rf"{PREFIX}/([a-z0-9_]+)/(\d+)/(\d+)/(\d+)")
_WRAPPED = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf)\{([^{}]*)\}")


def problems(name: str, seed: int, size: int) -> tuple[Problem, ...]:
    """`size` problems of the task, in order. `answer` is the entry's own; None where a task has many right answers and
    gives none (it is graded all the same).

    `InputError`: reasoning-gym is not installed, has no such task, or cannot make it from name, seed and size alone.
    """
    if size < 1:
        raise InputError(f"a reasoning-gym task needs 1 problem or more, not {size}")
    task = _task(name, seed, size)
    found = []
    for index in range(size):
        entry = task[index]
        answer = None if entry["answer"] is None else str(entry["answer"])
        found.append(Problem(f"{PREFIX}/{name}/{seed}/{size}/{index}", str(entry["question"]), answer, index))
    return tuple(found)


def is_task(problem_id: str) -> bool:
    """Whether the id is one that `problems` gives."""
    return _ID.fullmatch(problem_id) is not None


def right(problem_id: str, gold: str | None, answer: str) -> bool:
    """Whether the task gives the answer its full score, 1, as it stands or without \\text{} around words.

    An answer that makes the task's grader raise is wrong. `InputError` where `gold` is not what
    the installed reasoning-gym makes for this id: another version draws another problem.
    """
    match = _ID.fullmatch(problem_id)
    if match is None:
        raise InputError(f"{problem_id!r} is not the id of a {PREFIX} problem")
    name, seed, size, index = match[1], int(match[2]), int(match[3]), int(match[4])
    task = _task(name, seed, size)
    entry = task[index]
    made = None if entry["answer"] is None else str(entry["answer"])
    if made != gold:
        raise InputError(
            f"{problem_id} was made by another version of reasoning-gym: its answer was {gold!r} and is {made!r} here"
        )
    return any(_score(task, entry, text) >= 1.0 for text in {answer, _WRAPPED.sub(r"\1", answer)})


def _score(task: Any, entry: dict[str, Any], answer: str) -> float:
    try:
        return float(task.score_answer(answer, entry))
    except Exception:
        # Not every grader guards itself against what a model may write, each in its own way.
        return 0.0


@cache
def _task(name: str, seed: int, size: int) -> Any:
    if importlib.util.find_spec("reasoning_gym") is None:
        raise InputError("reasoning-gym is not installed: pip install 'atts-engine[datasets]'")
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        raise InputError(f"reasoning-gym has no task {name!r}; there are {', '.join(sorted(DATASETS))}")
    try:
        return reasoning_gym.create_dataset(name, seed=seed, size=size)
    except (AssertionError, TypeError, ValueError) as error:
        raise InputError(f"the reasoning-gym task {name} cannot be made from seed and size alone: {error}") from error
