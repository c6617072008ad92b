"""Who is taken over. A gate asks the target lane for a span's score and gives its verdict."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, Protocol

import numpy as np

from atts_engine.backends import Lane, Seq
from atts_engine.conformal import Calibrator, GateRequest, Pending, Policy, lowest_score
from atts_engine.errors import ChainError
from atts_engine.pipeline.records import Decision
from atts_engine.pipeline.streams import gate_uniform
from atts_engine.runtime.records import SpanResult


class Place(NamedTuple):
    """Which span is judged. stream: as in `Problem`."""

    problem_id: str
    chain: int
    turn: int
    stream: str = ""

    @property
    def stream_name(self) -> str:
        """As `Problem.stream_name`."""
        return self.stream or self.problem_id

    def uniform(self, seed: int) -> int:
        """The tie-breaking draw of the span's verdict; see `gate_uniform`."""
        return gate_uniform(seed, self.stream_name, self.chain, self.turn)


@dataclass(frozen=True, slots=True)
class Appraisal:
    """What a gate tests in the place of the mean negative log-likelihood, higher being worse. score: of the span with
    this result, awaited once. by_turn: spans are compared within their turn; otherwise with those of all turns."""

    score: Callable[[SpanResult], Awaitable[float]]
    by_turn: bool = True


@dataclass(frozen=True, slots=True)
class Judged:
    """score: mean negative log-likelihood; tested: what was tested in its place, None where it was itself;
    percentile: share of what the span was compared with that scores lower (is better); logprobs: of the span's
    tokens under the target, where its lane tells them; wait_s: seconds of waiting until the verdict, those at a barrier
    among them, where the lane tells its own; sum_logprob: of the span under the target, nats."""

    score: float
    takeover: bool
    p_value: float | None = None
    percentile: float | None = None
    decision: Decision | None = None
    logprobs: tuple[float, ...] = ()
    wait_s: float | None = None
    sum_logprob: float | None = None
    tested: float | None = None


class Gate(Protocol):
    def begin(self, problem_id: str, chains: Sequence[int]) -> None:
        """These chains of the problem start."""
        ...

    def enter(self, place: Place) -> None:
        """The chain begins to draft the turn's span, and will ask."""
        ...

    async def ask(
        self,
        lane: Lane,
        seq: Seq,
        place: Place,
        seed: int,
        most: int | None = None,
        *,
        appraisal: Appraisal | None = None,
    ) -> Judged:
        """most: of a span that was cut where `settled` said, the tokens that it could have had."""
        ...

    def settled(self, place: Place, seed: int, logprobs: Sequence[float], most: int) -> int | None:
        """The number of tokens, 1 or more, after which a takeover is certain whatever the rest of a span of at most
        `most` tokens may be; None where the first ones, scored `logprobs`, leave it open."""
        ...

    def leave(self, place: Place) -> None:
        """The chain has ended and will ask no more. `place`: the first turn that it has no verdict of."""
        ...

    def end(self, problem_id: str) -> None:
        """All chains of the problem have ended, or were cancelled."""
        ...


@dataclass(frozen=True, slots=True)
class PlacedRequest(GateRequest):
    """A gate request that knows whose span it judges, so that its decision is recorded even if the asker is gone."""

    place: Place
    gate: ConformalGate


class _Chains:
    """What a policy is told of a problem: the turn that each living chain is in, how many have entered each turn, and
    how many turns are over."""

    def __init__(self, turn: dict[int, int]) -> None:
        self.turn = turn
        self.entered = Counter({0: len(turn)})
        self.ended = 0


class ConformalGate:
    """Each chain alone: its span's p-value against calibration scores, tested at the level that calibrator and policy
    give it.

    A calibrator that a lane can run is counted and decided on the lane's device, in the step that finishes the score.
    Any other calibrator, any budget policy, any score of another kind (`Appraisal`) and all spans of a lane that cannot
    count (a server's) are decided here, on the event loop, one after the other. All scores of a calibrator must be of
    one kind.

    `heard` is to be called with every (request, result) of a lane in decision_seq order; it moves the calibrator.
    """

    def __init__(
        self,
        calibrator: Calibrator,
        on_decision: Callable[[Decision], None] | None = None,
        policy: Policy | None = None,
    ) -> None:
        self.calibrator = calibrator
        self._policy = policy
        self._on_decision = on_decision
        self._asked: dict[Place, int] = {}
        self._asked_by_key: Counter[int] = Counter()
        self._host_decisions = 0
        self._chains: dict[str, _Chains] = {}

    @property
    def outstanding(self) -> int:
        """Requests that a lane has not answered yet."""
        return len(self._asked)

    def begin(self, problem_id: str, chains: Sequence[int]) -> None:
        if self._policy is not None:
            self._chains[problem_id] = _Chains(dict.fromkeys(chains, 0))
            # Every chain has a first span; whether it has another, nobody knows before it begins it.
            self._policy.expect(problem_id, 0, len(chains))

    def enter(self, place: Place) -> None:
        if self._policy is None or place.turn == 0:
            return
        chains = self._chains[place.problem_id]
        chains.turn[place.chain] = place.turn
        chains.entered[place.turn] += 1
        self._policy.expect(place.problem_id, place.turn, chains.entered[place.turn])
        self._end_turns(self._policy, place.problem_id)

    async def ask(
        self,
        lane: Lane,
        seq: Seq,
        place: Place,
        seed: int,
        most: int | None = None,
        *,
        appraisal: Appraisal | None = None,
    ) -> Judged:
        u = place.uniform(seed)
        key = self.calibrator.key_of(place.turn if appraisal is None or appraisal.by_turn else 0)
        decision: Decision | None = None
        if self._policy is None and self.calibrator.on_device and appraisal is None:
            decision, result = await self._ask_lane(lane, seq, place, key, u, most)
        else:
            result = await lane.verdict(seq, None)
        if decision is None:
            if appraisal is not None:
                score = float(np.float32(await appraised(appraisal, result)))
            else:
                score = result.score if most is None else lowest_score(result.sum_logprob, result.n_tokens, most)
            decision = self._decide_here(score, place, key, u)
        lower = decision.n - decision.count
        return Judged(
            decision.score if appraisal is None else result.score,
            decision.verdict == "takeover",
            decision.p_value,
            lower / decision.n if decision.n else None,
            decision,
            result.logprobs,
            result.wait_s,
            result.sum_logprob,
            None if appraisal is None else decision.score,
        )

    def settled(self, place: Place, seed: int, logprobs: Sequence[float], most: int) -> int | None:
        """For a frozen calibrator without a policy, whose answer does not depend on when it is asked. The test is
        monotone in the score, and so is `lowest_score` in the number of tokens."""
        u = place.uniform(seed)
        key = self.calibrator.key_of(place.turn)
        level = self.calibrator.level(key)
        sums = list(accumulate(logprobs, initial=0.0))

        def taken(n: int) -> bool:
            score = lowest_score(sums[n], n, most)
            return self.calibrator.decide(score, key, u, place.problem_id, level=level).takeover

        if not logprobs or not taken(len(logprobs)):
            return None
        return bisect_left(range(len(logprobs)), True, lo=1, key=taken)

    async def _ask_lane(
        self, lane: Lane, seq: Seq, place: Place, key: int, u: int, most: int | None
    ) -> tuple[Decision | None, SpanResult]:
        plain = self.calibrator.request(key, u, Pending(self._asked_by_key[key], len(self._asked)))
        request = PlacedRequest(plain.store, plain.key, plain.level, plain.u, plain.insert, place, self, most=most)
        self._asked[place] = key
        self._asked_by_key[key] += 1
        try:
            result = await lane.verdict(seq, request)
            return None if result.outcome is None else decision_of(request, result), result
        finally:
            # Heard before it is answered, unless there was no verdict: an error, or an asker that is gone.
            self._settle(place)

    def heard(self, request: PlacedRequest, result: SpanResult) -> None:
        decision = decision_of(request, result)
        self._settle(request.place)
        self._learn(decision)

    def _settle(self, place: Place) -> None:
        key = self._asked.pop(place, None)
        if key is not None:
            self._asked_by_key[key] -= 1

    def _decide_here(self, score: float, place: Place, key: int, u: int) -> Decision:
        level = self.calibrator.level(key)
        if self._policy is not None:
            level = self._policy.level(place.problem_id, place.turn, level)
        ruling = self.calibrator.decide(score, key, u, place.problem_id, level=level)
        seen = ruling.assessment
        decision = Decision(
            decision_seq=self._host_decisions,
            batch=self._host_decisions,
            problem=place.problem_id,
            chain=place.chain,
            turn=place.turn,
            key=key,
            score=score,
            n=seen.n,
            count=seen.greater + seen.ties,
            ties=seen.ties,
            k=level * (seen.n + 1),
            level=level,
            u=u,
            p_value=seen.p_value,
            verdict="takeover" if ruling.takeover else "keep",
            threshold=ruling.threshold,
        )
        self._host_decisions += 1
        if self._policy is not None:
            self._policy.decided(place.problem_id, place.turn, ruling.takeover)
        self._learn(decision)
        return decision

    def _learn(self, decision: Decision) -> None:
        self.calibrator.observe(
            decision.score, decision.key, decision.verdict == "takeover", decision.problem, decision.p_value
        )
        if self._on_decision is not None:
            self._on_decision(decision)

    def leave(self, place: Place) -> None:
        if self._policy is None:
            return
        chains = self._chains[place.problem_id]
        if chains.turn.pop(place.chain, None) == place.turn:
            # It failed in a span that was announced.
            chains.entered[place.turn] -= 1
            self._policy.expect(place.problem_id, place.turn, chains.entered[place.turn])
        self._end_turns(self._policy, place.problem_id)

    def _end_turns(self, policy: Policy, problem_id: str) -> None:
        """Tell the policy of turns that no chain will come to any more."""
        chains = self._chains[problem_id]
        slowest = min(chains.turn.values(), default=chains.ended)
        for turn in range(chains.ended, slowest):
            policy.turn_ended(problem_id, turn)
        chains.ended = max(slowest, chains.ended)

    def end(self, problem_id: str) -> None:
        if self._policy is not None:
            self._policy.leave(problem_id)
            del self._chains[problem_id]


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


async def appraised(appraisal: Appraisal, result: SpanResult) -> float:
    """The score; `ChainError` for one that is NaN or infinite."""
    score = await appraisal.score(result)
    if not math.isfinite(score):
        raise ChainError(f"the span's score is {score}")
    return score
