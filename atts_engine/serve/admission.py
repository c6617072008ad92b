"""How much work is taken on. A request is counted in chains and tokens on each lane that it will use, from before its
first step until its last page is free; what would be too much is refused at once, so no queue grows without bound."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from atts_engine.serve.errors import ApiError, bad_request, overloaded

LANES = ("draft", "target")
_MENDS = {
    "chains": "ask for fewer (n, spans, or chains of atts)",
    "tokens": "prompts are counted too: ask for fewer (max_tokens, n, spans, or chains of atts), or shorten the prompt",
}
MAX_RETRY_S = 60
FIRST_GUESS = 1024
MEMORY = 0.05
"""What the latest answer weighs in the mean length of answers."""


@dataclass(frozen=True, slots=True)
class Demand:
    """Of one request on one lane: chains, and the tokens that they may come to hold, prompts included."""

    chains: int = 0
    tokens: int = 0


@dataclass(slots=True)
class Load:
    """What is open on one lane."""

    chains: int = 0
    tokens: int = 0


class Guess:
    """How long an answer will be whose request names no limit: the moving mean of those that have ended, or `fixed`.

    To count all that the context has room for would fill the server with a handful of ordinary chats. Where answers
    turn out longer than was guessed, lanes preempt.
    """

    def __init__(self, fixed: int | None = None) -> None:
        self._fixed = fixed
        self._mean = float(FIRST_GUESS)

    def tokens(self, room: int) -> int:
        """At most `room`."""
        return min(room, self._fixed if self._fixed is not None else math.ceil(self._mean))

    def learn(self, mean: float) -> None:
        """mean: tokens of each of a request's answers."""
        self._mean += MEMORY * (mean - self._mean)


class Admission:
    """max_chains: of each lane. max_tokens: by lane. clock: seconds. reserve_tokens: see `Guess`, of which there is one
    for plain answers and one for chains."""

    def __init__(
        self,
        max_chains: int,
        max_tokens: Mapping[str, int],
        clock: Callable[[], float] = time.monotonic,
        reserve_tokens: int | None = None,
    ) -> None:
        self._max = {lane: Demand(max_chains, max_tokens[lane]) for lane in LANES}
        self.answers = Guess(reserve_tokens)
        self.chains = Guess(reserve_tokens)
        self._clock = clock
        self._held_s = 1.0
        self.loads = {lane: Load() for lane in LANES}
        self.draining = False
        self.requests = 0

    @contextmanager
    def admit(self, demand: dict[str, Demand]) -> Iterator[None]:
        """Count a request in while the block runs. `ApiError` 400 for one that could never be had, 503 for one that
        cannot be had now."""
        self.check(demand)
        began = self._clock()
        self._move(demand, 1)
        try:
            yield
        finally:
            self._move(demand, -1)
            # A moving mean of how long requests hold their place: when it may be worth to ask again.
            self._held_s += 0.2 * (self._clock() - began - self._held_s)

    def check(self, demand: dict[str, Demand]) -> None:
        """As `admit`, without counting anything in."""
        for lane, wanted in demand.items():
            for unit in ("chains", "tokens"):
                if getattr(wanted, unit) > getattr(self._max[lane], unit):
                    raise bad_request(
                        f"the request asks for {getattr(wanted, unit)} {unit}, and the {lane} lane allows "
                        f"{getattr(self._max[lane], unit)} at any time; {_MENDS[unit]}"
                    )
        if self.draining:
            raise overloaded("the server is going down and takes no new requests", "draining", MAX_RETRY_S)
        for lane, wanted in demand.items():
            for unit in ("chains", "tokens"):
                if getattr(self.loads[lane], unit) + getattr(wanted, unit) > getattr(self._max[lane], unit):
                    raise self._full(lane, unit)

    def _full(self, lane: str, unit: str) -> ApiError:
        wait = min(MAX_RETRY_S, max(1, math.ceil(self._held_s)))
        return overloaded(f"the {lane} lane has as many {unit} open as it may; ask again later", "overloaded", wait)

    def _move(self, demand: dict[str, Demand], sign: int) -> None:
        self.requests += sign
        for lane, wanted in demand.items():
            self.loads[lane].chains += sign * wanted.chains
            self.loads[lane].tokens += sign * wanted.tokens
