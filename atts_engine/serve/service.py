"""What the routes share: the engine, what is admitted, and the account that is kept of each request."""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from atts_engine.config import ATTSParams
from atts_engine.conformal import Calibrator, Meta
from atts_engine.engine import AsyncEngine
from atts_engine.errors import LaneError
from atts_engine.pipeline import VerdictEvent
from atts_engine.serve.admission import LANES, Admission, Demand
from atts_engine.serve.errors import ApiError, bad_request
from atts_engine.serve.generation import Counts, Delta
from atts_engine.serve.metrics import ServerMetrics
from atts_engine.serve.settings import ServerSettings
from atts_engine.serve.tracing import RequestTrace, Silence, Tracing

log = logging.getLogger("atts.serve")
T = TypeVar("T")

POOLS = 4
"""Tokens that may be admitted to a lane where nothing is said: so many times its KV pool."""

LONG_TEXT = 4096
"""Characters from which on a text is turned into tokens on another thread."""

HEALTH_AGE_S = 1.0
"""A check of the lanes is good for so long, however often it is asked for."""


@dataclass(slots=True)
class Account:
    """Of one request while it lasts."""

    id: str
    operation: str
    trace: RequestTrace
    began: float
    counts: Counts = field(default_factory=Counts)
    reason: str = "stop"
    last_token: dict[int, float] = field(default_factory=dict)


class Service:
    """calibrator: of requests with `atts`; None: the engine's own, one for each setting, that learn online."""

    def __init__(
        self,
        engine: AsyncEngine,
        settings: ServerSettings,
        calibrator: Calibrator | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self.engine = engine
        self.settings = settings
        self.calibrator = calibrator
        self.created = int(time.time())
        # Of a server's pool nothing is known; it has a queue of its own, and this bounds ours.
        room = {
            lane: settings.max_chains * engine.lane_context_tokens[lane] if pool is None else POOLS * pool
            for lane, pool in engine.pool_tokens.items()
        }
        if settings.max_queued_tokens is not None:
            room = dict.fromkeys(room, settings.max_queued_tokens)
        self.admission = Admission(settings.max_chains, room, reserve_tokens=settings.reserve_tokens)
        self.metrics = ServerMetrics(engine, self.admission, settings.model, settings.params.alpha)
        self._tracing = tracing if tracing is not None else Silence()
        self._forget_listener = engine.add_decision_listener(self.metrics.decision)
        self._health_lock = asyncio.Lock()
        self._lanes: dict[str, float | LaneError] = {}
        self._checked_at = -math.inf

    def close(self) -> None:
        """Leave the engine as it was found."""
        self._forget_listener()

    def drain(self) -> None:
        """Admit nothing more; what is open goes on."""
        self.admission.draining = True

    # -- what a request asks for --

    def check_model(self, name: str | None) -> None:
        """`ApiError` 404 unless it is the pair's name; None is it."""
        if name is not None and name != self.settings.model:
            raise ApiError(
                404,
                f"no model {name!r} here; there is {self.settings.model!r}",
                param="model",
                code="model_not_found",
            )

    def check_calibration(self, params: ATTSParams) -> None:
        """`ApiError` 400 where the server's calibration holds under other conditions than the request asks for."""
        if self.calibrator is None:
            return
        asked = replace(self.engine.calibration_meta(params), alpha=params.alpha)
        known = replace(self.calibrator.meta or Meta(), alpha=self.calibrator.alpha, keys=None)
        if differences := asked.differences(known):
            raise bad_request(
                f"the server's calibration holds under other conditions ({'; '.join(differences)})", "atts"
            )

    async def off_loop(self, size: int, work: Callable[[], T]) -> T:
        """`work` on a text of `size` characters, on another thread where it may take long."""
        return await asyncio.to_thread(work) if size > LONG_TEXT else work()

    def token_bytes(self, token: int) -> bytes:
        """Of one token of the target by itself, special ones too."""
        return self.engine.target_model.tokenizer.bytes_of(token)

    def seed(self, asked: int | None) -> int:
        return asked if asked is not None else secrets.randbits(63)

    def deadline_s(self, asked: float | None) -> float | None:
        return min((s for s in (asked, self.settings.timeout_s) if s is not None), default=None)

    # -- one request --

    @contextmanager
    def account(
        self,
        request_id: str,
        operation: str,
        demand: dict[str, Demand],
        headers: Mapping[str, str],
        attributes: Mapping[str, Any],
    ) -> Iterator[Account]:
        """Admit a request, and write down how it went. `ApiError` 503 or 400 where it is not admitted."""
        try:
            self.admission.check(demand)
        except ApiError as error:
            self.metrics.refused(error.body.code or "too_large")
            raise
        with self.admission.admit(demand):
            trace = self._tracing.begin(operation, self.settings.model, headers, attributes)
            account = Account(request_id, operation, trace, time.perf_counter())
            account.counts.on_written = self.metrics.written
            self.metrics.waiting(1)
            failure: str | None = None
            try:
                yield account
            except (asyncio.CancelledError, GeneratorExit):
                account.reason = "abort"
                raise
            except Exception as error:
                account.reason, failure = "error", type(error).__name__
                raise
            finally:
                self._closed(account, failure)

    async def watched(self, account: Account, deltas: AsyncGenerator[Delta, None]) -> AsyncGenerator[Delta, None]:
        """The deltas, with their times taken."""
        async with aclosing(deltas) as watched:
            async for delta in watched:
                if delta.n_tokens:
                    self._token(account, delta)
                if delta.finish is not None:
                    account.reason = delta.finish
                yield delta

    def verdict(self, account: Account, event: VerdictEvent, alpha: float) -> None:
        self.metrics.verdict(event, alpha)
        account.trace.event(
            "atts.verdict",
            {"chain": event.chain, "turn": event.turn, "score": event.score, "takeover": event.takeover},
        )

    def _token(self, account: Account, delta: Delta) -> None:
        now = time.perf_counter()
        if not account.last_token:
            self.metrics.first_token(now - account.began)
            self.metrics.prompt(account.counts.prompt)
            self.metrics.waiting(-1)
            self.metrics.running(1)
            account.trace.event("first_token", {})
        elif delta.index in account.last_token:
            self.metrics.between_tokens((now - account.last_token[delta.index]) / delta.n_tokens)
        account.last_token[delta.index] = now

    def _closed(self, account: Account, failure: str | None) -> None:
        if account.last_token:
            self.metrics.running(-1)
        else:
            self.metrics.waiting(-1)
        seconds, counts = time.perf_counter() - account.began, account.counts
        self.metrics.finished(account.reason, seconds, counts.prompt, counts.completion)
        account.trace.end(
            {
                "gen_ai.response.id": account.id,
                "gen_ai.response.model": self.settings.model,
                "gen_ai.response.finish_reasons": [account.reason],
                "gen_ai.usage.input_tokens": counts.prompt,
                "gen_ai.usage.output_tokens": counts.completion,
            },
            failure,
        )
        log.info(
            "%s %s: %s after %.3f s, %d tokens in, %d out%s",
            account.operation,
            account.id,
            account.reason,
            seconds,
            counts.prompt,
            counts.completion,
            f" ({failure})" if failure is not None else "",
        )

    # -- health --

    async def health(self) -> dict[str, float | LaneError]:
        """Of each lane the seconds that a token took, or why there was none; found at most a second ago."""
        async with self._health_lock:
            if time.monotonic() - self._checked_at > HEALTH_AGE_S:
                self._lanes = {lane: await self._check(lane) for lane in LANES}
                self._checked_at = time.monotonic()
            return self._lanes

    async def _check(self, lane: str) -> float | LaneError:
        try:
            return await self.engine.check(lane)
        except LaneError as error:
            if not isinstance(self._lanes.get(lane), LaneError):
                # Once: /health is asked for all the time.
                log.warning("health: %s", error)
            return error
