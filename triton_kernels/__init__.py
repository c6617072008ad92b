"""Triton kernels of atts-engine. They know tensors and nothing else: `atts_engine.ops` checks shapes and chooses
them."""

from __future__ import annotations

from atts_triton.gate import gate
from atts_triton.paged_attention import paged_attention
from atts_triton.paging import kv_append, kv_copy_pages, kv_gather, kv_scatter, kv_slots, rope_kv_append
from atts_triton.rows import add_rms_norm, rms_norm, rope, silu_mul
from atts_triton.sample import sample
from atts_triton.score_gate import score_gate
from atts_triton.score_logits import score_logits
from atts_triton.score_tokens import score_tokens
from atts_triton.span_mean import span_mean

__all__ = [
    "add_rms_norm",
    "gate",
    "kv_append",
    "kv_copy_pages",
    "kv_gather",
    "kv_scatter",
    "kv_slots",
    "paged_attention",
    "rms_norm",
    "rope",
    "rope_kv_append",
    "sample",
    "score_gate",
    "score_logits",
    "score_tokens",
    "silu_mul",
    "span_mean",
]
