"""Strategies by name, each with its settings, its source and its defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from atts_engine.errors import InputError
from atts_engine.pipeline.settings.base import Options, Settings
from atts_engine.pipeline.settings.gated import (
    Asynchronous,
    CoinToss,
    Gated,
    LatestTurns,
    LongestSpans,
    RewardGuided,
    SpecReason,
)
from atts_engine.pipeline.settings.sampling import (
    AdaptiveConfidence,
    AdaptiveConsistency,
    BestOfN,
    ConfidentVote,
    DeepConf,
    EarlyStoppingBest,
    EarlyStoppingConsistency,
    Probing,
    SelfConsistency,
)
from atts_engine.pipeline.settings.speculative import Speculative
from atts_engine.pipeline.settings.stepwise import Lookahead, SpeculativeThinking

__all__ = [
    "SETTINGS",
    "STRATEGIES",
    "AdaptiveConfidence",
    "AdaptiveConsistency",
    "Alone",
    "Asynchronous",
    "BestOfN",
    "CoinToss",
    "ConfidentVote",
    "DeepConf",
    "DraftAlone",
    "EarlyStoppingBest",
    "EarlyStoppingConsistency",
    "Gated",
    "LatestTurns",
    "LongestSpans",
    "Lookahead",
    "Options",
    "Probing",
    "RewardGuided",
    "SelfConsistency",
    "Settings",
    "SpecReason",
    "Speculative",
    "SpeculativeThinking",
    "Synchronous",
    "TargetAlone",
    "make_settings",
    "parse_strategy",
    "strategy_text",
]


@dataclass(frozen=True, slots=True)
class Alone(Settings):
    """One model alone writes every chain."""

    author: ClassVar[str]


@dataclass(frozen=True, slots=True)
class DraftAlone(Alone):
    author: ClassVar[str] = "draft"


@dataclass(frozen=True, slots=True)
class TargetAlone(Alone):
    author: ClassVar[str] = "target"


@dataclass(frozen=True, slots=True)
class Synchronous(Settings):
    """The baseline that the paper argues against: a barrier per turn, softmax ranking of the problem's chains, and the
    worst alpha of them are taken over."""

    per_chain: ClassVar[bool] = False


SETTINGS: Mapping[str, type[Settings]] = {
    "atts": Asynchronous,
    "atts-sync": Synchronous,
    "coin": CoinToss,
    "draft": DraftAlone,
    "lookahead": Lookahead,
    "rsd": RewardGuided,
    "span-length": LongestSpans,
    "spec-reason": SpecReason,
    "speculative": Speculative,
    "speculative-thinking": SpeculativeThinking,
    "target": TargetAlone,
    "turn-number": LatestTurns,
    "self-consistency": SelfConsistency,
    "best-of-n": BestOfN,
    "adaptive-consistency": AdaptiveConsistency,
    "esc": EarlyStoppingConsistency,
    "deepconf": DeepConf,
    "probing": Probing,
    "early-stop-bon": EarlyStoppingBest,
    "sc-conf": ConfidentVote,
    "asc-conf": AdaptiveConfidence,
}

STRATEGIES = tuple(SETTINGS)


def make_settings(name: str, options: Options = ()) -> Settings:
    """The settings of a strategy by its name; options that are left out keep their defaults."""
    if name not in SETTINGS:
        raise InputError(f"strategy must be one of {', '.join(STRATEGIES)}, not {name!r}")
    kind = SETTINGS[name]
    known = [f.name for f in fields(kind)]
    values: dict[str, Any] = dict(options)
    for option in values:
        if option not in known:
            there = f"it has {', '.join(known)}" if known else "it has none"
            raise InputError(f"the strategy {name} has no option {option!r}; {there}")
    return kind(**values)


def parse_strategy(text: str) -> tuple[str, Options]:
    """`NAME` or `NAME:option=value:option=value`, as it is written on the command line, into name and options."""
    name, *pairs = text.split(":")
    options = []
    for pair in pairs:
        option, equals, value = pair.partition("=")
        if not option or not equals:
            raise InputError(f"a strategy is written NAME or NAME:option=value:..., not {text!r}")
        options.append((option.replace("-", "_"), _value(value)))
    make_settings(name, tuple(options))
    return name, tuple(options)


def strategy_text(name: str, options: Options) -> str:
    """What `parse_strategy` reads."""
    return ":".join([name, *(f"{option.replace('_', '-')}={value}" for option, value in options)])


def _value(text: str) -> int | float | str | bool:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
