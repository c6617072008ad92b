"""Which GPUs hold which model: tensor-parallel copies of each, on GPUs of their own or sharing them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from atts_engine.errors import InputError
from atts_engine.evaluation.simulation.cost import Device, Efficiency, RooflineCost, StepCost, TableCost
from atts_engine.evaluation.simulation.lanes import LaneModel
from atts_engine.evaluation.simulation.simulator import Machine
from atts_engine.evaluation.simulation.work import Job, tokens_of
from atts_engine.models import ModelConfig
from atts_engine.runtime.meters import ModelCost, StepRows

NODE = 8
"""GPUs that reach each other over NVLink; a model is split over no more."""
WEIGHT_SHARE = 0.6
"""Of the usable memory that weights may take where the number of GPUs of a copy is chosen; the rest is for KV."""


@dataclass(frozen=True, slots=True)
class Half:
    """One model of the pair on one kind of GPU. table: measured step times in place of the roofline's."""

    name: str
    model: ModelCost
    tp: int
    device: Device
    efficiency: Efficiency
    usable_bytes: float
    table: tuple[tuple[int, ...], tuple[float, ...]] | None = None

    @classmethod
    def of(
        cls,
        name: str,
        config: ModelConfig,
        device: Device,
        efficiency: Efficiency,
        *,
        itemsize: int = 2,
        memory_fraction: float = 0.9,
        tp: int | None = None,
        table: tuple[tuple[int, ...], tuple[float, ...]] | None = None,
    ) -> Half:
        """tp None: the fewest GPUs, a power of two, whose usable memory the weights fill to `WEIGHT_SHARE` at most.
        `InputError` where 8 are too few."""
        if not 0.0 < memory_fraction <= 1.0:
            raise InputError(f"the share of the memory must be in (0, 1], not {memory_fraction:g}")
        model, usable = ModelCost.of(config, itemsize), device.memory_bytes * memory_fraction
        if tp is None:
            sizes = [n for n in (1, 2, 4, NODE) if config.num_heads % n == 0]
            fits = [
                n for n in sizes if RooflineCost(model, device, efficiency, n).weight_bytes <= WEIGHT_SHARE * usable
            ]
            if not fits:
                raise InputError(f"{name} does not fit {sizes[-1]} GPUs of {device.memory_bytes / 1e9:g} GB")
            tp = fits[0]
        if tp > NODE:
            raise InputError(f"a model is split over {NODE} GPUs at most, not {tp}: further GPUs hold further copies")
        # Refuses a number of GPUs that does not divide the heads.
        RooflineCost(model, device, efficiency, tp)
        return cls(name, model, tp, device, efficiency, usable, table)

    @property
    def roofline(self) -> RooflineCost:
        return RooflineCost(self.model, self.device, self.efficiency, self.tp)

    @property
    def cost(self) -> StepCost:
        return self.roofline if self.table is None else TableCost(*self.table, self.roofline)

    def lane(self, gpus: int, max_batch_tokens: int) -> LaneModel:
        """As many copies as those GPUs hold, with all usable memory that the weights leave for KV."""
        return self._lane(gpus // self.tp, max_batch_tokens, self.usable_bytes - self.roofline.weight_bytes)

    def _lane(self, copies: int, max_batch_tokens: int, kv_bytes: float) -> LaneModel:
        room = int(kv_bytes / self.roofline.kv_bytes_per_token)
        if copies < 1:
            raise InputError(f"{self.name} needs {self.tp} GPUs or more")
        if room < 1:
            raise InputError(
                f"the weights of {self.name} leave no memory for KV on {self.tp} GPUs of {self.device.name}"
            )
        return LaneModel(self.cost, copies, max_batch_tokens, room, self.tp, self.roofline.kv_bytes_per_token)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the lanes are. Of `gpus`, `unused` ones hold no copy and are paid for all the same."""

    machine: Machine
    gpus: int
    draft_gpus: int
    target_gpus: int
    unused: int

    def describe(self) -> dict[str, Any]:
        m = self.machine
        return {
            "shared": m.shared,
            "draft_gpus": self.draft_gpus,
            "target_gpus": self.target_gpus,
            "draft_copies": m.draft.replicas if self.draft_gpus else 0,
            "target_copies": m.target.replicas if m.target else m.draft.replicas if self.target_gpus else 0,
            "unused_gpus": self.unused,
        }


def place_alone(half: Half, gpus: int, max_batch_tokens: int, *, draft: bool) -> Placement:
    """One model on all GPUs."""
    lane = half.lane(gpus, max_batch_tokens)
    used = lane.replicas * half.tp
    return Placement(Machine(lane), gpus, used if draft else 0, 0 if draft else used, gpus - used)


def place_shared(draft: Half, target: Half, gpus: int, max_batch_tokens: int) -> Placement:
    """Both models on every group of as many GPUs as the larger one needs; both lanes hold the same number of tokens,
    since every chain has its text in both."""
    group = max(draft.tp, target.tp)
    copies = gpus // group
    if copies < 1:
        raise InputError(f"{draft.name} and {target.name} need {group} GPUs or more, not {gpus}")
    rooflines = draft.roofline, target.roofline
    left = min(draft.usable_bytes, target.usable_bytes) - sum(r.weight_bytes for r in rooflines)
    per_token = sum(r.kv_bytes_per_token for r in rooflines)
    lanes = [
        half._lane(copies, max_batch_tokens, left * half.roofline.kv_bytes_per_token / per_token)
        for half in (draft, target)
    ]
    used = copies * group
    return Placement(Machine(lanes[0], lanes[1], shared=True), gpus, used, used, gpus - used)


def place_split(
    draft: Half,
    target: Half,
    gpus: int,
    max_batch_tokens: int,
    job: Job,
    in_flight: int | None,
    *,
    draft_gpus: int | None = None,
    target_gpus: int | None = None,
) -> Placement:
    """GPUs of their own for either model. Numbers that are None are chosen by `chain_seconds`, among splits that hold
    the largest problem where there is one.

    `InputError` where there are too few GPUs.
    """
    if draft_gpus is not None or target_gpus is not None:
        d = draft_gpus if draft_gpus is not None else gpus - (target_gpus or 0)
        t = target_gpus if target_gpus is not None else gpus - d
        if d + t > gpus or d < draft.tp or t < target.tp:
            raise InputError(
                f"{d} GPUs for {draft.name} and {t} for {target.name}: of {gpus}, they need {draft.tp} and {target.tp}"
            )
        splits = [d // draft.tp]
        total = d + t
    else:
        splits = list(range(1, (gpus - target.tp) // draft.tp + 1))
        d, t, total = 0, 0, gpus
    if not splits:
        raise InputError(
            f"{draft.name} and {target.name} need {draft.tp + target.tp} GPUs or more, not {gpus}, to have their own"
        )
    largest = max(sum(w.draft + w.target for turns in problem for w in turns) for problem in job)

    def lanes(copies: int) -> tuple[LaneModel, LaneModel]:
        of_target = t if t else total - copies * draft.tp
        return draft.lane(copies * draft.tp, max_batch_tokens), target.lane(of_target, max_batch_tokens)

    def worth(copies: int) -> tuple[bool, float]:
        pair = lanes(copies)
        short = any((lane.kv_tokens or 0) * lane.replicas < largest for lane in pair)
        return short, chain_seconds(pair[0], pair[1], job, in_flight)

    of_draft, of_target = lanes(min(splits, key=worth))
    used = of_draft.replicas * draft.tp, of_target.replicas * target.tp
    return Placement(Machine(of_draft, of_target), gpus, used[0], used[1], gpus - sum(used))


def chain_seconds(draft: LaneModel, target: LaneModel, job: Job, in_flight: int | None) -> float:
    """A rule of thumb to choose a split by: seconds of a mean chain if every open chain had a sequence at work in both
    lanes, each step of either having the rows that the other lane's tokens add to it."""
    chains = sum(map(len, job))
    open_chains = chains if in_flight is None else min(chains, in_flight * max(map(len, job)))
    own = [max(1.0, n / chains) for n in tokens_of(job)]
    seconds = 0.0
    for lane, tokens, other in zip((draft, target), own, own[::-1], strict=True):
        rows = max(1, round(open_chains / lane.replicas * (1.0 + other / tokens)))
        context = round(open_chains / lane.replicas * sum(own) / 2)
        seconds += tokens * lane.cost.step(StepRows(rows, context, context, 0, rows)).seconds
    return seconds
