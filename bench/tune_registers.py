"""The proposers of `atts tune` side by side on the built-in pair, under a budget of target tokens.

    python -m bench.tune_registers       # writes bench/results/tune_cpu.json

Every proposer has the same problems, budget and number of proposals, with several seeds of its own; the best
configuration of each study is then run on held-out problems. `untuned` is the default setting of the task with as
many chains as the budget allows.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from atts_engine.cli.options import TASK_DEFAULTS
from atts_engine.cli.tables import Table, count, percent, plain_table, seconds
from atts_engine.config import ATTSParams, EngineConfig
from atts_engine.conformal import make_calibrator
from atts_engine.evaluation import registers
from atts_engine.evaluation.files import write_text
from atts_engine.evaluation.tuning import (
    Budget,
    Choice,
    Configuration,
    EngineEvaluator,
    GridSearch,
    Measurement,
    Proposer,
    RandomSearch,
    Range,
    Sizes,
    Space,
    StudyFolder,
    Unit,
    best,
    best_so_far,
    run_study,
)
from atts_engine.evaluation.tuning.optuna_proposer import OptunaProposer
from atts_engine.models.size import parameter_count
from atts_engine.pipeline import Problem
from bench.output import out_file
from bench.provenance import ROOT, provenance

OUT = ROOT / "bench" / "results" / "tune_cpu.json"
PAIR = "tiny-draft:tiny-target"
STEPS = (6, 6)
SPACE = Space(
    {
        "pair": Choice((PAIR,)),
        "chains": Range(1, 8, True),
        "turns": Range(4, 16, True),
        "draft_tokens": Range(8, 48, True),
        "target_tokens": Range(8, 48, True),
        "alpha": Range(0.1, 0.9, False),
        "takeover": Choice(("continue", "replace")),
    }
)
PROPOSERS = ("random", "grid", "optuna")


def run(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    budget = Budget("tokens", args.budget_tokens)
    drawn = registers.heldout(args.problems + args.validate, 0, STEPS)
    problems = [Problem(p.id, p.problem, p.answer, i) for i, p in enumerate(drawn)]
    tuning, kept_out = problems[: args.problems], problems[args.problems :]
    sizes = Sizes(parameter_count("tiny-draft"), parameter_count("tiny-target"))
    evaluator = EngineEvaluator(
        {PAIR: EngineConfig("tiny-draft", "tiny-target")},
        {PAIR: sizes},
        Unit(sizes.draft),
        tuning,
        ATTSParams(),
        lambda engine, params: make_calibrator("adaptive", params.alpha, meta=engine.calibration_meta(params)),
        concurrency=16,
    )
    with evaluator:
        untuned = _untuned(evaluator, budget, kept_out)
        studies = [
            _study(name, seed, evaluator, budget, args.trials, kept_out)
            for seed in range(args.seeds)
            for name in PROPOSERS
        ]
    command = (
        f"python -m bench.tune_registers --problems {args.problems} --validate {args.validate} --trials {args.trials} "
        f"--seeds {args.seeds} --budget-tokens {args.budget_tokens:g}"
    )
    record = {
        "provenance": provenance(command),
        "task": {"problems": args.problems, "kept_out": args.validate, "steps": list(STEPS), "pair": PAIR},
        "space": SPACE.as_json(),
        "budget": asdict(budget),
        "trials": args.trials,
        "untuned": untuned,
        "studies": studies,
        "by_proposer": {name: _summary([s for s in studies if s["proposer"] == name]) for name in PROPOSERS},
    }
    write_text(args.out, json.dumps(record, indent=1) + "\n")
    print(plain_table(_table(record)), end="")
    print(f"wrote {args.out}")
    return 0


def _untuned(evaluator: EngineEvaluator, budget: Budget, kept_out: Sequence[Problem]) -> dict[str, Any]:
    task = TASK_DEFAULTS["registers"]

    def configuration(chains: int) -> Configuration:
        spans = task["turns"], task["draft_tokens"], task["target_tokens"]
        return Configuration(PAIR, chains, *spans, ATTSParams().alpha, "continue")

    one, _ = evaluator.measure(configuration(1), None)
    chosen = configuration(max(1, int(budget.limit / one.costs["tokens"])))
    found, _ = evaluator.measure(chosen, None)
    return {
        "configuration": asdict(chosen),
        "tuning": _figures(found),
        "kept_out": _figures(evaluator.validate(chosen, kept_out)),
    }


def _study(
    name: str, seed: int, evaluator: EngineEvaluator, budget: Budget, trials: int, kept_out: Sequence[Problem]
) -> dict[str, Any]:
    proposers: dict[str, Proposer] = {
        "random": RandomSearch(SPACE, seed),
        "grid": GridSearch(SPACE, seed),
        "optuna": OptunaProposer(SPACE, budget, seed),
    }
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as path, StudyFolder.open(path, {}, SPACE, resume=False) as folder:
        run_study(folder, budget, proposers[name], evaluator, trials=trials)
        history = list(folder.trials)
    took = time.perf_counter() - began
    top = best(history, budget)
    print(f"{name}, seed {seed}: {seconds(took)}", flush=True)
    states = [t.state for t in history]
    record = {
        "proposer": name,
        "seed": seed,
        "states": {state: states.count(state) for state in sorted(set(states))},
        "over_budget": sum(t.measurement is not None and not budget.holds(t.measurement.costs) for t in history),
        "wall_s": took,
        "best_so_far": best_so_far(history, budget),
    }
    if top is None or top[0].configuration is None:
        return {**record, "best": None}
    chosen = top[0].configuration
    held = evaluator.validate(chosen, kept_out)
    found = {"configuration": asdict(chosen), "tuning": _figures(top[1]), "kept_out": _figures(held)}
    return {**record, "best": found}


def _figures(m: Measurement) -> dict[str, Any]:
    kept = ("problems", "right", "accuracy", "low", "high", "takeover_rate", "costs", "wall_s")
    return {name: getattr(m, name) for name in kept}


def _summary(studies: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    found = [s["best"] for s in studies if s["best"] is not None]

    def mean(values: Sequence[float]) -> float | None:
        return sum(values) / len(values) if values else None

    return {
        "tuning_accuracy": mean([b["tuning"]["accuracy"] for b in found]),
        "kept_out_accuracy": mean([b["kept_out"]["accuracy"] for b in found]),
        "kept_out_tokens": mean([b["kept_out"]["costs"]["tokens"] for b in found]),
        "not_run": mean([s["states"].get("infeasible", 0) for s in studies]),
        "wall_s": mean([s["wall_s"] for s in studies]),
    }


def _table(record: dict[str, Any]) -> Table:
    rows = [
        (
            name,
            percent(cell["tuning_accuracy"]),
            percent(cell["kept_out_accuracy"]),
            count(cell["kept_out_tokens"]),
            count(cell["not_run"]),
            seconds(cell["wall_s"]),
        )
        for name, cell in record["by_proposer"].items()
    ]
    plain = record["untuned"]
    rows.append(
        (
            "untuned",
            percent(plain["tuning"]["accuracy"]),
            percent(plain["kept_out"]["accuracy"]),
            count(plain["kept_out"]["costs"]["tokens"]),
            "-",
            "-",
        )
    )
    columns = ("proposer", "best, tuning", "on kept-out", "target tokens there", "not run", "time")
    title = f"means over seeds; {record['trials']} proposals, {record['budget']['limit']:g} target tokens a problem"
    return Table(title, columns, tuple(rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=16, help="to tune on (default: %(default)s)")
    parser.add_argument("--validate", type=int, default=64, help="kept out (default: %(default)s)")
    parser.add_argument("--trials", type=int, default=16, help="proposals of a study (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="studies of each proposer (default: %(default)s)")
    parser.add_argument("--budget-tokens", type=float, default=100.0, help="default: %(default)s")
    parser.add_argument("--out", type=out_file, default=OUT, help="default: bench/results/tune_cpu.json")
    sys.exit(run(parser.parse_args()))
