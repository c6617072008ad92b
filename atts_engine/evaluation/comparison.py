"""Two finished runs on the same problems, compared problem by problem."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atts_engine.errors import InputError
from atts_engine.evaluation import measures
from atts_engine.evaluation.folder import differences
from atts_engine.evaluation.grading import Grader
from atts_engine.evaluation.intervals import bootstrap, bootstrap_ratio, mcnemar, paired_bootstrap
from atts_engine.evaluation.measures import Outcome
from atts_engine.evaluation.solutions import read_solutions
from atts_engine.evaluation.traces import read_chains
from atts_engine.pipeline.records import Chain

ACCURACIES = ("chain_accuracy", "voted", "majority", "weighted", "any_of")
LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """What a run folder holds, all its problems being answered. answers: by problem."""

    name: str
    settings: Mapping[str, Any]
    chains: tuple[Chain, ...]
    answers: Mapping[str, str | None]

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> FinishedRun:
        """`InputError`: the folder holds no run, or one that is not finished."""
        folder = Path(path)
        try:
            settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
            problems = settings["problems"]["count"]
        except FileNotFoundError as error:
            raise InputError(
                f"{folder} holds no run (no settings.json): name a folder that `atts run --out` wrote, or the folder "
                "of one strategy in what `atts eval --out` wrote"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{folder / 'settings.json'} is not the settings of a run ({error!r})") from error
        solutions = read_solutions(folder / "solutions.jsonl", allow_torn_tail=True)
        if len(solutions) != problems:
            raise InputError(
                f"{folder} is not finished: it holds {len(solutions)} of {problems} answers; go on with it by --resume"
            )
        counted = {(s.problem_id, number) for s in solutions for number in s.chains}
        chains = read_chains(folder / "chains.jsonl", allow_torn_tail=True)
        return cls(
            str(folder),
            settings,
            tuple(c for c in chains if (c.problem_id, c.chain) in counted),
            {s.problem_id: s.ballot.answer for s in solutions},
        )


def compare_runs(first: FinishedRun, second: FinishedRun, *, seed: int = 0) -> dict[str, Any]:
    """{"first", "second", "problems", "settings", "accuracies", "costs", "level"}, ready for JSON; every interval is
    {"mean", "low", "high"}.

    settings: one line for each that differs. accuracies: of each of `ACCURACIES`, {"first", "second", "difference":
    intervals, "mcnemar": {"only_first", "only_second", "p_value"}, or None where a problem can be right in part};
    any_of is of as many chains as both have; {} where nothing is graded. costs: of draft_tokens, target_tokens and
    latency_s, all per problem, {"first", "second", "difference", "ratio": intervals}, ratio None where second's is 0.
    `InputError` names the problem that is on one side only, or says that same ids have other problems.
    """
    _check_same_problems(first, second)
    same = Grader().equal
    graded = [measures.grade(run.chains, same, run.answers) for run in (first, second)]
    return {
        "first": first.name,
        "second": second.name,
        "problems": first.settings["problems"]["count"],
        "graded": len(graded[0]),
        "settings": differences(dict(first.settings), dict(second.settings)),
        "accuracies": _accuracies(graded[0], graded[1], seed) if graded[0] else {},
        "costs": _costs(first, second, seed),
        "level": LEVEL,
    }


def _check_same_problems(first: FinishedRun, second: FinishedRun) -> None:
    sides = [{c.problem_id: c.gold for c in run.chains} for run in (first, second)]
    if odd := sorted(sides[0].keys() ^ sides[1].keys()):
        here, there = (first, second) if odd[0] in sides[0] else (second, first)
        raise InputError(
            f"a paired comparison needs the same problems in both runs: {here.name} has {odd[0]}, {there.name} has it "
            f"not ({len(odd)} are in one only)"
        )
    if first.settings["problems"] != second.settings["problems"]:
        changed = [name for name, gold in sides[0].items() if gold != sides[1][name]]
        detail = f"the answer of {changed[0]}" if changed else "texts, or their order"
        raise InputError(
            f"a paired comparison needs the same problems in both runs: {first.name} and {second.name} have the same "
            f"ids, but differ in {detail}"
        )


def _accuracies(first: Sequence[Outcome], second: Sequence[Outcome], seed: int) -> dict[str, Any]:
    chains = min(len(o.correct) for o in (*first, *second))
    found = {}
    for name in ACCURACIES:
        sides = [
            [o.any_of_k(chains) if name == "any_of" else float(getattr(o, name)) for o in side]
            for side in (first, second)
        ]
        whole = all(value in (0.0, 1.0) for side in sides for value in side)
        found[name] = _paired(sides[0], sides[1], seed) | {
            "mcnemar": measures.as_json(mcnemar(*sides)) if whole and name != "chain_accuracy" else None
        }
    return found


def _paired(ours: Sequence[float], theirs: Sequence[float], seed: int) -> dict[str, Any]:
    return {
        "first": measures.as_json(bootstrap(ours, level=LEVEL, seed=seed)),
        "second": measures.as_json(bootstrap(theirs, level=LEVEL, seed=seed)),
        "difference": measures.as_json(paired_bootstrap(ours, theirs, level=LEVEL, seed=seed)),
    }


def _costs(first: FinishedRun, second: FinishedRun, seed: int) -> dict[str, Any]:
    costs = {}
    columns = zip(_per_problem(first.chains).items(), _per_problem(second.chains).values(), strict=True)
    for (name, ours), theirs in columns:
        if ours is None or theirs is None:
            continue
        ratio = bootstrap_ratio(ours, theirs, level=LEVEL, seed=seed) if sum(theirs) > 0 else None
        costs[name] = _paired(ours, theirs, seed) | {"ratio": None if ratio is None else measures.as_json(ratio)}
    return costs


def _per_problem(chains: Sequence[Chain]) -> dict[str, list[float] | None]:
    groups = measures.by_problem(chains).values()
    known = measures.tokens_by_author(chains) is not None
    return {
        "draft_tokens": [float(sum(c.draft_tokens for c in group)) for group in groups] if known else None,
        "target_tokens": [float(sum(c.target_tokens for c in group)) for group in groups] if known else None,
        "latency_s": measures.latencies(chains),
    }
