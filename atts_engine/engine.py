"""`AsyncEngine`, the public face: two models, their lanes, and the chains that run on them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch

from atts_engine import ops
from atts_engine.backends import InProcessLane
from atts_engine.config import MATH_PROMPT, EngineConfig, dtype_of, fill_prompt, prompt_hash
from atts_engine.conformal import Adaptive, Calibrator, GateRequest, Meta, Monitored, Policy, TopB, make_policy
from atts_engine.errors import InputError, QueueFull
from atts_engine.models import Decoder, Model, load_model, resolve_device
from atts_engine.ops import tuning
from atts_engine.pipeline import (
    ATTSParams,
    ConformalGate,
    Decision,
    Event,
    Pair,
    Problem,
    Prompts,
    Solution,
    Task,
    Tongues,
    Words,
    run_problem,
)
from atts_engine.pipeline.events import SolutionEvent
from atts_engine.pipeline.gate import PlacedRequest
from atts_engine.runtime import (
    EngineLoop,
    LaneCore,
    Mailbox,
    Rates,
    SpanResult,
    available_bytes,
    kv_bytes_per_token,
    pool_tokens,
    probe,
)

DecisionListener = Callable[[Decision], None]
T = TypeVar("T")


class AsyncEngine:
    """Made by `await AsyncEngine.create(config)`; belongs to that event loop. Close it or use `async with`."""

    def __init__(
        self,
        config: EngineConfig,
        draft: Model,
        target: Model,
        cores: tuple[LaneCore, LaneCore],
        calibrator: Calibrator | None,
    ) -> None:
        self.config = config
        self.draft_model = draft
        self.target_model = target
        self._cores = cores
        self._calibrator = calibrator
        self._defaults: dict[tuple[object, ...], Calibrator] = {}
        self._gates: dict[tuple[int, str], ConformalGate] = {}
        self._listeners: list[DecisionListener] = []
        self._rates: dict[tuple[torch.device, torch.dtype], Rates] = {}
        self._open_chains = 0
        self._prompt = config.prompt if config.prompt is not None else _default_prompt(draft, target)
        mailbox = Mailbox(asyncio.get_running_loop())

        def decided(request: GateRequest, result: SpanResult) -> None:
            mailbox.post(lambda: self._decided(request, result))

        heard = [(core, decided) for core in cores]
        self._loops = [EngineLoop(heard)] if config.lane_threads == "one" else [EngineLoop([lane]) for lane in heard]
        lanes = [
            InProcessLane(core, loop, mailbox, chunk_tokens=config.chunk_tokens)
            for core, loop in zip(cores, (self._loops[0], self._loops[-1]), strict=True)
        ]
        self._pair = Pair(lanes[0], lanes[1], _tongues(draft, target))
        for loop in self._loops:
            loop.start()

    @classmethod
    async def create(cls, config: EngineConfig, calibrator: Calibrator | None = None) -> AsyncEngine:
        """Load both models and start. Raises `InputError` for a model that cannot be had or a pair that does not fit.

        calibrator: used by every request that brings none of its own; None: `Adaptive`, smoothed p-values by turn at
        an adaptive level that start cold and learn online, one for each setting that changes what scores mean.
        """
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        if config.ops is not None:
            ops.use(config.ops)
        if config.check_ops:
            ops.checked()
        await asyncio.to_thread(_tune, config)
        draft, target = await asyncio.to_thread(_load_pair, config)
        cores = await asyncio.to_thread(_cores, config, draft, target)
        return cls(config, draft, target, cores, calibrator)

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
    ) -> AsyncGenerator[Event, None]:
        """Events of a problem's chains as they happen; `SolutionEvent` is the last.

        Leaving the iterator cancels every chain and frees its pages in both lanes.

        chains: numbers of the chains to write (all of `range(params.chains)` when None): how a run is resumed.
        priority: requests with a lower number are served first and preempted last, without exception; among equals,
        problems get equal shares. deadline_s: seconds from now after which chains that still run end where they are
        (`finish` "deadline"), and what there is takes the vote. task: says when two answers are one, and judges steps
        where a strategy asks for that; None: answers are compared as texts.
        Raises `InputError` for a prompt that does not fit, `QueueFull` when there are too many chains already,
        `LaneError` when a lane has failed.
        """
        params = params if params is not None else ATTSParams()
        if deadline_s is not None and not deadline_s > 0.0:
            raise InputError(f"deadline_s must be more than 0 seconds, not {deadline_s}")
        problem = problem if isinstance(problem, Problem) else Problem("0", problem)
        gate = self._gate(params, calibrator)
        prompts = self._prompts(problem)
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
    ) -> Solution:
        """Run a problem to its end and return the vote; errors and settings as in `generate`."""
        stream = self.generate(
            problem, params, calibrator=calibrator, priority=priority, deadline_s=deadline_s, task=task
        )
        async with aclosing(stream) as events:
            async for event in events:
                if isinstance(event, SolutionEvent):
                    return event.solution
        raise AssertionError("generate() ended without a solution")

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
        """Counters of each lane since it began (see `LaneStats` and `LaneTotals`), its pool's pages, and its open
        sequences. peak_kv_bytes: of the most pages that were in use on its device at once since `restart_peaks`."""
        return {
            core.name: asdict(core.stats)
            | asdict(core.meter.totals)
            | {
                "free_pages": core.pool.free,
                "used_pages": core.pool.used,
                "peak_kv_bytes": core.pool.peak * core.pool.page_size * kv_bytes_per_token(core.model),
                "host_free_pages": core.host_pool.free,
                "host_used_pages": core.host_pool.used,
                "open_sequences": core.open_sequences,
            }
            for core in self._cores
        }

    def restart_peaks(self) -> None:
        """Let `peak_kv_bytes` of each lane count from now on."""
        for core in self._cores:
            core.pool.restart_peak()

    async def rates(self) -> dict[str, Rates]:
        """What the device of each lane reaches in the lane's dtype, measured at the first call, which takes about a
        second a device. Ask while no chain runs: a busy device measures low."""
        found = {}
        for core in self._cores:
            decoder = core.model.decoder
            key = (decoder.lm_head.device, decoder.lm_head.dtype)
            if key not in self._rates:
                self._rates[key] = await asyncio.to_thread(probe, *key)
            found[core.name] = self._rates[key]
        return found

    async def close(self) -> None:
        """Stop both lanes; chains that still run end with `LaneError`. Closing twice is allowed."""
        for loop in self._loops:
            await asyncio.to_thread(loop.stop)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

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
            policy: Policy | None = None
            if params.policy != "threshold":
                made = make_policy(params.policy, params.alpha)
                assert not isinstance(made, TopB), "ATTSParams refuses policies that need a barrier"
                policy = made
            gate = self._gates[name] = ConformalGate(calibrator, self._announce, policy)
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
               params.min_p, params.takeover, params.settings.score)  # fmt: skip
        if key not in self._defaults:
            self._defaults[key] = Adaptive(params.alpha, meta=self.calibration_meta(params))
        return self._defaults[key]

    def _decided(self, request: GateRequest, result: SpanResult) -> None:
        assert isinstance(request, PlacedRequest)
        request.gate.heard(request, result)

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


def _tune(config: EngineConfig) -> None:
    """Put the tuning table of --tuning in force, or that of the target's GPU where there is one. The table is the
    process's: two kinds of GPU share the target's."""
    device = resolve_device(config.target_device)
    path = Path(config.tuning) if config.tuning is not None else None
    if path is None and device.type == "cuda":
        path = tuning.find(torch.cuda.get_device_name(device))
    if path is not None:
        tuning.put_in_force(tuning.load(path), path)


def _load_pair(config: EngineConfig) -> tuple[Model, Model]:
    dtype = dtype_of(config.dtype)
    # Both before anything is loaded: a large draft should not be read for a target device that is not there.
    places = resolve_device(config.draft_device), resolve_device(config.target_device)
    draft = load_model(config.draft, places[0], dtype)
    if config.target == config.draft and places[0] == places[1]:
        # One copy of the weights, two decoders: a decoder's buffers belong to one lane's thread and stream.
        return draft, replace(draft, decoder=Decoder(draft.config, draft.decoder.weights))
    return draft, load_model(config.target, places[1], dtype)


def _tongues(draft: Model, target: Model) -> Tongues:
    ends = [frozenset(m.tokenizer.eos_token_ids) | frozenset(m.config.eos_token_ids) for m in (draft, target)]
    if draft.tokenizer.fingerprint == target.tokenizer.fingerprint:
        words = Words(target.tokenizer, ends[0] | ends[1])
        return Tongues(words, words)
    for model in (draft, target):
        if model.tokenizer.eos_token_id is None:
            raise InputError(
                f"{model.name}: the tokenizer has no end-of-text token, which a pair with two tokenizers needs; "
                "name one as `eos_token` in its tokenizer_config.json"
            )
        try:
            model.tokenizer.encoder()
        except InputError as error:
            raise InputError(f"{model.name}: {error}; choose a pair that shares a tokenizer") from error
    codecs = draft.tokenizer, target.tokenizer
    own = [Words(codec, end, codec.eos_token_id) for codec, end in zip(codecs, ends, strict=True)]
    return Tongues(own[0], own[1], codecs)


def _cores(config: EngineConfig, draft: Model, target: Model) -> tuple[LaneCore, LaneCore]:
    models, devices = (draft, target), (draft.decoder.device, target.decoder.device)
    token_bytes = [kv_bytes_per_token(model) for model in models]
    if config.kv_tokens is not None:
        tokens = [config.kv_tokens, config.kv_tokens]
    else:
        free = [available_bytes(device) for device in devices]
        tokens = pool_tokens(devices, token_bytes, free, config.kv_memory_fraction)
    cpu = torch.device("cpu")
    room = pool_tokens((cpu, cpu), token_bytes, [available_bytes(cpu)] * 2, None)

    def core(name: str, lane: int, stream_priority: int) -> LaneCore:
        host = config.host_kv_tokens
        if host is None:
            moves = config.preemption == "swap" or (config.preemption == "auto" and devices[lane].type != "cpu")
            host = min(tokens[lane], room[lane]) if moves else 0
        made = LaneCore(
            name,
            models[lane],
            kv_tokens=tokens[lane],
            page_size=config.page_size,
            max_batch_tokens=config.max_batch_tokens,
            device=devices[lane],
            host_kv_tokens=host,
            preemption=config.preemption,
            overlap=config.overlap,
            graphs=config.graphs,
            stream_priority=stream_priority,
            profile=config.profile,
        )
        made.warm_up()
        return made

    # Where both lanes share a GPU, drafting goes first: many short steps, and every chain waits for them.
    return core("draft", 0, -1), core("target", 1, 0)


def _default_prompt(draft: Model, target: Model) -> str:
    return "{problem}" if {draft.name, target.name} <= {"tiny-draft", "tiny-target"} else MATH_PROMPT
