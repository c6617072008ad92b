"""Recorded chains through a calibrator: what its gate would have decided on real scores, without a model.

The scores after a takeover were recorded under the recorded verdicts; a replay studies calibration and
scheduling, not the text that other verdicts would have led to.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from atts_engine.conformal import (
    ONLINE_CALIBRATORS,
    CalibrationError,
    Calibrator,
    Meta,
    ReferenceATTS,
    decide,
    load_calibrator,
    make_calibrator,
)
from atts_engine.errors import InputError
from atts_engine.pipeline.records import Chain

CALIBRATORS = ("reference", *ONLINE_CALIBRATORS)
POLICIES = ("threshold",)
ORDERS = ("arrival", "shuffle")
MIN_DECISIONS = 50
"""Turns with fewer decisions are left out of `max_abs_dev_by_turn`."""


@dataclass(frozen=True, slots=True)
class Scored:
    """One scored span of a trace."""

    problem_id: str
    problem_index: int
    chain: int
    turn: int
    score: float
    ppl: float | None
    percentile: float | None
    takeover: bool


@dataclass(frozen=True, slots=True)
class Replay:
    """Spans in the order they were decided in, and each one's takeover and p-value (the percentile, for
    `reference`)."""

    spans: tuple[Scored, ...]
    takeovers: npt.NDArray[np.bool_]
    values: npt.NDArray[np.float64]


def scored_spans(chains: Iterable[Chain], order: str = "arrival", seed: int = 0) -> list[Scored]:
    """The scored spans of a trace.

    arrival: by problem, then turn, then chain, as chains of one problem run side by side; shuffle: a
    permutation drawn from `seed`.
    """
    if order not in ORDERS:
        raise InputError(f"no order {order!r}; there are {', '.join(ORDERS)}")
    spans = [
        Scored(c.problem_id, c.problem_index, c.chain, t.turn, t.score, t.ppl, t.percentile, t.takeover)
        for c in chains
        for t in c.turns
        if t.score is not None
    ]
    spans.sort(key=lambda s: (s.problem_index, s.problem_id, s.turn, s.chain))
    if order == "shuffle":
        spans = [spans[i] for i in np.random.default_rng(seed).permutation(len(spans))]
    return spans


def uniform_of(span: Scored, seed: int) -> int:
    """The span's uniform in 1 .. 2**32: a hash of (seed, problem, chain, turn), the same in any order of
    arrival."""
    name = f"{seed}\0{span.problem_id}\0{span.chain}\0{span.turn}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=4).digest(), "little") + 1


def replay_online(spans: Sequence[Scored], calibrator: Calibrator, *, outstanding: int = 1, seed: int = 0) -> Replay:
    """Decide each span against the calibrator's store and let it learn. The calibrator is changed, unless it
    is frozen.

    outstanding: decisions in flight, the one being made included. A decision does not see the scores of the
    outstanding - 1 decisions before it; those join the store in order.
    """
    if outstanding < 1:
        raise InputError(f"the number of outstanding decisions must be 1 or more, not {outstanding}")
    takeovers = np.zeros(len(spans), dtype=np.bool_)
    values = np.zeros(len(spans), dtype=np.float64)
    in_flight: deque[tuple[float, int]] = deque()
    for i, span in enumerate(spans):
        while len(in_flight) >= outstanding:
            calibrator.observe(*in_flight.popleft())
        key = calibrator.key_of(span.turn)
        request = calibrator.request(key, uniform_of(span, seed))
        greater, ties, n = request.store.count(span.score, request.key)
        takeovers[i] = decide(greater, ties, n, request.level, request.u)
        values[i] = calibrator.p_value(span.score, key, request.u)
        in_flight.append((span.score, key))
    while in_flight:
        calibrator.observe(*in_flight.popleft())
    return Replay(tuple(spans), takeovers, values)


def replay_reference(spans: Sequence[Scored], calibrator: ReferenceATTS) -> Replay:
    """Decide each span by the published rule, on its recorded perplexity in float64."""
    ppls = [_ppl(span) for span in spans]
    takeovers = np.array([calibrator.takeover(ppl) for ppl in ppls], dtype=np.bool_)
    values = np.array([calibrator.percentile(ppl) for ppl in ppls], dtype=np.float64)
    return Replay(tuple(spans), takeovers, values)


def _ppl(span: Scored) -> float:
    if span.ppl is None:
        raise InputError(
            f"the reference calibrator needs 'ppl' of every scored turn: problem {span.problem_id}, "
            f"chain {span.chain}, turn {span.turn} has none"
        )
    return span.ppl


def replay(
    spans: Sequence[Scored],
    calibrator: str,
    alpha: float,
    *,
    calibration: str | os.PathLike[str] | None = None,
    frozen: bool = False,
    outstanding: int = 1,
    seed: int = 0,
) -> Replay:
    """Replay with a calibrator by name.

    calibration: for `reference` and `split` an `.npy` array of perplexities, for `mondrian` and `split` an
    `.npz` state; without it the calibrator starts cold, which `reference` cannot. `InputError` for a name
    that is not in this version, listing those that are, and for anything else that cannot be used.
    """
    check_name("calibrator", calibrator, CALIBRATORS)
    try:
        if calibrator == "reference":
            if calibration is None:
                raise InputError("the reference calibrator needs --calibration FILE.npy, an array of perplexities")
            return replay_reference(spans, ReferenceATTS(load_array(calibration), alpha))
        online = _online(calibrator, alpha, calibration, frozen)
        return replay_online(spans, online, outstanding=outstanding, seed=seed)
    except CalibrationError as error:
        raise InputError(str(error)) from error


def _online(name: str, alpha: float, calibration: str | os.PathLike[str] | None, frozen: bool) -> Calibrator:
    if calibration is None:
        if frozen:
            raise InputError("a frozen replay needs --calibration: a cold start has nothing to test against")
        return make_calibrator(name, alpha)
    if Path(calibration).suffix == ".npy":
        if name != "split":
            raise InputError(f"an .npy array names no turns: {name} needs an .npz state, which `atts calibrate` writes")
        calibrator = make_calibrator(name, alpha)
        for ppl in load_array(calibration):
            calibrator.observe(float(np.log(ppl)), calibrator.key_of(0))
        calibrator.frozen = frozen
        return calibrator
    loaded = load_calibrator(calibration, Meta(alpha=alpha), frozen=frozen)
    if loaded.name != name:
        raise InputError(f"{calibration} holds a calibration of {loaded.name!r}, not of {name!r}")
    return loaded


def load_array(path: str | os.PathLike[str]) -> npt.NDArray[np.float64]:
    """Perplexities from an `.npy` file, flattened; `InputError` unless all are finite and above 0."""
    try:
        values = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise InputError(f"no calibration file at {path}") from error
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} is not an .npy array of perplexities ({error})") from error
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiu":
        raise InputError(f"{path} is not an .npy array of perplexities")
    flat: npt.NDArray[np.float64] = values.astype(np.float64).ravel()
    if flat.size == 0 or not np.isfinite(flat).all() or (flat <= 0.0).any():
        raise InputError(f"{path} must hold perplexities that are finite and above 0, at least one")
    return flat


def check_name(what: str, name: str, names: Sequence[str]) -> None:
    """`InputError` listing the names of this version unless `name` is one of them."""
    if name not in names:
        raise InputError(f"no {what} {name!r} in this version; there are: {', '.join(names)}")


def mid_ranks(spans: Sequence[Scored]) -> npt.NDArray[np.float64]:
    """float64[N]: each span's rank among all scores of its turn, in [0, 1]; ties share the middle of their
    ranks."""
    ranks = np.zeros(len(spans), dtype=np.float64)
    scores = np.array([s.score for s in spans], dtype=np.float32)
    turns = np.array([s.turn for s in spans], dtype=np.int64)
    for turn in np.unique(turns):
        members = np.flatnonzero(turns == turn)
        held = np.sort(scores[members])
        below = np.searchsorted(held, scores[members], side="left")
        up_to = np.searchsorted(held, scores[members], side="right")
        ranks[members] = (below + up_to) / (2 * len(members))
    return ranks


def figures(result: Replay, alpha: float) -> dict[str, Any]:
    """The figures of a replay, keys as `atts replay --json` prints them.

    rate: share taken over; selection_power: mean same-turn mid-rank of the spans taken over (a coin gives
    0.5), None if there are none; max_abs_dev_by_turn: largest |rate - alpha| over turns with MIN_DECISIONS
    decisions or more, None if there are none.
    """
    by_turn = _rates(result, lambda s: str(s.turn), key=int)
    chosen = mid_ranks(result.spans)[result.takeovers]
    deviations = [abs(cell["rate"] - alpha) for cell in by_turn.values() if cell["n"] >= MIN_DECISIONS]
    return {
        "n": len(result.spans),
        "rate": float(np.mean(result.takeovers)) if result.spans else None,
        "selection_power": float(chosen.mean()) if chosen.size else None,
        "by_turn": by_turn,
        "by_problem": _rates(result, lambda s: s.problem_id),
        "max_abs_dev_by_turn": max(deviations, default=None),
    }


def _rates(
    result: Replay, cell_of: Callable[[Scored], str], key: Callable[[str], Any] | None = None
) -> dict[str, dict[str, Any]]:
    cells: dict[str, list[bool]] = defaultdict(list)
    for span, takeover in zip(result.spans, result.takeovers, strict=True):
        cells[cell_of(span)].append(bool(takeover))
    names = sorted(cells, key=key) if key else list(cells)
    return {name: {"n": len(cells[name]), "rate": sum(cells[name]) / len(cells[name])} for name in names}


def reproduced(result: Replay) -> dict[str, int]:
    """For a `reference` replay: recorded percentiles, how many come out exactly, and takeovers that agree."""
    outcomes = zip(result.spans, result.values.tolist(), result.takeovers.tolist(), strict=True)
    recorded = [(span, value, taken) for span, value, taken in outcomes if span.percentile is not None]
    return {
        "percentiles_recorded": len(recorded),
        "percentiles_reproduced": sum(span.percentile == value for span, value, _ in recorded),
        "takeovers_recorded": sum(span.takeover for span, _, _ in recorded),
        "verdicts_reproduced": sum(span.takeover == taken for span, _, taken in recorded),
    }
