"""A model of two lanes that write the turns of chains, with or without a barrier per turn. Knows lengths and step
times alone, so that what a barrier costs can be predicted before it is measured."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Scope = Literal["none", "problem", "all"]
"""Who waits for whom before a verdict: nobody, the chains of a problem, all chains that are open."""


@dataclass(frozen=True, slots=True)
class TurnWork:
    """Tokens of one turn: of the draft's span, 1 or more, and of the target's, 0 where the chain is not taken over."""

    draft: int
    target: int = 0


Job = Sequence[Sequence[Sequence[TurnWork]]]
"""Turns of each chain of each problem; problems are started in this order."""


@dataclass(frozen=True, slots=True)
class LaneModel:
    """A lane gives each of its rows a token a step, and a step of `rows` rows takes base_s + row_s * rows seconds.

    At most `slots` rows at a time; None: no bound. A span that finds no slot waits, first come, first served.
    """

    base_s: float
    row_s: float = 0.0
    slots: int | None = None

    def step_s(self, rows: int) -> float:
        return self.base_s + self.row_s * rows if rows else 0.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """seconds: of the whole job; chain_s: from its problem's start to a chain's end, summed over chains; barrier_s: of
    chain_s, at barriers; slot_s: of chain_s, before a slot was free."""

    seconds: float
    chain_s: float
    barrier_s: float
    slot_s: float


@dataclass(slots=True)
class _Lane:
    """progress: tokens that a row which was there from the beginning would have by now; a span of n tokens that gets
    its slot at progress v is over at v + n."""

    model: LaneModel
    progress: float = 0.0
    running: list[tuple[float, int]] = field(default_factory=list)
    queue: deque[tuple[int, int]] = field(default_factory=deque)

    def free(self) -> bool:
        return self.model.slots is None or len(self.running) < self.model.slots

    def left(self) -> float:
        return self.running[0][0] - self.progress if self.running else math.inf


@dataclass(slots=True)
class _Chain:
    problem: int
    turns: Sequence[TurnWork]
    since: float
    turn: int = 0
    phase: Literal["draft", "score", "target"] = "draft"


def simulate(
    job: Job,
    draft: LaneModel,
    target: LaneModel,
    *,
    in_flight: int,
    barrier: Scope,
    one_device: bool,
    score_steps: int = 0,
) -> Outcome:
    """The job with `in_flight` problems open at a time, the next one starting when one has ended.

    one_device: a step of one lane and a step of the other take turns, so that a token of either takes as long as both
    steps; otherwise each lane has a device of its own. score_steps: of the target lane, between a draft span and its
    verdict; the rest of what a score costs is to be in `draft.row_s`.
    Raises ValueError for a job without tokens to write.
    """
    if in_flight < 1 or not job or not all(chains and all(chains) for chains in job):
        raise ValueError("a job needs a problem or more in flight, a chain in each problem, and a turn in each chain")
    return _Simulation(job, _Lane(draft), _Lane(target), in_flight, barrier, one_device, score_steps).run()


class _Simulation:
    def __init__(
        self,
        job: Job,
        draft: _Lane,
        target: _Lane,
        in_flight: int,
        barrier: Scope,
        one_device: bool,
        score_steps: int,
    ) -> None:
        self._waiting_problems = deque(range(len(job)))
        self._job = job
        self._draft = draft
        self._target = target
        self._in_flight = in_flight
        self._scope = barrier
        self._one_device = one_device
        self._score_steps = score_steps
        self._now = 0.0
        self._chains: list[_Chain] = []
        self._open: dict[int, int] = {}
        """Living chains of each open problem."""
        self._asked: list[int] = []
        self._chain_s = self._barrier_s = self._slot_s = 0.0

    def run(self) -> Outcome:
        for _ in range(min(self._in_flight, len(self._job))):
            self._start_problem()
        while self._draft.running or self._target.running:
            periods = self._periods()
            lanes = (self._draft, self._target)
            passed = min(lane.left() * p for lane, p in zip(lanes, periods, strict=True) if lane.running)
            self._now += max(0.0, passed)
            over: list[int] = []
            for lane, period in zip(lanes, periods, strict=True):
                if not lane.running:
                    continue
                # The end that comes next is taken to the bit; sums of steps would pass it or fall short of it.
                done = lane.left() * period <= passed
                lane.progress = lane.running[0][0] if done else lane.progress + passed / period
                while lane.running and lane.running[0][0] <= lane.progress:
                    over.append(heapq.heappop(lane.running)[1])
            # A freed slot goes to a span that waits before it goes to the chain's own next one.
            for lane in lanes:
                self._admit(lane)
            for chain in over:
                self._span_over(chain)
        return Outcome(self._now, self._chain_s, self._barrier_s, self._slot_s)

    def _periods(self) -> tuple[float, float]:
        """Seconds for a token of each row of either lane."""
        steps = [lane.model.step_s(len(lane.running)) for lane in (self._draft, self._target)]
        return (sum(steps), sum(steps)) if self._one_device else (steps[0], steps[1])

    def _start_problem(self) -> None:
        if not self._waiting_problems:
            return
        problem = self._waiting_problems.popleft()
        self._open[problem] = len(self._job[problem])
        for turns in self._job[problem]:
            self._chains.append(_Chain(problem, turns, self._now))
            self._write(self._draft, len(self._chains) - 1, turns[0].draft)
        self._chain_s -= self._now * len(self._job[problem])

    def _write(self, lane: _Lane, chain: int, tokens: int) -> None:
        lane.queue.append((chain, tokens))
        self._chains[chain].since = self._now
        self._admit(lane)

    def _admit(self, lane: _Lane) -> None:
        while lane.queue and lane.free():
            chain, tokens = lane.queue.popleft()
            self._slot_s += self._now - self._chains[chain].since
            heapq.heappush(lane.running, (lane.progress + tokens, chain))

    def _span_over(self, number: int) -> None:
        chain = self._chains[number]
        if chain.phase == "target":
            self._turn_over(number)
        elif chain.phase == "draft" and self._score_steps:
            chain.phase = "score"
            self._write(self._target, number, self._score_steps)
        elif self._scope == "none":
            self._judged(number)
        else:
            chain.since = self._now
            self._asked.append(number)
            self._release()

    def _judged(self, number: int) -> None:
        chain = self._chains[number]
        tokens = chain.turns[chain.turn].target
        if tokens:
            chain.phase = "target"
            self._write(self._target, number, tokens)
        else:
            self._turn_over(number)

    def _turn_over(self, number: int) -> None:
        chain = self._chains[number]
        chain.turn, chain.phase = chain.turn + 1, "draft"
        if chain.turn < len(chain.turns):
            self._write(self._draft, number, chain.turns[chain.turn].draft)
            return
        self._chain_s += self._now
        self._open[chain.problem] -= 1
        if not self._open[chain.problem]:
            del self._open[chain.problem]
            self._start_problem()
        self._release()

    def _release(self) -> None:
        """Judge the chains of every group whose living chains have all asked."""
        problems = {self._chains[c].problem for c in self._asked}
        groups = [set(self._open)] if self._scope == "all" else [{p} for p in sorted(problems)]
        for group in groups:
            asked = [c for c in self._asked if self._chains[c].problem in group]
            if asked and len(asked) == sum(self._open[p] for p in group):
                self._asked = [c for c in self._asked if c not in asked]
                for number in asked:
                    self._barrier_s += self._now - self._chains[number].since
                for number in asked:
                    self._judged(number)
