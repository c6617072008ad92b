"""report.html of a suite: its tables, accuracy against cost, and the chains of the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from atts_engine.evaluation import page, pareto, plots
from atts_engine.evaluation.plan import stands_in
from atts_engine.evaluation.report import Section, chain_sections, plot_sections, settings_panel
from atts_engine.evaluation.suite import REFERENCE, Row, Setting, suite_settings
from atts_engine.evaluation.suite_table import COLUMNS, TITLES, note, table_rows


def suite_report(setting: Setting, rows: Sequence[Row], found: Mapping[str, Any]) -> str:
    """The page. found: as `suite_table.suite_figures`."""
    draft, target, _ = setting.models
    lead = (
        f"{draft} and {target} on {len(setting.problems)} problems, {setting.params.chains} chains each unless the "
        f"table says otherwise, alpha {setting.params.alpha:g}, seed {setting.params.seed}. Calibrations are frozen: "
        f"they come from {len(setting.pilot)} other problems in {setting.passes} passes."
    )
    sections: list[Section] = []
    for block in found["blocks"]:
        notes = [note(block)]
        checked = [row["label"] for row in block["rows"] if stands_in(row["label"])]
        if checked:
            notes.append(f"The task's checker stands in for a judge or a reward model: {', '.join(checked)}.")
        sections.append((_headline(block["equal"]), page.table(COLUMNS, table_rows(block), notes)))

    def draw() -> list[plots.Plot]:
        drawn = []
        for block in found["blocks"]:
            each = {row["label"]: row for row in block["rows"]}
            drawn += [
                plots.accuracy_against(each, cost, _headline(block["equal"]))
                for cost in pareto.COSTS
                if pareto.placed(each, cost)
            ]
        return drawn

    sections += plot_sections(draw)
    reference = next((row for row in rows if row.label == REFERENCE), rows[0])
    sections += plot_sections(lambda: _of_reference(reference, found), f"Plots ({reference.label})")
    sections += chain_sections(reference.result)
    sections.append(("Settings", settings_panel(suite_settings(setting))))
    return page.page(f"Strategies compared: {draft} and {target}", lead, sections)


def _headline(equal: str | None) -> str:
    title = TITLES[equal]
    return title[0].upper() + title[1:]


def _of_reference(row: Row, found: Mapping[str, Any]) -> list[plots.Plot]:
    cells = next(b for b in found["blocks"] if b["name"] == row.block)["rows"]
    figures = next(cell for cell in cells if cell["label"] == row.label)
    return plots.of_chains(row.result.chains, figures["takeovers"], row.params.alpha, row.result.in_force())
