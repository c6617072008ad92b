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
    ordered = sorted(chains, key=lambda c: c.chain)
    weights = (_confidence(chain) if vote == "weighted" else 1.0 for chain in ordered)
    return weigh(one_spelling((chain.final_answer for chain in ordered), same), weights)


def one_spelling(answers: Iterable[str | None], same: Callable[[str, str], bool] = str.__eq__) -> list[str | None]:
    """The answers, each as it was spelt first; None: no answer."""
    seen: list[str] = []
    named: list[str | None] = []
    for answer in answers:
        if answer is not None:
            name = next((known for known in seen if same(known, answer)), None)
            if name is None:
                seen.append(answer)
            answer = name or answer
        named.append(answer)
    return named


def weigh(answers: Iterable[str | None], weights: Iterable[float]) -> dict[str, float]:
    """Sum of the weights of each answer, in order of first appearance; who gave none has no vote."""
    votes: dict[str, float] = {}
    for answer, weight in zip(answers, weights):
        if answer is not None:
            votes[answer] = votes.get(answer, 0.0) + weight
    return votes


def winner(votes: dict[str, float]) -> str | None:
    """The heaviest answer; among equals the one that the lowest chain number gave. None without any answer."""
    return max(votes, key=lambda name: votes[name], default=None)


def _confidence(chain: Chain) -> float:
    scores = [t.score for t in chain.turns if t.score is not None]
    return math.exp(-sum(scores) / len(scores)) if scores else 1.0
