"""Ending a trial early that cannot become the best: racing by intervals (Maron and Moore, "Hoeffding races", 1993)."""

from __future__ import annotations

import math
from statistics import NormalDist

from atts_engine.evaluation.tuning.trial import Measurement

LEVEL = 0.95


def wilson(right: int, seen: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's score interval of a share (E. B. Wilson, 1927): unlike a bootstrap it has a width at 0 and at 1.

    `right` of `seen` problems, seen being 1 or more.
    """
    z = NormalDist().inv_cdf(0.5 + level / 2.0)
    share, shrink = right / seen, 1.0 + z * z / seen
    centre = (share + z * z / (2.0 * seen)) / shrink
    half = z / shrink * math.sqrt(share * (1.0 - share) / seen + z * z / (4.0 * seen * seen))
    return max(0.0, centre - half), min(1.0, centre + half)


def hopeless(right: int, seen: int, leader: Measurement) -> bool:
    """Whether the interval of `right` of `seen` lies wholly below the leader's. Looks that are taken several times have
    no joint level, so this may end a good trial: it saves time and proves nothing."""
    return wilson(right, seen)[1] < wilson(leader.right, leader.problems)[0]
