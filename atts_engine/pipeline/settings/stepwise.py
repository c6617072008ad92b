"""Settings of the strategies in which the two models write by turns to a rule of their own."""

from __future__ import annotations

from dataclasses import dataclass

from atts_engine.pipeline.settings.base import Settings, check_choice, check_kinds, check_least


@dataclass(frozen=True, slots=True)
class SpeculativeThinking(Settings):
    """Speculative Thinking (arXiv 2504.12329): behind a blank line the words of the draft's next tokens say whether the
    target is to think there in its place.

    propose: tokens that are looked at, and that the target writes where they affirm, reflect or verify; verify: tokens
    more where they verify; reflections: so many spans that reflect bring a recap, 0 for never; recap: tokens of the
    target behind the first one.
    """

    propose: int = 20
    verify: int = 125
    reflections: int = 15
    recap: int = 125

    def __post_init__(self) -> None:
        check_kinds(self)
        for name, least in (("propose", 1), ("verify", 0), ("reflections", 0), ("recap", 1)):
            check_least(self, name, least)


@dataclass(frozen=True, slots=True)
class Lookahead(Settings):
    """Lookahead Reasoning (arXiv 2506.19830): the draft runs ahead by steps, while the target writes its own step
    behind each of them; the draft's stay as far as a judge finds them to be the target's, whose step follows.

    depth: steps of the draft ahead. judge: "target" is asked whether two steps say the same, "task": both are right by
    the task's checker or the same text, "exact": the same text.
    """

    depth: int = 4
    judge: str = "target"

    def __post_init__(self) -> None:
        check_kinds(self)
        check_least(self, "depth", 1)
        check_choice(self, "judge", ("target", "task", "exact"))
