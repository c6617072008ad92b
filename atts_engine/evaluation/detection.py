"""Whether the score finds what is wrong: wrong chains of any graded problem, wrong steps of the register task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from atts_engine.errors import InputError
from atts_engine.evaluation import intervals, registers
from atts_engine.evaluation.grading import is_right
from atts_engine.pipeline.records import Chain, Problem

Same = Callable[[str, str], bool]


def wrong_chains(chains: Iterable[Chain], same: Same, *, level: float = 0.95, seed: int = 0) -> dict[str, Any] | None:
    """AUC of a chain's mean score over its scored spans for the chain's answer being wrong (or missing); chains that
    were not graded or not scored are left out. None where all of them are right, or all wrong."""
    found = []
    for chain in chains:
        right = is_right(chain.problem_id, chain.gold, chain.final_answer, same)
        scores = [turn.score for turn in chain.turns if turn.score is not None]
        if right is not None and scores:
            found.append((sum(scores) / len(scores), not right, chain.problem_id))
    return _figures(found, level, seed)


def wrong_steps(
    chains: Iterable[Chain],
    problems: Sequence[Problem],
    *,
    replaced: bool = False,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Any] | None:
    """AUC of a draft span's score for a wrong step in it (`registers.written_steps`). None unless the problems are of
    the register task and some spans are right and some wrong. replaced: a takeover took the draft's span back."""
    texts = {problem.id: problem.problem for problem in problems}
    try:
        for text in texts.values():
            registers.operations(text)
    except InputError:
        return None
    found = []
    for chain in chains:
        before = ""
        for turn in chain.turns:
            if turn.score is not None:
                wrong = _goes_wrong(texts[chain.problem_id], before, turn.draft)
                found.append((turn.score, wrong, chain.problem_id))
            before += (turn.target or "") if turn.takeover and replaced else turn.draft + (turn.target or "")
    return _figures(found, level, seed)


def _goes_wrong(problem: str, before: str, span: str) -> bool:
    """Whether `span` states a step wrongly that was not wrong already as far as the text before it goes."""
    known = {step.start for step in registers.written_steps(problem, before) if not step.right}
    return any(
        not step.right and step.end > len(before) and step.start not in known
        for step in registers.written_steps(problem, before + span)
    )


def _figures(found: Sequence[tuple[float, bool, str]], level: float, seed: int) -> dict[str, Any] | None:
    if not found:
        return None
    scores, wrong, groups = zip(*found, strict=True)
    area = intervals.auc(scores, wrong, groups, level=level, seed=seed)
    if area is None:
        return None
    return {"mean": area.mean, "low": area.low, "high": area.high, "items": len(found), "wrong": sum(wrong)}
