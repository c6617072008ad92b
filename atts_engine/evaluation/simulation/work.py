"""The work of a job: how long the turns of its chains are. No texts."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from atts_engine.errors import InputError
from atts_engine.evaluation.traces import has_tokens
from atts_engine.pipeline.records import Chain

TURNS = Path(__file__).with_name("turns.json")
"""Turn lengths of 128 recorded chains; its `note` says which, and `bench.gpu_proof.turns` made it."""
CHARS_PER_TOKEN = 3.0
"""Of the published recordings, which hold texts only."""


@dataclass(frozen=True, slots=True)
class TurnWork:
    """Tokens of one turn: of the draft's span, 1 or more, and of the target's, 0 where the chain is not taken over."""

    draft: int
    target: int = 0


Job = Sequence[Sequence[Sequence[TurnWork]]]
"""Turns of each chain of each problem; problems are started in this order."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """job: turns of each chain of each problem. draft_tokens, target_tokens: of the whole recorded job, of which `job`
    may be a part. estimated: tokens were not recorded, but characters."""

    job: Job
    draft_tokens: int
    target_tokens: int
    takeover_rate: float
    estimated: bool = True


def load_turns(path: Path = TURNS) -> Recorded:
    """The recorded turn lengths that come with the package."""
    found = json.loads(path.read_text(encoding="utf-8"))
    job = [[[TurnWork(d, t) for d, t, _ in chain] for chain in problem] for problem in found["problems"]]
    whole = found["whole"]
    return Recorded(job, whole["draft_tokens"], whole["target_tokens"], whole["takeovers"] / whole["turns"])


def estimated_tokens(chars: int, chars_per_token: float) -> int:
    """Tokens of a text of that length; at least 1 where there is text."""
    return max(1, round(chars / chars_per_token)) if chars else 0


def recorded_turns(chains: Sequence[Chain], chars_per_token: float = CHARS_PER_TOKEN) -> Recorded:
    """Turn lengths of a trace's chains: recorded token counts, or estimates where a chain has none.

    A draft span counts at least one token. Chains without a turn are left out; `InputError` where none is left.
    """
    by_problem: dict[str, list[list[TurnWork]]] = {}
    estimated, turns, takeovers = False, 0, 0
    for chain in chains:
        counted = has_tokens(chain)
        estimated |= not counted
        work = []
        for turn in chain.turns:
            if counted:
                draft, target = turn.draft_tokens, turn.target_tokens
            else:
                draft = estimated_tokens(len(turn.draft), chars_per_token)
                target = estimated_tokens(len(turn.target or ""), chars_per_token)
            work.append(TurnWork(max(1, draft), target))
            takeovers += turn.takeover
        turns += len(work)
        if work:
            by_problem.setdefault(chain.problem_id, []).append(work)
    job = list(by_problem.values())
    if not job:
        raise InputError("the trace holds no turn to simulate")
    draft_tokens, target_tokens = tokens_of(job)
    if not target_tokens and all(chain.strategy in ("draft", "target") for chain in chains):
        raise InputError("the trace was written by one model alone: name one of atts or atts-sync, which has turns")
    return Recorded(job, draft_tokens, target_tokens, takeovers / turns, estimated)


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


def alone(job: Job) -> Job:
    """The same chains with all their tokens written by one model in one span."""
    return [[[TurnWork(sum(w.draft + w.target for w in chain))] for chain in problem] for problem in job]


def resample(job: Job, *, problems: int, chains: int, turns: int, seed: int) -> Job:
    """A job of that size from recorded chains: each problem is one of the recorded, drawn with replacement, and its
    chains are drawn with replacement from that problem's, so that easy problems stay easy throughout.

    A chain keeps its first `turns` turns. The same seed gives the same first problems, and of each the same first
    chains, at any size.
    """
    drawn = []
    for number in range(problems):
        rng = random.Random(f"{seed}:{number}")
        recorded = job[rng.randrange(len(job))]
        drawn.append([recorded[rng.randrange(len(recorded))][:turns] for _ in range(chains)])
    return drawn
