"""The asynchronous arithmetic intensity of the built-in pair over chains and turns: tables and plots of
docs/intensity.md.

    python -m bench.intensity              # some minutes; writes bench/results/intensity_cpu.json
    python -m bench.intensity --render     # puts it into docs/intensity.md, docs/intensity.svg and docs/growth.svg

Spans are short (8 tokens) so that chains of 6 steps go on for up to twelve turns.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atts_engine.cli.main import main as atts
from atts_engine.evaluation.files import write_text
from atts_engine.evaluation.sweep_plot import draw_sweep
from bench.output import out_file
from bench.provenance import ROOT, provenance

OUT = ROOT / "bench" / "results" / "intensity_cpu.json"
PAGE = ROOT / "docs" / "intensity.md"
BEGIN, END = "<!-- sweep:begin -->\n", "<!-- sweep:end -->"


def measure(problems: int, chains: str, turns: str, repeats: int, out: Path) -> int:
    flags = [
        *("eval", "--task", "registers", "--steps", "6", "--problems-count", str(problems)),
        *("--sweep-chains", chains, "--sweep-turns", turns, "--repeats", str(repeats)),
        *("--draft-tokens", "8", "--target-tokens", "8", "--threads", "1", "--seed", "1"),
    ]
    with tempfile.TemporaryDirectory() as folder:
        status = atts([*flags, "--out", f"{folder}/sweep", "--json", f"{folder}/figures.json"])
        if status != 0:
            return status
        found = json.loads(Path(f"{folder}/figures.json").read_text(encoding="utf-8"))
    runs = [
        {k: r[k] for k in ("mode", "chains", "turns", "repeat", "wall_s", "wait_s", "tokens")} for r in found["runs"]
    ]
    command = shlex.join(["atts", *flags, "--out", "DIR"])
    record = {"provenance": provenance(command), "cells": found["cells"], "growth": found["growth"], "runs": runs}
    write_text(out, json.dumps(record, indent=1) + "\n")
    print(f"wrote {out}")
    return 0


def section(record: Mapping[str, Any]) -> str:
    where, cells = record["provenance"], record["cells"]
    chains, turns = (sorted({c[name] for c in cells}) for name in ("chains", "turns"))
    shown = [c for c in cells if c["turns"] == turns[-1]]
    lines = [
        f"At most {turns[-1]} turns; seconds are medians of {cells[0]['repeats']} runs.",
        "",
        "| | chains | run | passes | T_c | T_m | T_s | T_other | blocked | r | accounted | chains wait |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for lane in ("draft", "target"):
        for mode in ("async", "sync"):
            for cell in sorted((c for c in shown if c["mode"] == mode), key=lambda c: c["chains"]):
                times = cell["lanes"][lane]
                row = [f"{times[k]:.3g}" for k in ("pass", "T_c", "T_m", "T_s", "T_other", "blocked", "r")]
                row += [f"{100 * times['accounted']:.0f}%", f"{100 * cell['wait_share']:.0f}%"]
                lines.append(f"| {mode}, {lane} | {cell['chains']} | {cell['wall_s']:.2f} | " + " | ".join(row) + " |")
    lines += [
        "",
        f"Laws over {len(chains)} numbers of chains ({chains[0]} to {chains[-1]}) and {len(turns)} of turns "
        f"({turns[0]} to {turns[-1]}), every run a point; for each quantity the best law, and the paper's (a power "
        "of the chains, exponential in the turns):",
        "",
        "| | in chains | in turns | R² of the logarithm | AIC above the best |",
        "|---|---|---|---|---|",
    ]
    for mode, quantities in record["growth"].items():
        for name, laws in quantities.items():
            best = laws[0]
            papers = next(law for law in laws if law["kinds"] == ["power", "exponential"])
            for law in [best] if papers is best else [best, papers]:
                slopes = zip(law["kinds"], law["slopes"], law["errors"], strict=True)
                cells_of = [_slope(kind, b, error) for kind, b, error in slopes]
                above = law["aic"] - best["aic"]
                lines.append(
                    f"| {mode}, {name} | " + " | ".join([*cells_of, f"{law['r2']:.3f}", f"{above:.1f}"]) + " |"
                )
    lines += [
        "",
        "![r against chains](intensity.svg)",
        "",
        "![waiting time against chains and turns](growth.svg)",
        "",
        f"`{where['command']}` · {where['date']} · {where['cpu']}, {where['cores']} cores, torch {where['torch']} · "
        "[bench/results/intensity_cpu.json](../bench/results/intensity_cpu.json), written by "
        "`python -m bench.intensity`.",
        "",
    ]
    return "\n".join(lines)


def _slope(kind: str, b: float, error: float) -> str:
    return f"n^{b:.2f} ± {error:.2f}" if kind == "power" else f"exp({b:.3f} n) ± {error:.3f}"


def updated(page: str, record: Mapping[str, Any]) -> str:
    head, rest = page.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n{section(record)}\n{END}{tail}"


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=16, help="held-out problems (default: %(default)s)")
    parser.add_argument("--chains", default="2,4,8,16,32", help="default: %(default)s")
    parser.add_argument("--turns", default="2,4,8,12", help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each cell (default: %(default)s)")
    parser.add_argument("--out", type=out_file, default=OUT, help="default: bench/results/intensity_cpu.json")
    parser.add_argument("--render", action="store_true", help="write tables and plots from the results; run nothing")
    args = parser.parse_args(words)
    if not args.render:
        return measure(args.problems, args.chains, args.turns, args.repeats, args.out)
    record = json.loads(args.out.read_text(encoding="utf-8"))
    write_text(PAGE, updated(PAGE.read_text(encoding="utf-8"), record))
    draw_sweep(record, PAGE.parent)
    return 0


if __name__ == "__main__":
    sys.exit(main())
