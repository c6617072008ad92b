"""The decision log: one record per verdict. Replaying it from the initial store reproduces every verdict."""

from __future__ import annotations

import os
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import asdict, dataclass
from itertools import groupby, pairwise
from typing import Any

from atts_engine.conformal import CalibrationError, Calibrator
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
    """The decision as a line of decisions.jsonl. Floats survive JSON to the bit."""
    return asdict(decision)


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
        **integers,
    )


def read_decisions(path: str | os.PathLike[str], *, allow_torn_tail: bool = False) -> list[Decision]:
    """The decisions of a log, in the file's order."""
    return [decision_from_line(line) for line in read_lines(path, allow_torn_tail=allow_torn_tail)]


def check_log(decisions: Iterable[Decision], calibrator: Calibrator) -> Difference | None:
    """Replay a log from the calibrator's state; the first difference, or None if every count, p-value and verdict comes
    out to the bit.

    calibrator: as it stood before the first decision; it is left as it is. Levels are taken from the log: they were
    set when a verdict was asked for. Decisions are taken in the order of decision_seq; all of one `batch` are decided
    before any of them is learnt, as the lane does. `InputError` for a log that is no log: a decision_seq twice, a
    batch that comes back, a key or score that no store takes.
    """
    return _replayed(decisions, deepcopy(calibrator))


def restore(calibrator: Calibrator, decisions: Iterable[Decision]) -> None:
    """Bring a calibrator to where it stood after these decisions, as `--resume` needs it.

    The calibrator must stand where the log began. The log is checked on the way: `InputError` names the first
    decision that does not come out as recorded, and nothing is learned then.
    """
    log = list(decisions)
    if (difference := check_log(log, calibrator)) is not None:
        raise InputError(f"the decision log does not follow from this calibration ({difference})")
    for decision in sorted(log, key=lambda d: d.decision_seq):
        _learn(calibrator, decision)


def _replayed(decisions: Iterable[Decision], calibrator: Calibrator) -> Difference | None:
    ordered = sorted(decisions, key=lambda d: d.decision_seq)
    for before, after in pairwise(ordered):
        if before.decision_seq == after.decision_seq:
            raise InputError(f"the decision log holds decision_seq {after.decision_seq} twice")
        if after.batch < before.batch:
            raise InputError(f"the decision log goes back to batch {after.batch} at decision {after.decision_seq}")
    for _, group in groupby(ordered, key=lambda d: d.batch):
        batch = list(group)
        for decision in batch:
            if (difference := _check(decision, calibrator)) is not None:
                return difference
        for decision in batch:
            _learn(calibrator, decision)
    return None


def _learn(calibrator: Calibrator, decision: Decision) -> None:
    takeover = decision.verdict == "takeover"
    calibrator.observe(decision.score, decision.key, takeover, decision.problem, decision.p_value)


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
