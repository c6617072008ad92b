"""Oracles of the ops in float64, and how far a result may be from them.

Written from the ops' contracts and not from their code. What an op only moves or decides has no error: it is compared
bit for bit with the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

Oracle = Callable[..., tuple[Tensor, ...]]
FACTOR = 2.0
"""An element may be this many times as far from float64 as plain torch in the same dtype is."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
    product = x.double() @ weight.double().T
    return (product if bias is None else product + bias.double(),)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
    wide = x.double()
    return (wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double(),)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
    """The norm is that of the sum as it is handed on, rounded to the dtype."""
    return (x.double() + delta.double(), *rms_norm(x + delta, weight, eps))


def silu_mul(gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    return (gate.double() * gate.double().sigmoid() * up.double(),)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    low, high = x.double().chunk(2, dim=-1)
    cos, sin = cos.double()[:, None], sin.double()[:, None]
    return (torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1),)


def rope_kv_append(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, kv_layer: Tensor, slots: Tensor
) -> tuple[Tensor, ...]:
    """(q turned, the layer's pages after the append)."""
    pages = kv_layer.double()
    pages[0].flatten(0, 1)[slots] = rope(k, cos, sin)[0]
    pages[1].flatten(0, 1)[slots] = v.double()
    return (*rope(q, cos, sin), pages)


def paged_attention(
    q: Tensor, kv_layer: Tensor, block_table: Tensor, cu_q: Tensor, kv_len: Tensor, scale: float
) -> tuple[Tensor, ...]:
    """Row i of a sequence's n sees its first kv_len - n + i + 1 tokens."""
    out = []
    bounds, group = cu_q.tolist(), q.shape[1] // kv_layer.shape[3]
    for b, length in enumerate(kv_len.tolist()):
        first, last = bounds[b], bounds[b + 1]
        k, v = (kv_layer[i][block_table[b].long()].flatten(0, 1)[:length].double() for i in range(2))
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))  # [length, Hq, D]
        scores = torch.einsum("nhd,lhd->hnl", q[first:last].double(), k) * scale
        seen = torch.ones(last - first, length, dtype=torch.bool, device=q.device).tril(length - (last - first))
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        out.append(torch.einsum("hnl,lhd->nhd", weights, v))
    return (torch.cat(out),)


def score_logits(logits: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    return (logits.double().log_softmax(-1).gather(1, ids[:, None])[:, 0],)


def token_confidence(logits: Tensor, k: int) -> tuple[Tensor, ...]:
    return (-logits.double().log_softmax(-1).topk(min(k, logits.shape[1])).values.mean(-1),)


def score_tokens(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    """By pieces of rows, as float64 logits of many are large."""
    pieces = zip(hidden.split(64), ids.split(64), strict=True)
    return (torch.cat([score_logits(linear(h, weight)[0], i)[0] for h, i in pieces]),)


def span_mean(logprob: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, ...]:
    sums = torch.stack([span.double().sum() for span in logprob.split(cu_seqlens.diff().tolist())])
    return -sums / cu_seqlens.diff(), sums


ORACLES: dict[str, Oracle] = {
    "linear": linear,
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "silu_mul": silu_mul,
    "rope": rope,
    "rope_kv_append": rope_kv_append,
    "paged_attention": paged_attention,
    "score_logits": score_logits,
    "score_tokens": score_tokens,
    "span_mean": span_mean,
    "token_confidence": token_confidence,
}
"""By op: results in float64, the contents of what the op writes to behind them."""
WRITTEN: dict[str, tuple[int, ...]] = {
    "kv_append": (2,),
    "rope_kv_append": (5,),
    "kv_copy_pages": (0,),
    "kv_scatter": (1,),
    "kv_swap": (0, 1),
    "gate": (2, 3, 4),
    "score_gate": (5, 6, 7),
}
"""By op: arguments that it writes to."""


def excess(ours: Tensor, reference: Tensor, oracle: Tensor) -> float:
    """The largest error of an element over what it may be: FACTOR times the reference's error there, or four times the
    root of the mean of its squares where that is more, and a rounding. At most 1 is right; what is not finite, or has
    another shape or dtype, is inf."""
    if ours.shape != reference.shape or ours.dtype != reference.dtype or not bool(ours.isfinite().all()):
        return float("inf")
    if not ours.numel():
        return 0.0
    error, theirs = (ours.double() - oracle).abs(), (reference.double() - oracle).abs()
    spread = theirs.square().mean().sqrt()
    # Where the reference happens to be exact: one rounding of the result, and the last bits of exp, rsqrt and sums.
    rounding = max(torch.finfo(ours.dtype).eps, 4 * torch.finfo(torch.float32).eps)
    allowed = FACTOR * torch.maximum(theirs, 4 * spread) + rounding * oracle.abs() + 1e-6
    return float((error / allowed).max())


def relative(ours: Tensor, oracle: Tensor) -> float:
    """Norm of the error over that of the result, in roundings of the dtype, of 2.5e-6 at least. Below 4 is right for
    the reference, which `excess` takes for its measure."""
    rounding = max(torch.finfo(ours.dtype).eps, 2.5e-6)
    return float((ours.double() - oracle).norm() / (rounding * oracle.norm()).clamp(min=1e-30))


@contextmanager
def poisoned() -> Iterator[None]:
    """Every tensor that torch allocates without contents holds NaN, or the largest integer, until it is written."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fills
