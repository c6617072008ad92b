"""The figures of a study, ready for JSON, and its page."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from typing import Any

from atts_engine.evaluation import page, plots
from atts_engine.evaluation.tuning.cost import KINDS, Budget
from atts_engine.evaluation.tuning.results import Measured, best, best_so_far, measured, pareto
from atts_engine.evaluation.tuning.trial import Measurement, Trial

COLUMNS = ("trial", "configuration", "accuracy", "95%", "taken over", "cost")


def figures(
    trials: Sequence[Trial], budget: Budget, settings: Mapping[str, Any], validation: Measurement | None
) -> dict[str, Any]:
    """The summary of a study: what `summary.json` and `--json` hold.

    best: the trial with the highest accuracy within the budget, or None; pareto: numbers of the trials that nothing
    dominates; validation: the best on problems that it was not picked on; insights: the agent's last ones.
    """
    top = best(trials, budget)
    return {
        "budget": asdict(budget),
        "trials": len(trials),
        "states": dict(Counter(t.state for t in trials)),
        "repeated": sum(t.repeats is not None for t in trials),
        "best": None if top is None else top[0].as_json(),
        "pareto": [t.number for t, _ in pareto(trials, budget.kind)],
        "best_so_far": best_so_far(trials, budget),
        "validation": None if validation is None else asdict(validation),
        "insights": list(trials[-1].insights) if trials else [],
        "measured_s": sum(t.measurement.wall_s for t in trials if t.measurement is not None and t.repeats is None),
        "history": [t.as_json() for t in trials],
        "settings": dict(settings),
    }


def rows(found: Sequence[Measured], budget: Budget) -> list[tuple[str, ...]]:
    """Trials as rows under `COLUMNS`."""
    return [(str(trial.number), str(trial.configuration), *cells(m, budget)) for trial, m in found]


def cells(m: Measurement, budget: Budget) -> tuple[str, str, str, str]:
    """Accuracy, its interval, takeover rate and cost as people read them."""
    rate = "-" if m.takeover_rate is None else f"{100 * m.takeover_rate:.0f}%"
    return (
        f"{100 * m.accuracy:.1f}%",
        f"{100 * m.low:.1f} to {100 * m.high:.1f}",
        rate,
        f"{m.costs[budget.kind]:,.4g}" + ("" if budget.holds(m.costs) else " (over)"),
    )


def optimism(measured_trials: int, validation: Measurement | None, accuracy: float) -> str:
    """What to think of the best accuracy."""
    text = f"The best of {measured_trials} configurations on the problems it was picked on is optimistic"
    if validation is None:
        return f"{text}: keep problems out of the study with --validate N, or run it on others."
    return (
        f"{text} ({100 * accuracy:.1f}%). On {validation.problems} problems that were kept out of the study: "
        f"{100 * validation.accuracy:.1f}% (95%: {100 * validation.low:.1f} to {100 * validation.high:.1f})."
    )


def study_report(
    trials: Sequence[Trial], budget: Budget, settings: Mapping[str, Any], validation: Measurement | None
) -> str:
    """The page of a study."""
    top, front = best(trials, budget), pareto(trials, budget.kind)
    lead = (
        f"{len(trials)} proposals of the proposer {settings['proposer']['name']} on {settings['problems']['count']} "
        f"problems, for the highest accuracy of the vote at {budget}."
    )
    sections: list[tuple[str | None, str]] = [(None, page.cards(_cards(trials, budget, validation)))]
    if not plots.can_plot():
        note = '<p class="note">Plots need matplotlib: pip install &#x27;atts-engine[eval]&#x27;</p>'
        sections.append(("Plots", note))
    elif measured(trials):
        drawn = _plots(trials, budget)
        figs = "".join(f"<figure>{p.svg}<figcaption>{escape(p.caption)}</figcaption></figure>" for p in drawn)
        sections.append(("Plots", f'<div class="plots">{figs}</div>'))
    notes = [] if top is None else [optimism(len(measured(trials)), validation, top[1].accuracy)]
    columns = (*COLUMNS[:-1], f"{KINDS[budget.kind]} a problem")
    sections.append(("Nothing beats these in accuracy and cost", page.table(columns, rows(front, budget), notes)))
    if trials and trials[-1].insights:
        items = "".join(f"<li>{escape(line)}</li>" for line in trials[-1].insights)
        sections.append(("What the agent believes", f'<div class="panel"><ul>{items}</ul></div>'))
    sections.append(("History", _history(trials, budget)))
    text = escape(json.dumps(dict(settings), indent=2))
    sections.append(
        ("Settings", f'<details class="panel"><summary>JSON</summary><pre>{text}</pre></details>'),
    )
    return page.page("ATTS study: settings under a budget", lead, sections)


def _cards(trials: Sequence[Trial], budget: Budget, validation: Measurement | None) -> list[tuple[str, str, str]]:
    states = Counter(t.state for t in trials)
    found = []
    if (top := best(trials, budget)) is not None:
        trial, m = top
        spread = f"95%: {100 * m.low:.1f} to {100 * m.high:.1f}; optimistic"
        found.append((f"best, trial {trial.number}", f"{100 * m.accuracy:.1f}%", spread))
        found.append((f"its {KINDS[budget.kind]}", f"{m.costs[budget.kind]:,.4g}", f"of {budget.limit:,.6g} a problem"))
    if validation is not None:
        spread = f"95%: {100 * validation.low:.1f} to {100 * validation.high:.1f}"
        name = f"on {validation.problems} other problems"
        found.append((name, f"{100 * validation.accuracy:.1f}%", spread))
    small = ", ".join(f"{count} {state}" for state, count in states.items() if state != "measured")
    found.append(("measured", str(states["measured"]), small or "of as many proposals"))
    return found


def _plots(trials: Sequence[Trial], budget: Budget) -> list[plots.Plot]:
    front = {t.number for t, _ in pareto(trials, budget.kind)}
    top = best(trials, budget)
    points = {
        t.number: plots.Point(m.costs[budget.kind], m.accuracy, m.low, m.high, t.number in front)
        for t, m in measured(trials)
    }
    marked = None if top is None else points[top[0].number]
    return [
        plots.accuracy_against_cost(list(points.values()), budget.limit, marked, KINDS[budget.kind]),
        plots.best_so_far(best_so_far(trials, budget)),
    ]


def _history(trials: Sequence[Trial], budget: Budget) -> str:
    shown = []
    for t in trials:
        state = t.state if t.repeats is None else f"{t.state}, as trial {t.repeats}"
        told = ("-", "-", "-", "-") if t.measurement is None else cells(t.measurement, budget)
        if t.measurement is None and t.planned_cost is not None:
            told = ("-", "-", "-", f"{t.planned_cost:,.4g} (planned)")
        what = "; ".join(t.complaints) if t.configuration is None else str(t.configuration)
        shown.append((str(t.number), what, *told, state, t.reason or ""))
    columns = (*COLUMNS[:-1], f"{KINDS[budget.kind]} a problem", "", "reason")
    return page.table(columns, shown, [])
