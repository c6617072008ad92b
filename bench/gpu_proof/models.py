"""Models of real shapes with random weights, made on the device: speed does not know what the weights say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from atts_engine.evaluation.simulation.catalogue import MODELS
from atts_engine.models import Decoder, Model, ModelConfig, Tokenizer
from atts_engine.models.decoder import DecoderWeights, LayerWeights

CONFIGS = {name: MODELS[f"qwen2.5-{name.lower()}"] for name in ("1.5B", "7B", "14B")}
"""config.json of Qwen/Qwen2.5-1.5B-Instruct, -7B-Instruct and -14B-Instruct on the Hugging Face hub."""
TINY = {
    name: replace(
        CONFIGS["1.5B"], vocab_size=41000, hidden_size=16, num_layers=layers, num_heads=2, num_kv_heads=1, head_dim=8,
        intermediate_size=32, max_positions=512, eos_token_ids=(0,),
    )
    for name, layers in (("1.5B", 1), ("7B", 1), ("14B", 2))
}  # fmt: skip
"""The same names at the sizes of a dry run; the vocabulary holds the prompts of `bench.e2e`."""


@dataclass(frozen=True)
class NoText:
    """A tokenizer whose tokens have no text: what random weights write means nothing."""

    vocab_size: int
    eos_token_ids: tuple[int, ...]
    fingerprint: str = "no text"
    settled: bool = True

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return ""

    def detokenizer(self, skip_special: bool = True) -> NoText:
        return self

    def push(self, ids: Sequence[int]) -> str:
        return ""

    def settle(self) -> str:
        return ""

    def copy(self) -> NoText:
        return self


def random_model(name: str, config: ModelConfig, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Model:
    """Normal weights of variance 1 / fan-in, norms of ones, biases of zeros, so that activations stay near 1."""
    g = torch.Generator(device).manual_seed(seed)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=g, device=device, dtype=dtype).mul_(columns**-0.5)

    def ones(n: int) -> Tensor:
        return torch.ones(n, device=device, dtype=dtype)

    c = config
    width = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim

    def layer() -> LayerWeights:
        return LayerWeights(
            attn_norm=ones(c.hidden_size),
            qkv=matrix(width, c.hidden_size),
            qkv_bias=torch.zeros(width, device=device, dtype=dtype) if c.qkv_bias else None,
            q_norm=ones(c.head_dim) if c.qk_norm else None,
            k_norm=ones(c.head_dim) if c.qk_norm else None,
            out=matrix(c.hidden_size, c.num_heads * c.head_dim),
            mlp_norm=ones(c.hidden_size),
            gate_up=matrix(2 * c.intermediate_size, c.hidden_size),
            down=matrix(c.hidden_size, c.intermediate_size),
        )

    embed = matrix(c.vocab_size, c.hidden_size)
    layers = tuple(layer() for _ in range(c.num_layers))
    head = embed if c.tie_embeddings else matrix(c.vocab_size, c.hidden_size)
    decoder = Decoder(c, DecoderWeights(embed, layers, ones(c.hidden_size), head))
    tokenizer = cast(Tokenizer, NoText(c.vocab_size, c.eos_token_ids))
    return Model(f"{name}, random weights", c, decoder, tokenizer, f"random {seed}")
