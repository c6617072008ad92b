"""The fused path of the verifier: from hidden states to verdicts."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from atts_engine.ops import checks
from atts_engine.ops.dispatch import TRITON, chosen
from atts_engine.ops.gating import check_capacity, gate
from atts_engine.ops.scoring import check_softcap, score_tokens, span_mean


class ScoreGateResult(NamedTuple):
    """Per span: score fp32[B] and sum_logprob fp64[B] as of `span_mean`, the rest as of `gate`."""

    score: Tensor
    sum_logprob: Tensor
    greater: Tensor
    ties: Tensor
    n: Tensor
    takeover: Tensor
    p: Tensor


def score_gate(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    cu_seqlens: Tensor,
    key: Tensor,
    ring: Tensor,
    size: Tensor,
    head: Tensor,
    level: Tensor,
    u: Tensor,
    insert: Tensor,
    softcap: float = 0.0,
) -> ScoreGateResult:
    """`score_tokens`, `span_mean` and `gate` as one: hidden[T, H], weight[V, H], ids[T] int64 and the spans
    cu_seqlens[B + 1] (int32 or int64) give the scores of B spans, which are tested against the store and inserted.

    key, level, u, insert [B] and ring[K, C], size[K], head[K] are those of `gate`; ring, size and head change in place.
    softcap is that of `score_tokens`. Results are those of the three ops one after the other, to the bit within one
    implementation. A span whose score is not finite has no verdict: greater = -1, ties = 0, takeover False, p NaN.

    Raises InputError where any of the three would.
    """
    checks.score_gate(hidden, weight, ids, cu_seqlens, key, ring, size, head, level, u, insert)
    check_softcap(softcap, "score_gate")
    check_capacity(ring, "score_gate")
    if chosen("score_gate", hidden.device) == TRITON:
        import atts_triton

        results = atts_triton.score_gate(
            hidden, weight, ids, cu_seqlens, key, ring, size, head, level, u, insert, softcap
        )
        return ScoreGateResult(*results)
    score, sums = span_mean(score_tokens(hidden, weight, ids, softcap), cu_seqlens)
    return ScoreGateResult(score, sums, *gate(score, key, ring, size, head, level, u, insert))
