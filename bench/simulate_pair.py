"""A pair of 1.5B and 70B on 8 to 512 GPUs, simulated: the tables of docs/simulate.md.

python -m bench.simulate_pair             # writes bench/results/simulate_pair.json and the tables
python -m bench.simulate_pair --check     # exit code 1 where the tables are not those of the file
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atts_engine.cli.main import main as atts
from atts_engine.evaluation.files import write_text
from bench.provenance import ROOT, provenance

OUT = ROOT / "bench" / "results" / "simulate_pair.json"
PAGE = ROOT / "docs" / "simulate.md"
BEGIN, END = "<!-- pair:begin -->\n", "<!-- pair:end -->"
PAIR = ("simulate", "--draft", "qwen2.5-1.5b", "--target", "llama-3.1-70b", "--device", "h100")
SWEEPS = {
    "gpus": ("--gpus", "8,16,32,64,128,256,512", "--problems", "64", "--chains", "16"),
    "one at a time": (
        *("--gpus", "8,32,128,512", "--problems", "16", "--chains", "16", "--concurrency", "1"),
        *("--strategies", "atts,atts-sync,target"),
    ),
    "few": (
        *("--gpus", "8,64,512", "--problems", "8", "--chains", "16"),
        *("--strategies", "atts,atts-sync,target"),
    ),
    "chains": (
        *("--gpus", "64", "--problems", "16", "--chains", "1,4,16,64,256"),
        *("--strategies", "atts,atts-sync,target"),
    ),
    "turns": ("--gpus", "64", "--problems", "64", "--turns", "1,2,4,8", "--strategies", "atts,atts-sync,target"),
}
TITLES = {
    "gpus": "64 problems of 16 chains, all in flight",
    "one at a time": "16 problems of 16 chains, one in flight",
    "few": "8 problems of 16 chains, all in flight",
    "chains": "16 problems on 64 GPUs, all in flight, by chains a problem",
    "turns": "64 problems of 16 chains on 64 GPUs, all in flight, by turns a chain has at most",
}
Cells = Mapping[str, Mapping[str, Any]]


def run() -> dict[str, Any]:
    """Simulate every sweep. SystemExit where one fails."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, flags in SWEEPS.items():
            file = Path(folder) / "sweep.json"
            if atts([*PAIR, *flags, "--plain", "--json", str(file)]):
                raise SystemExit(f"the sweep {name!r} failed")
            command = shlex.join(["atts", *PAIR, *flags])
            found[name] = {"command": command, **json.loads(file.read_text(encoding="utf-8"))}
    return {"provenance": provenance("python -m bench.simulate_pair"), "sweeps": found}


COLUMNS = (
    "draft + target", "target alone", "synchronous", "ATTS", "sync / ATTS", "sync: at barriers",
    "busy, draft and target", "r, draft and target", "KV a GPU", "GPU-hours",
)  # fmt: skip


def section(record: Mapping[str, Any]) -> str:
    """The sweeps as Markdown."""
    lines = []
    for name, sweep in record["sweeps"].items():
        columns = ("GPUs" if sweep["axis"] == "gpus" else sweep["axis"], *COLUMNS)
        lines += [
            f"Simulated, {TITLES[name]}:",
            "",
            f"| {' | '.join(columns)} |",
            "|---" * len(columns) + "|",
            *(_row(point[sweep["axis"]], point["strategies"]) for point in sweep["points"]),
            "",
            f"`{sweep['command']}`. Synchronisation dominates: {_dominated(sweep)}.",
            "",
        ]
    where = record["provenance"]
    lines.append(
        f"Written by `{where['command']}` into "
        f"[bench/results/simulate_pair.json](../bench/results/simulate_pair.json), {where['date']}. GPUs and the last "
        "four columns are those of ATTS."
    )
    return "\n".join(lines) + "\n"


def _row(at: int, cells: Cells) -> str:
    free, sync = cells["atts"], cells["atts-sync"]
    lanes, place = [free["lanes"][name] for name in ("draft", "target")], free["placement"]
    held = max(lane["peak_kv_bytes_per_gpu"] for lane in lanes) / 1e9
    row = (
        str(at),
        f"{place['draft_gpus']} + {place['target_gpus']}",
        *(f"{cells[name]['wall_s']:.0f} s" for name in ("target", "atts-sync", "atts")),
        f"{sync['wall_s'] / free['wall_s']:.2f}",
        f"{100 * sync['chain_time']['barrier']:.0f}%",
        ", ".join(f"{100 * lane['busy_share']:.0f}%" for lane in lanes),
        ", ".join(f"{lane['r']:.3g}" for lane in lanes),
        f"{held:.1f} GB",
        f"{free['gpu_hours']:.2f}",
    )
    return f"| {' | '.join(row)} |"


def _dominated(sweep: Mapping[str, Any]) -> str:
    unit = "GPUs" if sweep["axis"] == "gpus" else sweep["axis"]
    told = [
        f"{'the chains' if what == 'chains' else f'the {what} lane'} of {strategy} at {', '.join(map(str, at))} {unit}"
        for strategy, places in sweep["synchronisation_dominates_at"].items()
        for what, at in places.items()
        if at and strategy in ("atts", "atts-sync")
    ]
    return "; ".join(told) or "nowhere"


def written(page: str, record: Mapping[str, Any]) -> str:
    """The page with the tables between its markers."""
    before, rest = page.split(BEGIN, 1)
    return before + BEGIN + section(record) + END + rest.split(END, 1)[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare the page with the file, and simulate nothing")
    args = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    if args.check:
        same = written(page, json.loads(OUT.read_text(encoding="utf-8"))) == page
        print(f"{PAGE.name} is {'' if same else 'not '}what {OUT.name} says")
        return 0 if same else 1
    record = run()
    write_text(OUT, json.dumps(record, indent=1) + "\n")
    write_text(PAGE, written(page, record))
    print(f"wrote {OUT} and {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
