"""Ordinal adaptive prediction sets: grow from the most probable label until enough mass is held."""

from __future__ import annotations

import numpy as np

from atts_engine.conformal.ordinal.checks import Floats
from atts_engine.conformal.ordinal.sets import ScoredSets


def mass_before(probabilities: Floats) -> Floats:
    """`[N, K]`: the mass held when a label is reached (and not counted yet), growing from the most probable label by
    the more probable of the two neighbours; 0 at the start. Of two equal neighbours the higher (worse) comes first."""
    f = probabilities
    n, n_classes = f.shape
    rows = np.arange(n)
    lower = f.argmax(axis=1)
    upper = lower.copy()
    before = np.zeros_like(f)
    mass = f[rows, lower].copy()
    for _ in range(n_classes - 1):
        below = np.where(lower > 0, f[rows, np.maximum(lower - 1, 0)], -1.0)
        above = np.where(upper < n_classes - 1, f[rows, np.minimum(upper + 1, n_classes - 1)], -1.0)
        down = below > above
        lower, upper = lower - down, upper + ~down
        label = np.where(down, lower, upper)
        before[rows, label] = mass
        mass = mass + f[rows, label]
    return before


class OrdinalAPS(ScoredSets):
    """Grows from the most probable label by the more probable neighbour while the mass held is at most the threshold.

    A label's strangeness is `mass_before`, so the calibration is exact for the rule and no grid over thresholds is
    needed. Guarantee: as `ScoredSets`; contiguous and nested by construction. Source: Lu, Angelopoulos, Pomerantz,
    "Improving trustworthiness of AI disease severity rating in medical imaging with ordinal conformal prediction
    sets" (MICCAI 2022).
    """

    def strangeness(self, probabilities: Floats) -> Floats:
        return mass_before(probabilities)
