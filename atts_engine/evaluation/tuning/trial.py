"""One proposal and what came of it: a line of trials.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from atts_engine.evaluation.jsonl import Line
from atts_engine.evaluation.tuning.cost import Workload
from atts_engine.evaluation.tuning.space import Configuration, Space

STATES = ("measured", "pruned", "infeasible", "refused")


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a configuration achieved on the tuning problems.

    accuracy, low, high: share of problems whose vote is right, with its 95% Wilson interval; takeover_rate: None
    without a verdict; text_tokens: mean length of a chain's text; work, costs: for one problem (see `cost`); wall_s:
    seconds of all problems together. Of a pruned trial all of it is of the problems that were run.
    """

    problems: int
    right: int
    accuracy: float
    low: float
    high: float
    takeover_rate: float | None
    text_tokens: float
    work: Workload
    costs: Mapping[str, float]
    wall_s: float


@dataclass(frozen=True, slots=True)
class Trial:
    """number: from 1, the trial's line in trials.jsonl. state: "measured"; "pruned" (ended early, hopeless);
    "infeasible" (its planned cost is over the budget, so it was not run); "refused" (the proposer named nothing that
    could be run; no configuration then).

    planned_cost: in the budget's kind, None where nothing was known to plan with. repeats: number of the trial with the
    same configuration whose measurement this is. insights: what the proposer believed when it proposed; reason: why it
    proposed this; complaints: what was wrong with answers that were told back to it.
    """

    number: int
    state: str
    configuration: Configuration | None
    planned_cost: float | None = None
    measurement: Measurement | None = None
    repeats: int | None = None
    insights: tuple[str, ...] = ()
    reason: str | None = None
    complaints: tuple[str, ...] = field(default=())

    def as_json(self) -> dict[str, Any]:
        """The line of trials.jsonl, with every digit of every number."""
        return asdict(self)

    @classmethod
    def from_json(cls, line: Line, space: Space) -> Trial:
        """The trial of a line; `InputError` with the line's number for anything that `as_json` does not write."""
        state = line.text("state")
        if state not in STATES:
            raise line.error(f"state must be one of {', '.join(STATES)}, not {state!r}")
        values, found = line.fields.get("configuration"), line.fields.get("measurement")
        repeats = line.fields.get("repeats")
        try:
            return cls(
                number=line.integer("number"),
                state=state,
                configuration=None if values is None else space.configuration(values),
                planned_cost=line.optional_number("planned_cost"),
                measurement=None if found is None else _measurement(found),
                repeats=None if repeats is None else line.integer("repeats"),
                insights=_texts(line, "insights"),
                reason=line.optional_text("reason"),
                complaints=_texts(line, "complaints"),
            )
        except (TypeError, KeyError, ValueError) as error:
            raise line.error(f"not a trial of this study ({error})") from error


def _measurement(found: Mapping[str, Any]) -> Measurement:
    work = dict(found["work"])
    draft, target = work.pop("prompt_tokens")
    rest = {name: value for name, value in found.items() if name != "work"}
    return Measurement(**rest, work=Workload(prompt_tokens=(draft, target), **work))


def _texts(line: Line, name: str) -> tuple[str, ...]:
    values = line.fields.get(name, [])
    if not isinstance(values, Sequence) or not all(isinstance(value, str) for value in values):
        raise line.error(f"field {name!r} must be a list of strings")
    return tuple(values)
