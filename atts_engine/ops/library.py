"""Registration of the ops as torch.ops.atts.*, with fakes, for torch.compile and for callers outside this package.

The engine calls the Python functions themselves: a call through the dispatcher costs it several microseconds, fifty
times a step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from atts_engine.ops.attention import paged_attention
from atts_engine.ops.dense import add_rms_norm, linear, rms_norm, rope, silu_mul
from atts_engine.ops.gating import gate
from atts_engine.ops.paging import (
    kv_append,
    kv_copy_pages,
    kv_gather,
    kv_scatter,
    kv_slots,
    kv_swap,
    rope_kv_append,
)
from atts_engine.ops.sampling import sample
from atts_engine.ops.scoring import score_logits, score_tokens, span_mean, token_confidence
from atts_engine.ops.verdicts import score_gate

_GATE_SCHEMA = (
    "gate(Tensor score, Tensor key, Tensor(a!) ring, Tensor(b!) size, Tensor(c!) head, Tensor level, Tensor u, "
    "Tensor insert) -> (Tensor greater, Tensor ties, Tensor n, Tensor takeover, Tensor p)"
)
_SCORE_GATE_SCHEMA = (
    "score_gate(Tensor hidden, Tensor weight, Tensor ids, Tensor cu_seqlens, Tensor key, Tensor(a!) ring, "
    "Tensor(b!) size, Tensor(c!) head, Tensor level, Tensor u, Tensor insert, float softcap=0.0) -> "
    "(Tensor score, Tensor sum_logprob, Tensor greater, Tensor ties, Tensor n, Tensor takeover, Tensor p)"
)
_SCORE_TOKENS_SCHEMA = "score_tokens(Tensor hidden, Tensor weight, Tensor ids, float softcap=0.0) -> Tensor"
_SAMPLE_SCHEMA = (
    "sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seed, "
    "Tensor position) -> Tensor"
)
_ATTENTION_SCHEMA = (
    "paged_attention(Tensor q, Tensor kv_layer, Tensor block_table, Tensor cu_q, Tensor kv_len, float scale, *, "
    "int window=0) -> Tensor"
)
_ROPE_APPEND_SCHEMA = (
    "rope_kv_append(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) kv_layer, Tensor slots) -> Tensor"
)
_SWAP_SCHEMA = "kv_swap(Tensor(a!) kv, Tensor(b!) host, Tensor pages, Tensor slots, bool to_host) -> ()"


def _like_first(first: Tensor, *_: object) -> Tensor:
    return torch.empty_like(first)


def _two_like_first(first: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(first), torch.empty_like(first)


def _attention_fake(q: Tensor, *_: object, window: int = 0) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _fp32_per_row(first: Tensor, *_: object) -> Tensor:
    return first.new_empty(first.shape[0], dtype=torch.float32)


def _nothing(*_: object) -> None:
    return None


def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _span_mean_fake(logprob: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    spans = cu_seqlens.shape[0] - 1
    return logprob.new_empty(spans), logprob.new_empty(spans, dtype=torch.float64)


def _gate_fake(score: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = score.shape[0]
    kinds = (torch.int64, torch.int64, torch.int64, torch.bool, torch.float64)
    greater, ties, n, takeover, p = (score.new_empty(rows, dtype=kind) for kind in kinds)
    return greater, ties, n, takeover, p


def _gather_fake(kv: Tensor, pages: Tensor) -> Tensor:
    return kv.new_empty(pages.shape[0], *kv.shape[:2], *kv.shape[3:])


def _score_gate_fake(hidden: Tensor, weight: Tensor, ids: Tensor, cu_seqlens: Tensor, *_: object) -> tuple[Tensor, ...]:
    score = hidden.new_empty(cu_seqlens.shape[0] - 1, dtype=torch.float32)
    return score, torch.empty_like(score, dtype=torch.float64), *_gate_fake(score)


def _sample_fake(logits: Tensor, *_: object) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


_REGISTRATIONS: tuple[tuple[str, Callable[..., object], Callable[..., object]], ...] = (
    ("linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor", linear, _linear_fake),
    ("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", rms_norm, _like_first),
    (
        "add_rms_norm(Tensor x, Tensor delta, Tensor weight, float eps) -> (Tensor sum, Tensor normed)",
        add_rms_norm,
        _two_like_first,
    ),
    ("silu_mul(Tensor gate, Tensor up) -> Tensor", silu_mul, _like_first),
    ("rope(Tensor x, Tensor cos, Tensor sin) -> Tensor", rope, _like_first),
    ("kv_append(Tensor k, Tensor v, Tensor(a!) kv_layer, Tensor slots) -> ()", kv_append, _nothing),
    ("kv_copy_pages(Tensor(a!) kv, Tensor src, Tensor dst) -> ()", kv_copy_pages, _nothing),
    ("kv_slots(Tensor positions, Tensor block_table, Tensor cu_q, int page) -> Tensor", kv_slots, _like_first),
    (_ROPE_APPEND_SCHEMA, rope_kv_append, _like_first),
    ("kv_gather(Tensor kv, Tensor pages) -> Tensor", kv_gather, _gather_fake),
    ("kv_scatter(Tensor staged, Tensor(a!) kv, Tensor pages) -> ()", kv_scatter, _nothing),
    (_SWAP_SCHEMA, kv_swap, _nothing),
    (_ATTENTION_SCHEMA, paged_attention, _attention_fake),
    (_SCORE_TOKENS_SCHEMA, score_tokens, _fp32_per_row),
    ("score_logits(Tensor logits, Tensor ids, float softcap=0.0) -> Tensor", score_logits, _fp32_per_row),
    ("token_confidence(Tensor logits, int k) -> Tensor", token_confidence, _fp32_per_row),
    ("span_mean(Tensor logprob, Tensor cu_seqlens) -> (Tensor score, Tensor sum_logprob)", span_mean, _span_mean_fake),
    (_GATE_SCHEMA, gate, _gate_fake),
    (_SCORE_GATE_SCHEMA, score_gate, _score_gate_fake),
    (_SAMPLE_SCHEMA, sample, _sample_fake),
)


def register() -> torch.library.Library:
    """Define every op in the namespace `atts`. The returned library must be kept: its end takes the ops away."""
    library = torch.library.Library("atts", "DEF")
    for schema, function, fake in _REGISTRATIONS:
        name = schema.partition("(")[0]
        library.define(schema)
        library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"atts::{name}", fake, lib=library)
    return library
