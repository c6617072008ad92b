"""Log-probabilities of given tokens, and their mean over a span."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from atts_engine.errors import InputError
from atts_engine.ops import checks, native
from atts_engine.ops.dense import pad_rows
from atts_engine.ops.dispatch import TRITON, chosen, runs_native

_TILE_ELEMENTS = 1 << 22
_ROW_CHUNK = 512


def vocabulary_tile(vocab: int, hidden: int) -> int:
    """Vocabulary columns of one tile of the reference: a function of the model alone, so that the score of a token
    does not depend on who shares its batch."""
    tile = max(1024, _TILE_ELEMENTS // max(hidden, 1) // 1024 * 1024)
    return min(vocab, tile)


def score_tokens(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """log softmax(hidden[T, H] @ weight[V, H].T)[t, ids[t]] -> logprob[T] fp32; ids int64 in [0, V).

    Goes through the vocabulary tile by tile; [T, V] never exists. The target's logit comes from the same product as
    the normaliser. A row that is not finite gives NaN. Raises InputError where shapes do not fit or an id is not a
    token; on a GPU, where the check would wait for the device, such an id gives NaN.
    """
    checks.score_tokens(hidden, weight, ids)
    rows = hidden.shape[0]
    if chosen("score_tokens", hidden.device) == TRITON:
        import atts_triton

        return atts_triton.score_tokens(hidden, weight, ids)
    if runs_native("score_tokens", hidden) and weight.dtype == hidden.dtype:
        return native.score_tokens(hidden, weight, ids)
    parts = [
        _score_rows(hidden[at : at + _ROW_CHUNK], weight, ids[at : at + _ROW_CHUNK])
        for at in range(0, rows, _ROW_CHUNK)
    ]
    return torch.cat(parts) if parts else hidden.new_empty(0, dtype=torch.float32)


def _score_rows(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    rows, vocab = hidden.shape[0], weight.shape[0]
    hidden = pad_rows(hidden.float())  # logits rounded to fp16 or bf16 would lose ranks
    ids = torch.cat((ids, ids.new_zeros(hidden.shape[0] - rows)))
    tile = vocabulary_tile(vocab, weight.shape[1])
    peak = hidden.new_full((hidden.shape[0],), float("-inf"), dtype=torch.float32)
    total = torch.zeros_like(peak)
    target = torch.zeros_like(peak)
    for first in range(0, vocab, tile):
        logits = torch.nn.functional.linear(hidden, weight[first : first + tile].float())
        local = ids - first
        inside = (local >= 0) & (local < logits.shape[1])
        picked = logits.gather(1, local.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
        target = torch.where(inside, picked, target)
        new_peak = torch.maximum(peak, logits.amax(1))
        # One subtraction serves rows that are -inf so far: exp(-inf - finite) is 0, and -inf - -inf is kept away.
        anchor = new_peak.masked_fill(new_peak == float("-inf"), 0.0)
        total = total * (peak - anchor).exp_() + logits.sub_(anchor[:, None]).exp_().sum(1)
        peak = new_peak
    known = (ids >= 0) & (ids < vocab)
    return torch.where(known, target - (peak + total.log()), float("nan"))[:rows]


def score_logits(logits: Tensor, ids: Tensor) -> Tensor:
    """log softmax(logits[T, V])[t, ids[t]] -> logprob[T] fp32, for logits that exist already; ids int64 in [0, V)."""
    checks.score_logits(logits, ids)
    if runs_native("score_logits", logits):
        return native.score_logits(logits, ids)
    wide = logits.float()
    peak = wide.amax(1, keepdim=True)
    weights = (wide - peak).exp_()
    if len(ids) == 1 and not logits.is_cuda:
        # Threads cut the sum of a lone row, which changes its bits; rows in company are summed by one thread each.
        weights = torch.cat((weights, weights))
    total = weights.sum(1)[: len(ids)]
    return (wide.gather(1, ids[:, None]) - peak)[:, 0] - total.log()


def span_mean(logprob: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Score of each span: (score[B] fp32 = -mean, sum_logprob[B] fp64) of logprob[T] fp32 over cu_seqlens[B + 1].

    The sum runs in fp64 from the first token to the last, so a caller that adds a span's chunks one after the other
    arrives at the same bits. Raises InputError for an empty span or bounds that do not cover logprob.
    """
    checks.span_mean(logprob, cu_seqlens)
    bounds = cu_seqlens.tolist()
    values = logprob.tolist()
    if bounds[0] != 0 or bounds[-1] != len(values):
        raise InputError(f"span_mean: cu_seqlens runs {bounds[0]} .. {bounds[-1]} for {len(values)} tokens")
    sums, means = [], []
    for start, end in pairwise(bounds):
        if end <= start:
            raise InputError("span_mean: a span without tokens has no score")
        total = 0.0
        for value in values[start:end]:
            total += value
        sums.append(total)
        means.append(-total / (end - start))
    device = logprob.device
    return (
        torch.tensor(means, dtype=torch.float64, device=device).float(),
        torch.tensor(sums, dtype=torch.float64, device=device),
    )
