"""A study without models: accuracy and cost are known functions of the configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from atts_engine.evaluation.tuning import Budget, Choice, Configuration, Measurement, Range, Space, Trial, Workload
from atts_engine.evaluation.tuning.study import Hopeless

BUDGET = Budget("tokens", 400.0)
PROBLEMS = 40


def space(**changed: Range | Choice) -> Space:
    """Small ranges of everything, with two pairs."""
    dimensions: dict[str, Range | Choice] = {
        "pair": Choice(("d:t", "d:big")),
        "chains": Range(1, 16, True),
        "turns": Range(2, 8, True),
        "draft_tokens": Range(8, 48, True),
        "target_tokens": Range(8, 48, True),
        "alpha": Range(0.1, 0.9, False),
        "takeover": Choice(("continue", "replace")),
    }
    return Space(dimensions | changed)


def target_tokens(c: Configuration) -> float:
    """Tokens that the target writes for a problem."""
    return c.chains * c.turns * c.alpha * c.target_tokens


def smooth(c: Configuration) -> float:
    """An accuracy with one summit: many chains, alpha at 0.62, replace."""
    return (0.4 + 0.5 * c.chains / 16) * (1.0 - abs(c.alpha - 0.62)) * (1.0 if c.takeover == "replace" else 0.7)


def measurement(accuracy: float, tokens: float, problems: int = PROBLEMS) -> Measurement:
    """The record of an accuracy and a cost; its other figures follow or are constant."""
    right = round(accuracy * problems)
    costs = {"tokens": tokens, "flops": 1e6 * tokens, "units": tokens / 7.0, "seconds": tokens / 100.0}
    work = Workload(4, (50.0, 50.0), 80.0, 20.0)
    return Measurement(
        problems, right, accuracy, max(0.0, accuracy - 0.1), min(1.0, accuracy + 0.1), 0.4, 100.0, work, costs, 1.0
    )


class FakeEvaluator:
    """`dies_after`: measurements after which the next one is interrupted. ran: what was measured, in order."""

    def __init__(
        self, accuracy: Callable[[Configuration], float] = smooth, dies_after: int | None = None, plans: bool = True
    ) -> None:
        self.ran: list[Configuration] = []
        self._accuracy = accuracy
        self._dies_after = dies_after
        self._plans = plans

    def planned(self, configuration: Configuration, history: Sequence[Trial]) -> dict[str, float] | None:
        return dict(measurement(0.0, target_tokens(configuration)).costs) if self._plans and history else None

    def measure(self, configuration: Configuration, hopeless: Hopeless | None) -> tuple[Measurement, bool]:
        if self._dies_after is not None and len(self.ran) >= self._dies_after:
            raise KeyboardInterrupt
        self.ran.append(configuration)
        accuracy, tokens = self._accuracy(configuration), target_tokens(configuration)
        for seen in range(10, PROBLEMS, 10):
            if hopeless is not None and hopeless(round(accuracy * seen), seen):
                return measurement(accuracy, tokens, seen), False
        return measurement(accuracy, tokens), True
