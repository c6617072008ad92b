"""What a remote lane counts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field


@dataclass(slots=True)
class RemoteStats:
    """Counters since the lane began. Tokens that the server computed are known to it alone; these are what crossed the
    wire.

    requests: sent, of which retries repeated one that had failed; failures: given up; breaker_opened: times that the
    server was found to be away. decode_requests, score_requests: calls of either kind, however often they were sent.
    sent_tokens: of prompts, over all requests that were answered; told_tokens: those of answers that said how many of
    them the server had in its prefix cache, which were cached_tokens. score_sent_tokens, score_cached_tokens: of
    sent_tokens and cached_tokens those of score requests. scored_tokens, sampled_tokens: handed over. resumed_spans:
    written on by a new request after the server had gone in the middle of one. lost_requests: given up because no byte
    of them came for too long, although the server lives. in_flight: requests open now; busy_s:
    wall time with one or more of them; waiting_s: that requests waited for a server that was away, summed.
    """

    requests: int = 0
    retries: int = 0
    failures: int = 0
    breaker_opened: int = 0
    decode_requests: int = 0
    score_requests: int = 0
    sent_tokens: int = 0
    told_tokens: int = 0
    cached_tokens: int = 0
    score_sent_tokens: int = 0
    score_cached_tokens: int = 0
    scored_tokens: int = 0
    sampled_tokens: int = 0
    resumed_spans: int = 0
    lost_requests: int = 0
    in_flight: int = 0
    busy_s: float = 0.0
    waiting_s: float = 0.0
    clock: Callable[[], float] = field(default=time.monotonic, repr=False)
    _since: float = 0.0

    @contextmanager
    def request(self) -> Iterator[None]:
        """One request on the wire while the block runs."""
        if not self.in_flight:
            self._since = self.clock()
        self.requests += 1
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1
            if not self.in_flight:
                self.busy_s += self.clock() - self._since

    def sent(self, tokens: int, cached: int | None, *, score: bool = False) -> None:
        """A prompt was answered. cached: of its tokens; None where the server does not tell."""
        self.sent_tokens += tokens
        self.score_sent_tokens += tokens * score
        if cached is not None:
            self.told_tokens += tokens
            self.cached_tokens += cached
            self.score_cached_tokens += cached * score

    def as_dict(self) -> dict[str, float]:
        running = self.clock() - self._since if self.in_flight else 0.0
        counted = asdict(self) | {"busy_s": self.busy_s + running}
        return {name: value for name, value in counted.items() if name not in ("clock", "_since")}
