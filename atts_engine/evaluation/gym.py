"""Tasks of reasoning-gym (arXiv 2505.24760) by name and seed, graded by each task's own `score_answer`.

A problem's id holds all that makes it, ``reasoning-gym/NAME/SEED/SIZE/INDEX/DIGEST``, so a trace file alone suffices to
grade its chains. SIZE belongs to it: one task (`acre`) draws other problems where more are asked for. DIGEST is one of
the question: versions draw different ones, and those of three tasks depend on the process's PYTHONHASHSEED too
(docs/evaluation.md).
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Iterable
from functools import cache
from typing import Any

from atts_engine.errors import InputError
from atts_engine.pipeline.records import Problem

PREFIX = "reasoning-gym"
_ID = re.compile(rf"{PREFIX}/([a-z0-9_]+)/(-?\d+)/(\d+)/(\d+)/([0-9a-f]{{8}})")


def problems(name: str, seed: int, size: int) -> tuple[Problem, ...]:
    """`size` problems of the task, in order. `answer` is the entry's own; None where a task has many right answers and
    gives none (it is graded all the same).

    `InputError`: reasoning-gym is not installed, has no such task, or cannot make it from name, seed and size alone.
    """
    if size < 1:
        raise InputError(f"a reasoning-gym task needs 1 problem or more, not {size}")
    found = []
    for index in range(size):
        entry = _entry(name, seed, size, index)
        answer = None if entry["answer"] is None else str(entry["answer"])
        question = str(entry["question"])
        problem_id = f"{PREFIX}/{name}/{seed}/{size}/{index}/{_digest(question)}"
        found.append(Problem(problem_id, question, answer, index))
    return tuple(found)


def is_task(problem_id: str) -> bool:
    """Whether the id is one that `problems` gives."""
    return _ID.fullmatch(problem_id) is not None


def right(problem_id: str, spellings: Iterable[str]) -> bool:
    """Whether the task gives one of the answer's spellings its full score, 1.

    A spelling that makes the task's grader raise is wrong. `InputError` where the problem of
    this id is another one here.
    """
    match = _ID.fullmatch(problem_id)
    if match is None:
        raise InputError(f"{problem_id!r} is not the id of a {PREFIX} problem")
    name, seed, size, index = match[1], int(match[2]), int(match[3]), int(match[4])
    task, entry = _task(name, seed, size), _entry(name, seed, size, index)
    if _digest(str(entry["question"])) != match[5]:
        raise InputError(
            f"{problem_id} is another problem here: grade it with the version of reasoning-gym, and the "
            "PYTHONHASHSEED, that made it"
        )
    return any(_score(task, entry, text) >= 1.0 for text in spellings)


def _digest(question: str) -> str:
    return hashlib.blake2b(question.encode(), digest_size=4).hexdigest()


def _score(task: Any, entry: dict[str, Any], answer: str) -> float:
    try:
        return float(task.score_answer(answer, entry))
    except Exception:
        # Not every grader guards itself against what a model may write, each in its own way.
        return 0.0


@cache
def _entry(name: str, seed: int, size: int, index: int) -> dict[str, Any]:
    # Some tasks search for seconds before they have a problem.
    return dict(_task(name, seed, size)[index])


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
