"""Chains on a page: their text in the colours of the authors, and when each of them did what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from atts_engine.pipeline.records import Chain, Problem

LEGEND = (
    '<p class="legend"><span class="draft">draft</span><span class="target">target</span>'
    '<span class="kept">✓ span kept</span><span class="taken">⇄ taken over</span></p>'
)
TEXT_LIMIT = 6000
"""Characters of a span that are shown."""


def chosen_problems(
    problems: Sequence[Problem], chains: Sequence[Chain], most: int
) -> list[tuple[Problem, list[Chain]]]:
    """The problems worth reading: those where chains disagree and the target stepped in come first."""
    groups: dict[str, list[Chain]] = {problem.id: [] for problem in problems}
    for chain in chains:
        groups[chain.problem_id].append(chain)

    def interest(problem: Problem) -> tuple[int, int]:
        group = groups[problem.id]
        answers = len({c.final_answer for c in group})
        return -min(answers, 2), -sum(t.takeover for c in group for t in c.turns)

    ranked = sorted((p for p in problems if groups[p.id]), key=interest)
    return [(problem, groups[problem.id]) for problem in ranked[:most]]


def worst_chains(
    problems: Sequence[Problem],
    chains: Sequence[Chain],
    right: Callable[[Problem, Chain], bool | None],
    most: int,
) -> list[tuple[Problem, Chain]]:
    """Wrong chains by their worst span's score, the lowest first: those that the target would have written itself. At
    most one of each problem; chains without a score are left out."""
    by_id = {problem.id: problem for problem in problems}
    found: dict[str, tuple[float, int, Chain]] = {}
    for chain in chains:
        scores = [t.score for t in chain.turns if t.score is not None]
        if scores and right(by_id[chain.problem_id], chain) is False:
            candidate = (max(scores), chain.chain, chain)
            found[chain.problem_id] = min(found.get(chain.problem_id, candidate), candidate, key=lambda c: c[:2])
    ranked = sorted(found.values(), key=lambda c: (c[0], c[2].problem_index))
    return [(by_id[chain.problem_id], chain) for _, _, chain in ranked[:most]]


def chain_text(chain: Chain, right: bool | None, opened: bool) -> str:
    """One chain as a fold-out: its text with a mark after each judged span."""
    parts = []
    for turn in chain.turns:
        if turn.draft:
            parts.append(f'<span class="draft">{_shown(turn.draft)}</span>')
        if turn.score is not None:
            kind, sign = ("taken", "⇄") if turn.takeover else ("kept", "✓")
            p = "" if turn.p_value is None else f" p {turn.p_value:.2f}"
            parts.append(f'<span class="mark {kind}" title="turn {turn.turn}, score {turn.score:.4g}">{sign}{p}</span>')
        if turn.target:
            parts.append(f'<span class="target">{_shown(turn.target)}</span>')
    state = {True: ("kept", "right"), False: ("bad", "wrong"), None: ("", "")}[right]
    answer = "no answer" if chain.final_answer is None else f"answer {chain.final_answer}"
    error = f' <span class="bad">{escape(chain.error)}</span>' if chain.error else ""
    taken = sum(t.takeover for t in chain.turns)
    says = f"chain {chain.chain}: {answer}"
    tail = f"{len(chain.turns)} turns, {taken} taken over, {chain.draft_tokens} + {chain.target_tokens} tokens"
    return (
        f"<details{' open' if opened else ''}><summary>{escape(says)} "
        f'<span class="{state[0]}">{state[1]}</span> <small>{tail}</small>{error}</summary>'
        f'<div class="text">{"".join(parts)}</div></details>'
    )


def _shown(text: str) -> str:
    cut = "" if len(text) <= TEXT_LIMIT else " [...]"
    return escape(text[:TEXT_LIMIT]) + cut


def timeline(chains: Sequence[Chain]) -> str:
    """An SVG with one row a chain: when the draft wrote, when the verdict was waited for, when the target wrote."""
    longest = max((c.duration_s for c in chains), default=0.0)
    if longest <= 0.0:
        return ""
    left, width, row = 34, 860, 22
    scale = width / longest
    marks = []
    for i, chain in enumerate(chains):
        y = i * row
        marks.append(f'<text x="0" y="{y + 14}">{chain.chain}</text>')
        at = 0.0
        for turn in chain.turns:
            marks.append(_block(left, y, at, turn.t_draft, scale, "--draft", f"turn {turn.turn}: draft"))
            at = max(at, turn.t_draft)
            if turn.score is not None:
                marks.append(_block(left, y, at, turn.t_verdict, scale, "--line", f"turn {turn.turn}: verdict awaited"))
                at = max(at, turn.t_verdict)
            if turn.t_target > 0.0:
                marks.append(_block(left, y, at, turn.t_target, scale, "--target", f"turn {turn.turn}: target"))
                at = max(at, turn.t_target)
    height = len(chains) * row
    axis = f'<text x="{left}" y="{height + 14}">0 s</text>' + (
        f'<text x="{left + width}" y="{height + 14}" text-anchor="end">{longest:.2f} s</text>'
    )
    return (
        f'<svg class="timeline" viewBox="0 0 {left + width + 4} {height + 20}" role="img" aria-label="timeline">'
        f"{''.join(marks)}{axis}</svg>"
    )


def _block(left: int, y: int, start: float, end: float, scale: float, colour: str, says: str) -> str:
    if end <= start:
        return ""
    x, w = left + start * scale, max(0.75, (end - start) * scale - 0.5)
    return (
        f'<rect x="{x:.2f}" y="{y + 3}" width="{w:.2f}" height="15" rx="2" style="fill: var({colour})">'
        f"<title>{escape(says)}, {end - start:.3f} s</title></rect>"
    )
