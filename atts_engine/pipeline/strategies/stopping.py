"""When sampling may stop: decisions on the answers so far, in the order of chain numbers.

`answers` are spelt in one way each (`voting.one_spelling`); None is a chain without an answer, which has no vote. Each
rule says the fewest further chains that could let it stop, 0 when it does. That many are written side by side: a rule
that looked after each of them could not have stopped before the last, so none is written in vain.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import count

Answers = Sequence[str | None]


def majority_probability(first: int, second: int) -> float:
    """P(Beta(first + 1, second + 1) > 1/2): how surely an answer with `first` votes is the more frequent of two, under
    a uniform prior (Aggarwal et al., arXiv 2305.11860).

    P(Beta(a, b) > 1/2) is P(Binomial(a + b - 1, 1/2) <= a - 1), a ratio of integers, so nothing is rounded but the
    result.
    """
    trials = first + second + 1
    ways: int = sum(math.comb(trials, i) for i in range(first + 1))
    return ways / (1 << trials)


def to_majority(answers: Answers, threshold: float) -> int:
    """Chains that Adaptive-Consistency needs at least; `threshold` in (1/2, 1)."""
    first, second = _leaders(answers)
    return next(more for more in count() if majority_probability(first + more, second) >= threshold)


def unanimous(answers: Answers, window: int) -> str | None:
    """The answer of the first whole window whose chains all gave it."""
    for at in range(0, len(answers) - window + 1, window):
        (answer, *others) = answers[at : at + window]
        if answer is not None and all(other == answer for other in others):
            return answer
    return None


def to_unanimous(answers: Answers, window: int) -> int:
    """Chains that ESC needs at least: the rest of the window."""
    return 0 if unanimous(answers, window) is not None else window - len(answers) % window


def _leaders(answers: Answers) -> tuple[int, int]:
    votes = Counter(a for a in answers if a is not None).most_common(2)
    first, second = (n for _, n in [*votes, ("", 0), ("", 0)][:2])
    return first, second
