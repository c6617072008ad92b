"""Recorded chains through a calibrator: what its gate would have decided on real scores, without a model.

The scores after a takeover were recorded under the recorded verdicts; a replay studies calibration and
scheduling, not the text that other verdicts would have led to.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict, deque
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
    ColdStart,
    Meta,
    Pending,
    Policy,
    ReferenceATTS,
    TopB,
    load_calibrator,
    make_calibrator,
    make_policy,
)
from atts_engine.errors import InputError
from atts_engine.pipeline.records import Chain

CALIBRATORS = ("reference", *ONLINE_CALIBRATORS)
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
    permutation drawn from `seed`. `InputError` for a span that was not scored whole.
    """
    if order not in ORDERS:
        raise InputError(f"no order {order!r}; there are {', '.join(ORDERS)}")
    chains = list(chains)
    for chain in chains:
        if any(turn.early for turn in chain.turns):
            raise InputError(
                f"problem {chain.problem_id}, chain {chain.chain} holds early verdicts, whose scores are lower bounds; "
                "a replay needs a run without --early-verdict"
            )
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


def replay_online(
    spans: Sequence[Scored],
    calibrator: Calibrator,
    policy: Policy | None = None,
    *,
    outstanding: int = 1,
    seed: int = 0,
) -> Replay:
    """Decide each span against the calibrator's store and let it learn. The calibrator is changed, unless it
    is frozen.

    outstanding: decisions in flight, the one being made included. A decision does not see the scores and verdicts of
    the outstanding - 1 decisions before it; those are observed in order. A policy counts every verdict at once.
    """
    if outstanding < 1:
        raise InputError(f"the number of outstanding decisions must be 1 or more, not {outstanding}")
    takeovers = np.zeros(len(spans), dtype=np.bool_)
    values = np.zeros(len(spans), dtype=np.float64)
    in_flight: deque[tuple[float, int, bool, str, float]] = deque()
    by_key: Counter[int] = Counter()

    def observe() -> None:
        observation = in_flight.popleft()
        by_key[observation[1]] -= 1
        calibrator.observe(*observation)

    arrivals = _Arrivals(spans, policy)
    for i, span in enumerate(spans):
        while len(in_flight) >= outstanding:
            observe()
        key = calibrator.key_of(span.turn)
        level = calibrator.level(key, Pending(by_key[key], len(in_flight)))
        if policy is not None:
            level = arrivals.level(span, level)
        ruling = calibrator.decide(span.score, key, uniform_of(span, seed), span.problem_id, level=level)
        takeovers[i] = ruling.takeover
        values[i] = ruling.assessment.p_value
        if policy is not None:
            arrivals.decided(span, ruling.takeover)
        in_flight.append((span.score, key, ruling.takeover, span.problem_id, ruling.assessment.p_value))
        by_key[key] += 1
    while in_flight:
        observe()
    return Replay(tuple(spans), takeovers, values)


class _Arrivals:
    """Tells a policy what an engine would know of each problem: how many spans a turn has, and when it is over."""

    def __init__(self, spans: Sequence[Scored], policy: Policy | None) -> None:
        self._policy = policy
        self._left = Counter((s.problem_id, s.turn) for s in spans)
        self._total = dict(self._left)
        places = [(s.problem_index, s.problem_id, s.turn) for s in spans]
        # Out of order a turn begins before the one before it has ended, and nobody knows how many will come.
        self._known = places == sorted(places)

    def level(self, span: Scored, own: int) -> int:
        assert self._policy is not None
        place = span.problem_id, span.turn
        if self._known and self._left[place] == self._total[place]:
            self._policy.expect(*place, self._total[place])
        return self._policy.level(*place, own)

    def decided(self, span: Scored, takeover: bool) -> None:
        assert self._policy is not None
        place = span.problem_id, span.turn
        self._policy.decided(*place, takeover)
        self._left[place] -= 1
        if not self._left[place]:
            self._policy.turn_ended(*place)


def replay_synchronous(spans: Sequence[Scored], calibrator: Calibrator, policy: TopB, *, seed: int = 0) -> Replay:
    """All spans of a problem's turn at once, as a barrier would have them: what no test of one span after another beats
    at the same count."""
    groups: dict[tuple[str, int], list[int]] = defaultdict(list)
    for i, span in enumerate(spans):
        groups[span.problem_id, span.turn].append(i)
    takeovers = np.zeros(len(spans), dtype=np.bool_)
    values = np.zeros(len(spans), dtype=np.float64)
    for (problem, turn), members in groups.items():
        key = calibrator.key_of(turn)
        for i in members:
            values[i] = calibrator.p_value(spans[i].score, key, uniform_of(spans[i], seed), problem)
        takeovers[members] = policy.choose(problem, turn, [spans[i].score for i in members])
        for i in members:
            calibrator.observe(spans[i].score, key, bool(takeovers[i]), problem, float(values[i]))
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
    policy: str = "threshold",
    *,
    calibration: str | os.PathLike[str] | None = None,
    frozen: bool = False,
    outstanding: int = 1,
    seed: int = 0,
    cold: ColdStart | None = None,
) -> Replay:
    """Replay with a calibrator and a policy by name.

    calibration: for `reference` and `split` an `.npy` array of perplexities, for any but `reference` an `.npz` state;
    without it the calibrator starts cold, which `reference` cannot. `InputError` for a name that does not exist,
    listing those that do, and for anything else that cannot be used.
    """
    check_name("calibrator", calibrator, CALIBRATORS)
    try:
        if calibrator == "reference":
            if policy != "threshold":
                raise InputError("the reference calibrator has its own fixed rule: it takes no policy but threshold")
            if cold is not None or frozen:
                raise InputError("the reference calibrator is one fixed array: it has no cold start and never learns")
            if calibration is None:
                raise InputError("the reference calibrator needs --calibration FILE.npy, an array of perplexities")
            return replay_reference(spans, ReferenceATTS(load_array(calibration), alpha))
        online = _online(calibrator, alpha, calibration, frozen, cold)
        budget = make_policy(policy, alpha)
        if isinstance(budget, TopB):
            if outstanding != 1:
                raise InputError("top-b is synchronous: a whole turn is decided at once, so nothing is outstanding")
            return replay_synchronous(spans, online, budget, seed=seed)
        return replay_online(spans, online, budget, outstanding=outstanding, seed=seed)
    except CalibrationError as error:
        raise InputError(str(error)) from error


def _online(
    name: str, alpha: float, calibration: str | os.PathLike[str] | None, frozen: bool, cold: ColdStart | None
) -> Calibrator:
    if calibration is None:
        if frozen:
            raise InputError("a frozen replay needs --calibration: a cold start has nothing to test against")
        return make_calibrator(name, alpha, cold=cold)
    if cold is not None:
        raise InputError("a saved calibration brings its own cold start: leave --cold-start out")
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
    """`InputError` listing the names unless `name` is one of them."""
    if name not in names:
        raise InputError(f"no {what} {name!r}; there are: {', '.join(names)}")


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
    decisions or more, None if there are none. The spans taken over in one turn of a problem are the set that the paper
    hands to the target: set_size is its mean size, coverage how often it holds the turn's worst score of that
    problem (the first of them), and problem_off the mean distance of a problem's rate from alpha.
    """
    by_turn = _rates(result, lambda s: str(s.turn), key=int)
    chosen = mid_ranks(result.spans)[result.takeovers]
    deviations = [abs(cell["rate"] - alpha) for cell in by_turn.values() if cell["n"] >= MIN_DECISIONS]
    by_problem = _rates(result, lambda s: s.problem_id)
    off = [abs(cell["rate"] - alpha) for cell in by_problem.values()]
    return {
        "n": len(result.spans),
        "rate": float(np.mean(result.takeovers)) if result.spans else None,
        "selection_power": float(chosen.mean()) if chosen.size else None,
        **_sets(result),
        "by_turn": by_turn,
        "by_problem": by_problem,
        "problem_off": float(np.mean(off)) if off else None,
        "max_abs_dev_by_turn": max(deviations, default=None),
    }


def _sets(result: Replay) -> dict[str, float | None]:
    groups: dict[tuple[str, int], list[int]] = defaultdict(list)
    for i, span in enumerate(result.spans):
        groups[span.problem_id, span.turn].append(i)
    if not groups:
        return {"coverage": None, "set_size": None}
    held = [bool(result.takeovers[max(m, key=lambda i: result.spans[i].score)]) for m in groups.values()]
    return {"coverage": sum(held) / len(groups), "set_size": float(result.takeovers.sum()) / len(groups)}


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
