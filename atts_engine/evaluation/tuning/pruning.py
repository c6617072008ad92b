"""Ending a trial early that cannot become the best: racing by intervals (Maron and Moore, "Hoeffding races", 1993)."""

from __future__ import annotations

from atts_engine.evaluation.intervals import wilson
from atts_engine.evaluation.tuning.trial import Measurement


def hopeless(right: int, seen: int, leader: Measurement) -> bool:
    """Whether the 95% interval of `right` of `seen` lies wholly below the leader's.

    Looks that are taken several times have no joint level, so this may end a good trial: it saves time and proves
    nothing.
    """
    return wilson(right, seen).high < leader.low
