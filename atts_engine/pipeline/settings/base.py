"""What settings of strategies have in common, and checks of their values."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from atts_engine.errors import InputError

Options = tuple[tuple[str, int | float | str | bool], ...]


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of one strategy. Values are checked when they are made; `InputError` names the one that cannot be.

    per_chain: every chain is written for itself, so that an interrupted problem can be finished chain by chain, and the
    problem's answer is the vote of `ATTSParams.vote`. Otherwise chains depend on one another: an interrupted problem is
    begun anew, and the strategy says what the answer is.
    """

    per_chain: ClassVar[bool] = True

    @property
    def calibrated(self) -> bool:
        """Whether verdicts come from the request's calibrator at `ATTSParams.alpha`."""
        return False

    @property
    def score(self) -> str:
        """What is scored and how, as a calibration names it (`conformal.Meta.score`)."""
        return "mean-nll"


_KINDS: dict[type, tuple[tuple[type, ...], str]] = {
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "a text"),
    bool: ((bool,), "true or false"),
}


def check_kinds(settings: Settings) -> None:
    """`InputError` for a value of another kind than its default."""
    for field in fields(settings):
        kind, value = type(field.default), getattr(settings, field.name)
        allowed, words = _KINDS[kind]
        if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
            raise InputError(f"{field.name} must be {words}, not {value!r}")


def check_choice(settings: Settings, name: str, choices: Collection[str]) -> None:
    value = getattr(settings, name)
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def check_least(settings: Settings, name: str, least: int) -> None:
    value: Any = getattr(settings, name)
    if value < least:
        raise InputError(f"{name} must be {least} or more, not {value}")


def check_inside(settings: Settings, name: str, low: float, high: float) -> None:
    """Both ends are outside."""
    value: Any = getattr(settings, name)
    if not low < value < high:
        raise InputError(f"{name} must lie between {low} and {high}, both excluded, not {value}")


def check_range(settings: Settings, name: str, low: float, high: float) -> None:
    """Both ends are inside."""
    value: Any = getattr(settings, name)
    if not low <= value <= high:
        raise InputError(f"{name} must be a number from {low:g} to {high:g}, not {value!r}")
