"""Small valid inputs of every op, by name and dtype."""

from __future__ import annotations

from typing import Any

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
NAMES = {
    "linear": ("x", "weight", "bias"),
    "rms_norm": ("x", "weight", "eps"),
    "add_rms_norm": ("x", "delta", "weight", "eps"),
    "silu_mul": ("gate", "up"),
    "rope": ("x", "cos", "sin"),
    "kv_append": ("k", "v", "kv_layer", "slots"),
    "kv_copy_pages": ("kv", "src", "dst"),
    "kv_swap": ("kv", "host", "pages", "slots", "to_host"),
    "paged_attention": ("q", "kv_layer", "block_table", "cu_q", "kv_len", "scale"),
    "score_tokens": ("hidden", "weight", "ids"),
    "score_logits": ("logits", "ids"),
    "span_mean": ("logprob", "cu_seqlens"),
    "gate": ("score", "key", "ring", "size", "head", "level", "u", "insert"),
    "sample": ("logits", "temperature", "top_k", "top_p", "min_p", "seed", "position"),
}
"""Arguments of every op, in order."""
FP32_ONLY = frozenset({"gate", "span_mean"})


def dtypes(op: str) -> tuple[torch.dtype, ...]:
    """What op takes for its floating inputs."""
    return FLOATS[:1] if op in FP32_ONLY else FLOATS


def sample(op: str, dtype: torch.dtype, device: str = "cpu") -> tuple[Any, ...]:
    """Arguments for one call of op, fresh at every call: some ops write to theirs."""
    g = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(device, dtype)

    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, device=device)

    def fp32(*shape: int) -> torch.Tensor:
        return torch.full(shape, 0.5, device=device)

    x, q, kv_layer = random(5, 16), random(5, 4, 8), random(2, 6, 4, 2, 8)
    index, host = ints(0, 1, 2, 3, 4), torch.arange(3)
    if op == "linear":
        return x, random(7, 16), random(7)
    if op == "rms_norm":
        return x, random(16), 1e-5
    if op == "add_rms_norm":
        return x, random(5, 16), random(16), 1e-5
    if op == "silu_mul":
        return x, random(5, 16)
    if op == "rope":
        return q, fp32(5, 4), fp32(5, 4)
    if op == "kv_append":
        return random(5, 2, 8), random(5, 2, 8), kv_layer, index
    if op == "kv_copy_pages":
        return kv_layer[None].clone(), ints(0, 1), ints(3, 4)
    if op == "kv_swap":
        return kv_layer[None].clone(), torch.zeros(4, 1, 2, 4, 2, 8, dtype=dtype), ints(0, 1, 2), host + 1, True
    if op == "paged_attention":
        table, cu_q, kv_len = ints(*range(6)).view(2, 3), ints(0, 2, 5), ints(9, 3)
        return q, kv_layer, table.int(), cu_q.int(), kv_len.int(), 0.3
    if op == "score_tokens":
        return x, random(40, 16), index
    if op == "score_logits":
        return x, index
    if op == "span_mean":
        return fp32(5), ints(0, 2, 5)
    if op == "gate":
        store = fp32(3, 4) * 0, ints(0, 0, 0), ints(0, 0, 0)
        return fp32(5), index % 3, *store, index + 1, index + 1, index > 0
    assert op == "sample", op
    return x, fp32(5), index, fp32(5), fp32(5), index, index
