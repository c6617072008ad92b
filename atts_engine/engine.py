"""`AsyncEngine`, the public face: two models, their lanes, and the chains that run on them."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self, TypeVar

import torch

from atts_engine import assembly, ops
from atts_engine.backends import EngineLane, InProcessLane, Lane, ModelInfo
from atts_engine.backends.remote.lane import RemoteLane
from atts_engine.config import EngineConfig, fill_prompt, prompt_hash
from atts_engine.conformal import Adaptive, Calibrator, GateRequest, Meta, Monitored
from atts_engine.errors import ChainError, InputError, LaneError, QueueFull
from atts_engine.pipeline import (
    ATTSParams,
    CompletionEvent,
    ConformalGate,
    Decision,
    Event,
    Gate,
    Pair,
    PrefixStore,
    Problem,
    Prompts,
    Solution,
    SpanScore,
    Task,
    complete,
    run_problem,
)
from atts_engine.pipeline.events import SolutionEvent
from atts_engine.pipeline.gate import PlacedRequest
from atts_engine.runtime import (
    Mailbox,
    Rates,
    SamplingParams,
    SpanResult,
    probe,
)

DecisionListener = Callable[[Decision], None]
T = TypeVar("T")

MAX_DEFAULT_CALIBRATORS = 64
"""Settings that keep a calibration of their own at a time; that of the one unused for longest is forgotten."""

FIRST = -(1 << 31)
"""Priority of the engine's own questions."""


class AsyncEngine:
    """Made by `await AsyncEngine.create(config)`; belongs to that event loop. Close it or use `async with`."""

    def __init__(
        self, config: EngineConfig, draft: EngineLane, target: EngineLane, calibrator: Calibrator | None
    ) -> None:
        self.config = config
        self._lanes = draft, target
        self._calibrator = calibrator
        self._defaults: OrderedDict[tuple[object, ...], Calibrator] = OrderedDict()
        self._gates: dict[tuple[int, str], ConformalGate] = {}
        self._listeners: list[DecisionListener] = []
        self._rates: dict[tuple[torch.device, torch.dtype], Rates] = {}
        self._open_chains = 0
        models = draft.model, target.model
        self._prompt = config.prompt if config.prompt is not None else assembly.default_prompt(*models)
        self._pair = Pair(draft, target, assembly.tongues(*models))
        self._prefixes = PrefixStore(target, self._prefix_tokens())

    @classmethod
    async def create(cls, config: EngineConfig, calibrator: Calibrator | None = None) -> AsyncEngine:
        """Load both models, or ask for the servers that have them, and start. Raises `InputError` for a model that
        cannot be had or a pair that does not fit, `LaneError` for a server that does not answer.

        calibrator: used by every request that brings none of its own; None: `Adaptive`, smoothed p-values by turn at
        an adaptive level that start cold and learn online, one for each setting that changes what scores mean.
        """
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        if config.ops is not None:
            ops.use(config.ops)
        if config.check_ops:
            ops.checked()
        await asyncio.to_thread(assembly.tune, config)
        mailbox = Mailbox(asyncio.get_running_loop())

        def heard(request: GateRequest, result: SpanResult) -> None:
            assert isinstance(request, PlacedRequest)
            mailbox.post(lambda: request.gate.heard(request, result))

        lanes = await assembly.lanes(config, mailbox, heard)
        try:
            return cls(config, *lanes, calibrator)
        except BaseException:
            for lane in lanes:
                await lane.aclose()
            raise

    @property
    def draft_model(self) -> ModelInfo:
        return self._lanes[0].model

    @property
    def target_model(self) -> ModelInfo:
        return self._lanes[1].model

    async def generate(
        self,
        problem: Problem | str,
        params: ATTSParams | None = None,
        *,
        calibrator: Calibrator | None = None,
        chains: Sequence[int] | None = None,
        priority: int = 0,
        deadline_s: float | None = None,
        task: Task | None = None,
        prompts: Prompts | None = None,
        gate: Gate | None = None,
    ) -> AsyncGenerator[Event, None]:
        """Events of a problem's chains as they happen; `SolutionEvent` is the last.

        Leaving the iterator cancels every chain and frees its pages in both lanes.

        chains: numbers of the chains to write (all of `range(params.chains)` when None): how a run is resumed.
        priority: requests with a lower number are served first and preempted last, without exception; among equals,
        problems get equal shares. deadline_s: seconds from now after which chains that still run end where they are
        (`finish` "deadline"), and what there is takes the vote. task: says when two answers are one, and judges steps
        where a strategy asks for that; None: answers are compared as texts. prompts: what the chains go on from (see
        `prompts`); None: the problem's text in the engine's prompt. gate: judges the spans in the calibrator's place.
        Raises `InputError` for a prompt that does not fit, `QueueFull` when there are too many chains already,
        `LaneError` when a lane has failed.
        """
        params = params if params is not None else ATTSParams()
        if deadline_s is not None and not deadline_s > 0.0:
            raise InputError(f"deadline_s must be more than 0 seconds, not {deadline_s}")
        problem = problem if isinstance(problem, Problem) else Problem("0", problem)
        gate = self._gate(params, calibrator) if gate is None else gate
        prompts = self._prompts(problem) if prompts is None else prompts
        events: asyncio.Queue[Event | BaseException] = asyncio.Queue()

        async def work() -> None:
            try:
                await run_problem(
                    self._pair, prompts, problem, params, gate, events.put_nowait, chains, priority, deadline_s, task
                )
            except Exception as error:
                events.put_nowait(error)

        wanted = params.chains if chains is None else len(chains)
        self._admit(wanted)
        self._open_chains += wanted
        running = asyncio.create_task(work())
        try:
            while True:
                event = await events.get()
                if isinstance(event, BaseException):
                    raise event
                yield event
                if isinstance(event, SolutionEvent):
                    return
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            self._open_chains -= wanted

    async def solve(
        self,
        problem: Problem | str,
        params: ATTSParams | None = None,
        *,
        calibrator: Calibrator | None = None,
        priority: int = 0,
        deadline_s: float | None = None,
        task: Task | None = None,
        prompts: Prompts | None = None,
    ) -> Solution:
        """Run a problem to its end and return the vote; errors and settings as in `generate`."""
        stream = self.generate(
            problem,
            params,
            calibrator=calibrator,
            priority=priority,
            deadline_s=deadline_s,
            task=task,
            prompts=prompts,
        )
        async with aclosing(stream) as events:
            async for event in events:
                if isinstance(event, SolutionEvent):
                    return event.solution
        raise AssertionError("generate() ended without a solution")

    async def complete(
        self,
        prompt: Sequence[int],
        samplings: Sequence[SamplingParams],
        max_tokens: int,
        *,
        priority: int = 0,
        deadline_s: float | None = None,
        chunk_tokens: int | None = None,
    ) -> AsyncGenerator[CompletionEvent, None]:
        """The target alone: a sample of `prompt` (its token ids) for each of `samplings`, at most `max_tokens` each.

        Events as they happen; every sample's last one says how it finished. Leaving the iterator frees the pages of
        all. chunk_tokens: handed over at a time; None: as configured. Errors, priority and deadline as in `generate`;
        `ChainError` where a sample cannot go on, which ends the others.
        """
        self._admit(len(samplings))
        self._open_chains += len(samplings)
        stream = complete(
            self._pair.target,
            self.target_model.tokenizer,
            prompt,
            samplings,
            max_tokens,
            priority=priority,
            deadline_s=deadline_s,
            chunk_tokens=chunk_tokens,
        )
        try:
            async with aclosing(stream) as events:
                async for event in events:
                    yield event
        finally:
            self._open_chains -= len(samplings)

    async def score(self, prefix: Sequence[int], span: Sequence[int]) -> SpanScore:
        """How likely the target finds the tokens of `span` after those of `prefix`, one or more of each.

        A prefix stays open for as long as `score_cache_tokens` has room: the next span of it, or of one that begins
        with it, computes nothing of it again. Raises `InputError` for tokens that do not fit, `LaneError`.
        """
        vocab, context = self.target_model.vocab_size, self.context_tokens
        bad = next((t for t in span if not 0 <= t < vocab), None)
        if bad is not None:
            raise InputError(f"token id {bad} of the span is outside the vocabulary of {vocab}")
        if len(prefix) + len(span) > context:
            raise InputError(f"prefix and span have {len(prefix) + len(span)} tokens, and there is room for {context}")
        return await self._prefixes.score(prefix, span)

    async def forget_prefixes(self) -> None:
        """Give back the pages of every prefix that `score` keeps."""
        await self._prefixes.clear()

    def prompts(self, content: str | Sequence[Mapping[str, Any]]) -> Prompts:
        """Both models' tokens of a text as it stands, or of chat messages through each model's own template."""
        codecs = self.draft_model.tokenizer, self.target_model.tokenizer
        made = [c.encode(content) if isinstance(content, str) else c.chat_prompt(content) for c in codecs]
        return Prompts(tuple(made[0]), tuple(made[1]))

    async def check(self, lane: str, timeout_s: float = 10.0) -> float:
        """Have the lane ("draft" or "target") compute a token ahead of all other work; returns the seconds it took.
        `LaneError` for a lane that has failed, or says nothing for `timeout_s` seconds."""
        began = time.perf_counter()
        asked = self._pair.draft if lane == "draft" else self._pair.target
        try:
            async with asyncio.timeout(timeout_s):
                await _one_token(asked)
        except TimeoutError as error:
            raise LaneError(f"{lane} lane: no answer within {timeout_s:g} seconds") from error
        except ChainError as error:
            raise LaneError(f"{lane} lane: {error}") from error
        return time.perf_counter() - began

    @property
    def context_tokens(self) -> int:
        """Tokens that one sequence of the target may hold: its context, or the KV pool where that is smaller."""
        return self.lane_context_tokens["target"]

    @property
    def lane_context_tokens(self) -> dict[str, int]:
        """As `context_tokens`, of each lane."""
        return {lane.name: min(lane.max_length, lane.pool_tokens or lane.max_length) for lane in self._lanes}

    @property
    def pool_tokens(self) -> dict[str, int | None]:
        """Tokens that each lane's KV pool holds; None where a server keeps that to itself."""
        return {lane.name: lane.pool_tokens for lane in self._lanes}

    def add_decision_listener(self, listener: DecisionListener) -> Callable[[], None]:
        """Have `listener` called with every verdict in decision_seq order, those of cancelled chains too;
        returns a function that takes it off again."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def calibration_meta(self, params: ATTSParams) -> Meta:
        """The conditions that calibration scores of these models, this prompt and these parameters are taken under."""
        return Meta(
            draft=self.draft_model.fingerprint,
            target=self.target_model.fingerprint,
            prompt=prompt_hash(self._prompt),
            draft_tokens=params.draft_tokens,
            temperature=params.temperature,
            score=params.settings.score,
        )

    def prompt_lengths(self, problem: Problem) -> tuple[int, int]:
        """Tokens of the problem's prompt, as the draft and as the target count them; `InputError` as in `generate`."""
        prompts = self._prompts(problem)
        return len(prompts.draft), len(prompts.target)

    def stats(self) -> dict[str, dict[str, float]]:
        """Counters of each lane since it began: `InProcessLane.stats`, `RemoteLane.stats`."""
        return {lane.name: lane.stats() for lane in self._lanes}

    def restart_peaks(self) -> None:
        """Let `peak_kv_bytes` of each lane in this process count from now on."""
        for lane in self._lanes:
            if isinstance(lane, InProcessLane):
                lane.restart_peak()

    def prefix_stats(self) -> dict[str, int]:
        """Of `score`: prefix tokens asked for and found since the engine began, and those held open now."""
        kept = self._prefixes
        return {"queried": kept.queried_tokens, "hit": kept.hit_tokens, "held": kept.held_tokens}

    async def rates(self) -> dict[str, Rates]:
        """What the device of each lane in this process reaches in the lane's dtype, measured at the first call, which
        takes about a second a device. Ask while no chain runs: a busy device measures low."""
        found = {}
        for lane in self._lanes:
            if not isinstance(lane, InProcessLane):
                continue
            head = lane.model.decoder.lm_head
            key = (head.device, head.dtype)
            if key not in self._rates:
                self._rates[key] = await asyncio.to_thread(probe, *key)
            found[lane.name] = self._rates[key]
        return found

    def servers(self) -> dict[str, dict[str, Any]]:
        """Of each lane that is on a server: its address, engine and version, model, context, whether scores append to
        what the server holds or compute all of a chain again ("append", "recompute"), and whether it heeds seeds."""
        return {lane.name: lane.about() for lane in self._lanes if isinstance(lane, RemoteLane)}

    async def close(self) -> None:
        """Stop both lanes; chains that still run end with `LaneError`. Closing twice is allowed."""
        for lane in self._lanes:
            await lane.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _prefix_tokens(self) -> int:
        """Of prefixes that stay open for `score`."""
        target = self._lanes[1]
        if not target.appends:
            # The server would compute them again all the same.
            return 0
        return self.config.score_cache_tokens or (target.pool_tokens or target.max_length) // 8

    def _admit(self, chains: int) -> None:
        limit = self.config.max_sequences
        if limit is None:
            return
        if chains > limit:
            raise InputError(f"{chains} chains are more than max_sequences = {limit} allows at any time")
        if self._open_chains + chains > limit:
            raise QueueFull(
                f"{self._open_chains} chains are open and {chains} more would exceed max_sequences = {limit}; "
                "ask again when some have ended"
            )

    def _gate(self, params: ATTSParams, calibrator: Calibrator | None) -> ConformalGate:
        calibrator = calibrator or self._calibrator or self._default_calibrator(params)
        if calibrator.alpha != params.alpha and params.settings.calibrated:
            raise InputError(
                f"the calibrator was made for alpha {calibrator.alpha}, but the request asks for {params.alpha}"
            )
        if calibrator.meta.score != params.settings.score and params.settings.calibrated:
            raise InputError(
                f"the calibrator holds scores of {calibrator.meta.score}, but the strategy {params.strategy} tests "
                f"{params.settings.score}; make it with meta=engine.calibration_meta(params)"
            )
        if params.early_verdict:
            self._check_early(calibrator)
        name = (id(calibrator), params.policy)
        gate = self._gates.get(name)
        if gate is None:
            gate = self._gates[name] = ConformalGate.under(params.policy, calibrator, self._announce)
        return gate

    def _check_early(self, calibrator: Calibrator) -> None:
        if not calibrator.frozen:
            raise InputError(
                "early_verdict needs a frozen calibration: a span that ends early has no whole score to learn from; "
                "save one with `atts calibrate` and load it frozen, or leave early_verdict off"
            )
        if isinstance(calibrator, Monitored):
            raise InputError(
                "early_verdict leaves a monitor no p-values of whole spans to watch; leave one of the two out"
            )
        if self._pair.tongues.codecs is not None:
            raise InputError(
                "early_verdict needs a pair that shares a tokenizer: with two, nobody knows how many of the target's "
                "tokens a span will have at most"
            )

    def _default_calibrator(self, params: ATTSParams) -> Calibrator:
        key = (params.alpha, params.draft_tokens, params.target_tokens, params.temperature, params.top_k,
        params.top_p,
               params.min_p, params.replaces, params.settings.score)  # fmt: skip
        if key not in self._defaults:
            self._defaults[key] = Adaptive(params.alpha, meta=self.calibration_meta(params))
        self._defaults.move_to_end(key)
        if len(self._defaults) > MAX_DEFAULT_CALIBRATORS:
            _, forgotten = self._defaults.popitem(last=False)
            self._gates = {name: gate for name, gate in self._gates.items() if gate.calibrator is not forgotten}
        return self._defaults[key]

    def _announce(self, decision: Decision) -> None:
        for listener in tuple(self._listeners):
            listener(decision)

    def _prompts(self, problem: Problem) -> Prompts:
        if not problem.problem.strip():
            raise InputError(f"problem {problem.id!r} has no text")
        message = [{"role": "user", "content": fill_prompt(self._prompt, problem.problem)}]
        return Prompts(
            tuple(self.draft_model.tokenizer.chat_prompt(message)),
            tuple(self.target_model.tokenizer.chat_prompt(message)),
        )


class Engine:
    """`AsyncEngine` for code without an event loop: `with Engine(config) as engine: engine.solve("...")`."""

    def __init__(self, config: EngineConfig, calibrator: Calibrator | None = None) -> None:
        self._runner = asyncio.Runner()
        try:
            self._engine = self._run(AsyncEngine.create(config, calibrator))
        except BaseException:
            self._runner.close()
            raise

    def solve(
        self,
        problem: Problem | str,
        params: ATTSParams | None = None,
        *,
        calibrator: Calibrator | None = None,
    ) -> Solution:
        """As `AsyncEngine.solve`."""
        return self._run(self._engine.solve(problem, params, calibrator=calibrator))

    def stats(self) -> dict[str, dict[str, float]]:
        return self._engine.stats()

    def close(self) -> None:
        self._run(self._engine.close())
        self._runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(work)


async def _one_token(lane: Lane) -> None:
    seq = await lane.open([0], priority=FIRST)
    try:
        async for _ in lane.decode(seq, 1, SamplingParams(temperature=0.0)):
            pass
    finally:
        await lane.close(seq)
