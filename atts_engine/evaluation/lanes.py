"""What the lanes did in a job: the figures of docs/intensity.md, and a table of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from atts_engine.pipeline.records import Chain
from atts_engine.runtime import Rates

Counters = Mapping[str, float]

COUNTED = (
    "steps",
    "computed_tokens",
    "distinct_tokens",
    "recomputed_tokens",
    "repeated_tokens",
    "rolled_back_tokens",
    "discarded_rows",
    "proposed_tokens",
    "accepted_tokens",
    "rejected_rows",
    "scored_tokens",
    "sampled_tokens",
    "preemptions",
    "operations",
    "bytes",
)
TIMED = ("pass", "schedule", "launch", "collect", "commit", "gate", "command", "idle", "blocked")
HOST = ("schedule", "launch", "commit", "gate", "command")
"""What T_other is made of. `collect` is waiting for the device, so it is in none of the four."""

COLUMNS = ("lane", "tokens", "again", "passes", "T_c", "T_m", "T_s", "T_other", "blocked", "r", "explained", "KV peak")
NOTE = (
    "T_c, T_m: operations and bytes of the steps at the rates that this device reached in a probe; passes, T_s (idle, "
    "with chains open), T_other (host) and blocked: measured. r = T_c / (T_m + T_s). explained: the larger of T_c and "
    "T_m, to their sum, over passes. again: tokens forwarded more than once. KV peak: memory of the "
    "most pages in use at once."
)


@dataclass(frozen=True, slots=True)
class LaneUse:
    """One lane in one job. counters: by how much each of `AsyncEngine.stats()` rose; rates: of the lane's device."""

    counters: Counters
    rates: Rates
    peak_kv_bytes: int | None = None
    """Of the most KV pages in use on the lane's device at once; None where that was not watched."""

    @classmethod
    def between(cls, before: Counters, after: Counters, rates: Rates) -> LaneUse:
        names = (*COUNTED, *(f"{name}_s" for name in TIMED))
        peak = after.get("peak_kv_bytes")
        return cls({name: after[name] - before[name] for name in names}, rates, None if peak is None else int(peak))


@dataclass(frozen=True, slots=True)
class Intensity:
    """Seconds of one lane. compute, memory: computed; sync, other, passes: measured."""

    compute: float
    memory: float
    sync: float
    other: float
    passes: float
    explained: tuple[float, float] | None = field(init=False)
    """What compute and memory time come to over the measured passes, if one hides behind the other and if they add up;
    None where there was no pass."""

    def __post_init__(self) -> None:
        whole = self.passes
        shares = (max(self.compute, self.memory) / whole, (self.compute + self.memory) / whole) if whole > 0 else None
        object.__setattr__(self, "explained", shares)

    @classmethod
    def of(cls, use: LaneUse) -> Intensity:
        c = use.counters
        return cls(
            compute=c["operations"] / use.rates.flop_s,
            memory=c["bytes"] / use.rates.bytes_s,
            sync=c["idle_s"],
            other=sum(c[f"{name}_s"] for name in HOST),
            passes=c["pass_s"],
        )

    @property
    def ratio(self) -> float | None:
        """r = T_c / (T_m + T_s), the asynchronous arithmetic intensity (arXiv 2509.15148); None for a lane that did
        nothing."""
        below = self.memory + self.sync
        return self.compute / below if below > 0 else None


def lane_figures(use: LaneUse) -> dict[str, Any]:
    """JSON of one lane: its counters, `time_s` by what it went to, `device` (the probe's rates), T_c, T_m, T_s, T_other
    in seconds, r, `explained`, and peak_kv_bytes."""
    found = Intensity.of(use)
    low, high = found.explained if found.explained is not None else (None, None)
    return {
        **{name: use.counters[name] for name in COUNTED},
        "time_s": {name: use.counters[f"{name}_s"] for name in TIMED},
        "device": {"flop_s": use.rates.flop_s, "bytes_s": use.rates.bytes_s},
        "T_c": found.compute,
        "T_m": found.memory,
        "T_s": found.sync,
        "T_other": found.other,
        "r": found.ratio,
        "explained": {"overlapped": low, "serial": high},
        "peak_kv_bytes": use.peak_kv_bytes,
    }


def waiting(chains: Sequence[Chain]) -> dict[str, float] | None:
    """Waiting time of the chains that tell theirs: how many these are, mean seconds, and the share of their time. None
    where there is none."""
    told = [(c.wait_s, c.duration_s) for c in chains if c.wait_s is not None]
    if not told:
        return None
    waited, lasted = (sum(column) for column in zip(*told, strict=True))
    return {"chains": len(told), "mean_s": waited / len(told), "share": waited / lasted if lasted > 0 else 0.0}


def lane_rows(lanes: Mapping[str, Mapping[str, Any]], prefix: str = "") -> list[tuple[str, ...]]:
    """Rows of a table with the columns `COLUMNS`, of the lanes that did something. lanes: {name: `lane_figures`}."""
    return [_row(prefix + name, lane) for name, lane in lanes.items() if lane["steps"]]


def _row(name: str, lane: Mapping[str, Any]) -> tuple[str, ...]:
    low, high = lane["explained"]["overlapped"], lane["explained"]["serial"]
    times = [lane["time_s"]["pass"], *(lane[t] for t in ("T_c", "T_m", "T_s", "T_other")), lane["time_s"]["blocked"]]
    again = lane["recomputed_tokens"] + lane["repeated_tokens"]
    return (
        name,
        f"{lane['computed_tokens']:,}",
        f"{again:,}",
        *(f"{seconds:.3g} s" for seconds in times),
        "-" if lane["r"] is None else f"{lane['r']:.3g}",
        "-" if low is None else f"{100 * low:.0f} to {100 * high:.0f}%",
        "-" if lane["peak_kv_bytes"] is None else f"{lane['peak_kv_bytes'] / 2**20:,.1f} MiB",
    )
