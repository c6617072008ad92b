"""Turn lengths and takeovers of a recorded job, in numbers alone, so that `bench.gpu_proof` needs no trace file.

    python -m bench.gpu_proof.turns FILE        # a trace file (docs/formats.md) -> bench/data/turns.json

Tokens are estimated: characters over CHARS_PER_TOKEN, the ratio of `bench.e2e.barrier`, at least 1 where there is text.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atts_engine.evaluation.traces import read_chains
from bench.e2e.simulate import Job, TurnWork
from bench.provenance import ROOT

FILE = ROOT / "bench" / "data" / "turns.json"
CHARS_PER_TOKEN = 3.0
FIRST, STRIDE, PROBLEMS, CHAINS = 8, 12, 8, 16
NOTE = (
    "Of a recorded job (R1-Distill-Llama-8B drafts, QwQ-32B takes over, 100 problems of MATH-500): the chains of every "
    "12th problem from the ninth on, of all such choices the one whose share of target tokens is nearest to the whole "
    "job's. A chain is a list of turns, a turn is [draft tokens, target tokens, taken over]. No texts. Tokens are "
    "estimated as characters / chars_per_token. `whole` sums the turns of the whole job."
)


@dataclass(frozen=True, slots=True)
class Recorded:
    """job: turns of each chain of each problem. draft_tokens, target_tokens: of the whole recorded job."""

    job: Job
    draft_tokens: int
    target_tokens: int
    takeover_rate: float


def load(path: Path = FILE) -> Recorded:
    found = json.loads(path.read_text(encoding="utf-8"))
    job = [[[TurnWork(d, t) for d, t, _ in chain] for chain in problem] for problem in found["problems"]]
    whole = found["whole"]
    return Recorded(job, whole["draft_tokens"], whole["target_tokens"], whole["takeovers"] / whole["turns"])


def ceiling(draft_tokens: int, target_tokens: int) -> float:
    """How many times the throughput of the target alone ATTS can have at most: all tokens over the target's own. With
    draft and verification free, the target's decode of its own spans is what is left of the work."""
    return (draft_tokens + target_tokens) / target_tokens


def tokens_of(job: Job) -> tuple[int, int]:
    """(draft tokens, target tokens) of a job."""
    turns = [turn for problem in job for chain in problem for turn in chain]
    return sum(t.draft for t in turns), sum(t.target for t in turns)


def cut(job: Job, *, problems: int, chains: int, turns: int, scale: float = 1.0) -> Job:
    """The job's first problems, chains and turns, with spans shortened to 1/scale of their length."""

    def short(work: TurnWork) -> TurnWork:
        target = max(1, round(work.target / scale)) if work.target else 0
        return TurnWork(max(1, round(work.draft / scale)), target)

    return [[[short(w) for w in chain[:turns]] for chain in problem[:chains]] for problem in job[:problems]]


def fewer_takeovers(job: Job) -> Job:
    """Half the takeovers: what every second one wrote, the draft writes. Each chain keeps its number of tokens."""
    kept = itertools.cycle((True, False))

    def turn(work: TurnWork) -> TurnWork:
        return TurnWork(work.draft + work.target) if work.target and not next(kept) else work

    return [[[turn(work) for work in chain] for chain in problem] for problem in job]


def derive(path: Path) -> dict[str, Any]:
    """The numbers of a trace file, as FILE holds them."""

    def tokens(text: str | None) -> int:
        return max(1, round(len(text) / CHARS_PER_TOKEN)) if text else 0

    by_problem: dict[str, list[list[list[int]]]] = {}
    for chain in read_chains(path):
        turns = [[max(1, tokens(t.draft)), tokens(t.target), int(bool(t.takeover))] for t in chain.turns]
        by_problem.setdefault(chain.problem_id, []).append(turns)
    every: Sequence[list[int]] = [turn for problem in by_problem.values() for chain in problem for turn in chain]
    return {
        "note": NOTE,
        "source": path.name,
        "chars_per_token": CHARS_PER_TOKEN,
        "whole": {
            "chains": sum(map(len, by_problem.values())),
            "turns": len(every),
            "takeovers": sum(turn[2] for turn in every),
            "draft_tokens": sum(turn[0] for turn in every),
            "target_tokens": sum(turn[1] for turn in every),
        },
        "problems": [problem[:CHAINS] for problem in list(by_problem.values())[FIRST::STRIDE][:PROBLEMS]],
    }


if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(derive(Path(sys.argv[1])), separators=(",", ":")) + "\n", encoding="utf-8")
