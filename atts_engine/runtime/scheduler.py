"""Decides what one step computes. There are no phases: each sequence has `computed` tokens and a goal, and a step
brings as many sequences as the token budget allows nearer to theirs."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from atts_engine.kv import PagePool
from atts_engine.runtime.preemption import Costs
from atts_engine.runtime.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Work:
    """Forward positions [start, start + count) of a sequence.

    `score`: position ranges whose log-probability is wanted. `sample`: the last row gives the next token.
    """

    seq: Sequence
    start: int
    count: int
    score: tuple[tuple[int, int], ...]
    sample: bool


@dataclass(frozen=True, slots=True)
class Step:
    """Page copies are made before anything is written: `swap_out`, then `copies`, then `swap_in`."""

    work: tuple[Work, ...]
    copies: tuple[tuple[int, int], ...]
    """(source, destination) pages."""
    impossible: tuple[Sequence, ...]
    """Sequences that the whole pool cannot hold."""
    swap_out: tuple[tuple[int, int], ...] = ()
    """(page, slot of the host pool)."""
    swap_in: tuple[tuple[int, int], ...] = ()
    """(slot of the host pool, page)."""
    swapped: int = 0
    dropped: int = 0
    """Sequences preempted in this step: their KV moved to the host pool, or dropped."""


@dataclass(slots=True)
class _Plan:
    """A step in the making. `chosen`: sequences with work in it, whose pages must stay."""

    budget: int
    work: list[Work] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    impossible: list[Sequence] = field(default_factory=list)
    swap_out: list[tuple[int, int]] = field(default_factory=list)
    swap_in: list[tuple[int, int]] = field(default_factory=list)
    swapped: int = 0
    dropped: int = 0
    chosen: set[int] = field(default_factory=set)

    def step(self) -> Step:
        return Step(
            tuple(self.work),
            tuple(self.copies),
            tuple(self.impossible),
            tuple(self.swap_out),
            tuple(self.swap_in),
            self.swapped,
            self.dropped,
        )


class Scheduler:
    """Round robin over the sequences that want work: those served longest ago come first.

    host: where the KV of preempted sequences may go. costs: None moves it whenever there is room; otherwise only where
    that takes less time than computing it again.
    """

    def __init__(self, pool: PagePool, host: PagePool, max_batch_tokens: int, costs: Costs | None = None) -> None:
        self._pool = pool
        self._host = host
        self._budget = max_batch_tokens
        self._costs = costs
        self._step = 0

    def schedule(self, sequences: Collection[Sequence]) -> Step:
        self._step += 1
        waiting = sorted((s for s in sequences if s.wanted), key=lambda s: (s.last_step, s.id))
        plan = _Plan(self._budget)
        for seq in (s for s in waiting if not s.preempted):
            # A sequence later in the list may have been preempted for one before it.
            if plan.budget and not seq.preempted:
                self._place(seq, plan, sequences)
        for seq in sorted((s for s in waiting if s.preempted and s.id not in plan.chosen), key=lambda s: s.id):
            # Coming back only into free pages keeps two sequences from evicting each other in turns; with
            # nothing else to run the oldest may push others out, so that one always gets to its end.
            fits = seq.table.needed(seq.computed, seq.total + 1) <= self._pool.free
            if not plan.budget or not (fits or not plan.work):
                break
            self._place(seq, plan, sequences)
        # Only now: a slot that is read in this step must not be written in it.
        self._host.release(slot for slot, _ in plan.swap_in)
        return plan.step()

    def _place(self, seq: Sequence, plan: _Plan, sequences: Collection[Sequence]) -> None:
        """Give the sequence as much work as the budget allows, unless it cannot have the pages for it."""
        if self._pages(seq.goal) > self._pool.capacity:
            plan.impossible.append(seq)
            return
        start = seq.computed
        count = min(seq.remaining, plan.budget)
        while seq.table.needed(start, start + count) > self._pool.free:
            victim = self._victim(seq, plan, sequences)
            if victim is None:
                return
            self._preempt(victim, plan)
        if seq.table.parked:
            plan.swap_in += seq.table.recall()
        plan.copies += seq.table.reserve(start, start + count)
        plan.budget -= count
        plan.chosen.add(seq.id)
        seq.last_step = self._step
        seq.preempted = False
        sample = seq.decode is not None and start + count == seq.total
        plan.work.append(Work(seq, start, count, tuple(seq.score_ranges(start, count)), sample))

    def _victim(self, seq: Sequence, plan: _Plan, sequences: Collection[Sequence]) -> Sequence | None:
        """Who gives up its pages: those that free some before those that only let go of shared ones, idle before busy,
        then the youngest; never one that is older and busy."""
        holders = [s for s in sequences if s is not seq and s.table.pages and s.id not in plan.chosen]
        holders = [s for s in holders if not s.wanted or s.id > seq.id]
        return max(holders, key=lambda s: (bool(s.table.private), not s.wanted, s.id), default=None)

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
