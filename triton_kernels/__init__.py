"""Triton kernels of atts-engine. They know tensors and nothing else: `atts_engine.ops` checks shapes and chooses
them."""

from __future__ import annotations

from atts_triton.gate import gate
from atts_triton.paged_attention import paged_attention
from atts_triton.score_tokens import score_tokens

__all__ = ["gate", "paged_attention", "score_tokens"]
