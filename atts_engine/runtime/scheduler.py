"""Decides what one step computes. There are no phases: each sequence has `computed` tokens and a goal, and a step
brings as many sequences as the token budget allows nearer to theirs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable
from dataclasses import dataclass, field

from atts_engine.kv import PagePool
from atts_engine.runtime.decoding import DecodeState
from atts_engine.runtime.fairness import ServiceCounters
from atts_engine.runtime.preemption import Costs
from atts_engine.runtime.sequence import Sequence

PREFILL_SHARE = 8
"""One row in this many is kept for prefill while there is any; see `Scheduler`."""


@dataclass(frozen=True, slots=True)
class Work:
    """Forward positions [start, start + count) of a sequence.

    `score`: position ranges whose log-probability is wanted. `sample`: the decode whose next tokens the last `draws`
    rows give; when they become known and the sequence decodes something else by then, they are for nobody.
    """

    seq: Sequence
    start: int
    count: int
    score: tuple[tuple[int, int], ...]
    sample: DecodeState | None
    draws: int


@dataclass(frozen=True, slots=True)
class Step:
    """Page copies are made before anything is written: `swap_out`, then `copies`, then `swap_in`."""

    work: tuple[Work, ...]
    copies: tuple[tuple[int, int], ...]
    """(source, destination) pages, one copy after the other: a page may be written that was copied from before."""
    impossible: tuple[Sequence, ...]
    """Sequences that the whole pool cannot hold."""
    swap_out: tuple[tuple[int, int], ...] = ()
    """(page, slot of the host pool)."""
    swap_in: tuple[tuple[int, int], ...] = ()
    """(slot of the host pool, page)."""
    swapped: int = 0
    dropped: int = 0
    """Sequences preempted in this step: their KV moved to the host pool, or dropped."""

    @property
    def kinds(self) -> str:
        """What the step does, for a profiler: some of "append", "score" and "decode"."""
        parts = {"decode" if w.sample is not None else "score" if w.score else "append" for w in self.work}
        return "+".join(sorted(parts))


@dataclass(slots=True)
class _Plan:
    """A step in the making. `chosen`: sequences with work in it, whose pages must stay."""

    sequences: Collection[Sequence]
    budget: int
    work: list[Work] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    swap_out: list[tuple[int, int]] = field(default_factory=list)
    swap_in: list[tuple[int, int]] = field(default_factory=list)
    swapped: int = 0
    dropped: int = 0
    chosen: set[int] = field(default_factory=set)

    def step(self, impossible: list[Sequence]) -> Step:
        return Step(
            tuple(self.work),
            tuple(self.copies),
            tuple(impossible),
            tuple(self.swap_out),
            tuple(self.swap_in),
            self.swapped,
            self.dropped,
        )


class Scheduler:
    """Gives out the rows of a step and the pages of the pool.

    Rows: a lower `priority` number goes first, without exception. Within one, sequences that are one row from their
    goal, proposed tokens not counted (decoding), come before longer work (prompts, spans to score), so that no long
    prompt stalls a running chain; longer work has an eighth of the rows, saved up while it has had less. Within either,
    the group that was served least goes first (`ServiceCounters`), in it the sequence that was served longest ago.

    Pages: a running sequence may take those of lower priority, of idle sequences, of younger ones of its own group and
    of groups that would still hold more than its own. One that holds none, because it is new or was preempted, comes in
    only if there is room for all of it in free pages and those of lower priority: so no two evict each other in turns.
    When nothing at all could be placed, the oldest of the first priority takes what it needs from anybody, so that one
    always gets on.

    host: where the KV of preempted sequences may go. costs: None moves it whenever there is room; otherwise only where
    that takes less time than computing it again.
    """

    def __init__(self, pool: PagePool, host: PagePool, max_batch_tokens: int, costs: Costs | None = None) -> None:
        self._pool = pool
        self._host = host
        self._budget = max_batch_tokens
        self._costs = costs
        self._step = 0
        self._service = ServiceCounters()
        self._owed: dict[int, int] = {}
        """Rows that longer work of a priority is still to have, times PREFILL_SHARE."""

    def schedule(self, sequences: Collection[Sequence]) -> Step:
        self._step += 1
        wanted: list[Sequence] = []
        impossible: list[Sequence] = []
        for seq in sequences:
            if not seq.wanted:
                continue
            if self._pages(seq.goal) <= self._pool.capacity:
                wanted.append(seq)
            elif not seq.futures:
                # Otherwise the token that a step in flight samples may be the last one.
                impossible.append(seq)
        self._service.begin({s.group for s in sequences}, {s.group for s in wanted})
        plan = _Plan(sequences, self._budget)
        levels = sorted({s.priority for s in wanted})
        self._owed = {level: self._owed.get(level, 0) for level in levels}
        for level in levels:
            self._serve(level, [s for s in wanted if s.priority == level], plan)
        # What is in flight may free pages, and lets go of its own when it has arrived.
        if not plan.work and not any(s.flights for s in sequences):
            self._force(wanted, plan)
        # Only now: a slot that is read in this step must not be written in it.
        self._host.release(slot for slot, _ in plan.swap_in)
        return plan.step(impossible)

    def _serve(self, level: int, wanted: list[Sequence], plan: _Plan) -> None:
        """Give rows to the sequences of one priority."""
        running = [s for s in wanted if s.computed and not s.preempted]
        rows = [s for s in running if s.nearly_there]
        long = [s for s in running if not s.nearly_there] if len(rows) < len(running) else []
        entering = [s for s in wanted if not s.computed or s.preempted] if len(running) < len(wanted) else []
        if long or entering:
            self._owed[level] = min(self._owed[level] + self._budget, PREFILL_SHARE * self._budget)
        else:
            self._owed[level] = 0
        self._run(rows, plan, keep=self._owed[level] // PREFILL_SHARE)
        left = plan.budget
        self._run(long, plan)
        self._admit(entering, plan)
        self._owed[level] = max(0, self._owed[level] - PREFILL_SHARE * (left - plan.budget))
        self._run([s for s in rows if s.id not in plan.chosen], plan)

    def _run(self, sequences: Iterable[Sequence], plan: _Plan, keep: int = 0) -> None:
        for seq in self._service.order(sequences, lambda s: (s.last_step, s.id)):
            if plan.budget <= keep:
                return
            # It may have been preempted for one before it.
            if not seq.preempted:
                self._place(seq, plan, self._may_take(seq, plan), keep)

    def _admit(self, sequences: Iterable[Sequence], plan: _Plan) -> None:
        for seq in self._service.order(sequences, lambda s: (s.id,)):
            room, lower = self._pool.free, []
            needed = seq.table.needed(seq.computed, seq.total + 1)
            if needed > room:
                lower = [s for s in self._holders(seq, plan) if s.priority > seq.priority]
                room += sum(len(s.table.private) for s in lower)
            # Who comes after it must wait too, or small sequences would keep a large one out for good.
            if not plan.budget or needed > room:
                return
            self._place(seq, plan, lower.__contains__)

    def _force(self, wanted: list[Sequence], plan: _Plan) -> None:
        # By age: an order that changes while they are served would have them take each other's pages in turns.
        for seq in sorted(wanted, key=lambda s: (s.priority, s.id)):
            if not plan.work:
                self._place(seq, plan, lambda victim: True)

    def _place(self, seq: Sequence, plan: _Plan, may_take: Callable[[Sequence], bool], keep: int = 0) -> None:
        """Give the sequence as much work as the budget allows, but for `keep` rows of it, unless it cannot have the
        pages for it."""
        start = seq.computed
        count = min(seq.remaining, plan.budget - keep)
        while seq.table.needed(start, start + count) > self._pool.free:
            # Nobody gives up pages for a row that may turn out to be for nobody.
            victim = None if seq.futures else self._victim([s for s in self._holders(seq, plan) if may_take(s)])
            if victim is None:
                return
            self._preempt(victim, plan)
        if seq.table.parked:
            plan.swap_in += seq.table.recall()
        plan.copies += seq.table.reserve(start, start + count)
        plan.budget -= count
        plan.chosen.add(seq.id)
        self._service.charge(seq.group, count)
        seq.last_step = self._step
        seq.preempted = False
        draws = seq.draws(start, count)
        sample = seq.decode if draws else None
        plan.work.append(Work(seq, start, count, tuple(seq.score_ranges(start, count)), sample, draws))

    def _holders(self, seq: Sequence, plan: _Plan) -> list[Sequence]:
        """Who else holds pages that neither this step nor one in flight needs."""
        others = (s for s in plan.sequences if s is not seq and s.id not in plan.chosen)
        return [s for s in others if s.table.pages and not s.flights]

    def _may_take(self, seq: Sequence, plan: _Plan) -> Callable[[Sequence], bool]:
        """Whose pages a running sequence may take."""

        def allowed(victim: Sequence) -> bool:
            if victim.priority != seq.priority:
                return victim.priority > seq.priority
            if not victim.wanted:
                return True
            if victim.group == seq.group:
                return victim.id > seq.id
            held: Counter[Hashable] = Counter()
            for s in plan.sequences:
                held[s.group] += len(s.table.private)
            return held[victim.group] - len(victim.table.private) > held[seq.group]

        return allowed

    def _victim(self, holders: list[Sequence]) -> Sequence | None:
        """Who gives up its pages: those that free some before those that only let go of shared ones, then the lowest
        priority, idle before busy, the most served group, the youngest."""
        return max(
            holders,
            key=lambda s: (bool(s.table.private), s.priority, not s.wanted, self._service.served(s.group), s.id),
            default=None,
        )

    def _preempt(self, seq: Sequence, plan: _Plan) -> None:
        if self._moves(seq):
            plan.swap_out += seq.park_kv()
            plan.swapped += 1
        else:
            seq.drop_kv()
            plan.dropped += 1

    def _moves(self, seq: Sequence) -> bool:
        private = seq.table.private
        if not 0 < len(private) <= self._host.free or not self._pool.clean(private):
            return False
        kept = len(seq.table.pages) - len(private)
        return self._costs is None or self._costs.worth_moving(len(private), kept * self._pool.page_size, seq.computed)

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self._pool.page_size)
