"""What a study may vary, and one point of it."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from atts_engine.errors import InputError
from atts_engine.pipeline.params import TAKEOVERS, ATTSParams

Value = int | float | str
DIGITS = 3
"""Decimals of a proposed alpha: nobody needs more, and people read it."""


@dataclass(frozen=True, slots=True)
class Configuration:
    """One setting of everything that is tuned. pair: name of a draft and a target, as the study lists them; the others
    as in `ATTSParams`."""

    pair: str
    chains: int
    turns: int
    draft_tokens: int
    target_tokens: int
    alpha: float
    takeover: str

    def params(self, base: ATTSParams) -> ATTSParams:
        """`base` with this configuration's values."""
        values = asdict(self)
        del values["pair"]
        return replace(base, **values)

    def __str__(self) -> str:
        return (
            f"{self.pair}, {self.chains} chains, {self.turns} turns, K {self.draft_tokens}/{self.target_tokens}, "
            f"alpha {self.alpha:g}, {self.takeover}"
        )


NAMES = tuple(field.name for field in fields(Configuration))
WHOLE = ("chains", "turns", "draft_tokens", "target_tokens")


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from low to high, both included: whole numbers on a logarithmic scale, since twice as many chains is a
    step of the same kind wherever it is taken, or real ones on a linear scale."""

    low: float
    high: float
    whole: bool

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise InputError(f"a range must be written LOW-HIGH with LOW <= HIGH, not {self.low:g}-{self.high:g}")

    def value(self, share: float) -> Value:
        """The value `share` (0 to 1) of the way from low to high."""
        if self.whole:
            found = math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
            return int(min(self.high, max(self.low, round(found))))
        return self.nearest(self.low + share * (self.high - self.low))

    def nearest(self, value: float) -> float:
        """A real value with few decimals, within the range."""
        return min(self.high, max(self.low, round(value, DIGITS)))

    def draw(self, rng: random.Random) -> Value:
        """A random value, uniform on the range's scale."""
        return self.value(rng.random())

    def levels(self, count: int) -> tuple[Value, ...]:
        """Up to `count` different values, evenly spaced on the range's scale; the middle one where count is 1."""
        shares = [0.5] if count == 1 else [i / (count - 1) for i in range(count)]
        return tuple(dict.fromkeys(self.value(share) for share in shares))

    def complaint(self, value: object) -> str | None:
        """Why `value` is not of this range, or None."""
        kind = int if self.whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kind) or not self.low <= value <= self.high:
            return f"must be a {'whole ' if self.whole else ''}number from {self.low:g} to {self.high:g}, not {value!r}"
        return None

    def __str__(self) -> str:
        return f"{self.low:g}-{self.high:g}"


@dataclass(frozen=True, slots=True)
class Choice:
    """One of a few values, each as likely as the others."""

    values: tuple[Value, ...]

    def __post_init__(self) -> None:
        if not self.values or len(set(self.values)) != len(self.values):
            raise InputError(f"a choice must list different values, not {self}")

    def draw(self, rng: random.Random) -> Value:
        """One of the values."""
        return rng.choice(self.values)

    def levels(self, count: int) -> tuple[Value, ...]:
        """All values, however many levels a range would have."""
        return self.values

    def complaint(self, value: object) -> str | None:
        """Why `value` is none of these, or None."""
        # 4.0 and True equal whole numbers that they cannot stand for.
        if not any(type(value) is type(known) and value == known for known in self.values):
            return f"must be one of {self}, not {value!r}"
        return None

    def __str__(self) -> str:
        return ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in self.values)


Dimension = Range | Choice


@dataclass(frozen=True, slots=True)
class Space:
    """A dimension for every field of `Configuration`. `InputError` where a value could not be run."""

    dimensions: Mapping[str, Dimension]

    def __post_init__(self) -> None:
        if set(self.dimensions) != set(NAMES):
            raise InputError(f"a search space needs exactly the dimensions {', '.join(NAMES)}")
        for name, dimension in self.dimensions.items():
            ends = dimension.values if isinstance(dimension, Choice) else (dimension.low, dimension.high)
            for value in ends:
                if name in WHOLE and not (isinstance(value, int | float) and value >= 1 and value == int(value)):
                    raise InputError(f"{name} must be whole numbers, 1 or more, not {value}")
                if name == "alpha" and not (isinstance(value, int | float) and 0.0 < value < 1.0):
                    raise InputError(f"alpha must be inside (0, 1), not {value}")
                if name == "takeover" and value not in TAKEOVERS:
                    raise InputError(f"takeover must be one of {', '.join(TAKEOVERS)}, not {value!r}")

    def configuration(self, values: Mapping[str, Any]) -> Configuration:
        """The configuration that `values` spell out; `InputError` names every value that is missing, unknown or out of
        its range."""
        unknown = [f"{name!r} is no setting" for name in values if name not in self.dimensions]
        missing = [f"{name} is missing" for name in NAMES if name not in values]
        wrong = [
            f"{name} {complaint}"
            for name, dimension in self.dimensions.items()
            if name in values and (complaint := dimension.complaint(values[name])) is not None
        ]
        if found := unknown + missing + wrong:
            raise InputError("; ".join(found))
        return Configuration(**{name: values[name] for name in NAMES})

    def draw(self, rng: random.Random) -> Configuration:
        """A random configuration, every dimension by itself."""
        return self.configuration({name: self.dimensions[name].draw(rng) for name in NAMES})

    def as_json(self) -> dict[str, Any]:
        """{name: [low, high] in a range, or {"choice": [values]}}."""
        return {
            name: {"choice": list(d.values)} if isinstance(d, Choice) else [d.low, d.high]
            for name, d in self.dimensions.items()
        }


def dimension(name: str, text: str) -> Dimension:
    """A dimension as people write it: "4-16" is a range, "1,2,8" a choice, "8" one value. `InputError` names `name`."""
    whole = name in WHOLE
    try:
        low, dash, high = text.partition("-")
        if dash:
            return Range(_number(low, whole), _number(high, whole), whole)
        return Choice(tuple(_number(part, whole) for part in text.split(",")))
    except ValueError as error:
        raise InputError(
            f"{name} must be a range such as LOW-HIGH, a list such as A,B,C, or one value, not {text!r}"
            + (f" ({error})" if isinstance(error, InputError) else "")
        ) from error


def _number(text: str, whole: bool) -> int | float:
    if whole:
        return int(text)
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value
