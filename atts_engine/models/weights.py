"""Named tensors of a checkpoint into the decoder's fused weights, one tensor in memory at a time."""

from __future__ import annotations

from typing import Protocol

import torch

from atts_engine.errors import InputError
from atts_engine.models.config import ModelConfig
from atts_engine.models.decoder import Decoder, DecoderWeights, LayerWeights, pack
from atts_engine.ops import Weight

# Buffers that old checkpoints saved beside the weights; they follow from the config.
_DERIVED = ("rotary_emb.inv_freq",)


class TensorSource(Protocol):
    """A checkpoint with Hugging Face Llama names. `read` gives a floating tensor on the CPU; InputError if it
    cannot be had."""

    @property
    def where(self) -> str: ...

    def names(self) -> frozenset[str]: ...

    def read(self, name: str) -> torch.Tensor: ...


def load_decoder(
    config: ModelConfig, source: TensorSource, device: torch.device, dtype: torch.dtype, *, packed: bool = False
) -> Decoder:
    """Read every tensor once, straight into its place on `device` in `dtype`. packed: `DecoderWeights.packed`, one
    matrix of the blocks after the other, so that no more than one plain one is held.

    InputError names the first tensor that is missing, misshapen or not floating point, or those this
    architecture has no place for.
    """
    return Decoder(config, _Loader(config, source, device, dtype, packed).weights())


class _Loader:
    def __init__(
        self, config: ModelConfig, source: TensorSource, device: torch.device, dtype: torch.dtype, packs: bool
    ) -> None:
        self.config, self.source, self.device, self.dtype, self.packs = config, source, device, dtype, packs
        self.unread = set(source.names())

    def weights(self) -> DecoderWeights:
        c = self.config
        embed = self.stacked([("model.embed_tokens.weight", (c.vocab_size, c.hidden_size))])
        layers = tuple(self.layer(f"model.layers.{index}.") for index in range(c.num_layers))
        norm = self.stacked([("model.norm.weight", (c.hidden_size,))])
        if c.tie_embeddings:
            self.unread.discard("lm_head.weight")
            lm_head = embed
        else:
            lm_head = self.stacked([("lm_head.weight", (c.vocab_size, c.hidden_size))])
        strange = sorted(name for name in self.unread if not name.endswith(_DERIVED))
        if strange:
            raise InputError(
                f"{self.source.where}: {len(strange)} tensors have no place in a {c.family} model of "
                f"{c.num_layers} layers, "
                f"{strange[0]} first; config and weights do not belong together"
            )
        weights = DecoderWeights(embed, layers, norm, lm_head)
        return weights.packed() if self.packs else weights

    def layer(self, prefix: str) -> LayerWeights:
        c = self.config
        hidden, inner, head = c.hidden_size, c.intermediate_size, c.head_dim
        width = {"q": c.num_heads * head, "k": c.num_kv_heads * head, "v": c.num_kv_heads * head}
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        return LayerWeights(
            attn_norm=self.stacked([(prefix + "input_layernorm.weight", (hidden,))]),
            qkv=self.matrix([(f"{attention}{n}_proj.weight", (rows, hidden)) for n, rows in width.items()]),
            qkv_bias=self.stacked([(f"{attention}{n}_proj.bias", (rows,)) for n, rows in width.items()])
            if c.qkv_bias
            else None,
            q_norm=self.stacked([(attention + "q_norm.weight", (head,))]) if c.qk_norm else None,
            k_norm=self.stacked([(attention + "k_norm.weight", (head,))]) if c.qk_norm else None,
            out=self.matrix([(attention + "o_proj.weight", (hidden, width["q"]))]),
            mlp_norm=self.stacked([(prefix + "post_attention_layernorm.weight", (hidden,))]),
            gate_up=self.matrix([(f"{mlp}{n}_proj.weight", (inner, hidden)) for n in ("gate", "up")]),
            down=self.matrix([(mlp + "down_proj.weight", (hidden, inner))]),
        )

    def matrix(self, parts: list[tuple[str, tuple[int, ...]]]) -> Weight:
        """Packed at once, where it is to be: no second plain matrix is held meanwhile."""
        plain = self.stacked(parts)
        return pack(plain) if self.packs else plain

    def stacked(self, parts: list[tuple[str, tuple[int, ...]]]) -> torch.Tensor:
        """The named tensors, one under the other. Each is read and copied into its rows before the next is
        read."""
        rows = sum(shape[0] for _, shape in parts)
        fused = torch.empty((rows, *parts[0][1][1:]), dtype=self.dtype, device=self.device)
        start = 0
        for name, shape in parts:
            if name not in self.unread:
                raise InputError(f"{self.source.where}: tensor {name} is missing")
            self.unread.remove(name)
            tensor = self.source.read(name)
            if tuple(tensor.shape) != shape:
                raise InputError(
                    f"{self.source.where}: {name} has shape {list(tensor.shape)}, the config asks for {list(shape)}"
                )
            if not tensor.is_floating_point():
                raise InputError(
                    f"{self.source.where}: {name} is stored as {tensor.dtype}; only floating-point weights "
                    "are supported"
                )
            fused[start : start + shape[0]].copy_(tensor)
            start += shape[0]
        return fused
