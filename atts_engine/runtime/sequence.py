"""State of one sequence inside a lane. Touched by the scheduler thread only."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np

from atts_engine.kv import BlockTable
from atts_engine.runtime.commands import Command
from atts_engine.runtime.decoding import DecodeState

FloatArray = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


@dataclass(slots=True, eq=False)
class Sequence:
    """Positions [0, computed) have their KV in the pages of `table`, on the device or parked in host memory, or get it
    from a step in flight: whatever is launched after that step finds it there.

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
    futures: int = 0
    """Tokens at the end that steps in flight sample: their places are taken, the host does not know them yet."""
    flights: int = 0
    """Steps in flight that hold rows of this sequence. Its pages are let go, shared or moved only when there are none:
    until then they are being written, and nobody knows whether what is written is finite."""
    furthest: int = 0
    """Positions below this were computed before: computing them again is counted as recomputation."""
    known: int = 0
    """Positions below this hold tokens that were computed at the places where they are. Beyond `furthest` lies at most
    the one that a truncate made the last: its KV stands, but what it predicts must be computed again."""
    waits_since: float | None = None
    """Time at which it was asked for a decode or a verdict, or last served, unless it is in a step or asked nothing."""
    waited: float = 0.0
    """Seconds of waiting since the last answer."""
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
        return len(self.tokens) + self.futures

    @property
    def goal(self) -> int:
        """`computed` when the work at hand is done."""
        state = self.decode
        if state is not None and state.proposal:
            return self.computed if state.in_flight else self.total
        more = state is not None and state.produced + self.futures < state.limit
        return self.total if more else self.total - 1

    @property
    def remaining(self) -> int:
        return self.goal - self.computed

    @property
    def nearly_there(self) -> bool:
        """One row is left to compute, or a row for each proposed token and one."""
        return self.remaining == 1 + (self.decode.proposed if self.decode is not None else 0)

    def draws(self, start: int, count: int) -> int:
        """How many of the last rows give a token of the decode when positions [start, start + count) are forwarded."""
        if self.decode is None:
            return 0
        first = self.total - 1 - self.decode.proposed
        return max(0, start + count - max(start, first))

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

    def scored_logprobs(self) -> FloatArray:
        """Of the tokens scored since the last verdict, in order."""
        return np.concatenate([np.zeros(0, np.float32), *(s for _, s in self.scored)])

    def asked(self, at: float) -> None:
        """Somebody waits for it from now on."""
        if self.waits_since is None and not self.flights:
            self.waits_since = at

    def served(self, now: float) -> None:
        """It has rows in a step that begins."""
        if self.waits_since is not None:
            self.waited += now - self.waits_since
            self.waits_since = None

    def take_wait(self, now: float) -> float:
        """Seconds from question to answer during which it was in no running step; the answer is there now."""
        self.served(now)
        waited, self.waited = self.waited, 0.0
        return waited

    def launch(self, end: int, score: tuple[tuple[int, int], ...], draws: int) -> tuple[int, int]:
        """Take rows up to position `end` as computed: a step that does so was launched.

        Returns how many tokens were computed before and dropped, and how many others were computed before.
        """
        dropped = max(0, min(end, self.furthest) - self.computed)
        repeated = max(0, min(end, self.known) - self.computed) - dropped
        self.computed = end
        self.furthest = max(self.furthest, end)
        self.known = max(self.known, end)
        self.flights += 1
        if score:
            done = score[-1][1]
            while self.to_score and self.to_score[0][1] <= done:
                self.to_score.popleft()
            if self.to_score and self.to_score[0][0] < done:
                self.to_score[0] = (done, self.to_score[0][1])
        if draws:
            assert self.decode is not None
            if self.decode.proposal:
                self.decode.in_flight = True
            else:
                self.futures += 1
        return dropped, repeated

    def place(self, token: int) -> bool:
        """Put the token that the lane drew in its place. True: it stands there, as it was proposed. Otherwise it is the
        last of the sequence now: what was proposed from there on is forgotten."""
        state = self.decode
        assert state is not None
        if state.proposed and self.tokens[-state.proposed] == token:
            state.proposed -= 1
            state.accepted += 1
            return True
        self._drop_proposed(state)
        self.tokens.append(token)
        if not state.proposal:
            self.futures -= 1
        return False

    def retract(self) -> None:
        """Forget what is still only proposed; the decode goes on without it."""
        assert self.decode is not None
        self._drop_proposed(self.decode)
        self.computed = min(self.computed, self.total - 1)
        self.furthest = min(self.furthest, self.total - 1)
        self.known = min(self.known, self.total - 1)

    def _drop_proposed(self, state: DecodeState) -> None:
        del self.tokens[len(self.tokens) - state.proposed :]
        state.proposed = 0

    def end_decode(self) -> None:
        """Leave the decode where the host knows it to be; what is still only proposed is forgotten. Rows in flight for
        it are for nobody: the KV that they write stays uncounted, and the last token is forwarded again like that of
        any sequence at rest."""
        self.futures = 0
        self.retract()
        self.decode = None

    def trim(self) -> None:
        """Let go of pages behind what is computed. For a sequence without a step in flight."""
        self.table.truncate(self.computed)

    def truncate(self, length: int) -> int:
        """Forget tokens from `length` on; returns how many of them were computed."""
        rolled_back = max(0, self.known - length)
        del self.tokens[length:]
        # The new last token must be forwarded again: what follows it is scored from that forward.
        self.computed = min(self.computed, length - 1)
        self.furthest = min(self.furthest, length - 1)
        self.known = min(self.known, length)
        self.to_score = deque((a, min(b, length)) for a, b in self.to_score if a < length)
        self.scored = [(p, s[: length - p]) for p, s in self.scored if p < length]
        self.trim()
        return rolled_back

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
        self.trim()
