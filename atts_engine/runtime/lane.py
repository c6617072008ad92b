"""The in-process lane's core: sequences, their commands, and one loop body, `schedule() -> launch() -> commit()`.

Everything here happens on the scheduler thread; other threads reach it through `EngineLoop.post`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import replace

import numpy as np
import torch

from atts_engine.conformal import GateRequest
from atts_engine.errors import AttsError, ChainError, ContextFull, InputError, LaneError
from atts_engine.kv import BlockTable, PagePool
from atts_engine.models import Model
from atts_engine.runtime.commands import Append, Command, Decode, Fork, Propose, Scored, Truncate, Verdict
from atts_engine.runtime.decoding import DecodeState
from atts_engine.runtime.gating import DeviceGate, ScoredSpan
from atts_engine.runtime.memory import kv_bytes_per_token
from atts_engine.runtime.meters import CudaPasses, HostPasses, LaneMeter, ModelCost, Standing
from atts_engine.runtime.preemption import Costs
from atts_engine.runtime.ranges import make_ranges
from atts_engine.runtime.records import SpanResult
from atts_engine.runtime.runner import Draw, Pending, Runner
from atts_engine.runtime.scheduler import Scheduler
from atts_engine.runtime.sequence import Sequence
from atts_engine.runtime.stats import LaneStats

DecisionListener = Callable[[GateRequest, SpanResult], None]


class LaneCore:
    """A model, its KV pool and the sequences on it.

    host_kv_tokens: capacity of the pool in host memory that the KV of preempted sequences may move to; preemption:
    "auto" moves where that is quicker than computing it again, "swap" wherever there is room, "recompute" never.

    overlap: launch a step before the one before it is committed; None: on a GPU. graphs: see `Runner`.
    stream_priority: of the lane's CUDA streams, lower goes first. profile: NVTX ranges on a GPU.
    """

    def __init__(
        self,
        name: str,
        model: Model,
        *,
        kv_tokens: int,
        page_size: int,
        max_batch_tokens: int,
        device: torch.device,
        host_kv_tokens: int = 0,
        preemption: str = "auto",
        overlap: bool | None = None,
        graphs: bool | None = None,
        stream_priority: int = 0,
        profile: bool = False,
    ) -> None:
        self.name = name
        self.model = model
        self.stats = LaneStats()
        self.max_length = model.config.max_positions
        num_pages = 1 + -(-kv_tokens // page_size)
        self.pool = PagePool(num_pages, page_size)
        host_pages = 0 if preemption == "recompute" else -(-host_kv_tokens // page_size)
        self.host_pool = PagePool(host_pages, page_size, padding=False)
        self._runner = Runner(
            model.decoder,
            num_pages,
            page_size,
            device,
            model.decoder.lm_head.dtype,
            host_pages=host_pages,
            graphs=graphs,
            stream_priority=stream_priority,
        )
        passes = CudaPasses(self._runner.on_stream) if device.type == "cuda" else HostPasses()
        self.meter = LaneMeter(ModelCost.of_model(model), passes)
        self._max_batch_tokens = max_batch_tokens
        costs = Costs.of(model.config, kv_bytes_per_token(model) * page_size, device.type)
        self._scheduler = Scheduler(
            self.pool, self.host_pool, max_batch_tokens, costs if preemption == "auto" else None
        )
        overlaps = overlap if overlap is not None else device.type == "cuda"
        self._depth = 2 if overlaps else 1
        self._flight: deque[Pending] = deque()
        """Steps that were launched and not committed, oldest first; at most `_depth` of them."""
        self._ranges = make_ranges(profile, device)
        self._gate = DeviceGate(device)
        self._eos = frozenset(model.tokenizer.eos_token_ids) | frozenset(model.config.eos_token_ids)
        self._sequences: dict[int, Sequence] = {}
        self._leaving: set[Sequence] = set()
        """Closed, but with rows in flight: their pages come back when these have arrived."""
        self._ready: list[Sequence] = []
        self._failure: LaneError | None = None

    def warm_up(self) -> None:
        """Compile, capture and allocate what steps will need; before the first step, on any thread."""
        self._runner.warm_up(self._max_batch_tokens)
        with self._runner.aside():
            self._gate.warm_up()

    # -- commands --

    def open(self, seq_id: int, prompt: tuple[int, ...], group: Hashable = None, priority: int = 0) -> None:
        """group: None is a group of its own, and of those that are forked from it."""
        group = ("sequence", seq_id) if group is None else group
        table = BlockTable(self.pool, self.host_pool)
        self.meter.arrived(self.meter.clock())
        self._sequences[seq_id] = Sequence(seq_id, list(prompt), table, group=group, priority=priority)

    def command(self, seq_id: int, command: Command, asked_at: float | None = None) -> None:
        """asked_at: time of the meter's clock at which it was asked, which may be before this thread came to it."""
        began = self.meter.clock()
        asked_at = began if asked_at is None else asked_at
        self.meter.arrived(asked_at)
        seq = self._sequences.get(seq_id)
        if self._failure is not None:
            command.reply(None, self._failure)
        elif seq is None:
            command.reply(None, ChainError(f"{self.name}: sequence {seq_id} is closed"))
        else:
            if isinstance(command, Decode | Propose | Verdict) or (isinstance(command, Scored) and command.wait):
                seq.asked(asked_at)
            seq.pending.append(command)
            self._advance(seq)
        self.meter.carried_out(began)

    def stop_decode(self, seq_id: int) -> None:
        """End the running decode where it stands: its reader is gone."""
        seq = self._sequences.get(seq_id)
        if seq is not None and seq.decode is not None:
            self._end_decode(seq, None)
            self._advance(seq)

    def close(self, seq_id: int) -> None:
        seq = self._sequences.get(seq_id)
        if seq is not None:
            self._drop(seq, ChainError(f"{self.name}: sequence {seq_id} was closed"))
            if not self._sequences and not self._flight:
                self.meter.emptied()

    @property
    def open_sequences(self) -> int:
        return len(self._sequences) + len(self._leaving)

    # -- one step --

    @property
    def in_flight(self) -> bool:
        return bool(self._flight)

    def step(self, on_decision: DecisionListener, *, wait: bool = True) -> bool:
        """Do one step's worth of work; False when there is none, or none before the device is further on and `wait` is
        off. A fault of the model fails the whole lane."""
        if self._failure is not None:
            return False
        try:
            return self._step(on_decision, wait)
        except Exception as error:
            self.fail(LaneError(f"{self.name} lane failed: {type(error).__name__}: {error}"), error)
            return False

    def fail(self, failure: LaneError, cause: BaseException | None = None) -> None:
        failure.__cause__ = cause
        self._failure = failure
        # What is in flight runs to its end on the device and is heard by nobody; no step follows it.
        for seq in (*self._sequences.values(), *self._leaving):
            seq.flights = 0
        self._flight.clear()
        for seq in self._leaving:
            seq.table.release()
        self._leaving.clear()
        for seq in list(self._sequences.values()):
            self._drop(seq, failure)

    def _step(self, on_decision: DecisionListener, wait: bool) -> bool:
        began = self.meter.begin()
        # The device gets its next step before the host looks at the results of the last one.
        launched = len(self._flight) < self._depth and self._launch()
        full = len(self._flight) == self._depth
        committed = bool(self._flight) and (full or not launched) and (wait or self._flight[0].ready())
        if committed:
            with self._ranges(f"{self.name}.commit"):
                self._commit(self._flight.popleft())
        decided = self._decide(on_decision)
        if decided:
            self.meter.decided()
        ended = self.meter.end(self._standing())
        # Pages in quarantine come free at the next step, and somebody may be waiting for them.
        if not (launched or committed or decided or self.pool.quarantined):
            return False
        self.stats.busy_s += ended - began
        return True

    def _standing(self) -> Standing:
        if self._flight:
            return Standing.FLIGHT
        if self._ready or any(seq.wanted for seq in self._sequences.values()):
            return Standing.READY
        return Standing.IDLE if self._sequences else Standing.CLOSED

    def _launch(self) -> bool:
        if self.pool.quarantined:
            self._runner.wipe(self.pool.quarantined)
            self.pool.readmit()
        step = self._scheduler.schedule(self._sequences.values())
        self.stats.preemptions += step.swapped + step.dropped
        self.stats.preemptions_swap += step.swapped
        self.stats.preemptions_recompute += step.dropped
        self.stats.swapped_out_pages += len(step.swap_out)
        self.stats.swapped_in_pages += len(step.swap_in)
        for seq in step.impossible:
            self._drop(
                seq,
                ChainError(
                    f"{self.name}: a sequence of {seq.goal} tokens does not fit the KV pool of "
                    f"{self.pool.capacity * self.pool.page_size} tokens; raise kv_tokens or kv_memory_fraction"
                ),
            )
        now = self.meter.scheduled(launching=bool(step.work))
        if step.work:
            with self._ranges(f"{self.name}.{step.kinds}"):
                self._flight.append(self._runner.launch(step, self._flight[-1] if self._flight else None))
            self.meter.launched(step)
            for work in step.work:
                work.seq.served(now)
                dropped, repeated = work.seq.launch(work.start + work.count, work.score, work.draws)
                self.stats.recomputed_tokens += dropped
                self.stats.repeated_tokens += repeated
                self.stats.distinct_tokens += work.count - dropped - repeated
            self.meter.scheduled()
        elif step.swap_out:
            # Pages were taken from somebody, and were not enough: what they held must not be lost.
            self._runner.move(step)
        return bool(step.work or step.impossible)

    def _commit(self, pending: Pending) -> None:
        output = pending.collect()
        now = self.meter.collected()
        scores = output.logprobs
        sampled = iter(output.sampled)
        offset = 0
        touched: list[Sequence] = []
        self.stats.steps += 1
        for work in pending.step.work:
            seq = work.seq
            self.stats.computed_tokens += work.count
            for first, last in work.score:
                seq.scored.append((first, scores[offset : offset + last - first]))
                offset += last - first
                self.stats.scored_tokens += last - first
            seq.flights -= 1
            if not seq.flights and (seq.decode is not None or seq.pending):
                seq.asked(now)
            if work.sample is not None:
                drawn = [next(sampled) for _ in range(work.draws)]
                if work.sample is seq.decode:
                    self._take(seq, work.sample, drawn)
                else:
                    self._discard(seq, drawn)
            touched.append(seq)
        for seq in touched:
            if seq in self._leaving and not seq.flights:
                self._leaving.discard(seq)
                seq.table.release()
            elif not seq.closed:
                self._advance(seq)
        self.meter.committed()

    def _discard(self, seq: Sequence, drawn: list[Draw]) -> None:
        """Rows that were launched before the host knew that their sequence had ended its decode."""
        self.stats.computed_tokens -= len(drawn)
        self.stats.distinct_tokens -= len(drawn)
        self.stats.discarded_rows += len(drawn)
        self._forget(seq, drawn)

    def _forget(self, seq: Sequence, drawn: list[Draw]) -> None:
        """Rows behind the end of their sequence are for nobody, and neither are the pages that they alone are in."""
        poisoned = any(draw.token < 0 for draw in drawn)
        if poisoned:
            self.pool.taint(seq.table.pages)
        if seq.flights or seq.closed:
            return
        if poisoned:
            # The NaN lies past the end, where a lane that forwards one token at a time would never have written it.
            seq.drop_kv()
        else:
            seq.trim()

    def _take(self, seq: Sequence, state: DecodeState, drawn: list[Draw]) -> None:
        """What was drawn for a decode, in the order of positions: one token, or several where some were proposed."""
        state.in_flight = False
        for n, draw in enumerate(drawn):
            if draw.token < 0 and state.proposed:
                # The proposed tokens may be the cause: the lane draws its own without them.
                seq.retract()
                rejected = drawn[n:]
            else:
                self._take_token(seq, state, draw)
                rejected = drawn[n + 1 :] if seq.decode is not state else []
            if rejected:
                self.stats.rejected_rows += len(rejected)
                self._forget(seq, rejected)
                return

    def _take_token(self, seq: Sequence, state: DecodeState, draw: Draw) -> None:
        if draw.token < 0:
            self._poisoned(seq, "logits are NaN")
            return
        if draw.logprob is not None and not math.isfinite(draw.logprob):
            self._poisoned(seq, "the log-probability of a sampled token is not finite")
            return
        self.stats.sampled_tokens += 1
        proposed = seq.place(draw.token)
        self.stats.accepted_tokens += proposed
        finish = state.take(*draw, self._eos, self.model.tokenizer)
        if finish is not None or (state.proposal and not proposed):
            self._end_decode(seq, finish)
        elif isinstance(state.command, Decode) and len(state.buffer) >= state.command.chunk_tokens:
            state.command.emit(state.hand_over())

    def _end_decode(self, seq: Sequence, finish: str | None) -> None:
        state = seq.decode
        assert state is not None
        seq.end_decode()
        waited = seq.take_wait(self.meter.clock())
        match state.command:
            case Decode() as command:
                if finish is not None:
                    command.emit(state.hand_over(finish, waited))
                command.reply(None, None)
            case Propose() as command:
                command.reply(state.outcome(finish, waited), None)

    # -- commands of one sequence --

    def _advance(self, seq: Sequence) -> None:
        """Carry out the commands at the head of the queue as far as they can go without a forward pass."""
        while seq.pending and seq.decode is None:
            command = seq.pending[0]
            match command:
                case Append():
                    done = self._append(seq, command)
                case Decode() | Propose():
                    done = self._begin_decode(seq, command)
                case Truncate():
                    done = self._truncate(seq, command)
                case Fork():
                    done = self._fork(seq, command)
                case Verdict():
                    done = not (seq.to_score or seq.flights) and self._await_verdict(seq)
                case Scored():
                    done = not (command.wait and (seq.to_score or seq.flights)) and self._tell_scored(seq, command)
            if not done:
                return
            # A verdict stays at the head until the gate has answered it; `_decide` takes it off.
            if seq.pending and seq.pending[0] is command:
                seq.pending.popleft()

    def _append(self, seq: Sequence, command: Append) -> bool:
        start, end = seq.total, seq.total + len(command.tokens)
        if end > self.max_length:
            command.reply(
                None,
                ContextFull(f"{self.name}: {end} tokens are more than the model's context of {self.max_length}"),
            )
            return True
        seq.tokens.extend(command.tokens)
        if command.score and command.tokens:
            if seq.to_score and seq.to_score[-1][1] == start:
                start = seq.to_score.pop()[0]
            seq.to_score.append((start, end))
        command.reply(None, None)
        return True

    def _begin_decode(self, seq: Sequence, command: Decode | Propose) -> bool:
        if seq.total >= self.max_length:
            full = f"{self.name}: the chain has filled the model's context of {self.max_length} tokens"
            command.reply(None, ContextFull(full))
            return True
        state = DecodeState(command, limit=min(command.max_tokens, self.max_length - seq.total))
        if isinstance(command, Propose):
            state.recent = seq.tokens[max(0, seq.total - command.written) :] if command.sampling.stop else []
            proposed = self._verifiable(seq, command.tokens, state.limit)
            seq.tokens.extend(proposed)
            state.proposed = len(proposed)
            self.stats.proposed_tokens += len(proposed)
        seq.decode = state
        return True

    def _verifiable(self, seq: Sequence, tokens: tuple[int, ...], limit: int) -> tuple[int, ...]:
        """The first of the proposed tokens that can come to anything. The lane's own next token comes behind them; it
        never draws what is not in its vocabulary; and a proposal is no reason to fail for want of pages."""
        vocabulary = self.model.config.vocab_size
        room = self.pool.capacity * self.pool.page_size - seq.total
        known = next((i for i, t in enumerate(tokens) if not 0 <= t < vocabulary), len(tokens))
        return tokens[: max(0, min(limit - 1, room, known))]

    def _truncate(self, seq: Sequence, command: Truncate) -> bool:
        if seq.flights:
            return False
        if not 1 <= command.length <= seq.total:
            command.reply(
                None,
                InputError(f"truncate to {command.length} tokens: the sequence has {seq.total}, and one must stay"),
            )
            return True
        self.stats.rolled_back_tokens += seq.truncate(command.length)
        command.reply(None, None)
        return True

    def _fork(self, seq: Sequence, command: Fork) -> bool:
        if not seq.settled or seq.flights:
            return False
        for child_id in command.ids:
            self._sequences[child_id] = Sequence(
                child_id,
                list(seq.tokens),
                seq.table.fork(),
                computed=seq.computed,
                furthest=seq.computed,
                known=seq.computed,
                preempted=seq.preempted,
                group=seq.group,
                priority=seq.priority,
            )
        command.reply(None, None)
        return True

    def _await_verdict(self, seq: Sequence) -> bool:
        if seq not in self._ready:
            self._ready.append(seq)
        return False

    def _tell_scored(self, seq: Sequence, command: Scored) -> bool:
        logprobs = seq.scored_logprobs()
        if np.isfinite(logprobs).all():
            command.reply(tuple(logprobs.tolist()), None)
        else:
            # Answers this command too: it is still the first that waits.
            self._poisoned(seq, "the span's log-probabilities hold NaN or infinity")
        return True

    def _decide(self, on_decision: DecisionListener) -> bool:
        """Answer every verdict whose span is scored: one batch, one look at the calibration stores."""
        ready, self._ready = [s for s in self._ready if not s.closed], []
        spans: list[ScoredSpan] = []
        replies: list[tuple[Sequence, Verdict]] = []
        for seq in ready:
            command = seq.pending.popleft()
            assert isinstance(command, Verdict)
            if not seq.scored:
                command.reply(None, InputError(f"{self.name}: a verdict was asked for, but nothing was scored"))
                self._advance(seq)
                continue
            logprobs = seq.scored_logprobs()
            seq.scored.clear()
            if not np.isfinite(logprobs).all():
                command.reply(None, ChainError(f"{self.name}: the span's log-probabilities hold NaN or infinity"))
                self._poisoned(seq, "log-probabilities are not finite")
                continue
            spans.append(ScoredSpan(logprobs, command.gate))
            replies.append((seq, command))
        if not spans:
            return bool(ready)
        with self._ranges(f"{self.name}.gate"), self._runner.aside():
            results = self._gate.decide(spans)
        now = self.meter.clock()
        for (seq, command), result in zip(replies, results, strict=True):
            if command.gate is not None:
                on_decision(command.gate, result)
            command.reply(replace(result, wait_s=seq.take_wait(now)), None)
            self._advance(seq)
        return True

    # -- ends --

    def _poisoned(self, seq: Sequence, what: str) -> None:
        """One chain ends with an error; its pages are wiped before anybody else can read a NaN from them."""
        self.pool.taint(seq.table.pages)
        self._drop(seq, ChainError(f"{self.name}: {what}; the chain cannot go on"))

    def _drop(self, seq: Sequence, error: AttsError) -> None:
        if seq.closed:
            return
        seq.closed = True
        self._sequences.pop(seq.id, None)
        if seq.flights:
            self._leaving.add(seq)
        else:
            seq.table.release()
        if seq.decode is not None:
            seq.decode.command.reply(None, error)
            seq.decode = None
        while seq.pending:
            seq.pending.popleft().reply(None, error)
