"""`atts eval --compare DIR_A DIR_B`: two finished runs on the same problems."""

from __future__ import annotations

import argparse
from typing import Any

from atts_engine.cli.job import accuracy_cell, figure_cell
from atts_engine.cli.tables import Table, human_stream, rounded, show, write_json

NAMES = {
    "chain_accuracy": "chain accuracy",
    "voted": "answer",
    "majority": "majority",
    "weighted": "weighted vote",
    "any_of": "any of the chains",
    "draft_tokens": "draft tokens, a problem",
    "target_tokens": "target tokens, a problem",
    "latency_s": "seconds, a problem",
}


def compare(args: argparse.Namespace) -> int:
    """Show the paired comparison of the two folders of --compare."""
    from atts_engine.evaluation.comparison import FinishedRun, compare_runs

    first, second = (FinishedRun.read(folder) for folder in args.compare)
    found = compare_runs(first, second, seed=args.seed)
    show(_table(found), human_stream(args.json), args.plain)
    write_json(found, args.json)
    return 0


def _table(found: dict[str, Any]) -> Table:
    rows = []
    for name, cell in found["accuracies"].items():
        d, test = cell["difference"], cell["mcnemar"]
        difference = f"{100 * d['mean']:+.1f} ({100 * d['low']:+.1f} to {100 * d['high']:+.1f}) points"
        tested = ("-", "-", "-")
        if test is not None:
            tested = (f"{test['only_first']}", f"{test['only_second']}", f"{test['p_value']:.3g}")
        rows.append((NAMES[name], accuracy_cell(cell["first"]), accuracy_cell(cell["second"]), difference, *tested))
    for name, cell in found["costs"].items():
        d = cell["difference"]
        difference = f"{rounded(d['mean'])} ({rounded(d['low'])} to {rounded(d['high'])})"
        rows.append((NAMES[name], figure_cell(cell["first"]), figure_cell(cell["second"]), difference, "-", "-", "-"))
    notes = [
        f"A: {found['first']}",
        f"B: {found['second']}",
        f"in brackets: {100 * found['level']:g}% intervals, problems drawn again; only A, only B: problems that one "
        "got right and the other wrong; p: exact McNemar test",
    ]
    if found["settings"]:
        notes.append(f"settings that differ (was: A, is: B): {'; '.join(found['settings'])}")
    columns = ("", "A", "B", "A - B", "only A", "only B", "p")
    return Table(f"{found['problems']} problems, paired", columns, tuple(rows), note="\n".join(notes))
