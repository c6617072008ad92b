"""Turn lengths and takeovers of a recorded job, in numbers alone, so that `bench.gpu_proof` needs no trace file.

    python -m bench.gpu_proof.turns FILE    # a trace file (docs/formats.md); writes evaluation/simulation/turns.json

The lengths that `atts simulate` draws from too. Tokens are estimated: characters over CHARS_PER_TOKEN, at least 1 where
there is text.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atts_engine.evaluation.files import write_text
from atts_engine.evaluation.simulation.work import CHARS_PER_TOKEN, TURNS, Job, TurnWork, estimated_tokens
from atts_engine.evaluation.traces import read_chains

FIRST, STRIDE, PROBLEMS, CHAINS = 8, 12, 8, 16
NOTE = (
    "Of a recorded job (R1-Distill-Llama-8B drafts, QwQ-32B takes over, 100 problems of MATH-500): the chains of every "
    "12th problem from the ninth on, of all such choices the one whose share of target tokens is nearest to the whole "
    "job's. A chain is a list of turns, a turn is [draft tokens, target tokens, taken over]. No texts. Tokens are "
    "estimated as characters / chars_per_token. `whole` sums the turns of the whole job."
)


def ceiling(draft_tokens: int, target_tokens: int) -> float:
    """How many times the throughput of the target alone ATTS can have at most: all tokens over the target's own. With
    draft and verification free, the target's decode of its own spans is what is left of the work."""
    return (draft_tokens + target_tokens) / target_tokens


def fewer_takeovers(job: Job) -> Job:
    """Half the takeovers: what every second one wrote, the draft writes. Each chain keeps its number of tokens."""
    kept = itertools.cycle((True, False))

    def turn(work: TurnWork) -> TurnWork:
        return TurnWork(work.draft + work.target) if work.target and not next(kept) else work

    return [[[turn(work) for work in chain] for chain in problem] for problem in job]


def derive(path: Path) -> dict[str, Any]:
    """The numbers of a trace file, as TURNS holds them."""

    def tokens(text: str | None) -> int:
        return estimated_tokens(len(text or ""), CHARS_PER_TOKEN)

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
    write_text(TURNS, json.dumps(derive(Path(sys.argv[1])), separators=(",", ":")) + "\n")
