"""Whether an answer equals the gold answer."""

from __future__ import annotations

import importlib
import importlib.util
import re
import threading
from collections.abc import Callable
from fractions import Fraction

from atts_engine.evaluation import gym
from atts_engine.pipeline.task import PlainTask

_TIMEOUT_S = 5
_DROPPED = re.compile(r"\\left|\\right|\\[!,;: ]|\\\$|\\?%|\^\\circ|\^\{\\circ\}|\\mbox(?=\{)|[\s~$]")
_TEXT = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf)\{([^{}]*)\}")
_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)")
_GROUPED = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_LATEX_FRACTION = re.compile(r"([+-]?)\\frac\{([+-]?\d+)\}\{([+-]?\d+)\}")
_PLAIN_FRACTION = re.compile(r"([+-]?\d+)/(\d+)")


def normalise(answer: str) -> str:
    """The answer without what does not change its value: spaces, dollar signs, \\left and \\right, \\text{},
    degree and percent signs, a final full stop, grouping commas; \\dfrac and \\tfrac become \\frac."""
    text = answer.strip().removesuffix(".")
    if text.startswith(r"\(") and text.endswith(r"\)"):
        text = text[2:-2]
    text = _TEXT.sub(r"\1", text)
    text = text.replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac")
    text = _DROPPED.sub("", text)
    return text.replace(",", "") if _GROUPED.fullmatch(text) else text


def number(answer: str) -> Fraction | None:
    """The exact value of an integer, decimal or fraction (a/b or \\frac{a}{b}); None for anything else."""
    text = normalise(answer)
    if _NUMBER.fullmatch(text):
        return Fraction(text)
    if match := _LATEX_FRACTION.fullmatch(text):
        sign, top, bottom = match.groups()
        value = None if int(bottom) == 0 else Fraction(int(top), int(bottom))
        return -value if value is not None and sign == "-" else value
    if match := _PLAIN_FRACTION.fullmatch(text):
        top, bottom = match.groups()
        return None if int(bottom) == 0 else Fraction(int(top), int(bottom))
    return None


def plainly_equal(gold: str, answer: str) -> bool | None:
    """Whether the two are the same normalised text or the same exact number; two integers that differ are not. None
    where only mathematics could tell."""
    if normalise(gold) == normalise(answer):
        return True
    left, right = number(gold), number(answer)
    if left is None or right is None:
        return None
    if left == right:
        return True
    return False if left.denominator == right.denominator == 1 else None


def answers_equal(gold: str, answer: str) -> bool:
    """Whether `answer` is the gold answer: `plainly_equal`, or else what math-verify says.

    math-verify belongs to the extra `eval`; without it (see `has_math_verify`) what is left open is not equal.
    Numbers that differ and are no integers are left to math-verify, which rounds to 6 digits, so that accuracies
    compare with those published elsewhere. Its time limit works by signals, which only the main thread receives; in
    another thread it runs without one.
    """
    plainly = plainly_equal(gold, answer)
    return plainly if plainly is not None else has_math_verify() and math_verify_equal(gold, answer)


def is_graded(problem_id: str, gold: str | None) -> bool:
    """Whether there is a rule that tells right answers from wrong ones: a gold answer, or a task that grades."""
    return gold is not None or gym.is_task(problem_id)


def is_right(problem_id: str, gold: str | None, answer: str | None, same: Callable[[str, str], bool]) -> bool | None:
    """Whether the answer solves the problem; None without a rule (`is_graded`). No answer is a wrong one.

    A reasoning-gym task grades its own answers, as they stand and without \\text{} around words; every other is right
    if `same(gold, answer)`.
    """
    if not is_graded(problem_id, gold):
        return None
    if answer is None:
        return False
    if gym.is_task(problem_id):
        return gym.right(problem_id, {answer, _TEXT.sub(r"\1", answer)})
    return gold is not None and same(gold, answer)


def has_math_verify() -> bool:
    """Whether answers that are neither equal texts nor plain numbers can be compared."""
    return importlib.util.find_spec("math_verify") is not None


def math_verify_equal(gold: str, answer: str) -> bool:
    """What math-verify alone says of the two; within 5 s each for parsing and comparing, in the main thread."""
    from math_verify import parse, verify

    limit = _TIMEOUT_S if threading.current_thread() is threading.main_thread() else None
    expected, given = (parse(f"${text}$", parsing_timeout=limit) for text in (gold, answer))
    # The order matters: a set or interval as gold is matched more leniently than one as answer.
    return bool(verify(expected, given, timeout_seconds=limit))


class Grader:
    """`answers_equal` that remembers: chains of a problem give few distinct answers. For use by one
    thread."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], bool] = {}

    def equal(self, gold: str, answer: str) -> bool:
        pair = gold, answer
        if pair not in self._known:
            self._known[pair] = answers_equal(gold, answer)
        return self._known[pair]


class GradedTask(PlainTask):
    """Answers are one where a `Grader` says so; steps cannot be checked."""

    def __init__(self) -> None:
        # Half a second of imports, now and not between two steps of a run.
        if has_math_verify():
            importlib.import_module("math_verify")
        self._grader = Grader()

    def equal(self, gold: str, answer: str) -> bool:
        return self._grader.equal(gold, answer)
