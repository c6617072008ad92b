"""A discrete-event simulation of two lanes that write the turns of chains, with or without a barrier per turn.

Knows lengths and step times alone (docs/simulate.md). Chains and verdicts follow `pipeline.chain`: the draft hands its
span over chunk by chunk, the target scores it beside whatever it decodes, the verdict waits for the last chunk, and
what the target writes is appended to the draft's sequence chunk by chunk too.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from atts_engine.errors import InputError
from atts_engine.evaluation.simulation.lanes import Key, Lane, LaneModel, LaneUse, Plan
from atts_engine.evaluation.simulation.work import Job, TurnWork

Scope = Literal["none", "problem", "all"]
"""Who waits for whom before a verdict's consequence: nobody, the chains of a problem, all chains that are open."""
Verification = Literal["rows", "step"]
"""What the other lane does with a span: every token is a row of it, scored or appended chunk by chunk; or nothing but
one row of one step of the target before the verdict, where lanes were measured with all else in their own steps."""

_ALL = -1


@dataclass(frozen=True, slots=True)
class Machine:
    """The lanes. target None: `draft` writes alone, whatever its name, and nothing is verified. shared: copy i of one
    lane and copy i of the other are on one device, and their steps take turns."""

    draft: LaneModel
    target: LaneModel | None = None
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Rules:
    """in_flight: problems open at a time, the next one starting when one has ended; None: all. prompt_tokens: of each
    problem, computed once in each copy that has chains of it. max_batch_tokens: rows of a step (decoding sequences come
    first). hop_s: between what a lane has done and what its chain asks for next."""

    barrier: Scope = "none"
    in_flight: int | None = None
    prompt_tokens: int = 0
    chunk_tokens: int = 64
    max_batch_tokens: int = 2048
    verification: Verification = "rows"
    hop_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """seconds: of the whole job. chain_s: from its problem's start to a chain's end, summed over chains; it is the sum
    of draft_s, verify_s (from a span's end to its score), barrier_s and target_s. queued_s: of the first, second and
    fourth, before a step held rows of what was awaited. latency_s: of each problem, from its start."""

    seconds: float
    chains: int
    draft_s: float
    verify_s: float
    barrier_s: float
    target_s: float
    latency_s: tuple[float, ...]
    draft: LaneUse
    target: LaneUse | None

    @property
    def chain_s(self) -> float:
        return self.draft_s + self.verify_s + self.barrier_s + self.target_s

    @property
    def queued_s(self) -> float:
        return self.draft.queued_s + (self.target.queued_s if self.target else 0.0)


def simulate(job: Job, machine: Machine, rules: Rules) -> Outcome:
    """The job on the machine.

    Raises ValueError for a job without a turn in each chain, or one that a lone lane could not write; `InputError`
    where a problem's chains do not fit into the KV of the whole machine.
    """
    if not job or not all(chains and all(chains) for chains in job):
        raise ValueError("a job needs a problem, a chain in each problem, and a turn in each chain")
    if machine.target is None and any(turn.target for problem in job for chain in problem for turn in chain):
        raise ValueError("a lane alone cannot be taken over: make the job one of `alone` spans")
    if rules.in_flight is not None and rules.in_flight < 1:
        raise ValueError("a problem or more must be in flight")
    return _Simulation(job, machine, rules).run()


class _Device:
    """What makes one step at a time: a copy of one lane, or one of each."""

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self.lanes = lanes
        self.busy = False
        self.quiet: _Quiet | None = None
        self._next = 0

    def working(self) -> list[Lane]:
        """Lanes with something to do, the one whose turn it is first."""
        order = [self.lanes[(self._next + i) % len(self.lanes)] for i in range(len(self.lanes))]
        return [lane for lane in order if lane.works]

    def passed(self, lane: Lane) -> None:
        """It has had its turn."""
        self._next = (self.lanes.index(lane) + 1) % len(self.lanes)


@dataclass(slots=True)
class _Quiet:
    """Rounds of one step of each lane in which nothing ends or begins."""

    lanes: list[Lane]
    began: float
    round_s: float
    rounds: int

    @property
    def end(self) -> float:
        return self.began + self.rounds * self.round_s


@dataclass(slots=True)
class _Chain:
    problem: int
    turns: Sequence[TurnWork]
    draft: Lane
    target: Lane | None
    since: float
    """When its phase began."""
    turn: int = 0
    phase: Literal["draft", "target"] = "draft"

    @property
    def lanes(self) -> tuple[Lane, ...]:
        return (self.draft,) if self.target is None else (self.draft, self.target)

    @property
    def tokens(self) -> int:
        return sum(turn.draft + turn.target for turn in self.turns)


@dataclass(slots=True)
class _Open:
    """A problem whose chains are being written. By lane, by its id: holders, the living chains there, which share the
    prompt; first, the chains that begin when the prompt is there."""

    began: float
    living: int
    holders: Counter[int] = field(default_factory=Counter)
    first: dict[int, list[int]] = field(default_factory=dict)


class _Simulation:
    def __init__(self, job: Job, machine: Machine, rules: Rules) -> None:
        self._job = job
        self._rules = rules
        self._machine = machine
        self._uses = [LaneUse(m.replicas) for m in (machine.draft, machine.target) if m is not None]
        self._drafts = self._copies(machine.draft, self._uses[0])
        self._targets = self._copies(machine.target, self._uses[1]) if machine.target else []
        if machine.shared:
            pairs = zip(self._drafts, self._targets, strict=True)
            self._devices = [_Device(pair) for pair in pairs]
        else:
            self._devices = [_Device([lane]) for lane in (*self._drafts, *self._targets)]
        self._device_of = {id(lane): device for device in self._devices for lane in device.lanes}
        self._now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0
        self._dirty: dict[int, _Device] = {}
        self._queue = deque(range(len(job)))
        self._chains: list[_Chain] = []
        self._open: dict[int, _Open] = {}
        self._asked: dict[int, list[int]] = {}
        """Chains at the barrier, by group: their problem, or `_ALL`."""
        self._living: Counter[int] = Counter()
        """Chains of each group that have not ended."""
        self._spent = {"draft": 0.0, "verify": 0.0, "barrier": 0.0, "target": 0.0}
        self._latency = [0.0] * len(job)

    def _copies(self, model: LaneModel, use: LaneUse) -> list[Lane]:
        r = self._rules
        return [Lane(model, r.chunk_tokens, r.max_batch_tokens, use) for _ in range(model.replicas)]

    def run(self) -> Outcome:
        self._start_problems()
        self._plan()
        while self._events:
            self._now = self._events[0][0]
            # What comes at one time is taken together, so that a step sees all that was there when it began.
            while self._events and self._events[0][0] == self._now:
                heapq.heappop(self._events)[2]()
            self._plan()
        return Outcome(
            self._now,
            len(self._chains),
            self._spent["draft"],
            self._spent["verify"],
            self._spent["barrier"],
            self._spent["target"],
            tuple(self._latency),
            self._uses[0],
            self._uses[1] if len(self._uses) > 1 else None,
        )

    # Devices

    def _at(self, time: float, call: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self._events, (time, self._number, call))

    def _hop(self, call: Callable[[], None]) -> None:
        """What a chain does next, when it has heard of it."""
        if self._rules.hop_s:
            self._at(self._now + self._rules.hop_s, call)
        else:
            call()

    def _touch(self, lane: Lane) -> None:
        """Something was asked of the lane."""
        device = self._device_of[id(lane)]
        self._dirty[id(device)] = device
        quiet = device.quiet
        if quiet is not None and quiet.round_s > 0.0:
            # The rounds that have begun go on to their end.
            rounds = max(1, math.ceil((self._now - quiet.began) / quiet.round_s))
            if rounds < quiet.rounds:
                quiet.rounds = rounds
                self._at(quiet.end, partial(self._quiet_over, device))

    def _plan(self) -> None:
        for device in self._dirty.values():
            if not device.busy:
                self._begin(device)
            for lane in device.lanes:
                lane.rest(self._now)
        self._dirty = {}

    def _begin(self, device: _Device) -> None:
        lanes = device.working()
        if not lanes:
            return
        device.busy = True
        rounds = min(lane.quiet_steps() for lane in lanes)
        if rounds > 0:
            round_s = sum(lane.quiet_step_s(rounds) for lane in lanes)
            device.quiet = _Quiet(lanes, self._now, round_s, rounds)
            self._at(device.quiet.end, partial(self._quiet_over, device))
        else:
            plan = lanes[0].plan(self._now)
            self._at(self._now + plan.seconds, partial(self._step_over, device, lanes[0], plan))

    def _quiet_over(self, device: _Device) -> None:
        quiet = device.quiet
        if quiet is None or self._now < quiet.end:
            # It was ended before this time, and what runs now has an event of its own.
            return
        for lane in quiet.lanes:
            lane.skip(quiet.rounds)
        device.quiet, device.busy = None, False
        self._dirty[id(device)] = device

    def _step_over(self, device: _Device, lane: Lane, plan: Plan) -> None:
        device.busy = False
        device.passed(lane)
        self._dirty[id(device)] = device
        appended, chunks = lane.carry_out(plan)
        for append in appended:
            if append.final:
                self._hop(partial(self._prompted if append.key < 0 else self._scored, append.key, lane))
        for number, tokens, over in chunks:
            self._hop(partial(self._chunk_over, number, tokens, over))

    # Problems

    def _start_problems(self) -> None:
        most = len(self._job) if self._rules.in_flight is None else self._rules.in_flight
        while self._queue and len(self._open) < most:
            chains = self._job[self._queue[0]]
            drafts = self._places(self._drafts, chains)
            targets = self._places(self._targets, chains) if self._targets else [None] * len(chains)
            if drafts is None or targets is None:
                if self._open:
                    return
                raise InputError(self._too_large(chains))
            self._start(self._queue.popleft(), drafts, targets)

    def _places(self, lanes: Sequence[Lane], chains: Sequence[Sequence[TurnWork]]) -> list[Lane] | None:
        """For each chain the copy with the fewest open chains that has room for all its tokens; None where one finds
        none."""
        opened, room = [lane.open for lane in lanes], [_room(lane) for lane in lanes]
        holds = [False] * len(lanes)
        found = []
        for turns in chains:
            tokens = sum(turn.draft + turn.target for turn in turns)
            needed = [tokens + (0 if held else self._rules.prompt_tokens) for held in holds]
            fits = (i for i in range(len(lanes)) if needed[i] <= room[i])
            best = min(fits, key=lambda i: opened[i], default=None)
            if best is None:
                return None
            opened[best] += 1
            room[best] -= needed[best]
            holds[best] = True
            found.append(lanes[best])
        return found

    def _too_large(self, chains: Sequence[Sequence[TurnWork]]) -> str:
        tokens = sum(turn.draft + turn.target for turns in chains for turn in turns)
        rooms = [sum(map(_room, lanes)) for lanes in (self._drafts, self._targets) if lanes]
        return (
            f"the {len(chains)} chains of a problem have {tokens:,} tokens, and the KV of a lane has room for "
            f"{min(rooms):,.0f}: take more GPUs, fewer chains or fewer turns"
        )

    def _start(self, problem: int, drafts: Sequence[Lane], targets: Sequence[Lane | None]) -> None:
        prompt = self._rules.prompt_tokens
        state = self._open[problem] = _Open(self._now, len(drafts))
        self._living[self._group(problem)] += len(drafts)
        for turns, draft, target in zip(self._job[problem], drafts, targets, strict=True):
            number = len(self._chains)
            chain = _Chain(problem, turns, draft, target, self._now)
            self._chains.append(chain)
            for lane in chain.lanes:
                if prompt and not state.holders[id(lane)]:
                    lane.begin(-1 - problem, 0)
                    lane.append(-1 - problem, prompt, self._now, final=lane is draft)
                    lane.reserved += prompt
                state.holders[id(lane)] += 1
                lane.open += 1
                lane.reserved += chain.tokens
                lane.begin(number, prompt)
                self._touch(lane)
            if prompt:
                state.first.setdefault(id(draft), []).append(number)
            else:
                self._decode(number, draft)

    def _prompted(self, key: Key, lane: Lane) -> None:
        for number in self._open[-1 - key].first[id(lane)]:
            self._decode(number, lane)

    def _end(self, number: int) -> None:
        chain = self._chains[number]
        state, prompt = self._open[chain.problem], self._rules.prompt_tokens
        for lane in chain.lanes:
            lane.open -= 1
            lane.reserved -= chain.tokens
            lane.end(number, prompt)
            state.holders[id(lane)] -= 1
            if prompt and not state.holders[id(lane)]:
                lane.end(-1 - chain.problem, 0)
                lane.reserved -= prompt
            self._touch(lane)
        state.living -= 1
        self._living[self._group(chain.problem)] -= 1
        if not state.living:
            self._latency[chain.problem] = self._now - state.began
            del self._open[chain.problem]
            self._start_problems()
        self._release(self._group(chain.problem))

    # Chains

    def _decode(self, number: int, lane: Lane) -> None:
        chain = self._chains[number]
        turn = chain.turns[chain.turn]
        lane.decode(number, turn.draft if chain.phase == "draft" else turn.target, self._now)
        self._touch(lane)

    def _append(self, number: int, lane: Lane, tokens: int, *, scored: bool = False, final: bool = False) -> None:
        lane.append(number, tokens, self._now, scored=scored, final=final)
        self._touch(lane)

    def _chunk_over(self, number: int, tokens: int, over: bool) -> None:
        chain, by_rows = self._chains[number], self._rules.verification == "rows"
        if over:
            self._spend(chain, chain.phase)
        if chain.target is None:
            if over:
                self._turn_over(number)
        elif chain.phase == "draft":
            if by_rows or over:
                self._append(number, chain.target, tokens if by_rows else 1, scored=True, final=over)
        else:
            # The last chunk is handed back only where the draft goes on behind it.
            if by_rows and not (over and chain.turn + 1 == len(chain.turns)):
                self._append(number, chain.draft, tokens)
            if over:
                # The next span is asked for when the append has been heard of.
                self._hop(partial(self._turn_over, number))

    def _scored(self, number: int, _: Lane) -> None:
        chain = self._chains[number]
        self._spend(chain, "verify")
        if self._rules.barrier == "none":
            self._judged(number)
        else:
            group = self._group(chain.problem)
            self._asked.setdefault(group, []).append(number)
            self._release(group)

    def _release(self, group: int) -> None:
        """Judge the chains of a group whose living chains have all asked."""
        asked = self._asked.get(group)
        if asked and len(asked) == self._living[group]:
            del self._asked[group]
            for number in asked:
                self._spend(self._chains[number], "barrier")
            for number in asked:
                self._judged(number)

    def _judged(self, number: int) -> None:
        chain = self._chains[number]
        if chain.turns[chain.turn].target:
            assert chain.target is not None
            chain.phase = "target"
            self._decode(number, chain.target)
        else:
            self._turn_over(number)

    def _turn_over(self, number: int) -> None:
        chain = self._chains[number]
        chain.turn, chain.phase = chain.turn + 1, "draft"
        if chain.turn < len(chain.turns):
            self._decode(number, chain.draft)
        else:
            self._end(number)

    def _group(self, problem: int) -> int:
        return _ALL if self._rules.barrier == "all" else problem

    def _spend(self, chain: _Chain, on: str) -> None:
        self._spent[on] += self._now - chain.since
        chain.since = self._now


def _room(lane: Lane) -> float:
    """Tokens that may still be reserved in the lane."""
    return math.inf if lane.model.kv_tokens is None else lane.model.kv_tokens - lane.reserved
