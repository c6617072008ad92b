"""What a span's first tokens say of its whole score, whatever follows them."""

from __future__ import annotations

import numpy as np

ROUNDING = 1e-4
"""Nats by which the log-probability of a token that is still to come may lie above 0. In exact arithmetic none does;
computed in float32 it may by a few units in the last place of its logit, some 1e-5 for a logit of 100."""


def lowest_score(sum_logprob: float, n: int, most: int) -> float:
    """A lower bound, as float32, on the score of a span of at most `most` tokens whose first n log-probabilities sum to
    `sum_logprob`: a float64, summed from the first to the last as `ops.span_mean` does.

    A negative log-likelihood is 0 or more, so the sum over the whole span is at least that over its first n tokens, and
    its mean over n' <= most tokens is at least that sum over `most`. The same holds for the numbers as computed:
    no sum, quotient or rounding falls where what goes into it rises, and a token that may still come is allowed to lie
    `ROUNDING` above 0, which is far more than the rounding of a sum. So the bound never falls as n grows either; at
    n = most it is the span's score.
    """
    return float(np.float32((-sum_logprob - ROUNDING * (most - n)) / most))
