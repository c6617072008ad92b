"""A lane as the simulation sees it: who decodes, what is to be appended, and what a step makes of both."""

from __future__ import annotations

import heapq
import math
from collections import Counter, deque
from dataclasses import dataclass, field

from atts_engine.evaluation.simulation.cost import StepCost
from atts_engine.runtime.meters import StepRows
from atts_engine.runtime.scheduler import PREFILL_SHARE

Key = int
"""Of a sequence in a lane: a chain's number, or -1 - a problem's for its prompt."""


@dataclass(frozen=True, slots=True)
class LaneModel:
    """A lane of `replicas` copies of a model, each on `gpus` GPUs of its own and with its own batch.

    slots: sequences that decode at a time in a copy, kv_tokens: tokens whose keys and values a copy holds; None: no
    bound. kv_token_bytes: of one token on one GPU.
    """

    cost: StepCost
    replicas: int = 1
    slots: int | None = None
    kv_tokens: int | None = None
    gpus: int = 1
    kv_token_bytes: float = 0.0


@dataclass(slots=True)
class Append:
    """Tokens on their way into a sequence, `left` of them still to come. final: a chain waits for it."""

    key: Key
    left: int
    scored: bool
    final: bool
    asked_at: float


@dataclass(slots=True)
class LaneUse:
    """Sums over a lane's copies. busy_s: in steps; compute_s, memory_s: T_c and T_m of those steps; idle_s: chains were
    open and nothing was asked of any of them (T_s); queued_s: between what a chain waits for was asked and the first
    step that holds rows of it. peak_kv: tokens held at most by one copy."""

    replicas: int = 1
    steps: int = 0
    busy_s: float = 0.0
    compute_s: float = 0.0
    memory_s: float = 0.0
    idle_s: float = 0.0
    queued_s: float = 0.0
    computed: int = 0
    scored: int = 0
    sampled: int = 0
    peak_kv: int = 0


@dataclass(slots=True)
class Plan:
    """A step. decoding: rows of sequences that decode already; appends: with the tokens of each that it takes;
    sampling: sequences whose span begins with the last row of their append."""

    rows: StepRows
    decoding: int
    appends: list[tuple[Append, int]] = field(default_factory=list)
    sampling: list[Key] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(slots=True)
class _Span:
    """Of a decoding sequence: tokens of the chunk that it writes, and those of the span behind that."""

    chunk: int
    left: int


class Lane:
    """One copy of a model, which makes one step after the other.

    `progress` counts its steps. A sequence that decodes gets a token in each, so where its chunk ends is known in steps
    when it begins, and steps in which nothing ends or begins can be made at once.
    """

    def __init__(self, model: LaneModel, chunk_tokens: int, max_batch_tokens: int, use: LaneUse) -> None:
        self.model = model
        self.use = use
        self.open = 0
        """Chains that hold a sequence here."""
        self.reserved = 0
        """Tokens that the open sequences will have in the end."""
        self._chunk = chunk_tokens
        self._budget = max_batch_tokens
        self._progress = 0
        self._decoding: list[tuple[int, Key]] = []
        """Heap of (progress at the end of the chunk, sequence)."""
        self._spans: dict[Key, _Span] = {}
        self._context = 0
        """Tokens of all decoding sequences."""
        self._length: dict[Key, int] = {}
        """Tokens of each sequence; of a decoding one, less `progress`."""
        self._wanted: dict[Key, tuple[int, float]] = {}
        """Spans without a row yet: tokens, and when they were asked for."""
        self._appends: deque[Append] = deque()
        self._pending: Counter[Key] = Counter()
        """Appends of each sequence that are not over."""
        self._ending: dict[Key, int] = {}
        self._kv = 0
        self._idle_since: float | None = None

    @property
    def works(self) -> bool:
        return bool(self._decoding or self._appends or self._wanted)

    def begin(self, key: Key, length: int) -> None:
        """A sequence whose first `length` tokens are another's."""
        self._length[key] = length

    def end(self, key: Key, shared: int) -> None:
        """Close a sequence that does not decode, once all its appends are there. Its first `shared` tokens are
        another's."""
        if self._pending[key]:
            self._ending[key] = shared
        else:
            del self._pending[key]
            self._kv -= self._length.pop(key) - shared

    def decode(self, key: Key, tokens: int, now: float) -> None:
        """Write a span, once what is to be appended is there and a slot is free."""
        self._wanted[key] = (tokens, now)

    def append(self, key: Key, tokens: int, now: float, *, scored: bool = False, final: bool = False) -> None:
        self._appends.append(Append(key, tokens, scored, final, now))
        self._pending[key] += 1

    def rest(self, now: float) -> None:
        """Take the time up to now; from here on the lane is idle if chains are open and nothing is asked of it."""
        if self._idle_since is not None:
            self.use.idle_s += now - self._idle_since
        self._idle_since = now if self.open and not self.works else None

    def quiet_steps(self) -> int:
        """Steps that can be made before one in which something ends or begins."""
        if self._appends or not self._decoding or (self._wanted and self._free_slots() > 0):
            return 0
        return self._decoding[0][0] - self._progress - 1

    def quiet_step_s(self, steps: int) -> float:
        """Mean seconds of that many quiet steps, which is that of the middle one."""
        return self.model.cost.step(self._rows((steps + 1) / 2)).seconds

    def skip(self, steps: int) -> None:
        """Make that many quiet steps."""
        made = steps * len(self._decoding)
        self._count(self._rows((steps + 1) / 2), steps)
        self.use.sampled += made
        self._progress += steps
        self._context += made
        self._hold(made)

    def plan(self, now: float) -> Plan:
        """The next step: a row of every sequence that decodes, then as many tokens to append as the budget has room
        for, an eighth of it at least (`runtime.scheduler`)."""
        for key in list(self._wanted):
            if self._free_slots() <= 0:
                break
            if not self._pending[key]:
                tokens, asked_at = self._wanted.pop(key)
                self.use.queued_s += now - asked_at
                self._enter(key, tokens, 0)
        d = self._rows(1)
        plan = Plan(d, d.rows)
        rows, attended, cached, scored = d.rows, d.attended, d.cached, 0
        budget = max(self._budget - rows, self._budget // PREFILL_SHARE, 1)
        slots = self._free_slots()
        given: Counter[Key] = Counter()
        whole: Counter[Key] = Counter()
        for append in self._appends:
            if not budget:
                break
            key, n = append.key, min(append.left, budget)
            budget -= n
            plan.appends.append((append, n))
            scored += n if append.scored else 0
            start = self._length[key] + given[key]
            if n == append.left:
                whole[key] += 1
                if append.final:
                    self.use.queued_s += now - append.asked_at
                if whole[key] == self._pending[key] and key in self._wanted and slots > 0:
                    # One token behind (docs/architecture.md): the last row gives the span's first token.
                    self.use.queued_s += now - self._wanted[key][1]
                    plan.sampling.append(key)
                    slots -= 1
                    n += 1
            given[key] += n
            end = start + n
            rows += n
            attended += (end * (end + 1) - start * (start + 1)) // 2
            cached += end
        plan.rows = StepRows(rows, attended, cached, scored, d.rows + len(plan.sampling))
        plan.seconds = self.model.cost.step(plan.rows).seconds
        return plan

    def carry_out(self, plan: Plan) -> tuple[list[Append], list[tuple[Key, int, bool]]]:
        """The step is over. Returns the appends and the chunks that it ended, these as (sequence, tokens, whether its
        span is over)."""
        self._count(plan.rows, 1)
        self.use.scored += plan.rows.scored
        self.use.sampled += plan.rows.sampled
        self._hold(plan.rows.rows)
        self._progress += 1
        self._context += plan.decoding
        appended: list[Append] = []
        for append, n in plan.appends:
            append.left -= n
            self._length[append.key] += n
            if not append.left:
                self._appends.popleft()
                self._pending[append.key] -= 1
                appended.append(append)
                if not self._pending[append.key] and append.key in self._ending:
                    self.end(append.key, self._ending.pop(append.key))
        for key in plan.sampling:
            self._length[key] += 1
            self._enter(key, self._wanted.pop(key)[0], 1)
        chunks: list[tuple[Key, int, bool]] = []
        while self._decoding and self._decoding[0][0] <= self._progress:
            at, key = self._decoding[0]
            span = self._spans[key]
            chunks.append((key, span.chunk, not span.left))
            if span.left:
                span.chunk = min(self._chunk, span.left)
                span.left -= span.chunk
                heapq.heapreplace(self._decoding, (at + span.chunk, key))
            else:
                heapq.heappop(self._decoding)
                del self._spans[key]
                self._length[key] += self._progress
                self._context -= self._length[key]
        return appended, chunks

    def _enter(self, key: Key, tokens: int, written: int) -> None:
        """Let a sequence decode, of whose span `written` tokens are there."""
        chunk = min(self._chunk, tokens)
        self._spans[key] = _Span(chunk, tokens - chunk)
        heapq.heappush(self._decoding, (self._progress + chunk - written, key))
        self._context += self._length[key]
        self._length[key] -= self._progress

    def _free_slots(self) -> float:
        slots = self.model.slots
        return math.inf if slots is None else slots - len(self._decoding)

    def _rows(self, ahead: float) -> StepRows:
        """Rows of the decoding sequences alone, `ahead` steps from now."""
        n = len(self._decoding)
        context = round(self._context + ahead * n)
        return StepRows(n, context, context, 0, n)

    def _count(self, rows: StepRows, steps: int) -> None:
        time = self.model.cost.step(rows)
        self.use.steps += steps
        self.use.busy_s += steps * time.seconds
        self.use.compute_s += steps * time.compute_s
        self.use.memory_s += steps * time.memory_s
        self.use.computed += steps * rows.rows

    def _hold(self, tokens: int) -> None:
        self._kv += tokens
        self.use.peak_kv = max(self.use.peak_kv, self._kv)
