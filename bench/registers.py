"""The built-in pair on held-out problems, every strategy: the table of the README.

    python -m bench.registers            # writes bench/results/registers.json
    python -m bench.readme               # puts it into README.md

The problems (6 steps) are hard enough for the draft's own vote to fail on many of them.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path

from atts_engine.cli.main import main as atts
from atts_engine.evaluation.files import write_text
from bench.output import out_file
from bench.provenance import ROOT, provenance

OUT = ROOT / "bench" / "results" / "registers.json"
KEPT = (
    "strategy", "alpha", "vote", "chains_per_problem", "problems", "chains", "chain_accuracy", "voted", "majority",
    "any_of", "takeovers", "tokens", "wall_s", "decisions",
)  # fmt: skip


def run(problems: int, out: Path) -> int:
    flags = [
        *("eval", "--task", "registers", "--steps", "6", "--problems-count", str(problems), "--chains", "8"),
        *("--draft", "tiny-draft", "--target", "tiny-target", "--strategies", "draft,target,atts,atts-sync"),
        *("--alpha", "0.4", "--seed", "1", "--concurrency", "16"),
    ]
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        status = atts([*flags, "--out", f"{folder}/runs", "--json", str(figures)])
        if status != 0:
            return status
        found = json.loads(figures.read_text(encoding="utf-8"))
    strategies = {name: {k: cell[k] for k in KEPT} for name, cell in found["strategies"].items()}
    command = shlex.join(["atts", *flags, "--out", "DIR"])
    record = {"provenance": provenance(command), "strategies": strategies, "against": found["against"]}
    write_text(out, json.dumps(record, indent=1) + "\n")
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=200, help="held-out problems (default: %(default)s)")
    parser.add_argument("--out", type=out_file, default=OUT, help="default: bench/results/registers.json")
    arguments = parser.parse_args()
    sys.exit(run(arguments.problems, arguments.out))
