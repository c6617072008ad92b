"""What a suite compares: which strategies, and which of them at equal terms."""

from __future__ import annotations

from atts_engine.evaluation.suite import REFERENCE, Block
from atts_engine.pipeline.settings import STRATEGIES, parse_strategy

CHECKED = {"spec-reason": "spec-reason:judge=task", "rsd": "rsd", "lookahead": "lookahead:judge=task"}
"""Strategies whose judge or reward model the task's checker of steps stands in for, as they are written then."""
NEEDS_CHECKER = ("rsd",)
LOOPS = (
    REFERENCE,
    "spec-reason:gate=conformal",
    "rsd:gate=conformal",
    "coin:gate=conformal",
    "span-length",
    "turn-number",
)
"""One loop with another score each."""
SAMPLERS = ("target", "best-of-n:author=target", "adaptive-consistency:author=target", "esc:author=target")
"""The target alone, whose chains are as many as its tokens allow."""


def blocks(checked: bool, only: tuple[str, ...] = ()) -> tuple[Block, ...]:
    """The table of every strategy, in three blocks. checked: the task has a checker of steps; without one the target is
    the judge, and strategies that need a checker are left out. only: names to keep beside the reference; empty: all.
    """

    def kept(text: str) -> bool:
        name, _ = parse_strategy(text)
        return (checked or name not in NEEDS_CHECKER) and (not only or name in only or name == REFERENCE)

    def judged(text: str) -> str:
        name, colon, options = text.partition(":")
        return CHECKED.get(name, name) + colon + options if checked else text

    own = tuple(judged(name) for name in ("target", *(n for n in STRATEGIES if n != "target")) if kept(name))
    loops = tuple(judged(text) for text in LOOPS if kept(text))
    return (
        Block("own", own),
        Block("rate", loops, "rate"),
        Block("tokens", (*loops, *(text for text in SAMPLERS if kept(text))), "tokens"),
    )


def stands_in(text: str) -> bool:
    """Whether the task's checker stands in for a judge or a reward model."""
    name, options = parse_strategy(text)
    return name in NEEDS_CHECKER or ("judge", "task") in options or ("score", "reward") in options
