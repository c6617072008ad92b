"""State of one sequence inside a lane. Touched by the scheduler thread only."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np

from atts_engine.kv import BlockTable
from atts_engine.runtime.commands import Command, Decode
from atts_engine.runtime.records import TokenChunk

FloatArray = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


@dataclass(slots=True)
class DecodeState:
    """Progress of the decode command at the head of a sequence."""

    command: Decode
    produced: int = 0
    buffer: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """Of the tokens in `buffer`, where they are asked for."""
    recent: list[int] = field(default_factory=list)
    """The last tokens, as far back as a stop string can reach."""

    def hand_over(self, finish: str | None = None) -> TokenChunk:
        """The tokens since the last chunk."""
        chunk = TokenChunk(tuple(self.buffer), finish, tuple(self.logprobs))
        self.buffer.clear()
        self.logprobs.clear()
        return chunk


@dataclass(slots=True, eq=False)
class Sequence:
    """`tokens[:computed]` have their KV in the pages of `table`, on the device or parked in host memory.

    At rest `computed == len(tokens) - 1`: the last token is forwarded with whatever comes next, and that forward
    gives the log-probability of the next token, so a span's first token is scored like any other.
    """

    id: int
    tokens: list[int]
    table: BlockTable
    computed: int = 0
    pending: deque[Command] = field(default_factory=deque)
    decode: DecodeState | None = None
    to_score: deque[tuple[int, int]] = field(default_factory=deque)
    """Half-open position ranges that are still to be scored, ascending."""
    scored: list[tuple[int, FloatArray]] = field(default_factory=list)
    """(first position, log-probabilities) since the last verdict, ascending."""
    furthest: int = 0
    """Positions below this were computed before: computing them again is counted as recomputation."""
    last_step: int = -1
    preempted: bool = False
    """It gave up pages and has not been placed in a step since."""
    closed: bool = False
    group: Hashable = None
    """Sequences of one group share one claim to the lane's time; see `ServiceCounters`."""
    priority: int = 0
    """Lower numbers are served first and preempted last."""

    @property
    def total(self) -> int:
        return len(self.tokens)

    @property
    def goal(self) -> int:
        """`computed` when the work at hand is done."""
        return self.total if self.decode is not None else self.total - 1

    @property
    def remaining(self) -> int:
        return self.goal - self.computed

    @property
    def settled(self) -> bool:
        """All tokens but the last are computed, and nothing is being decoded."""
        return self.decode is None and self.computed == self.total - 1

    @property
    def wanted(self) -> bool:
        """Somebody waits for this sequence's work; one that was preempted stays out until then."""
        return self.remaining > 0 and (
            not self.preempted or self.decode is not None or bool(self.pending) or bool(self.to_score)
        )

    def score_ranges(self, start: int, count: int) -> list[tuple[int, int]]:
        """Positions to be scored by forwarding positions [start, start + count): those predicted are one ahead."""
        low, high = start + 1, start + count + 1
        clipped = ((max(a, low), min(b, high)) for a, b in self.to_score)
        return [(a, b) for a, b in clipped if a < b]

    def take_scores(self, first: int, logprobs: FloatArray) -> None:
        """Record log-probabilities of positions first .. first + len - 1 and strike them off `to_score`."""
        self.scored.append((first, logprobs))
        done = first + len(logprobs)
        while self.to_score and self.to_score[0][1] <= done:
            self.to_score.popleft()
        if self.to_score and self.to_score[0][0] < done:
            self.to_score[0] = (done, self.to_score[0][1])

    def truncate(self, length: int) -> None:
        """Forget tokens from `length` on."""
        del self.tokens[length:]
        # The new last token must be forwarded again: what follows it is scored from that forward.
        self.computed = min(self.computed, length - 1)
        self.furthest = min(self.furthest, self.computed)
        self.to_score = deque((a, min(b, length)) for a, b in self.to_score if a < length)
        self.scored = [(p, s[: length - p]) for p, s in self.scored if p < length]
        self.table.truncate(self.computed)

    def park_kv(self) -> list[tuple[int, int]]:
        """Move the pages that nobody shares to the host pool; returns the (page, slot) copies to be made."""
        self.preempted = True
        return self.table.park()

    def drop_kv(self) -> None:
        """Give up the KV that nobody shares, or all of it where nothing else would come free; the tokens stay and are
        computed again when they are wanted."""
        self.preempted = True
        # What others hold as well stays for nothing, unless it is all that there is: then the last to let go frees it.
        kept = self.table.shared if self.table.private else 0
        self.computed = min(self.computed, kept * self.table.page_size)
        self.table.truncate(self.computed)
