"""A gate whose calibration is somewhere else: spans are scored here, and one owner of all decides about them there."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from atts_engine.backends import Lane, Seq
from atts_engine.pipeline.gate import Appraisal, ConformalGate, Judged, Place, judged, tested_score
from atts_engine.pipeline.records import Decision


@dataclass(frozen=True, slots=True)
class Began:
    problem_id: str
    chains: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Entered:
    place: Place


@dataclass(frozen=True, slots=True)
class Asked:
    """score: what is tested, float32; u: as in `GateRequest`; by_turn: as in `Appraisal`."""

    place: Place
    score: float
    u: int
    by_turn: bool


@dataclass(frozen=True, slots=True)
class Left:
    place: Place


@dataclass(frozen=True, slots=True)
class Ended:
    problem_id: str


GateMessage = Began | Entered | Asked | Left | Ended


class SharedGate:
    """Tells the owner of a calibration, by `tell`, in order, what the chains of one problem do, and hands each chain
    the decision that `answer` brings. The owner takes the messages with `take`.

    A calibration that learns is never copied: all decisions come in one order, from the one store.
    """

    def __init__(self, tell: Callable[[GateMessage], None]) -> None:
        self._tell = tell
        self._waiting: dict[Place, asyncio.Future[Decision]] = {}

    def begin(self, problem_id: str, chains: Sequence[int]) -> None:
        self._tell(Began(problem_id, tuple(chains)))

    def enter(self, place: Place) -> None:
        self._tell(Entered(place))

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
        result = await lane.verdict(seq, None)
        score = await tested_score(result, most, appraisal)
        began = time.perf_counter()
        answer = self._waiting[place] = asyncio.get_running_loop().create_future()
        try:
            self._tell(Asked(place, score, place.uniform(seed), appraisal is None or appraisal.by_turn))
            decision = await answer
        finally:
            del self._waiting[place]
        waited = None if result.wait_s is None else result.wait_s + time.perf_counter() - began
        return replace(judged(decision, result, appraisal), wait_s=waited)

    def answer(self, place: Place, decision: Decision) -> None:
        """The owner's decision. One that nobody waits for any more is dropped."""
        waiting = self._waiting.get(place)
        if waiting is not None and not waiting.done():
            waiting.set_result(decision)

    def settled(self, place: Place, seed: int, logprobs: Sequence[float], most: int) -> int | None:
        """None: a calibration that learns settles nothing before the span is whole."""
        return None

    def leave(self, place: Place) -> None:
        self._tell(Left(place))

    def end(self, problem_id: str) -> None:
        self._tell(Ended(problem_id))


def take(gate: ConformalGate, message: GateMessage) -> Decision | None:
    """Have the owner's gate do what a `SharedGate` told; the decision where one was asked for."""
    match message:
        case Began(problem_id, chains):
            gate.begin(problem_id, chains)
        case Entered(place):
            gate.enter(place)
        case Asked(place, score, u, by_turn):
            return gate.decide(score, place, gate.calibrator.key_of(place.turn if by_turn else 0), u)
        case Left(place):
            gate.leave(place)
        case Ended(problem_id):
            gate.end(problem_id)
    return None
