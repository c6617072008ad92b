"""Log-probabilities of given tokens, and their mean over a span."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from atts_engine.errors import InputError
from atts_engine.ops import checks, cuda, native
from atts_engine.ops.dense import pad_rows
from atts_engine.ops.dispatch import CUDA, NATIVE, TRITON, chosen, runs_native

_TILE_ELEMENTS = 1 << 22
_ROW_CHUNK = 512


def vocabulary_tile(vocab: int, hidden: int) -> int:
    """Vocabulary columns of one tile of the reference: a function of the model alone, so that the score of a token
    does not depend on who shares its batch."""
    tile = max(1024, _TILE_ELEMENTS // max(hidden, 1) // 1024 * 1024)
    return min(vocab, tile)


def check_softcap(softcap: float, name: str) -> None:
    """Raises InputError for a soft-cap that is neither 0 (off) nor a positive number."""
    if not 0 <= softcap < math.inf:
        raise InputError(f"{name}: softcap must be 0 or a positive number, not {softcap}")


def _soft_capped(logits: Tensor, softcap: float) -> Tensor:
    """softcap * tanh(logits / softcap), in place; the logits themselves where softcap is 0."""
    return logits.div_(softcap).tanh_().mul_(softcap) if softcap else logits


def score_tokens(hidden: Tensor, weight: Tensor, ids: Tensor, softcap: float = 0.0) -> Tensor:
    """log softmax(z)[t, ids[t]] -> logprob[T] fp32 of z = hidden[T, H] @ weight[V, H].T; ids int64 in [0, V).

    softcap: where it is not 0, z is softcap * tanh(z / softcap), the cap of Gemma 2's logits (arXiv 2408.00118, section
    2). The kernel of csrc/ has none: such logits take the reference on the CPU.

    Goes through the vocabulary tile by tile; [T, V] never exists. The target's logit comes from the same product as
    the normaliser. A row that is not finite gives NaN. Raises InputError where shapes do not fit or an id is not a
    token; on a GPU, where the check would wait for the device, such an id gives NaN.
    """
    checks.score_tokens(hidden, weight, ids)
    check_softcap(softcap, "score_tokens")
    rows = hidden.shape[0]
    if chosen("score_tokens", hidden.device) == TRITON:
        import atts_triton

        return atts_triton.score_tokens(hidden, weight, ids, softcap)
    if not softcap and runs_native("score_tokens", hidden.device, hidden.dtype) and weight.dtype == hidden.dtype:
        return native.score_tokens(hidden, weight, ids)
    parts = [
        _score_rows(hidden[at : at + _ROW_CHUNK], weight, ids[at : at + _ROW_CHUNK], softcap)
        for at in range(0, rows, _ROW_CHUNK)
    ]
    return torch.cat(parts) if parts else hidden.new_empty(0, dtype=torch.float32)


def _score_rows(hidden: Tensor, weight: Tensor, ids: Tensor, softcap: float) -> Tensor:
    rows, vocab = hidden.shape[0], weight.shape[0]
    hidden = pad_rows(hidden.float())  # logits rounded to fp16 or bf16 would lose ranks
    ids = torch.cat((ids, ids.new_zeros(hidden.shape[0] - rows)))
    tile = vocabulary_tile(vocab, weight.shape[1])
    peak = hidden.new_full((hidden.shape[0],), float("-inf"), dtype=torch.float32)
    total = torch.zeros_like(peak)
    target = torch.zeros_like(peak)
    for first in range(0, vocab, tile):
        logits = _soft_capped(torch.nn.functional.linear(hidden, weight[first : first + tile].float()), softcap)
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


def score_logits(logits: Tensor, ids: Tensor, softcap: float = 0.0) -> Tensor:
    """log softmax(z)[t, ids[t]] -> logprob[T] fp32, for logits[T, V] that exist already; ids int64 in [0, V).

    z is logits, or with a softcap softcap * tanh(logits / softcap), as in `score_tokens`. A row that holds NaN or +inf,
    or nothing but -inf, gives NaN; so does an id outside [0, V) on a GPU. Raises InputError where shapes do not fit.
    """
    checks.score_logits(logits, ids)
    check_softcap(softcap, "score_logits")
    impl = chosen("score_logits", logits.device)
    if impl == TRITON:
        import atts_triton

        return atts_triton.score_logits(logits if logits.stride(1) == 1 else logits.contiguous(), ids, softcap)
    if impl == CUDA:
        return cuda.score_logits(logits, ids, softcap)
    if not softcap and runs_native("score_logits", logits.device, logits.dtype):
        return native.score_logits(logits, ids)
    wide = logits.float()
    if softcap:
        wide = _soft_capped(wide.clone(), softcap)
    peak = wide.amax(1, keepdim=True)
    weights = (wide - peak).exp_()
    if len(ids) == 1 and not logits.is_cuda:
        # Threads cut the sum of a lone row, which changes its bits; rows in company are summed by one thread each.
        weights = torch.cat((weights, weights))
    total = weights.sum(1)[: len(ids)]
    return (wide.gather(1, ids[:, None]) - peak)[:, 0] - total.log()


def token_confidence(logits: Tensor, k: int) -> Tensor:
    """Confidence of each row: -mean of the k largest entries of log softmax(logits)[t] -> confidence[T] fp32.

    The token confidence of DeepConf (arXiv 2508.15260), in nats: high where the mass lies on few tokens. With a
    vocabulary of fewer than k tokens it is the mean over all of it. A row that holds NaN gives NaN. A row's bits do not
    depend on the other rows. Raises InputError where logits is no matrix or k is below 1.
    """
    checks.token_confidence(logits, k)
    wide = logits.float()
    peak = wide.amax(1, keepdim=True)
    weights = (wide - peak).exp_()
    if len(wide) == 1 and not logits.is_cuda:
        # As in `score_logits`: threads would cut the sum of a lone row.
        weights = torch.cat((weights, weights))
    total = weights.sum(1)[: len(wide)]
    top = wide.topk(min(k, wide.shape[1]), dim=1).values - peak
    return total.log() - top.mean(1)


def span_mean(logprob: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Score of each span: (score[B] fp32 = -mean, sum_logprob[B] fp64) of logprob[T] fp32 over cu_seqlens[B + 1].

    The sum runs in fp64 from the first token to the last, so a caller that adds a span's chunks one after the other
    arrives at the same bits. cu_seqlens is int32 or int64. Raises InputError for an empty span or bounds that do not
    cover logprob; on a GPU, where the check would wait for the device, a span that is empty or leaves 0..T gives NaN.
    """
    checks.span_mean(logprob, cu_seqlens)
    impl = chosen("span_mean", logprob.device)
    if impl == TRITON:
        import atts_triton

        return atts_triton.span_mean(logprob, cu_seqlens)
    if impl == CUDA:
        return cuda.span_mean(logprob, cu_seqlens)
    if impl == NATIVE:
        return native.span_mean(logprob, cu_seqlens)
    if not checks.values_read(logprob):  # it is read all the same
        checks.span_bounds("span_mean", cu_seqlens, logprob.shape[0])
    bounds = cu_seqlens.tolist()
    values = logprob.tolist()
    sums, means = [], []
    for start, end in pairwise(bounds):
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
