"""Takeover rates of several replays side by side, as a picture file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atts_engine.errors import InputError
from atts_engine.evaluation.files import atomically, check_file
from atts_engine.evaluation.plots import can_plot

SUFFIXES = (".svg", ".png", ".pdf")


def check_plot_target(path: str | os.PathLike[str] | None) -> None:
    """`InputError` if a picture cannot be drawn there: no matplotlib, an unknown suffix, no file can be written."""
    if path is None:
        return
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise InputError(f"--plot {path}: the name must end in {', '.join(SUFFIXES)}")
    check_file(path, "--plot")
    if not can_plot():
        raise InputError("--plot needs matplotlib: pip install 'atts-engine[eval]'")


def draw_rates(replays: Mapping[str, Mapping[str, Any]], alpha: float, path: str | os.PathLike[str]) -> None:
    """By turn and by problem (sorted, each replay for itself), one line per replay; figures as `replay.figures` gives
    them. `OSError` as `atomically`."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = {"svg.hashsalt": "replay", "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False}
    with rc_context(style):
        figure = Figure(figsize=(9.6, 3.6), layout="constrained")
        by_turn, by_problem = figure.subplots(1, 2, sharey=True)
        for number, (name, found) in enumerate(replays.items()):
            # Ten colours are soon used up: the lines after them are dashed.
            line: dict[str, Any] = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number // 10 % 3]}
            cells = found["by_turn"]
            turns = [int(turn) for turn in cells]
            by_turn.plot(
                turns, [cell["rate"] for cell in cells.values()], marker="o", markersize=3.5, label=name, **line
            )
            rates = sorted(cell["rate"] for cell in found["by_problem"].values())
            by_problem.plot(range(len(rates)), rates, drawstyle="steps-post", **line)
        for axes, title in ((by_turn, "turn"), (by_problem, "problems, sorted by rate")):
            axes.axhline(alpha, color="0.4", linewidth=1, linestyle=(0, (4, 3)), zorder=0)
            axes.set_xlabel(title)
            axes.grid(axis="y", linewidth=0.4, alpha=0.6)
        by_turn.set_ylabel("share of spans taken over")
        by_turn.set_ylim(0, 1)
        figure.legend(loc="outside upper center", ncols=min(5, len(replays)), frameon=False)
        kind = Path(path).suffix.removeprefix(".")
        with atomically(Path(path)) as partial:
            figure.savefig(partial, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
