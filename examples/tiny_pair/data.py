"""Training sequences for the register task: gold chains, injected errors and their corrections, as padded batches."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch

from atts_engine.evaluation.registers import REGISTERS, apply, draw, problem_text, split_of

from .vocab import ASK, BLANK, BOS, BOX, CLOSE, EOS, EQUALS, ID, PAD, QUESTION, SEMICOLON, WAIT

BUCKET = 32
LARGEST = 9999


@dataclass(frozen=True)
class Recipe:
    """What the sequences of one training phase look like.

    ``error_rate``: probability that a step is made wrong, at most ``max_errors`` times a chain. ``corrects``: whether
    the model learns to write ``Wait, `` itself (the target) or only to read it (the draft). ``emphasis``: loss weight
    of the token after a blank line or a box, where the model decides between going on, correcting and ending.
    """

    steps: tuple[int, int] = (2, 6)
    error_rate: float = 0.0
    max_errors: int = 2
    corrects: bool = True
    emphasis: float = 5.0


@dataclass
class Sequence:
    """Token ids with, for each, its loss weight and whether it is a wrong digit (the auxiliary head's label)."""

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    wrong: list[bool] = field(default_factory=list)

    def put(self, token: int, weight: float = 1.0, wrong: bool = False) -> None:
        self.ids.append(token)
        self.weights.append(weight)
        self.wrong.append(wrong)

    def number(self, value: int, weight: float = 1.0) -> None:
        for digit in str(value):
            self.put(ID[digit], weight)

    def wrong_number(self, written: int, right: int) -> None:
        """``written`` where ``right`` belongs: loss up to the first wrong digit, differing digits labelled."""
        said, true = str(written), str(right)
        first = next((i for i in range(min(len(said), len(true))) if said[i] != true[i]), min(len(said), len(true)))
        for i, digit in enumerate(said):
            differs = i >= first if len(said) != len(true) else said[i] != true[i]
            self.put(ID[digit], 1.0 if i < first else 0.0, differs)


def _other_digit(rng: random.Random, value: int) -> int:
    """``value`` with one digit changed (a leading digit stays non-zero)."""
    digits = list(str(value))
    at = rng.randrange(len(digits))
    digits[at] = rng.choice([d for d in "0123456789" if d != digits[at] and (at or d != "0" or len(digits) == 1)])
    return int("".join(digits))


def _wrong_result(rng: random.Random, value: int) -> int:
    slip = rng.choice((1, 2, 10, 20, 100, None))
    if slip is None:
        return _other_digit(rng, value)
    written = value + rng.choice((-1, 1)) * slip
    return written if written > 0 else value + slip


class Writer:
    """Writes one chain: steps with injected errors, each corrected at once, some steps later, or after a wrong final
    box.
    """

    def __init__(self, rng: random.Random, recipe: Recipe, start: int, ops: list[tuple[str, int]]) -> None:
        self.rng, self.recipe, self.start, self.ops = rng, recipe, start, ops
        self.out = Sequence()
        self.errors = 0
        values = [start]
        for op, constant in ops:
            values.append(apply(op, values[-1], constant))
        self.gold = values

    def write(self) -> Sequence:
        out, n = self.out, len(self.ops)
        self._prompt()
        believed = list(self.gold)
        wrong_at, delay = (
            0,
            0.0,
        )  # the first uncorrected wrong step (0: none) and how many more steps pass before it is corrected
        i = 1
        while True:
            decide = self.recipe.emphasis
            if wrong_at and (delay <= 0 or (i <= n and not self._representable(i, believed[i - 1]))):
                out.put(WAIT, decide if self.recipe.corrects else 0.0)
                i, decide = wrong_at, 1.0
                believed[i - 1] = self.gold[i - 1]
                wrong_at = 0
            # Where a correction is due but the chain goes on, the target learns nothing and the draft learns to go on.
            if wrong_at and self.recipe.corrects:
                decide = 0.0
            if i <= n:
                believed[i] = self._step(i, believed[i - 1], decide, clean=bool(wrong_at))
                out.put(BLANK)
                if wrong_at:
                    delay -= 1
                elif believed[i] != self.gold[i]:
                    wrong_at = i
                    delay = self.rng.choices((0, 1, 2, float("inf")), (0.5, 0.17, 0.1, 0.23))[0]
                i += 1
                continue
            out.put(BOX, decide)
            out.number(believed[n])
            out.put(CLOSE)
            if not wrong_at:
                out.put(EOS, self.recipe.emphasis)
                return out
            out.put(BLANK, self.recipe.emphasis if self.recipe.corrects else 0.0)
            delay = 0

    def _prompt(self) -> None:
        out = self.out
        for token in (BOS, QUESTION, ID["a"], EQUALS):
            out.put(token, 0.0)
        out.number(self.start, 0.0)
        for i, (op, constant) in enumerate(self.ops, 1):
            for token in (SEMICOLON, ID[REGISTERS[i]], EQUALS, ID[REGISTERS[i - 1]], ID[op]):
                out.put(token, 0.0)
            out.number(constant, 0.0)
        for token in (SEMICOLON, ID[REGISTERS[len(self.ops)]], ASK, BLANK):
            out.put(token, 0.0)

    def _representable(self, i: int, operand: int) -> bool:
        return 0 <= apply(self.ops[i - 1][0], operand, self.ops[i - 1][1]) <= LARGEST

    def _step(self, i: int, operand: int, decide: float, clean: bool) -> int:
        """Write step ``i`` from ``operand``; returns the value that it states. ``clean``: inject nothing."""
        out, rng = self.out, self.rng
        op, constant = self.ops[i - 1]
        kind = ""
        if not clean and self.errors < self.recipe.max_errors and rng.random() < self.recipe.error_rate:
            kind = rng.choices(("result", "operand", "constant", "definition"), (0.70, 0.15, 0.10, 0.05))[0]
        said_operand = _other_digit(rng, operand) if kind == "operand" else operand
        said_constant = _other_digit(rng, constant) if kind in ("constant", "definition") else constant
        result = apply(op, said_operand, said_constant)
        if not 0 <= result <= LARGEST or result == self.gold[i] and kind:
            kind, said_operand, said_constant = "result", operand, constant
            result = apply(op, operand, constant)
        said_result = _wrong_result(rng, result) if kind == "result" else result
        self.errors += bool(kind)

        out.put(ID[REGISTERS[i]], decide)
        for token in (EQUALS, ID[REGISTERS[i - 1]], ID[op]):
            out.put(token)
        if kind == "definition":
            out.wrong_number(said_constant, constant)
        else:
            out.number(constant)
        out.put(EQUALS)
        if kind == "operand":
            out.wrong_number(said_operand, operand)
        else:
            out.number(said_operand)
        out.put(ID[op])
        if kind == "constant":
            out.wrong_number(said_constant, constant)
        else:
            out.number(said_constant, 0.0 if kind == "definition" else 1.0)
        out.put(EQUALS)
        if kind == "result":
            out.wrong_number(said_result, result)
        else:
            out.number(said_result)
        return said_result


@dataclass(frozen=True)
class Batch:
    """Inputs and next-token labels, all [rows, length]; ``wrong`` and ``digit`` describe the *input* tokens."""

    ids: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    wrong: torch.Tensor
    digit: torch.Tensor


class Stream:
    """An endless stream of batches of about ``tokens`` padded tokens, rows of like length together."""

    def __init__(self, recipe: Recipe, tokens: int, seed: int) -> None:
        self.recipe, self.tokens, self.rng = recipe, tokens, random.Random(seed)
        self._ready: list[Batch] = []

    def __next__(self) -> Batch:
        if not self._ready:
            self._ready = self._refill()
        return self._ready.pop()

    def sequence(self) -> Sequence:
        while True:
            start, ops = draw(self.rng, self.rng.randint(*self.recipe.steps))
            if split_of(problem_text(start, ops)) == "train":
                return Writer(self.rng, self.recipe, start, ops).write()

    def _refill(self, batches: int = 24) -> list[Batch]:
        by_length: dict[int, list[Sequence]] = {}
        ready: list[Batch] = []
        while len(ready) < batches:
            row = self.sequence()
            length = -(-(len(row.ids) - 1) // BUCKET) * BUCKET
            rows = by_length.setdefault(length, [])
            rows.append(row)
            if len(rows) == max(1, self.tokens // length):
                ready.append(_collate(rows, length))
                by_length[length] = []
        # What is left over is dropped; rare lengths are still seen, as each refill starts from a new random state.
        self.rng.shuffle(ready)
        return ready


def _collate(rows: list[Sequence], length: int) -> Batch:
    def padded(values: list[list], fill: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([v + [fill] * (length - len(v)) for v in values], dtype=dtype)

    ids = padded([r.ids[:-1] for r in rows], PAD, torch.long)
    digits = (ids >= ID["0"]) & (ids <= ID["9"])
    return Batch(
        ids=ids,
        labels=padded([r.ids[1:] for r in rows], PAD, torch.long),
        weights=padded([r.weights[1:] for r in rows], 0.0, torch.float32),
        wrong=padded([r.wrong[:-1] for r in rows], False, torch.float32),
        digit=digits,
    )
