"""Who is taken over. A gate asks the target lane for a span's score and gives its verdict."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from atts_engine.backends import Lane, Seq
from atts_engine.conformal import Calibrator, GateRequest
from atts_engine.pipeline.records import Decision
from atts_engine.pipeline.streams import gate_uniform
from atts_engine.runtime.records import SpanResult


class Place(NamedTuple):
    """Which span is judged."""

    problem_id: str
    chain: int
    turn: int


@dataclass(frozen=True, slots=True)
class Judged:
    """percentile: share of what the span was compared with that scores lower (is better); logprobs: of the span's
    tokens under the target, where its lane tells them."""

    score: float
    takeover: bool
    p_value: float | None = None
    percentile: float | None = None
    decision: Decision | None = None
    logprobs: tuple[float, ...] = ()


class Gate(Protocol):
    async def ask(self, lane: Lane, seq: Seq, place: Place, seed: int) -> Judged: ...

    def leave(self, place: Place) -> None:
        """The chain has ended and will ask no more."""
        ...


@dataclass(frozen=True, slots=True)
class PlacedRequest(GateRequest):
    """A gate request that knows whose span it judges, so that its decision is recorded even if the asker is gone."""

    place: Place
    gate: ConformalGate


class ConformalGate:
    """Each chain alone: its span's p-value against calibration scores, decided on the lane's device.

    `heard` is to be called with every (request, result) in decision_seq order; it moves the calibrator.
    """

    def __init__(self, calibrator: Calibrator, on_decision: Callable[[Decision], None] | None = None) -> None:
        self.calibrator = calibrator
        self._on_decision = on_decision

    async def ask(self, lane: Lane, seq: Seq, place: Place, seed: int) -> Judged:
        u = gate_uniform(seed, place.problem_id, place.chain, place.turn)
        plain = self.calibrator.request(self.calibrator.key_of(place.turn), u)
        request = PlacedRequest(plain.store, plain.key, plain.level, plain.u, plain.insert, place, self)
        result = await lane.verdict(seq, request)
        decision = decision_of(request, result)
        lower = decision.n - decision.count
        return Judged(
            result.score,
            decision.verdict == "takeover",
            decision.p_value,
            lower / decision.n if decision.n else None,
            decision,
            result.logprobs,
        )

    def heard(self, request: PlacedRequest, result: SpanResult) -> None:
        if request.insert:
            self.calibrator.observe(result.score, request.key)
        if self._on_decision is not None:
            self._on_decision(decision_of(request, result))

    def leave(self, place: Place) -> None:
        return None


def decision_of(request: PlacedRequest, result: SpanResult) -> Decision:
    """The log record of a verdict; everything needed to come to the same verdict again."""
    outcome = result.outcome
    if outcome is None:
        raise AssertionError("the lane answered a request that has a gate without the gate's outcome")
    return Decision(
        decision_seq=outcome.decision_seq,
        batch=outcome.batch,
        problem=request.place.problem_id,
        chain=request.place.chain,
        turn=request.place.turn,
        key=request.key,
        score=result.score,
        n=outcome.n,
        count=outcome.greater + outcome.ties,
        ties=outcome.ties,
        k=request.level * (outcome.n + 1),
        level=request.level,
        u=request.u,
        p_value=outcome.p_value,
        verdict="takeover" if outcome.takeover else "keep",
    )


class RankingGate:
    """The synchronous baseline: all chains of a problem wait for each other, softmax(-score) ranks them, and the
    lowest-ranked alpha of them are taken over. What rounding leaves over is carried to the next turn, so that the
    rate comes to alpha."""

    def __init__(self, chains: Iterable[int], alpha: float) -> None:
        self._alpha = alpha
        self._present = set(chains)
        self._asked: dict[int, tuple[float, asyncio.Future[Judged]]] = {}
        self._credit = 0.0

    async def ask(self, lane: Lane, seq: Seq, place: Place, seed: int) -> Judged:
        result = await lane.verdict(seq, None)
        answer: asyncio.Future[Judged] = asyncio.get_running_loop().create_future()
        self._asked[place.chain] = (result.score, answer)
        self._rank_when_all_are_here()
        return replace(await answer, logprobs=result.logprobs)

    def leave(self, place: Place) -> None:
        self._present.discard(place.chain)
        self._asked.pop(place.chain, None)
        self._rank_when_all_are_here()

    def _rank_when_all_are_here(self) -> None:
        if not self._asked or set(self._asked) != self._present:
            return
        asked, self._asked = self._asked, {}
        self._credit += self._alpha * len(asked)
        budget = min(len(asked), math.floor(self._credit + 0.5))
        self._credit -= budget
        best = min(score for score, _ in asked.values())
        weights = {chain: math.exp(best - score) for chain, (score, _) in asked.items()}
        total = sum(weights.values())
        # Lowest softmax weight first; equal weights (underflow too) go by score, then by chain.
        order = sorted(asked, key=lambda c: (weights[c] / total, -asked[c][0], c))
        taken = set(order[:budget])
        for rank, chain in enumerate(order):
            score, answer = asked[chain]
            if not answer.done():
                percentile = 1.0 - (rank + 0.5) / len(order)
                answer.set_result(Judged(score, chain in taken, percentile=percentile))
