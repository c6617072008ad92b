"""`atts simulate` against real runs on this machine's CPU: fitted at 4 and 16 chains, predicting 8 and 32.

    python -m bench.simulate_check            # writes bench/results/simulate_cpu.json

The built-in pair solves held-out problems of 6 steps, 2 problems in flight, at each number of chains, with one thread
of torch, which leaves other work of the machine least to disturb, and one for both lanes, which a fit has take turns.
Lanes are fitted to what the meters of the runs at 4 and 16 chains counted (`evaluation.simulation.fit`). Two
predictions of the wall time of the others, which differ in what is known of their work:

Of the rounds at each number of chains the one that took least time a token is used throughout, as the one that the rest
of the machine disturbed least; every run is in the file.

own lengths    the turns that the predicted run itself recorded: is its time right, given its work?
drawn lengths  chains drawn from the runs at 4 and 16, the mean of several seeds: nothing of the predicted run is known.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from atts_engine.cli.main import main as atts
from atts_engine.evaluation.files import write_text
from atts_engine.evaluation.simulation import Job, LaneModel, Machine, Outcome, Rules, simulate
from atts_engine.evaluation.simulation.fit import FittedLanes, RunRecord, fit, pooled
from atts_engine.evaluation.simulation.work import resample, tokens_of
from bench.output import out_file
from bench.provenance import ROOT, provenance

OUT = ROOT / "bench" / "results" / "simulate_cpu.json"
PROBLEMS = {4: 64, 16: 30, 8: 46, 32: 20}
"""By number of chains, so that every run takes 20 s and more on two idle cores. In this order, then back."""
FITTED, PREDICTED = (4, 16), (8, 32)
IN_FLIGHT = 2
HOP_S = 200e-6
SEEDS = range(8)
WITHIN = 0.2


def run(folder: Path, chains: int, problems: int) -> RunRecord:
    """One run of the built-in pair. SystemExit where it fails."""
    status = atts(
        [
            *("run", "--task", "registers", "--steps", "6", "--problems-count", str(problems), "--seed", "1"),
            *("--chains", str(chains), "--alpha", "0.4", "--concurrency", str(IN_FLIGHT), "--threads", "1"),
            *("--lane-threads", "one", "--plain", "--out", str(folder), "--json", str(folder.with_suffix(".json"))),
        ]
    )
    if status:
        raise SystemExit(f"the run at {chains} chains failed")
    return RunRecord.read(folder)


def predicted(job: Job, lanes: FittedLanes) -> Outcome:
    machine = Machine(LaneModel(lanes.draft), LaneModel(lanes.target), shared=True)
    return simulate(job, machine, Rules("none", IN_FLIGHT, lanes.prompt_tokens, hop_s=HOP_S))


def of_run(record: RunRecord, lanes: FittedLanes) -> dict[str, Any]:
    """A run, and the simulation of its own work."""
    outcome = predicted(record.recorded.job, lanes)
    assert outcome.target is not None
    return {
        "chains": record.chains,
        "problems": len(record.recorded.job),
        "tokens": {"draft": record.recorded.draft_tokens, "target": record.recorded.target_tokens},
        "measured_s": record.wall_s,
        "own_lengths_s": outcome.seconds,
        "own_lengths_error": outcome.seconds / record.wall_s - 1.0,
        "steps": {
            name: {"measured": record.lanes[name]["steps"], "simulated": use.steps}
            for name, use in (("draft", outcome.draft), ("target", outcome.target))
        },
    }


def least_disturbed(records: Sequence[RunRecord]) -> dict[int, RunRecord]:
    """Of each number of chains the run with the least time a token."""

    def per_token(record: RunRecord) -> float:
        return record.wall_s / sum(tokens_of(record.recorded.job))

    return {n: min((r for r in records if r.chains == n), key=per_token) for n in sorted({r.chains for r in records})}


def summary(chains: int, used: Mapping[int, RunRecord], lanes: FittedLanes) -> dict[str, Any]:
    """The run at one number of chains, and both predictions of it."""
    measured, problems = used[chains].wall_s, len(used[chains].recorded.job)
    own = predicted(used[chains].recorded.job, lanes).seconds
    pool = pooled([used[n] for n in FITTED]).job
    turns = max(len(chain) for problem in pool for chain in problem)
    drawn = [
        predicted(resample(pool, problems=problems, chains=chains, turns=turns, seed=seed), lanes).seconds
        for seed in SEEDS
    ]
    found = {"own_lengths": own, "drawn_lengths": statistics.mean(drawn)}
    return {
        "chains": chains,
        "fitted": chains in FITTED,
        "measured_s": measured,
        **{f"{name}_s": seconds for name, seconds in found.items()},
        **{f"{name}_error": seconds / measured - 1.0 for name, seconds in found.items()},
        "drawn_lengths_by_seed_s": drawn,
        "within": all(abs(seconds / measured - 1.0) <= WITHIN for seconds in found.values()),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [f"{'chains':>6} {'measured':>9} {'own lengths':>20} {'drawn lengths':>20}"]
    for row in rows:
        cells = [f"{row[f'{n}_s']:9.1f} s ({100 * row[f'{n}_error']:+5.1f}%)" for n in ("own_lengths", "drawn_lengths")]
        lines.append(f"{row['chains']:6} {row['measured_s']:7.1f} s {' '.join(cells)}" + " fitted" * row["fitted"])
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="runs at each number of chains (default: %(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="times the problems (default: %(default)s)")
    parser.add_argument("--out", type=out_file, default=OUT, help="default: bench/results/simulate_cpu.json")
    args = parser.parse_args()
    problems = {chains: max(IN_FLIGHT, round(n * args.scale)) for chains, n in PROBLEMS.items()}
    load = os.getloadavg()
    records: list[RunRecord] = []
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder) / "warm-up", 4, IN_FLIGHT)
        for number in range(args.rounds):
            # The order turns about, so that a drift of the machine's speed favours no number of chains.
            for chains in list(problems)[:: 1 if number % 2 == 0 else -1]:
                records.append(run(Path(folder) / f"{number}-{chains}", chains, problems[chains]))
    used = least_disturbed(records)
    lanes = fit([used[chains] for chains in FITTED])
    rows = [summary(chains, used, lanes) for chains in used]
    print(table(rows))
    found = {
        "provenance": provenance("python -m bench.simulate_check"),
        "settings": {"rounds": args.rounds, "scale": args.scale, "in_flight": IN_FLIGHT, "hop_s": HOP_S},
        "threads": torch.get_num_threads(),
        "load_before": load,
        "fit": lanes.to_json(),
        "summary": rows,
        "predicted_within_20_percent": all(row["within"] for row in rows if row["chains"] in PREDICTED),
        "runs": [of_run(record, lanes) for record in records],
    }
    write_text(args.out, json.dumps(found, indent=1) + "\n")
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
