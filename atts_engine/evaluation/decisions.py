"""The decision log: one record per verdict. Replaying it from the initial store reproduces every verdict.

A chain that was cut off is written anew, and so are its verdicts. The log is only appended to: the first decision after
that names those that no longer count (`Decision.discards`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import asdict, dataclass
from itertools import groupby, pairwise
from typing import Any

from atts_engine.conformal import CalibrationError, Calibrator, Monitored
from atts_engine.errors import InputError
from atts_engine.evaluation.jsonl import Line, read_lines
from atts_engine.pipeline.records import Decision


@dataclass(frozen=True, slots=True)
class Difference:
    """Where a replayed log first differs from what was recorded."""

    decision_seq: int
    field: str
    recorded: object
    replayed: object

    def __str__(self) -> str:
        return (
            f"decision {self.decision_seq}: {self.field} was recorded as {self.recorded!r}, "
            f"replayed as {self.replayed!r}"
        )


def decision_to_json(decision: Decision) -> dict[str, Any]:
    """The decision as a line of decisions.jsonl. Floats survive JSON to the bit. `discards` is left out where it is
    empty."""
    record = asdict(decision)
    if not decision.discards:
        del record["discards"]
    return record


def decision_from_line(line: Line) -> Decision:
    """One line of decisions.jsonl; `InputError` names the field that is missing or of the wrong type."""
    verdict = line.text("verdict")
    if verdict not in ("takeover", "keep"):
        raise line.error(f"field 'verdict' must be takeover or keep, not {verdict!r}")
    integers = {name: line.integer(name) for name in "decision_seq batch chain turn key n count ties k level u".split()}
    return Decision(
        problem=line.text("problem"),
        score=line.number("score"),
        p_value=line.number("p_value"),
        verdict=verdict,
        threshold=line.optional_number("threshold"),
        discards=line.integers("discards"),
        **integers,
    )


def read_decisions(path: str | os.PathLike[str], *, allow_torn_tail: bool = False) -> list[Decision]:
    """The decisions of a log, in the file's order."""
    return [decision_from_line(line) for line in read_lines(path, allow_torn_tail=allow_torn_tail)]


def in_force(decisions: Iterable[Decision]) -> list[Decision]:
    """The decisions that no later one discards, by decision_seq. Of each span that is on record there is one.

    `InputError` for a log that is no log: a decision_seq twice, a decision that discards what is not in force.
    """
    found: dict[int, Decision] = {}
    for decision in _ordered(decisions):
        _discard(found, decision)
        found[decision.decision_seq] = decision
    return list(found.values())


def check_log(decisions: Iterable[Decision], calibrator: Calibrator) -> Difference | None:
    """Replay a log from the calibrator's state; the first difference, or None if every count, p-value and verdict comes
    out to the bit.

    calibrator: as it stood before the first decision; it is left as it is. Levels are taken from the log: they were
    set when a verdict was asked for. Decisions are taken in the order of decision_seq; all of one `batch` are decided
    before any of them is learnt, as the lane does. Before a decision that discards others, the calibrator goes back to
    where the log began and learns again what is in force. `InputError` for a log that is no log: as `in_force`, a batch
    that comes back, a key or score that no store takes.
    """
    ordered = _ordered(decisions)
    for before, after in pairwise(ordered):
        if after.batch < before.batch:
            raise InputError(f"the decision log goes back to batch {after.batch} at decision {after.decision_seq}")
    replayed = deepcopy(calibrator)
    known: dict[int, Decision] = {}
    for _, group in groupby(ordered, key=lambda d: d.batch):
        batch = list(group)
        for decision in batch:
            if decision.discards:
                _discard(known, decision)
                replayed = deepcopy(calibrator)
                _learn(replayed, known.values())
            if (difference := _check(decision, replayed)) is not None:
                return difference
        _learn(replayed, batch)
        known |= {decision.decision_seq: decision for decision in batch}
    return None


def restore(calibrator: Calibrator, decisions: Iterable[Decision], discards: Iterable[int] = ()) -> None:
    """Bring a calibrator to where a run goes on after these decisions, as `--resume` needs it.

    The calibrator must stand where the log began. discards: those in force that the next decision is to discard. The
    log is checked on the way: `InputError` names the first decision that does not come out as recorded, and nothing is
    learned then.
    """
    log = list(decisions)
    if (difference := check_log(log, calibrator)) is not None:
        raise InputError(f"the decision log does not follow from this calibration ({difference})")
    gone = set(discards)
    _learn(calibrator, (d for d in in_force(log) if d.decision_seq not in gone))


def learn_again(calibrator: Calibrator, start: Calibrator, decisions: Iterable[Decision]) -> None:
    """Bring a calibrator to where it would stand had it learnt these decisions alone, in this order, from `start`. A
    monitor around it keeps what it has seen."""
    inner = calibrator.inner if isinstance(calibrator, Monitored) else calibrator
    inner.restore(start.arrays())
    calibrator.store = inner.store
    _learn(inner, decisions)


def _ordered(decisions: Iterable[Decision]) -> list[Decision]:
    ordered = sorted(decisions, key=lambda d: d.decision_seq)
    for before, after in pairwise(ordered):
        if before.decision_seq == after.decision_seq:
            raise InputError(f"the decision log holds decision_seq {after.decision_seq} twice")
    return ordered


def _discard(known: dict[int, Decision], decision: Decision) -> None:
    for seq in decision.discards:
        if known.pop(seq, None) is None:
            raise InputError(
                f"decision {decision.decision_seq} discards decision {seq}, which is not in force: the decision log "
                "was changed, or is of two runs"
            )


def _learn(calibrator: Calibrator, decisions: Iterable[Decision]) -> None:
    for d in decisions:
        calibrator.observe(d.score, d.key, d.verdict == "takeover", d.problem, d.p_value)


def _check(decision: Decision, calibrator: Calibrator) -> Difference | None:
    try:
        ruling = calibrator.decide(decision.score, decision.key, decision.u, decision.problem, level=decision.level)
    except CalibrationError as error:
        raise InputError(f"decision {decision.decision_seq}: {error}") from error
    seen = ruling.assessment
    replayed = {
        "n": seen.n,
        "count": seen.greater + seen.ties,
        "ties": seen.ties,
        "k": decision.level * (seen.n + 1),
        "p_value": seen.p_value,
        "threshold": ruling.threshold,
        "verdict": "takeover" if ruling.takeover else "keep",
    }
    for field, value in replayed.items():
        if getattr(decision, field) != value:
            return Difference(decision.decision_seq, field, getattr(decision, field), value)
    return None
