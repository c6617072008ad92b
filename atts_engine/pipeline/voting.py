"""One answer from the chains of a problem."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from atts_engine.pipeline.records import Chain

VOTES = ("majority", "weighted")


def tally(chains: Iterable[Chain], vote: str, same: Callable[[str, str], bool] = str.__eq__) -> dict[str, float]:
    """Weight of each distinct answer, in order of first appearance by chain number.

    majority: every chain with an answer counts 1. weighted: exp(-mean score) of the chain's scored spans, the
    geometric mean probability per token that the target gives what the draft wrote; chains without a score count 1.
    `same` says which answers are one; the first spelling seen stands for all.
    """
    votes: dict[str, float] = {}
    for chain in sorted(chains, key=lambda c: c.chain):
        if chain.final_answer is None:
            continue
        name = next((known for known in votes if same(known, chain.final_answer)), chain.final_answer)
        votes[name] = votes.get(name, 0.0) + (_confidence(chain) if vote == "weighted" else 1.0)
    return votes


def winner(votes: dict[str, float]) -> str | None:
    """The heaviest answer; among equals the one that the lowest chain number gave. None without any answer."""
    return max(votes, key=lambda name: votes[name], default=None)


def _confidence(chain: Chain) -> float:
    scores = [t.score for t in chain.turns if t.score is not None]
    return math.exp(-sum(scores) / len(scores)) if scores else 1.0
