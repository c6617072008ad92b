"""Every strategy on the built-in pair, at its own defaults and at equal terms: the table of strategies in the README.

    python -m bench.strategies           # under 20 minutes; writes bench/results/strategies_cpu.json
    python -m bench.readme               # puts it into README.md
    python -m bench.strategies --smollm2 gsm8k.jsonl --out bench/results/strategies_smollm2_cpu.json

The last is a smoke test with real text: SmolLM2-135M beside itself on the first problems of a file, two short chains
each.

A run that was broken off goes on in the same --folder. Figures but for times depend on the seed alone.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atts_engine.cli.main import main as atts
from atts_engine.evaluation.files import write_text
from bench.output import out_file
from bench.provenance import ROOT, provenance

OUT = ROOT / "bench" / "results" / "strategies_cpu.json"
KEPT = (
    "label", "options", "alpha", "calibrated", "chains_cap", "chains_per_problem", "problems", "chains", "errors",
    "chain_accuracy", "voted", "any_of", "tokens_per_problem", "latency_s", "auc_chains", "auc_steps", "wall_s",
    "difference",
)  # fmt: skip


def built_in(problems: int, pilot: int, chains: int) -> list[str]:
    return [
        *("eval", "--suite", "--task", "registers", "--steps", "6", "--problems-count", str(problems)),
        *("--pilot-problems", str(pilot), "--chains", str(chains), "--alpha", "0.4", "--seed", "1"),
        *("--concurrency", "16", "--threads", "1"),
    ]


def smollm2(file: Path) -> list[str]:
    return [
        *("eval", "--suite", "--draft", "smollm2-135m", "--target", "smollm2-135m", "--dtype", "bfloat16"),
        *("--problems", str(file), "--limit", "20", "--pilot-problems", "8", "--chains", "2", "--turns", "2"),
        *("--draft-tokens", "64", "--target-tokens", "64", "--alpha", "0.4", "--seed", "1", "--concurrency", "16"),
    ]


def measure(flags: Sequence[str], folder: Path, out: Path) -> int:
    resume = ["--resume"] if folder.is_dir() and any(folder.iterdir()) else []
    folder.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    figures = folder.with_name(f"{folder.name}.json")
    status = atts([*flags, "--out", str(folder), "--json", str(figures), *resume])
    if status != 0:
        return status
    took = time.perf_counter() - began
    found = json.loads(figures.read_text(encoding="utf-8"))
    record = {
        "provenance": provenance(shlex.join(["atts", *map(_shown, flags), "--out", "DIR"])),
        # Of this process: no measure of the suite where a part was done before.
        "wall_s": None if resume else took,
        "pilot_problems": int(flags[flags.index("--pilot-problems") + 1]),
        "blocks": [{**block, "rows": [_kept(row) for row in block["rows"]]} for block in found["blocks"]],
    }
    write_text(out, json.dumps(record, indent=1) + "\n")
    print(f"{took:.0f} s; wrote {out}")
    return 0


def _shown(word: str) -> str:
    """A file by its name: where it lies is nobody's business."""
    return Path(word).name if Path(word).is_file() else word


def _kept(row: Mapping[str, Any]) -> dict[str, Any]:
    rates = row["takeovers"]
    return {**{name: row[name] for name in KEPT}, "takeovers": {k: rates[k] for k in ("decisions", "rate", "interval")}}


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=40, help="held-out problems (default: %(default)s)")
    parser.add_argument("--pilot", type=int, default=16, help="problems to calibrate with (default: %(default)s)")
    parser.add_argument("--chains", type=int, default=8, help="chains a problem (default: %(default)s)")
    parser.add_argument("--smollm2", type=Path, metavar="FILE", help="a problem file for SmolLM2 in place of the pair")
    parser.add_argument("--folder", type=Path, help="where the runs go; kept, and gone on with (default: a new one)")
    parser.add_argument("--out", type=out_file, default=OUT, help="default: bench/results/strategies_cpu.json")
    args = parser.parse_args(words)
    flags = smollm2(args.smollm2) if args.smollm2 else built_in(args.problems, args.pilot, args.chains)
    if args.folder is not None:
        return measure(flags, args.folder, args.out)
    with tempfile.TemporaryDirectory() as folder:
        return measure(flags, Path(folder) / "suite", args.out)


if __name__ == "__main__":
    sys.exit(main())
