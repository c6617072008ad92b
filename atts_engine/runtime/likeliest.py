"""The likeliest tokens of rows of logits, for those who ask what else might have been drawn."""

from __future__ import annotations

import math

from torch import Tensor

from atts_engine import ops
from atts_engine.runtime.records import Alternatives


def top_logprobs(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The min(k, V) largest entries of log softmax(logits)[t], k >= 1, the largest first: (ids int64, logprob fp32),
    each [T, min(k, V)], of logits[T, V]. Enqueues alone: nothing is read on the host.

    The normaliser is that of `ops.score_logits`, so an entry is what that says of the same token, to a unit in its last
    place. Which of equal logits come first, or at all, is not defined. A row that holds NaN gives NaN. A row's bits do
    not depend on the other rows.
    """
    top, ids = logits.topk(min(k, logits.shape[1]), dim=1)
    first = ops.score_logits(logits, ids[:, 0].contiguous())
    top = top.float()
    return ids, (top - top[:, :1]) + first[:, None]


def alternatives(ids: list[int], logprobs: list[float]) -> Alternatives:
    """One row of `top_logprobs` on the host, less the tokens that cannot be drawn at all."""
    return tuple((token, logprob) for token, logprob in zip(ids, logprobs, strict=True) if math.isfinite(logprob))
