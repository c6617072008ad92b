"""The register task: short chains of integer arithmetic whose every step can be checked.

A problem reads ``a = 85; b = a-43; c = b+11; c?``. Its solution does one step per paragraph and boxes the last value::

    b = a-43 = 85-43 = 42

    c = b+11 = 42+11 = 53

    \\boxed{53}

A wrong step may be redone later: a paragraph ``Wait, b = a-43 = 85-43 = 42`` replaces what was said of ``b``, and the
steps after it are done again. The last box counts. All values lie in 10..999, so a step is 14 to 18 tokens of the
built-in tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from dataclasses import dataclass
from typing import Literal

from atts_engine.errors import InputError

REGISTERS = "abcdefghij"
LOW, HIGH = 10, 999
HELD_OUT_ONE_IN = 8

Split = Literal["train", "held-out"]

_DEFINITION = re.compile(r"([a-j]) = (?:(\d+)|([a-j])([-+*])(\d+))")
_STEP = re.compile(r"(Wait, )?([a-j]) = ([^\n]*)")


@dataclass(frozen=True)
class RegisterProblem:
    """One problem. ``problem`` is the text without ``Q: ``; ``steps`` is the number of operations, so ``steps + 1``
    registers.
    """

    id: str
    problem: str
    answer: str
    steps: int

    def to_json_line(self) -> str:
        """The line of a problem file (without the newline): ``id``, ``problem``, ``answer``."""
        return json.dumps({"id": self.id, "problem": self.problem, "answer": self.answer})


@dataclass(frozen=True)
class Operation:
    """``register = source op constant``; ``before`` and ``after`` are the true values of source and register."""

    register: str
    source: str
    op: str
    constant: int
    before: int
    after: int

    @property
    def text(self) -> str:
        op, constant = self.op, self.constant
        return f"{self.register} = {self.source}{op}{constant} = {self.before}{op}{constant} = {self.after}"


@dataclass(frozen=True)
class WrittenStep:
    """A paragraph of a chain that states a register: ``start:end`` are its character offsets in the chain's text."""

    register: str
    start: int
    end: int
    correction: bool
    right: bool


def apply(op: str, left: int, right: int) -> int:
    """The integer ``left op right`` for ``op`` in ``+ - *``."""
    if op == "+":
        return left + right
    if op == "-":
        return left - right
    if op == "*":
        return left * right
    raise InputError(f"operator {op!r} is not one of + - *")


def draw(rng: random.Random, steps: int) -> tuple[int, list[tuple[str, int]]]:
    """A random start value and ``steps`` pairs (operator, constant) whose values all stay within ``LOW..HIGH``."""
    value = start = rng.randint(10, 99)
    ops: list[tuple[str, int]] = []
    while len(ops) < steps:
        op = rng.choice("+-*")
        constant = rng.randint(2, 9) if op == "*" else rng.randint(10, 99)
        after = apply(op, value, constant)
        if LOW <= after <= HIGH:
            ops.append((op, constant))
            value = after
    return start, ops


def problem_text(start: int, ops: list[tuple[str, int]]) -> str:
    """The text of the problem that starts at ``start`` and applies ``ops`` in turn."""
    parts = [f"a = {start}"]
    parts += [f"{REGISTERS[i + 1]} = {REGISTERS[i]}{op}{k}" for i, (op, k) in enumerate(ops)]
    return "; ".join(parts) + f"; {REGISTERS[len(ops)]}?"


def split_of(problem: str) -> Split:
    """The split that the problem's text belongs to, by its hash: training can never see a held-out problem."""
    digest = hashlib.blake2b(problem.encode(), digest_size=8).digest()
    return "held-out" if int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0 else "train"


def generate(seed: int, index: int, steps: tuple[int, int] = (2, 6), split: Split | None = None) -> RegisterProblem:
    """Problem number ``index`` of the stream ``seed``, with between ``steps[0]`` and ``steps[1]`` operations, both
    included.

    With ``split`` the first problem of that split in the sub-stream of (seed, index). Same arguments, same problem.
    """
    lo, hi = steps
    if not 1 <= lo <= hi < len(REGISTERS):
        raise InputError(f"steps must satisfy 1 <= low <= high <= {len(REGISTERS) - 1}, not {lo}..{hi}")
    rng = random.Random(f"registers:{seed}:{index}")
    while True:
        start, ops = draw(rng, rng.randint(lo, hi))
        text = problem_text(start, ops)
        if split is None or split_of(text) == split:
            value = start
            for op, constant in ops:
                value = apply(op, value, constant)
            return RegisterProblem(f"registers-{seed}-{index}", text, str(value), len(ops))


def heldout(n: int, seed: int = 0, steps: tuple[int, int] = (2, 6)) -> list[RegisterProblem]:
    """``n`` different problems of the held-out split."""
    found: dict[str, RegisterProblem] = {}
    index = 0
    while len(found) < n:
        if index >= 50 * n + 1000:
            raise InputError(
                f"there are not {n} different held-out problems with {steps[0]}..{steps[1]} steps; ask for fewer"
            )
        problem = generate(seed, index, steps, "held-out")
        found.setdefault(problem.problem, problem)
        index += 1
    return list(found.values())


def operations(problem: str) -> list[Operation]:
    """The problem's operations in order, with true values. Raises `InputError` when the text is not a register
    problem.
    """
    body, _, question = problem.rpartition("; ")
    values: dict[str, int] = {}
    ops: list[Operation] = []
    for part in body.split("; "):
        m = _DEFINITION.fullmatch(part)
        if m is None:
            raise InputError(f"not a register problem: {part!r} in {problem!r}")
        register, literal, source, op, constant = m.groups()
        if literal is not None:
            values[register] = int(literal)
            continue
        if source not in values:
            raise InputError(f"not a register problem: {source!r} is used before it is set in {problem!r}")
        after = apply(op, values[source], int(constant))
        ops.append(Operation(register, source, op, int(constant), values[source], after))
        values[register] = after
    if not ops or question != f"{ops[-1].register}?":
        raise InputError(f"not a register problem: it must ask for its last register, {problem!r}")
    return ops


def solution(problem: str) -> str:
    """The gold text: every step in its paragraph, then the boxed answer (no end-of-text token)."""
    ops = operations(problem)
    return "\n\n".join([*(op.text for op in ops), f"\\boxed{{{ops[-1].after}}}"])


def last_boxed(text: str) -> str | None:
    """The content of the last balanced ``\\boxed{...}`` in ``text``, or None when there is none."""
    opening = "\\boxed{"
    at = text.rfind(opening)
    while at >= 0:
        depth, begin = 1, at + len(opening)
        for i in range(begin, len(text)):
            depth += (text[i] == "{") - (text[i] == "}")
            if depth == 0:
                return text[begin:i]
        at = text.rfind(opening, 0, at)
    return None


def check(problem: str, text: str) -> bool:
    """Whether the last balanced box of ``text`` holds the problem's answer."""
    boxed = last_boxed(text)
    return boxed is not None and boxed.strip() == str(operations(problem)[-1].after)


def written_steps(problem: str, text: str) -> list[WrittenStep]:
    """The steps that ``text`` states, in order. A step is right when it equals the gold step of its register to the
    letter.

    A last paragraph that is cut off (a span may end anywhere) is right when it is the beginning of the gold step.
    """
    gold = {op.register: op.text for op in operations(problem)}
    steps: list[WrittenStep] = []
    at = 0
    paragraphs = text.split("\n\n")
    for number, paragraph in enumerate(paragraphs):
        m = _STEP.fullmatch(paragraph)
        if m is not None:
            register, body = m[2], paragraph[m.start(2) :]
            expected = gold.get(register, "")
            cut = number == len(paragraphs) - 1 and expected.startswith(body)
            steps.append(WrittenStep(register, at, at + len(paragraph), m[1] is not None, cut or body == expected))
        at += len(paragraph) + len("\n\n")
    return steps


def first_wrong_step(problem: str, text: str) -> WrittenStep | None:
    """The first wrong step that ``text`` does not state again rightly later: where a correction would have to start."""
    steps = written_steps(problem, text)
    last_right = {step.register: step.start for step in steps if step.right}
    return next((s for s in steps if not s.right and last_right.get(s.register, -1) < s.start), None)
