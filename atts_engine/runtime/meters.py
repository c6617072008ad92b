"""What a lane does with its time, and how much work its steps are. docs/intensity.md tells what is measured and what is
computed.

Two kinds of figures stay apart. Times are measured, each as the sum of intervals between two looks at a clock; none is
what remains of another. Operations and bytes are computed from the model's shape and the rows of each step.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch

from atts_engine.models import Model, ModelConfig
from atts_engine.runtime.preemption import block_weights
from atts_engine.runtime.scheduler import Step

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class StepRows:
    """What a step asks of the model. rows: tokens forwarded; attended: (row, position) pairs of attention, of one head
    in one layer; cached: tokens whose keys and values attention reads, once a sequence; scored, sampled: rows of the
    LM head."""

    rows: int
    attended: int
    cached: int
    scored: int
    sampled: int

    @classmethod
    def of(cls, step: Step) -> StepRows:
        rows = attended = cached = scored = sampled = 0
        for work in step.work:
            end = work.start + work.count
            rows += work.count
            # Position p attends to p + 1 positions, itself among them.
            attended += (end * (end + 1) - work.start * (work.start + 1)) // 2
            cached += end
            for first, last in work.score:
                scored += last - first
            sampled += work.draws
        return cls(rows, attended, cached, scored, sampled)


@dataclass(frozen=True, slots=True)
class ModelCost:
    """Operations and bytes of a step, from the model's shape. itemsize: bytes of an element of embeddings and KV;
    weights: elements of the matrices of all blocks; block_bytes: what these take in memory; scoring_bytes,
    sampling_bytes: of the LM head, as scores and as samples read it.

    Left out: norms, biases, rotary positions, softmax, and activations, which a device keeps near its units.
    """

    config: ModelConfig
    itemsize: int
    weights: int
    block_bytes: int
    scoring_bytes: int
    sampling_bytes: int

    @classmethod
    def of(cls, config: ModelConfig, itemsize: int) -> ModelCost:
        """Of plain weights."""
        weights, head = block_weights(config), itemsize * config.vocab_size * config.hidden_size
        return cls(config, itemsize, weights, itemsize * weights, head, head)

    @classmethod
    def of_model(cls, model: Model) -> ModelCost:
        """Of weights as the model holds them: packed ones are read packed."""
        held = model.decoder.weights
        return cls(
            model.config,
            held.embed.dtype.itemsize,
            block_weights(model.config),
            sum(matrix.nbytes for layer in held.layers for matrix in layer.matrices),
            held.lm_head.nbytes,
            (held.lm_head if held.lm_head_packed is None else held.lm_head_packed).nbytes,
        )

    def operations(self, step: StepRows) -> int:
        """Floating-point operations, a multiplication and an addition being two: every row times every weight of the
        blocks, q k and p v for every attended position and head, LM head for the rows that want it."""
        c = self.config
        attention = 4 * c.num_layers * c.num_heads * c.head_dim * step.attended
        head = 2 * c.vocab_size * c.hidden_size * (step.scored + step.sampled)
        return 2 * self.weights * step.rows + attention + head

    def bytes(self, step: StepRows) -> int:
        """Bytes that must come from memory or go there: the blocks' weights once; an embedding a row; keys and values
        of each sequence read once and of each row written; the LM head once for scoring and once for sampling, which
        are two passes over it; logits of sampled rows written and read."""
        c = self.config
        kv = 2 * c.num_layers * c.num_kv_heads * c.head_dim * (step.cached + step.rows)
        logits = 2 * step.sampled * c.vocab_size
        head = self.scoring_bytes * (step.scored > 0) + self.sampling_bytes * (step.sampled > 0)
        return self.block_bytes + head + self.itemsize * (step.rows * c.hidden_size + kv + logits)


@dataclass(slots=True)
class LaneTotals:
    """Sums since the lane began; seconds, and counts that are computed.

    pass_s: of the model's passes, on the device: page copies, forward pass, LM head, sampling. On the host:
    schedule_s (choosing a step, and its bookkeeping), launch_s (enqueuing it, on a GPU; on a CPU that is the pass),
    collect_s (waiting for the device: no work), commit_s (tokens and scores to their sequences), gate_s (verdicts),
    command_s (what the pipeline asks). idle_s: sequences were open and nothing was asked of any; blocked_s: there was
    work, but the thread was with the other lane, or no page was free.
    """

    operations: int = 0
    bytes: int = 0
    pass_s: float = 0.0
    schedule_s: float = 0.0
    launch_s: float = 0.0
    collect_s: float = 0.0
    commit_s: float = 0.0
    gate_s: float = 0.0
    command_s: float = 0.0
    idle_s: float = 0.0
    blocked_s: float = 0.0


class Standing(Enum):
    """How a lane stands between two steps."""

    CLOSED = "no sequence is open"
    IDLE = "sequences are open, and nothing is asked of them"
    READY = "there is work"
    FLIGHT = "a step is in flight"


class PassTimer(Protocol):
    """Takes the time that passes take on the device."""

    asynchronous: bool
    """A pass goes on after its launch."""

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def read(self) -> float:
        """Seconds of the passes that have ended and were not read before; never waits."""
        ...


class HostPasses:
    """A device whose launches return when the pass is over. The meter's own clock has taken the time."""

    asynchronous = False

    def start(self) -> None:
        return None

    def stop(self) -> None:
        return None

    def read(self) -> float:
        return 0.0


class CudaPasses:
    """Pairs of events around every launch on the lane's stream, read once the device has passed them."""

    asynchronous = True

    def __init__(self, on_stream: Callable[[], AbstractContextManager[object]]) -> None:
        self._on_stream = on_stream
        self._flight: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._free: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self) -> None:
        pair = self._free.pop() if self._free else (_event(), _event())
        with self._on_stream():
            pair[0].record()
        self._flight.append(pair)

    def stop(self) -> None:
        with self._on_stream():
            self._flight[-1][1].record()

    def read(self) -> float:
        seconds = 0.0
        while self._flight and self._flight[0][1].query():
            start, end = pair = self._flight.popleft()
            seconds += start.elapsed_time(end) * 1e-3
            self._free.append(pair)
        return seconds


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


class LaneMeter:
    """The stop-watch of one lane: `begin` and `end` frame a step, the calls between them say what the time since the
    last call went to. Belongs to the lane's thread; `totals` may be read from another."""

    def __init__(self, cost: ModelCost, passes: PassTimer, clock: Clock = time.perf_counter) -> None:
        self.clock = clock
        self.totals = LaneTotals()
        self._cost = cost
        self._passes = passes
        self._standing = Standing.CLOSED
        self._mark = clock()

    def begin(self) -> float:
        """A step begins; returns the time."""
        now = self.clock()
        self._stood(now)
        return now

    def scheduled(self, *, launching: bool = False) -> float:
        """The time since went to choosing a step, or to its bookkeeping. Returns the time."""
        self.totals.schedule_s += self._lap()
        if launching:
            self._passes.start()
        return self._mark

    def launched(self, step: Step) -> None:
        if self._passes.asynchronous:
            self._passes.stop()
            self.totals.launch_s += self._lap()
            self.totals.pass_s += self._passes.read()
        else:
            self.totals.pass_s += self._lap()
        rows = StepRows.of(step)
        self.totals.operations += self._cost.operations(rows)
        self.totals.bytes += self._cost.bytes(rows)

    def collected(self) -> float:
        """The results of a step are here. Returns the time."""
        if self._passes.asynchronous:
            self.totals.collect_s += self._lap()
            self.totals.pass_s += self._passes.read()
        else:
            # Handing results over is all that a pass has left to do when its launch has returned.
            self.totals.pass_s += self._lap()
        return self._mark

    def committed(self) -> None:
        self.totals.commit_s += self._lap()

    def decided(self) -> None:
        self.totals.gate_s += self._lap()

    def end(self, standing: Standing) -> float:
        """The step is over; returns the time."""
        self.totals.commit_s += self._lap()
        self._standing = standing
        return self._mark

    def arrived(self, at: float) -> None:
        """Between two steps: something was asked of the lane at that time."""
        if self._standing in (Standing.IDLE, Standing.CLOSED):
            # The thread may have been elsewhere when it was asked: until then the lane was idle, since then blocked.
            self._stood(max(self._mark, at))
            self._standing = Standing.READY

    def carried_out(self, began: float) -> None:
        """Between two steps: a command took from `began` until now."""
        now = self.clock()
        self._stood(max(self._mark, began))
        self.totals.command_s += now - self._mark
        self._mark = now

    def emptied(self) -> None:
        """Between two steps: the last sequence was closed."""
        self._stood(max(self._mark, self.clock()))
        self._standing = Standing.CLOSED

    def _lap(self) -> float:
        now = self.clock()
        elapsed, self._mark = now - self._mark, now
        return elapsed

    def _stood(self, until: float) -> None:
        elapsed, self._mark = until - self._mark, until
        if self._standing is Standing.IDLE:
            self.totals.idle_s += elapsed
        elif self._standing is Standing.READY:
            self.totals.blocked_s += elapsed
