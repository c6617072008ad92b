"""Sampling by the Gumbel-max trick, with noise that belongs to a token and not to its place in the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from atts_engine.ops import checks, native
from atts_engine.ops.dispatch import TRITON, chosen, runs_native

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)
_CHUNK = 1 << 20


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
) -> Tensor:
    """Draw one id per row of logits[B, V] -> ids[B] int64.

    temperature[B] fp32 (0: argmax, the first of ties; so is one that takes the largest logit out of fp32's range on
    division); top_k[B] int64 (0: off); top_p[B] fp32 (1: off); min_p[B] fp32
    (0: off); seed[B], position[B] int64. Filters act in the order temperature, top_k (ties of the k-th stay), top_p
    (the smallest set, largest first, lower id first among ties, that reaches top_p of what top_k left), min_p
    (relative to the largest probability, so its place in the order changes nothing but top_p's base).

    The noise of a token is a hash of (seed, position, token id), so a row's draw does not depend on its place in the
    batch nor on the other rows. A row with NaN, a temperature of NaN among it, or without a finite largest logit gives
    -1. Implementations round masses each in their own way: a token whose mass ahead of it is within 2^-18 of the total
    from top_p's border, or whose probability is as near to min_p's, may fall on either side,
    and logits that only the division by the temperature makes equal may count as ties or in their own order.
    """
    checks.sample(logits, temperature, top_k, top_p, min_p, seed, position)
    rows, vocab = logits.shape
    if chosen("sample", logits.device) == TRITON:
        import atts_triton

        return atts_triton.sample(logits, temperature, top_k, top_p, min_p, seed, position)
    if runs_native("sample", logits.device, logits.dtype):
        return native.sample(logits, temperature, top_k, top_p, min_p, seed, position)
    logits = logits.float()
    step = max(1, _CHUNK // vocab)
    if rows <= step:
        return _sample_rows(logits, temperature, top_k, top_p, min_p, seed, position)
    parts = [
        _sample_rows(*(t[at : at + step] for t in (logits, temperature, top_k, top_p, min_p, seed, position)))
        for at in range(0, rows, step)
    ]
    return torch.cat(parts)


def _sample_rows(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
) -> Tensor:
    peak = logits.amax(1)
    # An infinite temperature would make NaN of tokens at -inf.
    temperature = temperature.clamp(max=torch.finfo(torch.float32).max)
    greedy = (temperature <= 0) | (peak / temperature).isinf()
    if bool(greedy.all()):
        ids = logits.argmax(1)
    else:
        scaled = logits / torch.where(greedy, 1.0, temperature)[:, None]
        filtered = ~greedy & ((top_k > 0) | (top_p < 1) | (min_p > 0))
        if bool(filtered.any()):
            chosen = filtered.nonzero().view(-1)
            scaled[chosen] = _filter(scaled[chosen], top_k[chosen], top_p[chosen], min_p[chosen])
        noise = gumbel_noise(seed, position, logits.shape[1])
        ids = torch.where(greedy[:, None], logits, scaled.add_(noise)).argmax(1)
    return torch.where(torch.isfinite(peak) & ~temperature.isnan(), ids, -1)


def _filter(scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Scaled logits[B, V] with what the filters take away at -inf."""
    vocab = scaled.shape[1]
    ordered, order = scaled.sort(dim=1, descending=True, stable=True)
    limit = torch.where(top_k > 0, top_k, vocab).clamp(max=vocab)
    kth = ordered.gather(1, (limit - 1)[:, None])
    relative = (ordered - ordered[:, :1]).exp_()  # probability over the largest probability
    mass = relative.masked_fill(ordered < kth, 0.0).double()
    before = mass.cumsum(1).sub_(mass)
    total = mass.sum(1, keepdim=True)
    beyond = (before >= top_p[:, None] * total) & (top_p < 1)[:, None]
    beyond[:, 0] = False
    drop = (ordered < kth) | beyond | (relative < min_p[:, None])
    return scaled.masked_fill(torch.zeros_like(drop).scatter_(1, order, drop), float("-inf"))


def gumbel_noise(seed: Tensor, position: Tensor, vocab: int) -> Tensor:
    """Standard Gumbel noise [B, V] fp32 of (seed[B], position[B], token id)."""
    stream = _mix(_mix(position * _GOLDEN + seed) + seed)
    ids = torch.arange(1, vocab + 1, device=seed.device) * _GOLDEN
    bits = _mix(stream[:, None] + ids) & 0x7FFFFFFFFFFFFFFF
    # The largest noise comes from the smallest exponential. Taking it as -log1p(-v) of a small v keeps v's full
    # relative precision there, where -log(u) of a u next to 1 would have 2^-24 steps.
    tail = bits.float().mul_(2.0**-63).clamp_(min=2.0**-64)
    return torch.log1p(tail.neg_()).neg_().log_().neg_()


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014), on int64 with wrap-around."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MIX_1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MIX_2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
