"""Settings of strategies that sample chains with one model, decide when to stop, and vote.

`ATTSParams.chains` is the most chains that any of them writes; where a source gives a number of its own, it is named.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from atts_engine.pipeline.settings.base import Settings, check_choice, check_inside, check_kinds, check_least

AUTHORS = ("draft", "target")
SCORES = ("nll", "reward", "p-true")


@dataclass(frozen=True, slots=True)
class Sampling(Settings):
    """author: the model that writes the chains. The sources run their methods on one model, the one whose answers are
    wanted; that is the target."""

    per_chain: ClassVar[bool] = False
    author: str = "target"

    def __post_init__(self) -> None:
        check_kinds(self)
        check_choice(self, "author", AUTHORS)


@dataclass(frozen=True, slots=True)
class SelfConsistency(Sampling):
    """Self-consistency (Wang et al., arXiv 2203.11171): the answer that most chains give.

    weighted: a chain counts with the geometric mean probability per token that its author gave it (the paper's
    "normalized weighted sum"), in place of 1.
    """

    weighted: bool = False


@dataclass(frozen=True, slots=True)
class SelfCheck(Sampling):
    """The author is asked of each chain whether its answer is correct: confidence c = P(yes | chain + question).

    question, yes: the words, with what separates them from the text before; empty: those of Self-Calibration (Huang et
    al., arXiv 2503.00031) where the author's tokenizer can spell them, else those of the built-in pair (see
    `strategies.self_check`).
    """

    question: str = ""
    yes: str = ""


@dataclass(frozen=True, slots=True)
class BestOfN(SelfCheck):
    """Best of N: the answer of the chain with the highest score.

    score: "nll", the mean log-likelihood per token under the target; "reward", the task's checker of steps, which
    stands in for a reward model; "p-true", the author's own confidence that it is right (Kadavath et al., arXiv
    2207.05221), asked as in `SelfCheck`.
    """

    score: str = "nll"

    def __post_init__(self) -> None:
        Sampling.__post_init__(self)
        check_choice(self, "score", SCORES)


@dataclass(frozen=True, slots=True)
class AdaptiveConsistency(Sampling):
    """Adaptive-Consistency (Aggarwal et al., arXiv 2305.11860): no more chains once the leading answer is the majority
    with a probability of `threshold`.

    With v1 and v2 votes of the two leading answers that probability is P(Beta(v1 + 1, v2 + 1) > 1/2). The paper writes
    40 chains at most.
    """

    threshold: float = 0.95

    def __post_init__(self) -> None:
        Sampling.__post_init__(self)
        check_inside(self, "threshold", 0.5, 1.0)


@dataclass(frozen=True, slots=True)
class EarlyStoppingConsistency(Sampling):
    """Early-stopping self-consistency, ESC (Li et al., arXiv 2401.10480): chains are written in windows of `window`;
    the answer is that of the first window whose chains all agree, else the majority of all. The paper writes 40 chains
    at most."""

    window: int = 5

    def __post_init__(self) -> None:
        Sampling.__post_init__(self)
        check_least(self, "window", 2)
