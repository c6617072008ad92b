"""Triton kernels of atts-engine. They know tensors and nothing else: `atts_engine.ops` checks shapes and chooses
them."""

from __future__ import annotations

from atts_triton.gate import gate
from atts_triton.score_gate import score_gate
from atts_triton.score_logits import score_logits
from atts_triton.score_tokens import score_tokens
from atts_triton.span_mean import span_mean

__all__ = ["gate", "score_gate", "score_logits", "score_tokens", "span_mean"]
