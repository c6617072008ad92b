"""Spans with running scores, read from traces and split by problem: the data of `bench.early_verdicts`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from atts_engine.errors import InputError
from atts_engine.evaluation.grading import Grader
from atts_engine.evaluation.jsonl import Line, read_lines

MIN_GROUP = 100
"""Fitting and calibration spans of a group of turns; a turn with fewer shares its group with later ones."""
FLOOR = 1e-3
"""Nats per token that are added before the logarithm: a mean NLL is 0 or more, with a long tail."""

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Span:
    """A scored draft span: n, score, draft after each chunk, the last being the whole; wrong: whether its chain's
    answer is, None without a gold answer."""

    problem: str
    turn: int
    n: tuple[int, ...]
    score: tuple[float, ...]
    draft: tuple[float, ...]
    wrong: bool | None


@dataclass(frozen=True, slots=True)
class Rows:
    """The prefixes short of the whole span, of one part's spans, in order. span: index into the spans; cell `[R, 2]`:
    group of turns and index of the prefix; features `[R, F]`; label: of the span."""

    span: Ints
    cell: Ints
    features: Floats
    label: Ints

    def of(self, cell: Ints) -> Bools:
        return (self.cell == cell).all(axis=1)


def read_spans(paths: Iterable[Path]) -> list[Span]:
    """Scored spans with chunks of all files. `InputError` for a malformed line and for a file without any."""
    spans: list[Span] = []
    grader = Grader()
    for path in paths:
        before = len(spans)
        for line in read_lines(path):
            gold, answer = line.optional_text("gold"), line.optional_text("final_answer")
            graded = gold is not None and line.optional_text("error") is None
            wrong = not (answer is not None and grader.equal(gold, answer)) if graded and gold is not None else None
            for turn in line.objects("turns"):
                if turn.flag("early", False):
                    raise turn.error("field 'early': the span was not scored whole; record without --early-verdict")
                if turn.fields.get("chunks"):
                    spans.append(_span(line.text("problem_id"), turn, wrong))
        if len(spans) == before:
            raise InputError(f"{path}: no turn carries `chunks` (running scores); record the traces again with them")
    return spans


def _span(problem: str, turn: Line, wrong: bool | None) -> Span:
    chunks = turn.objects("chunks")
    n = tuple(chunk.integer("n") for chunk in chunks)
    if n[0] < 1 or any(a >= b for a, b in zip(n, n[1:])):
        raise turn.error("field 'n' of chunks must be 1 or more and increase")
    score = tuple(chunk.number("score") for chunk in chunks)
    return Span(problem, turn.integer("turn"), n, score, tuple(c.number("draft_score") for c in chunks), wrong)


def split(spans: Sequence[Span], seed: int) -> list[list[Span]]:
    """Fitting, calibration and test spans: thirds of the problems, shuffled by `seed`; a problem's spans stay
    together, whichever files they are from."""
    problems = sorted({span.problem for span in spans})
    if len(problems) < 3:
        raise InputError(f"fitting, calibrating and testing need 3 problems or more; the traces hold {len(problems)}")
    order = np.random.default_rng(seed).permutation(len(problems))
    part = {problems[i]: 3 * place // len(problems) for place, i in enumerate(order)}
    return [[span for span in spans if part[span.problem] == p] for p in range(3)]


def turn_groups(parts: Sequence[Sequence[Span]]) -> dict[int, int]:
    """Turn -> group: consecutive turns until both first parts have MIN_GROUP spans; what is left joins the last."""
    counts = [Counter(span.turn for span in part) for part in parts[:2]]
    groups: dict[int, int] = {}
    group, held = 0, [0, 0]
    for turn in sorted({span.turn for part in parts for span in part}):
        groups[turn] = group
        held = [total + count[turn] for total, count in zip(held, counts)]
        if min(held) >= MIN_GROUP:
            group, held = group + 1, [0, 0]
    return {turn: min(g, max(group - 1, 0)) for turn, g in groups.items()}


def rows_of(spans: Sequence[Span], labels: Sequence[int], groups: dict[int, int], sees: str) -> Rows:
    """Features: log(mean NLL so far + FLOOR) under the draft, and under the target where `sees` is "both"."""
    index = [(i, groups[span.turn], p) for i, span in enumerate(spans) for p in range(len(span.n) - 1)]
    at = np.asarray(index, dtype=np.int64).reshape(-1, 3)
    features = [[spans[i].draft[p]] + ([spans[i].score[p]] if sees == "both" else []) for i, _, p in index]
    width = 2 if sees == "both" else 1
    return Rows(
        at[:, 0],
        at[:, 1:],
        np.log(np.maximum(np.asarray(features, dtype=np.float64).reshape(-1, width), 0.0) + FLOOR),
        np.asarray(labels, dtype=np.int64)[at[:, 0]],
    )
