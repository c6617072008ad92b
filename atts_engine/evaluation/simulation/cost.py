"""What a step of a lane costs: the roofline of a model on a device, or a line fitted to measured steps."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from atts_engine.errors import InputError
from atts_engine.runtime.meters import ModelCost, StepRows


class StepTime(NamedTuple):
    """Seconds of a step; compute_s, memory_s: what its operations and its bytes take at the device's rates, 0 where no
    shape and no device are known."""

    seconds: float
    compute_s: float = 0.0
    memory_s: float = 0.0


class StepCost(Protocol):
    """Tells the time of a step."""

    def step(self, rows: StepRows) -> StepTime: ...


@dataclass(frozen=True, slots=True)
class LinearCost:
    """A step takes base_s + row_s * rows seconds, whatever its rows do."""

    base_s: float
    row_s: float = 0.0

    def step(self, rows: StepRows) -> StepTime:
        return StepTime(self.base_s + self.row_s * rows.rows)


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU: operations a second of dense bf16 products, bytes a second of its memory, bytes of memory, and bytes a
    second to its peers in one direction. source: where the figures are from."""

    name: str
    flop_s: float
    bytes_s: float
    memory_bytes: float
    link_bytes_s: float
    source: str


@dataclass(frozen=True, slots=True)
class Efficiency:
    """What of a device's data-sheet rates a step reaches, and what it costs beside.

    compute, memory, link: shares of the peaks. step_s: of every step, for launches, sampling and scheduling.
    all_reduce_s: latency of one all-reduce. The defaults are assumptions; docs/simulate.md tells where they are from.
    """

    compute: float = 0.6
    memory: float = 0.7
    link: float = 0.65
    step_s: float = 500e-6
    all_reduce_s: float = 10e-6

    def __post_init__(self) -> None:
        for name in ("compute", "memory", "link"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise InputError(f"the {name} efficiency must be in (0, 1], not {getattr(self, name):g}")
        for name in ("step_s", "all_reduce_s"):
            if getattr(self, name) < 0.0:
                raise InputError(f"{name} must be 0 or more seconds, not {getattr(self, name):g}")


@dataclass(frozen=True, slots=True)
class RooflineCost:
    """max(operations / rate, bytes / bandwidth) + all-reduces + a constant, on `tp` GPUs that share a model.

    Operations and bytes are those of the lane's meter (`ModelCost`, docs/intensity.md). Weights, LM head and heads are
    split over the GPUs; a key/value head that has to be on several of them is read by each.
    """

    model: ModelCost
    device: Device
    efficiency: Efficiency
    tp: int = 1

    def __post_init__(self) -> None:
        heads = self.model.config.num_heads
        if self.tp < 1 or heads % self.tp:
            raise InputError(f"{heads} attention heads cannot be split over {self.tp} GPUs: choose a divisor")

    @property
    def kv_bytes_per_token(self) -> float:
        """Bytes of keys and values of one token on one GPU."""
        c = self.model.config
        heads = c.num_kv_heads / min(self.tp, c.num_kv_heads)
        return 2 * c.num_layers * heads * c.head_dim * self.model.itemsize

    @property
    def weight_bytes(self) -> float:
        """Bytes of the weights on one GPU: matrices of the blocks, embeddings, LM head."""
        c = self.model.config
        embeddings = (1 if c.tie_embeddings else 2) * c.vocab_size * c.hidden_size
        return self.model.itemsize * (self.model.weights + embeddings) / self.tp

    def step(self, rows: StepRows) -> StepTime:
        c, e = self.model.config, self.efficiency
        kv = 2 * c.num_layers * c.num_kv_heads * c.head_dim * self.model.itemsize * (rows.cached + rows.rows)
        held = (self.model.bytes(rows) - kv) / self.tp + self.kv_bytes_per_token * (rows.cached + rows.rows)
        compute = self.model.operations(rows) / self.tp / (self.device.flop_s * e.compute)
        memory = held / (self.device.bytes_s * e.memory)
        return StepTime(max(compute, memory) + self.all_reduce_s(rows.rows) + e.step_s, compute, memory)

    def all_reduce_s(self, rows: int) -> float:
        """Seconds of the two all-reduces of every layer, behind attention and behind the MLP (arXiv 1909.08053). Each
        GPU of a ring sends 2 (tp - 1) / tp of the activations."""
        if self.tp == 1:
            return 0.0
        c, e = self.model.config, self.efficiency
        sent = 2 * (self.tp - 1) / self.tp * rows * c.hidden_size * self.model.itemsize
        return 2 * c.num_layers * (sent / (self.device.link_bytes_s * e.link) + e.all_reduce_s)


@dataclass(frozen=True, slots=True)
class TableCost:
    """Measured seconds of steps by their rows, between which it is linear; outside, the ends' own lines go on. Of
    `shape`, operations and bytes tell T_c and T_m."""

    rows: tuple[int, ...]
    seconds: tuple[float, ...]
    shape: RooflineCost | None = None

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.rows, self.rows[1:], strict=False))
        if len(self.rows) < 2 or len(self.rows) != len(self.seconds) or not rising or min(self.seconds) <= 0:
            raise InputError("a table of steps needs two or more rising numbers of rows, and a time above 0 for each")

    def step(self, rows: StepRows) -> StepTime:
        at = min(max(bisect_right(self.rows, rows.rows), 1), len(self.rows) - 1)
        (r0, r1), (s0, s1) = self.rows[at - 1 : at + 1], self.seconds[at - 1 : at + 1]
        seconds = max(0.0, s0 + (s1 - s0) * (rows.rows - r0) / (r1 - r0))
        known = self.shape.step(rows) if self.shape is not None else StepTime(0.0)
        return StepTime(seconds, known.compute_s, known.memory_s)
