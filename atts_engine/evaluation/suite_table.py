"""The figures of a suite, ready for JSON, and the rows of its table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from atts_engine.evaluation import measures
from atts_engine.evaluation.suite import REFERENCE, Block, Row
from atts_engine.evaluation.summary import Same, figures, graded

BASELINE = "target"
"""What strategies at their own defaults are compared with; at equal terms it is the reference."""

COLUMNS = (
    "strategy", "at", "chain accuracy", "answer", "any chain", "taken over", "draft tokens", "target tokens",
    "latency", "difference",
)  # fmt: skip
TITLES = {
    None: "every strategy at its own defaults",
    "rate": "at one takeover rate: each score through the same calibration",
    "tokens": "at one number of target tokens: by level, or by number of chains",
}


def suite_figures(rows: Sequence[Row], blocks: Sequence[Block], same: Same) -> dict[str, Any]:
    """{"blocks": [{"name", "equal", "against", "rows": [...]}]}.

    A row: the figures of `summary.figures` but for its answers, `label`, `options`, `chains_cap` (chains that it may
    write), `chains_per_problem` (that it wrote), `calibrated`, and `difference`: its answers against those of the row
    that the block is compared with, paired by problem (`measures.compare`).
    """
    found = []
    for block in blocks:
        own = [row for row in rows if row.block == block.name]
        against = BASELINE if block.equal is None else REFERENCE
        base = next((row for row in own if row.label == against), None)
        outcomes = None if base is None else graded(base.result, same)
        cells = []
        for row in own:
            cell = _row(row, same)
            if outcomes and row is not base:
                cell["difference"] = measures.compare(graded(row.result, same), outcomes, "voted")
            cells.append(cell)
        compared = against if outcomes else None
        found.append({"name": block.name, "equal": block.equal, "against": compared, "rows": cells})
    return {"blocks": found}


def _row(row: Row, same: Same) -> dict[str, Any]:
    found = figures(row.result, row.params, same)
    del found["answers"]
    return {
        "label": row.label,
        "options": dict(row.params.options),
        "chains_cap": row.params.chains,
        "calibrated": row.params.settings.calibrated,
        **found,
        "chains_per_problem": found["chains"] / found["problems"],
        "difference": None,
    }


def table_rows(block: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rows of a table with the columns `COLUMNS`."""
    return [
        (
            row["label"],
            terms(row),
            _percent(row["chain_accuracy"]),
            _interval(row["voted"]),
            _percent(row["any_of"]),
            "-" if row["takeovers"]["rate"] is None else f"{100 * row['takeovers']['rate']:.1f}%",
            *(f"{row['tokens_per_problem'][author]['mean']:,.0f}" for author in ("draft", "target")),
            f"{row['latency_s']['mean']['mean']:.2f} s",
            _difference(row["difference"]),
        )
        for row in block["rows"]
    ]


def note(block: Mapping[str, Any]) -> str:
    """What the last column is, in words."""
    against = block["against"]
    said = "tokens and seconds of a problem; answer and difference with 95% bootstrap intervals over problems"
    return said if against is None else f"{said}; difference: points of the answer against {against}, paired"


def terms(row: Mapping[str, Any]) -> str:
    """How a row was run, in a few words."""
    chains = row["chains_per_problem"]
    cap = row["chains_cap"]
    written = f"{cap} chains" if chains == cap else f"{chains:.1f} of {cap} chains"
    return f"level {row['alpha']:g}" if row["calibrated"] else written


def _percent(cell: Mapping[str, float] | None) -> str:
    return "-" if cell is None else f"{100 * cell['mean']:.1f}%"


def _interval(cell: Mapping[str, float] | None) -> str:
    return "-" if cell is None else f"{100 * cell['mean']:.1f}% ({100 * cell['low']:.0f} to {100 * cell['high']:.0f})"


def _difference(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return "-"
    d = cell["difference"]
    return f"{100 * d['mean']:+.1f} ({100 * d['low']:+.0f} to {100 * d['high']:+.0f})"
