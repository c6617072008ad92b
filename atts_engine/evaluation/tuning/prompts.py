"""What the agent is told. The steps are those of AgentTTS (arXiv 2508.00890): begin from what is known of such spaces,
run, sum up what the results teach, propose again. The wording is this project's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from atts_engine.evaluation.tuning.cost import KINDS, Budget, Sizes, Unit
from atts_engine.evaluation.tuning.results import best
from atts_engine.evaluation.tuning.space import NAMES, Range, Space
from atts_engine.evaluation.tuning.trial import Trial

SYSTEM = (
    "You choose settings for an inference engine by careful experiment. You answer with one JSON object and nothing "
    "else."
)

_MEANINGS = {
    "pair": "which draft model and which target model",
    "chains": "independent solutions of a problem, whose answers are voted on",
    "turns": "turns that a chain has at most",
    "draft_tokens": "tokens of a draft span",
    "target_tokens": "tokens of a target span",
    "alpha": "share of draft spans that the target takes over",
    "takeover": "continue: the target writes on behind the span; replace: it writes the span anew",
}

FIRST = (
    "Nothing has been run yet. Write down what you expect (short sentences, at most six): which pair should be tried "
    "first and what would make another one worth its cost; from where on more chains or turns stop helping; which "
    "settings compete for the budget. Then propose the first configuration.\n"
    'Answer: {"insights": ["..."], "reason": "...", "configuration": {...}}'
)
SUM_UP = (
    "Revise your insights in the light of all results (short sentences, at most six). For each pair: is the larger "
    "model worth its cost here, or is the smaller one as good? For chains, turns and spans: where does more stop "
    "helping? For the budget: what should be given up to pay for what? Differences within the intervals are noise. "
    "Keep what still holds and drop what was refuted.\n"
    'Answer: {"insights": ["..."]}'
)
NEXT = (
    "Propose the next configuration: one that was not run yet, that your insights speak for or that would test them, "
    "and that should keep to the budget. If results hardly differ, try something far from what was tried.\n"
    'Answer: {"reason": "...", "configuration": {...}}'
)


def task(space: Space, budget: Budget, sizes: Mapping[str, Sizes], unit: Unit) -> str:
    """The engine, its settings and the budget in words."""
    lines = [
        "A draft model writes chains of reasoning in turns. In each turn it writes a span, a larger target model "
        "scores the span, and the worst-scored share of spans is taken over by the target. A vote over a problem's "
        "chains is its answer. Find the configuration with the highest accuracy of the vote whose cost keeps to the "
        f"budget: {budget}.",
        "",
        "Settings:",
    ]
    for name in NAMES:
        dimension = space.dimensions[name]
        kind = "one of" if not isinstance(dimension, Range) else "a whole number in" if dimension.whole else "in"
        lines.append(f"- {name}: {_MEANINGS[name]}; {kind} {dimension}")
    lines += ["", "Models:"]
    lines += [f"- {name}: draft {s.draft:,} parameters, target {s.target:,}" for name, s in sizes.items()]
    lines += [
        "",
        "Cost of a problem: every token of every chain goes through both models. A chain whose solution is L tokens "
        "long has about L / (draft_tokens + alpha * target_tokens) turns. Target tokens: what the target writes, "
        "chains * turns * alpha * target_tokens. FLOPs: 2 * parameters * (prompt + chains * L), summed over both "
        "models. Cost units, for each model: b2 * (a * b3 * (b1 + chains) / b1 - 1) with "
        f"a = parameters / {unit.parameters:g}, b1 = prompt / L, "
        f"b2 = {unit.prompt_tokens:g} / {unit.written_tokens:g}, "
        f"b3 = prompt / {unit.prompt_tokens:g}.",
    ]
    return "\n".join(lines)


def results(history: Sequence[Trial], budget: Budget) -> str:
    """Every trial in a line, and the best."""
    lines = ["Results so far:"]
    lines += [_line(trial, budget) for trial in history]
    top = best(history, budget)
    lines.append("Nothing has kept to the budget yet." if top is None else f"Best within the budget: {top[0].number}.")
    return "\n".join(lines)


def insights(known: Sequence[str]) -> str:
    """What was learnt before."""
    return "Your insights:\n" + ("\n".join(f"- {line}" for line in known) or "- none yet")


def _line(trial: Trial, budget: Budget) -> str:
    if trial.configuration is None:
        return f"{trial.number}. refused: {'; '.join(trial.complaints)}"
    m = trial.measurement
    head = f"{trial.number}. {trial.configuration}: "
    if m is None:
        return f"{head}not run, planned cost {trial.planned_cost:,.4g} {KINDS[budget.kind]}: over the budget"
    verdict = "within the budget" if budget.holds(m.costs) else "over the budget"
    ended = " (ended early, hopeless)" if trial.state == "pruned" else ""
    again = "" if trial.repeats is None else f" (already run as {trial.repeats}; propose something new)"
    return (
        f"{head}accuracy {m.accuracy:.3f} ({m.low:.3f} to {m.high:.3f}), cost {m.costs[budget.kind]:,.4g} "
        f"{KINDS[budget.kind]}, {verdict}{ended}{again}"
    )
