"""What a suite compares: which strategies, and which of them at equal terms."""

from __future__ import annotations

from atts_engine.evaluation.suite import REFERENCE, Block
from atts_engine.pipeline.settings import STRATEGIES, parse_strategy

NEEDS_CHECKER = ("rsd",)
CHECKED = {
    "spec-reason": "judge=task",
    "lookahead": "judge=task",
    # The built-in pair cannot spell the recap, and writes tens of tokens where the papers' models write thousands.
    "speculative-thinking": "reflections=0",
    "deepconf": "group=32:warmup=4",
    "probing": "every=16",
}
"""Options for the register task and its small models: the task's checker is the judge, and lengths that are counted in
tokens are cut down."""
VARIANTS = {REFERENCE: ("span=step",), "best-of-n": ("score=reward",)}
"""Further rows at their own defaults: options that change what a strategy is."""
LOOPS = (REFERENCE, f"{REFERENCE}:span=step", "spec-reason:gate=conformal", "rsd:gate=conformal")
CONTROLS = ("coin:gate=conformal", "coin:gate=conformal:span=step", "span-length", "turn-number")
"""Both are one loop, with another score each."""
SAMPLERS = ("target", "speculative", "best-of-n", "adaptive-consistency", "esc")
"""The target's own chains, of which there are as many as its tokens allow."""


def blocks(checked: bool, only: tuple[str, ...] = ()) -> tuple[Block, ...]:
    """The table of every strategy, in three blocks. checked: the problems are of the register task, which has a checker
    of steps; without one the target is the judge, and what needs a checker is left out. only: names to keep beside the
    reference; empty: all.
    """

    def kept(text: str) -> bool:
        name, options = parse_strategy(text)
        possible = checked or (name not in NEEDS_CHECKER and ("score", "reward") not in options)
        return possible and (not only or name in only or name == REFERENCE)

    def judged(text: str) -> str:
        name, _, options = text.partition(":")
        added = CHECKED.get(name) if checked else None
        return ":".join(part for part in (name, added, options) if part)

    names = ("target", REFERENCE, *(n for n in STRATEGIES if n not in ("target", REFERENCE)))
    every = [text for name in names for text in (name, *(f"{name}:{option}" for option in VARIANTS.get(name, ())))]
    own = tuple(judged(text) for text in every if kept(text))
    # With the task's checker as judge SpecReason tests the score of RSD: one row is enough where rates are equal.
    scores = [text for text in LOOPS if not (checked and text.startswith("spec-reason"))]
    loops = tuple(judged(text) for text in (*scores, *CONTROLS) if kept(text))
    return (
        Block("own", own),
        Block("rate", loops, "rate"),
        Block("tokens", (*loops, *(judged(text) for text in SAMPLERS if kept(text))), "tokens"),
    )


def stands_in(text: str) -> bool:
    """Whether the task's checker stands in for a judge or a reward model."""
    name, options = parse_strategy(text)
    return name in NEEDS_CHECKER or ("judge", "task") in options or ("score", "reward") in options
