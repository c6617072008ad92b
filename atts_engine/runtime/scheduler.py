"""Decides what one step computes. There are no phases: each sequence has `computed` tokens and a goal, and a step
brings as many sequences as the token budget allows nearer to theirs."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from atts_engine.kv import OutOfPages, PagePool
from atts_engine.runtime.sequence import DecodeState, Sequence


@dataclass(frozen=True, slots=True)
class Work:
    """Forward positions [start, start + count) of a sequence.

    `score`: position ranges whose log-probability is wanted. `sample`: the decode whose next token the last row gives;
    when the row's token becomes known and the sequence decodes something else by then, the token is for nobody.
    """

    seq: Sequence
    start: int
    count: int
    score: tuple[tuple[int, int], ...]
    sample: DecodeState | None


@dataclass(frozen=True, slots=True)
class Step:
    work: tuple[Work, ...]
    copies: tuple[tuple[int, int], ...]
    """Page copies (source, destination) to be made before anything is written."""
    impossible: tuple[Sequence, ...]
    """Sequences that the whole pool cannot hold."""


class Scheduler:
    """Round robin over the sequences that want work: those served longest ago come first."""

    def __init__(self, pool: PagePool, max_batch_tokens: int) -> None:
        self._pool = pool
        self._budget = max_batch_tokens
        self._step = 0
        self.preemptions = 0

    def schedule(self, sequences: Collection[Sequence]) -> Step:
        self._step += 1
        waiting = sorted((s for s in sequences if s.wanted), key=lambda s: (s.last_step, s.id))
        work: list[Work] = []
        copies: list[tuple[int, int]] = []
        impossible: list[Sequence] = []
        budget = self._budget
        chosen: set[int] = set()
        for seq in (s for s in waiting if not s.preempted):
            # A sequence later in the list may have been preempted for one before it.
            if budget == 0 or seq.preempted:
                continue
            made = self._place(seq, budget, sequences, chosen, copies, impossible)
            if made is not None:
                work.append(made)
                chosen.add(seq.id)
                budget -= made.count
        for seq in sorted((s for s in waiting if s.preempted and s.id not in chosen), key=lambda s: s.id):
            # Coming back only into free pages keeps two sequences from evicting each other in turns; with
            # nothing else to run the oldest may push others out, so that one always gets to its end.
            fits = self._pages(seq.total + 1) - len(seq.table.pages) <= self._pool.free
            if budget == 0 or not (fits or not work):
                break
            made = self._place(seq, budget, sequences, chosen, copies, impossible)
            if made is not None:
                work.append(made)
                chosen.add(seq.id)
                budget -= made.count
        return Step(tuple(work), tuple(copies), tuple(impossible))

    def _place(
        self,
        seq: Sequence,
        budget: int,
        sequences: Collection[Sequence],
        chosen: set[int],
        copies: list[tuple[int, int]],
        impossible: list[Sequence],
    ) -> Work | None:
        if self._pages(seq.goal) > self._pool.capacity:
            # The token that a step in flight samples may be the last one.
            if not seq.futures:
                impossible.append(seq)
            return None
        start = seq.computed
        count = min(seq.remaining, budget)
        while True:
            try:
                copies.extend(seq.table.reserve(start, start + count))
                break
            except OutOfPages:
                # Nobody gives up pages for a row that may turn out to be for nobody.
                if seq.futures:
                    return None
                victim = self._victim(seq, sequences, chosen)
                if victim is None:
                    return None
                victim.drop_kv()
                self.preemptions += 1
        seq.last_step = self._step
        sample = seq.decode if start + count == seq.total else None
        return Work(seq, start, count, tuple(seq.score_ranges(start, count)), sample)

    def _victim(self, seq: Sequence, sequences: Collection[Sequence], chosen: set[int]) -> Sequence | None:
        """Who gives up its pages: idle before busy, then the youngest; never one that is older and busy."""
        holders = [s for s in sequences if s is not seq and s.table.pages and not s.flights and s.id not in chosen]
        idle = [s for s in holders if not s.wanted]
        busy = [s for s in holders if s.wanted and s.id > seq.id]
        return max(idle or busy, key=lambda s: s.id, default=None)

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self._pool.page_size)
