"""The probability threshold set: an interval by itself where the probabilities have one mode (COPOC)."""

from __future__ import annotations

from atts_engine.conformal.ordinal.checks import Floats
from atts_engine.conformal.ordinal.sets import ScoredSets


class ProbabilityThreshold(ScoredSets):
    """{k: f_k >= threshold}. With the unimodal probabilities of `UnimodalHead` it is an interval without widening and
    the two together are COPOC (Dey, Merugu, Kaveri, "Conformal prediction sets for ordinal classification", NeurIPS
    2023); with others the interval is its hull, which is `FixedSequence`.

    Guarantee: as `ScoredSets`. The smallest sets on average that a given predictor allows, if its probabilities are
    right (Sadinle, Lei, Wasserman, JASA 2019).
    """

    def strangeness(self, probabilities: Floats) -> Floats:
        return -probabilities
