"""report.html of a run, and of a comparison of strategies."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from atts_engine.evaluation import chains_html, lanes, page, pareto, plots, servers
from atts_engine.evaluation.files import write_text
from atts_engine.evaluation.grading import Grader, is_right
from atts_engine.evaluation.job import JobResult
from atts_engine.pipeline.records import Chain, Problem

PROBLEMS_SHOWN = 3
WORST_SHOWN = 6
Section = tuple[str | None, str]


def write_report(path: Path, html: str) -> None:
    """Write the page so that it is there whole or not at all."""
    write_text(path, html)


def run_report(result: JobResult, figures: Mapping[str, Any]) -> str:
    """The page of one run. figures: as `summary.figures`, with the run's `settings`."""
    models = figures["settings"]["models"]
    lead = (
        f"{models['draft']} wrote, {models['target']} scored and took over. Strategy {figures['strategy']}, alpha "
        f"{figures['alpha']:g}; {figures['problems']} problems with {figures['chains_per_problem']} chains each."
    )
    sections: list[Section] = [(None, page.cards(_cards(figures)))]
    sections += plot_sections(
        lambda: plots.of_chains(result.chains, figures["takeovers"], figures["alpha"], result.in_force())
    )
    sections += chain_sections(result)
    sections += _lane_sections({figures["strategy"]: figures})
    sections.append(("Problems", _problem_table(figures)))
    sections.append(("Settings", settings_panel(figures["settings"])))
    return page.page(f"ATTS run: {models['draft']} and {models['target']}", lead, sections)


def comparison_report(results: Mapping[str, JobResult], figures: Mapping[str, Any]) -> str:
    """The page of several strategies on the same problems. figures: as `summary.comparison`, with all `settings`."""
    each = figures["strategies"]
    first = next(iter(each.values()))
    models = next(iter(figures["settings"].values()))["models"]
    lead = (
        f"{models['draft']} and {models['target']} on {first['problems']} problems with {first['chains_per_problem']} "
        f"chains each, alpha {first['alpha']:g}. Every strategy had the same problems and the same seed."
    )
    sections: list[Section] = [(None, _strategy_table(figures))]

    def draw() -> list[plots.Plot]:
        drawn = [plots.accuracy_against(each, cost) for cost in pareto.COSTS if pareto.placed(each, cost)]
        if "atts" in results:
            own, found = results["atts"], each["atts"]
            drawn += plots.of_chains(own.chains, found["takeovers"], found["alpha"], own.in_force())
        return drawn

    sections += plot_sections(draw)
    shown = results.get("atts") or next(iter(results.values()))
    sections += chain_sections(shown)
    sections += _lane_sections(each)
    sections.append(("Settings", settings_panel(figures["settings"])))
    return page.page(f"ATTS compared: {', '.join(each)}", lead, sections)


def _cards(figures: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    takeovers, tokens = figures["takeovers"], figures["tokens"]
    found = []
    for name, key in (("vote", "voted"), ("chain accuracy", "chain_accuracy"), ("any chain right", "any_of")):
        if (cell := figures[key]) is not None:
            found.append(
                (name, f"{100 * cell['mean']:.1f}%", f"95%: {100 * cell['low']:.1f} to {100 * cell['high']:.1f}")
            )
    if takeovers["decisions"]:
        cell = takeovers["interval"]
        rate = f"{100 * takeovers['rate']:.1f}%"
        spread = f"95%: {100 * cell['low']:.1f} to {100 * cell['high']:.1f}"
        found.append(("taken over", rate, f"of {takeovers['decisions']:,} spans, alpha {figures['alpha']:g}; {spread}"))
    for what in ("chains", "steps"):
        if (cell := figures[f"auc_{what}"]) is not None:
            spread = f"AUC, 95%: {cell['low']:.3f} to {cell['high']:.3f}"
            found.append((f"score tells wrong {what}", f"{cell['mean']:.3f}", spread))
    if tokens:
        found.append(("draft tokens", f"{tokens['draft']:,}", "generated"))
        found.append(("target tokens", f"{tokens['target']:,}", "generated; it scored the draft's besides"))
    resumed = f"{figures['restored_chains']:,} chains saved earlier" if figures["restored_chains"] else "wall time"
    found.append(("time", f"{figures['wall_s']:.1f} s", resumed))
    slow = figures["latency_s"]["p95"]
    found.append(("time of a problem, p95", f"{slow['mean']:.1f} s", f"95%: {slow['low']:.1f} to {slow['high']:.1f}"))
    if figures["tokens_per_s"] is not None:
        found.append(("tokens per second", f"{figures['tokens_per_s']:,.0f}", "both models"))
    if figures["errors"]:
        found.append(("chains failed", f"{figures['errors']:,}", "see the error field in chains.jsonl"))
    return found


def _strategy_table(figures: Mapping[str, Any]) -> str:
    def mean(cell: Mapping[str, float] | None) -> str:
        return "-" if cell is None else f"{100 * cell['mean']:.1f}%"

    rows = []
    for name, f in figures["strategies"].items():
        cell = f["voted"]
        spread = "-" if cell is None else f"{100 * cell['low']:.1f} to {100 * cell['high']:.1f}"
        rate = f["takeovers"]["rate"]
        rows.append(
            (
                name,
                mean(f["chain_accuracy"]),
                mean(cell),
                spread,
                mean(f["any_of"]),
                "-" if rate is None else f"{100 * rate:.1f}%",
                f"{f['tokens']['draft']:,}" if f["tokens"] else "-",
                f"{f['tokens']['target']:,}" if f["tokens"] else "-",
                f"{f['wall_s']:.1f} s",
            )
        )
    first = next(iter(figures["strategies"].values()))
    columns = (
        "strategy",
        "chain accuracy",
        "vote",
        "95%",
        f"any of {first['chains_per_problem']}",
        "taken over",
        "draft tokens",
        "target tokens",
        "time",
    )
    notes = [_against(name, cell) for name, cell in figures["against"].items()]
    if any(f["restored_chains"] for f in figures["strategies"].values()):
        notes.append("Times are those of the last process; chains that an earlier one saved took none of it.")
    return page.table(columns, rows, notes)


def _against(name: str, cell: Mapping[str, Any]) -> str:
    d, share, test = cell["difference"], cell["target_token_share"], cell["mcnemar"]
    text = (
        f"{name} against {cell['baseline']}: vote {100 * d['mean']:+.1f} points, 95% paired bootstrap "
        f"{100 * d['low']:+.1f} to {100 * d['high']:+.1f}"
    )
    if test is not None:
        text += f"; {test['only_first']} problems only {name} got right, {test['only_second']} only {cell['baseline']}"
    if share is not None:
        text += f"; {100 * share:.1f}% of its target tokens"
    return text + "."


def plot_sections(draw: Callable[[], list[plots.Plot]], title: str = "Plots") -> list[Section]:
    """The plots under one heading; where there is no matplotlib, a line that says so."""
    if not plots.can_plot():
        return [(title, '<p class="note">Plots need matplotlib: pip install &#x27;atts-engine[eval]&#x27;</p>')]
    drawn = draw()
    if not drawn:
        return []
    figures = "".join(f"<figure>{p.svg}<figcaption>{escape(p.caption)}</figcaption></figure>" for p in drawn)
    return [(title, f'<div class="plots">{figures}</div>')]


def _lane_sections(each: Mapping[str, Mapping[str, Any]]) -> list[Section]:
    rows: list[tuple[str, ...]] = []
    away: list[tuple[str, ...]] = []
    notes: list[str] = []
    for name, figures in each.items():
        prefix = f"{name} " if len(each) > 1 else ""
        rows += lanes.lane_rows(figures["lanes"], prefix)
        away += servers.server_rows(figures["servers"], prefix)
        notes += [prefix + note for note in servers.server_notes(figures["servers"])]
        if (cell := figures["waiting"]) is not None:
            notes.append(f"{name}: a chain waited {cell['mean_s']:.3g} s, {100 * cell['share']:.1f}% of its time.")
    tables = []
    if rows:
        tables.append(page.table(lanes.COLUMNS, rows, [lanes.NOTE, *([] if away else notes)]))
    if away:
        tables.append(page.table(servers.COLUMNS, away, [servers.NOTE, *notes]))
    return [("Lanes", "".join(tables))] if tables else []


def chain_sections(result: JobResult) -> list[Section]:
    """Time lines of a few problems, the worst chains, and texts worth reading."""
    same = Grader().equal

    def right(problem: Problem, chain: Chain) -> bool | None:
        return is_right(problem.id, problem.answer, chain.final_answer, same)

    chosen = chains_html.chosen_problems(result.problems, result.chains, PROBLEMS_SHOWN)
    if not chosen:
        return []
    lines = [(problem, line) for problem, chains in chosen if (line := chains_html.timeline(chains))]
    sections: list[Section] = []
    if lines:
        legend = '<p class="legend"><span class="draft">draft writes</span><span>waiting for the verdict</span>'
        legend += '<span class="target">target writes</span></p>'
        panels = "".join(f'<div class="panel"><b>{escape(problem.id)}</b>{line}</div><br>' for problem, line in lines)
        says = '<p class="note">One row a chain, seconds since each began.</p>'
        sections.append((f"Time lines ({result.strategy})", legend + panels + says))
    worst = chains_html.worst_chains(result.problems, result.chains, right, WORST_SHOWN)
    if worst:
        texts = [
            f"<b>{escape(problem.id)}</b>, gold answer {escape(problem.answer or '')}"
            f"{chains_html.chain_text(chain, False, opened=False)}"
            for problem, chain in worst
        ]
        says = (
            '<p class="note">Wrong chains that the target found likeliest: what no test of its own scores can find.</p>'
        )
        sections.append((f"Worst chains ({result.strategy})", f'<div class="panel">{"".join(texts)}</div>{says}'))
    blocks = []
    for problem, chains in chosen:
        texts = [chains_html.chain_text(chain, right(problem, chain), opened=i == 0) for i, chain in enumerate(chains)]
        gold = "" if problem.answer is None else f" (gold answer {escape(problem.answer)})"
        blocks.append(
            f'<div class="panel"><b>{escape(problem.id)}</b>{gold}<p class="problem">{escape(problem.problem)}</p>'
            f"{''.join(texts)}</div><br>"
        )
    sections.append((f"Chains ({result.strategy})", chains_html.LEGEND + "".join(blocks)))
    return sections


def _problem_table(figures: Mapping[str, Any]) -> str:
    rates = figures["takeovers"]["by_problem"]
    rows = []
    for name, cell in figures["answers"].items():
        right = {True: "right", False: "wrong", None: "-"}[cell["right"]]
        votes = ", ".join(f"{answer}: {weight:.3g}" for answer, weight in cell["votes"].items())
        rate = rates.get(name)
        taken = "-" if rate is None else f"{100 * rate['rate']:.0f}%"
        rows.append((name, cell["answer"] or "none", cell["gold"] or "-", right, taken, votes))
    return page.table(("problem", "answer", "gold", "", "taken over", "votes"), rows, [])


def settings_panel(settings: Mapping[str, Any]) -> str:
    return (
        f'<details class="panel"><summary>JSON</summary><pre>{escape(json.dumps(settings, indent=2))}</pre></details>'
    )
