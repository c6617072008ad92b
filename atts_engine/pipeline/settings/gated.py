"""Settings of the strategies in which the draft writes and a gate says whether the target takes over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from atts_engine.errors import InputError
from atts_engine.pipeline.scorers import SCORERS
from atts_engine.pipeline.settings.base import Settings, check_choice, check_kinds, check_range

SPANS = ("tokens", "step")
GATES = ("threshold", "conformal")


@dataclass(frozen=True, slots=True)
class Gated(Settings):
    """One loop: the draft writes a span, a scorer says what it is worth (higher is worse), and a gate decides whether
    the target takes over. The strategies of this kind differ in these alone.

    span: "tokens" (as many as the parameters say) or "step" (to the next blank line, and at most as many tokens); the
    target writes its spans the same way. gate: "threshold" (a takeover where the score is above a limit of the
    strategy's own) or "conformal" (the request's calibrator at `ATTSParams.alpha`: every scorer at the same rate of
    takeovers). takeover: None leaves it to the parameters.
    """

    takeover: ClassVar[str | None] = None

    @property
    def span(self) -> str:
        return "tokens"

    @property
    def gate(self) -> str:
        return "conformal"

    @property
    def scorer(self) -> str:
        """A name of `scorers.SCORERS`."""
        return "mean-nll"

    def worst(self, alpha: float) -> float:
        """The highest score that the gate "threshold" lets pass."""
        raise InputError(f"{type(self).__name__} has no threshold of its own; its gate is conformal")

    @property
    def calibrated(self) -> bool:
        return self.gate == "conformal"

    @property
    def score(self) -> str:
        return self.scorer if self.span == "tokens" else f"{self.scorer} of steps"

    def __post_init__(self) -> None:
        check_kinds(self)
        check_choice(self, "span", SPANS)
        check_choice(self, "gate", GATES)


@dataclass(frozen=True, slots=True)
class Asynchronous(Gated):
    """ATTS (arXiv 2509.15148): each chain is judged alone, by its own p-value.

    scorer: what is tested in the place of the mean negative log-likelihood, a name of `scorers.SCORERS`.
    """

    span: str = "tokens"
    scorer: str = "mean-nll"

    def __post_init__(self) -> None:
        Gated.__post_init__(self)
        check_choice(self, "scorer", SCORERS)


@dataclass(frozen=True, slots=True)
class SpecReason(Gated):
    """SpecReason (arXiv 2504.07891; ruipeterpan/specreason): the target rates every step of the draft from 0 to 9 in
    one token, keeps those of `threshold` or more, and writes the others itself.

    judge: "target", or "task" (9 times the reward of the task's checker). expected: the mean of the digits under the
    target's probabilities in place of the likeliest one.
    """

    takeover: ClassVar[str | None] = "replace"
    judge: str = "target"
    threshold: float = 7.0
    expected: bool = False
    gate: str = "threshold"
    span: str = "step"

    @property
    def scorer(self) -> str:
        if self.judge == "task":
            return "task-rating"
        return "expected-target-rating" if self.expected else "target-rating"

    def worst(self, alpha: float) -> float:
        return 9.0 - self.threshold

    def __post_init__(self) -> None:
        Gated.__post_init__(self)
        check_choice(self, "judge", ("target", "task"))
        check_range(self, "threshold", 0.0, 9.0)


@dataclass(frozen=True, slots=True)
class RewardGuided(Gated):
    """Reward-guided speculative decoding (RSD, arXiv 2501.19324; BaohaoLiao/RSD): a step of the draft stays where a
    process reward model gives it `threshold` or more; the target writes the others. The reward is `Task.reward`'s."""

    takeover: ClassVar[str | None] = "replace"
    threshold: float = 0.7
    gate: str = "threshold"
    span: str = "step"

    @property
    def scorer(self) -> str:
        return "task-reward"

    def worst(self, alpha: float) -> float:
        return 1.0 - self.threshold

    def __post_init__(self) -> None:
        Gated.__post_init__(self)
        check_range(self, "threshold", 0.0, 1.0)


@dataclass(frozen=True, slots=True)
class CoinToss(Gated):
    """Control: takeovers by lot. With the gate "threshold" each with probability `ATTSParams.alpha`; "conformal" brings
    their number to it."""

    gate: str = "threshold"
    span: str = "tokens"

    @property
    def scorer(self) -> str:
        return "coin"

    def worst(self, alpha: float) -> float:
        return 1.0 - alpha


@dataclass(frozen=True, slots=True)
class LongestSpans(Gated):
    """Control: the spans of the most tokens are taken over, at the rate `ATTSParams.alpha`."""

    span: str = "step"

    @property
    def scorer(self) -> str:
        return "span-length"


@dataclass(frozen=True, slots=True)
class LatestTurns(Gated):
    """Control: the latest turns are taken over, at the rate `ATTSParams.alpha` of all."""

    span: str = "tokens"

    @property
    def scorer(self) -> str:
        return "turn-number"
