"""What to do with the KV of a preempted sequence: move it to host memory, or drop it and compute it again."""

from __future__ import annotations

from dataclasses import dataclass

from atts_engine.models import ModelConfig

PREEMPTIONS = ("auto", "swap", "recompute")

LINK_BYTES_S = {"cuda": 20e9, "cpu": 5e9}
COMPUTE_FLOP_S = {"cuda": 200e12, "cpu": 100e9}
"""What a device can be counted on for: pinned copies of pages over PCIe (within memory on a CPU), and the matrix
products of a long prefill. Only their ratio matters, and the two sides of `worth_moving` are seldom near each other:
8B parameters with 128 KiB of KV a token move in a third of the time that they take to compute."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Of one model on one device. page_bytes: of a KV page in all layers."""

    config: ModelConfig
    page_bytes: int
    link_bytes_s: float
    compute_flop_s: float

    @classmethod
    def of(cls, config: ModelConfig, page_bytes: int, device_type: str) -> Costs:
        return cls(config, page_bytes, LINK_BYTES_S[device_type], COMPUTE_FLOP_S[device_type])

    def worth_moving(self, pages: int, first: int, end: int) -> bool:
        """Whether moving `pages` out and in again takes less time than computing positions [first, end) again."""
        return 2 * pages * self.page_bytes / self.link_bytes_s < forward_flops(self.config, first, end) / (
            self.compute_flop_s
        )


def forward_flops(config: ModelConfig, first: int, end: int) -> float:
    """Floating-point operations that compute the KV of positions [first, end), those before being in the cache: two for
    each weight of the blocks, and four for each element of q and each position it attends to. No LM head."""
    attended = (end * (end + 1) - first * (first + 1)) / 2
    q = config.num_heads * config.head_dim
    return 2.0 * block_weights(config) * (end - first) + 4.0 * config.num_layers * q * attended


def block_weights(config: ModelConfig) -> int:
    """Elements of the matrices of all blocks: q, k, v, output, and the three of the MLP."""
    c = config
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    return c.num_layers * c.hidden_size * (2 * q + 2 * kv + 3 * c.intermediate_size)
