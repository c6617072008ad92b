"""Every calibrator and policy on one recording: the table and the plot of docs/calibration.md.

    python -m bench.calibration --traces FILE.jsonl.gz       # writes bench/results/calibration.json
    python -m bench.calibration --render                     # puts it into docs/calibration.md and docs/calibration.svg

Replays need no model; the figures depend on the file and the seeds, not on the machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from atts_engine.conformal import Adaptive, AdaptiveConformalInference, Calibrator
from atts_engine.evaluation.files import atomically, write_text
from atts_engine.evaluation.replay import Scored, figures, replay, replay_online, scored_spans
from atts_engine.evaluation.traces import read_chains
from bench.provenance import ROOT, provenance

OUT = ROOT / "bench" / "results" / "calibration.json"
PAGE, PLOT = ROOT / "docs" / "calibration.md", ROOT / "docs" / "calibration.svg"
BEGIN, END = "<!-- calibration:begin -->\n", "<!-- calibration:end -->"
ALPHA, SEEDS = 0.4, (0, 1, 2)
ORDERS = ("arrival", "shuffle")
NAMED = (
    "adaptive", "aci", "mondrian", "window", "weighted", "hierarchical", "tracker", "split", "adaptive+exact-count",
    "adaptive+exact-count-dlr", "adaptive+top-b",
)  # fmt: skip
STEPS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
TOLERANCES = (0.005, 0.01, 0.02, 0.05, 0.1)
IN_FLIGHT = (1, 4, 16, 64, 128)
KEPT = ("rate", "max_abs_dev_by_turn", "problem_off", "selection_power", "coverage", "set_size")


def measure(path: Path) -> dict[str, Any]:
    chains = list(read_chains(path))
    record: dict[str, Any] = {"alpha": ALPHA, "seeds": list(SEEDS), "orders": {}}
    for order in ORDERS:
        streams = [scored_spans(chains, order, seed) for seed in SEEDS]
        record["decisions"] = len(streams[0])
        record["orders"][order] = {
            "named": {name: _mean([_by_name(s, name, seed) for s, seed in _seeded(streams)]) for name in NAMED},
            "aci_steps": {
                str(step): _online(streams, lambda step=step: AdaptiveConformalInference(ALPHA, step=step))
                for step in STEPS
            },
            "adaptive_tolerances": {
                str(t): _online(streams, lambda t=t: Adaptive(ALPHA, tolerance=t)) for t in TOLERANCES
            },
            "in_flight": {str(d): _online(streams, lambda: Adaptive(ALPHA), d) for d in IN_FLIGHT},
        }
        sys.stderr.write(f"{order}: done\n")
    return record


def _seeded(streams: Sequence[list[Scored]]) -> list[tuple[list[Scored], int]]:
    return list(zip(streams, SEEDS, strict=True))


def _by_name(spans: list[Scored], name: str, seed: int) -> dict[str, Any]:
    calibrator, _, policy = name.partition("+")
    return figures(replay(spans, calibrator, ALPHA, policy or "threshold", seed=seed), ALPHA)


def _online(streams: Sequence[list[Scored]], make: Any, outstanding: int = 1) -> dict[str, Any]:
    def one(spans: list[Scored], seed: int) -> dict[str, Any]:
        calibrator: Calibrator = make()
        return figures(replay_online(spans, calibrator, outstanding=outstanding, seed=seed), ALPHA)

    return _mean([one(s, seed) for s, seed in _seeded(streams)])


def _mean(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds; of the distances from alpha the largest."""
    cell = {key: fmean(f[key] for f in found) for key in KEPT}
    cell["max_abs_dev_by_turn"] = max(f["max_abs_dev_by_turn"] for f in found)
    cell["rate_off"] = max(abs(f["rate"] - ALPHA) for f in found)
    rates = [c["rate"] for f in found for c in f["by_problem"].values()]
    return cell | {"problem_low": min(rates), "problem_high": max(rates)}


def table(record: dict[str, Any]) -> str:
    where = record["provenance"]
    lines = [
        f"α = {record['alpha']:g}, {record['decisions']:,} decisions, cold start, one at a time; worst of "
        f"{len(record['seeds'])} seeds for the distances, mean for the rest. Left of each slash: arrival order; right: "
        "shuffled.",
        "",
        "| calibrator | rate off by | worst turn off by | problems off by | per problem | selection power |",
        "|---|---|---|---|---|---|",
    ]
    arrival, shuffled = (record["orders"][order]["named"] for order in ORDERS)
    for name in NAMED:
        a, s = arrival[name], shuffled[name]
        pairs = [f"{a[k]:.3f} / {s[k]:.3f}" for k in ("rate_off", "max_abs_dev_by_turn", "problem_off")]
        pairs.append(f"{a['problem_low']:.2f}–{a['problem_high']:.2f}")
        pairs.append(f"{a['selection_power']:.3f} / {s['selection_power']:.3f}")
        label = f"**`{name}`**" if name == "adaptive" else f"`{name}`"
        lines.append(f"| {label} | " + " | ".join(pairs) + " |")
    lines += ["", "`adaptive` with decisions in flight (the one being made included):", ""]
    lines += ["| in flight | " + " | ".join(map(str, IN_FLIGHT)) + " |", "|---|" + "---|" * len(IN_FLIGHT)]
    for label, key in (("worst turn off by", "max_abs_dev_by_turn"), ("selection power", "selection_power")):
        cells = [
            " / ".join(f"{record['orders'][order]['in_flight'][str(d)][key]:.3f}" for order in ORDERS)
            for d in IN_FLIGHT
        ]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"`{where['command']}` · {where['date']} · [bench/results/calibration.json](../bench/results/calibration.json)",
        "",
    ]
    return "\n".join(lines)


def draw(record: dict[str, Any], path: Path) -> None:
    """The frontier: what a turn's rate costs in selection power."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = {"svg.hashsalt": "calibration", "axes.spines.top": False, "axes.spines.right": False}
    with rc_context(style):
        figure = Figure(figsize=(9.6, 4.2), layout="constrained")
        for axes, order in zip(figure.subplots(1, 2, sharey=True), ORDERS, strict=True):
            found = record["orders"][order]
            for key, label, colour in (
                ("aci_steps", "aci, step", "C0"),
                ("adaptive_tolerances", "adaptive, tolerance", "C3"),
            ):
                cells = found[key]
                x = [cell["max_abs_dev_by_turn"] for cell in cells.values()]
                y = [cell["selection_power"] for cell in cells.values()]
                axes.plot(x, y, marker="o", markersize=4, color=colour, label=label)
                for name, at in zip(cells, zip(x, y, strict=True), strict=True):
                    axes.annotate(name, at, xytext=(4, -9), textcoords="offset points", fontsize=7, color=colour)
            for name in ("mondrian", "window", "weighted", "hierarchical", "tracker", "split", "adaptive+exact-count"):
                cell = found["named"][name]
                at = cell["max_abs_dev_by_turn"], cell["selection_power"]
                axes.plot(*at, marker="s", markersize=4, color="0.35")
                axes.annotate(name, at, xytext=(5, 3), textcoords="offset points", fontsize=8, color="0.25")
            axes.axvspan(0, 0.02, color="C3", alpha=0.07, linewidth=0)
            axes.axhline(0.75, color="0.6", linewidth=0.8, linestyle=(0, (4, 3)))
            axes.set_title(f"{order} order", fontsize=10)
            axes.set_xlabel("worst turn off by (turns with 50 decisions or more)")
            axes.set_xlim(left=0)
            axes.margins(x=0.15)
        axes.legend(frameon=False, loc="lower right")
        figure.axes[0].set_ylabel("selection power (a coin: 0.5)")
        with atomically(path) as partial:
            figure.savefig(partial, format="svg", metadata={"Date": None})


def updated(page: str, record: dict[str, Any]) -> str:
    head, rest = page.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n{table(record)}\n{END}{tail}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, help="recorded chains, in the format of docs/formats.md")
    parser.add_argument("--render", action="store_true", help="write the table and the plot from the results")
    args = parser.parse_args()
    if args.traces is None and not args.render:
        parser.error("give --traces FILE to measure, or --render to write the page")
    if args.traces is not None:
        record = measure(args.traces)
        command = f"python -m bench.calibration --traces {args.traces.name}"
        write_text(OUT, json.dumps({"provenance": provenance(command)} | record, indent=1) + "\n")
    if args.render:
        record = json.loads(OUT.read_text(encoding="utf-8"))
        write_text(PAGE, updated(PAGE.read_text(encoding="utf-8"), record))
        draw(record, PLOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
