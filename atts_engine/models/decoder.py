"""The decoder: one forward pass over a flattened batch with a paged KV cache.

Llama, Mistral, Qwen2 and Qwen3 are one architecture here: pre-norm blocks of grouped-query attention with
rotary positions and a SwiGLU MLP; Qwen2 adds biases to q, k and v, Qwen3 a norm per head of q and k.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F

from atts_engine import ops
from atts_engine.models.config import ModelConfig
from atts_engine.models.rotary import rope_table


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """N tokens of B sequences, those of one sequence side by side; every tensor on the decoder's device.

    ids: int64 [N]. positions: int64 [N], below config.max_positions; with block_table, int32 [B, maxpages], they
    say where each token's key and value go. cu_q: int32 [B+1], row bounds of the sequences. kv_len: int32 [B],
    tokens of each sequence in the cache once this batch is written (its rows are the last of them).
    """

    ids: torch.Tensor
    positions: torch.Tensor
    block_table: torch.Tensor
    cu_q: torch.Tensor
    kv_len: torch.Tensor


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One block. qkv: [(Hq+2*Hkv)*D, H], q rows first, then k, then v; gate_up: [2*F, H], gate rows first. The four
    matrices may be packed (`ops.unpack_weight` gives the plain one of either)."""

    attn_norm: torch.Tensor  # [H]
    qkv: ops.Weight
    qkv_bias: torch.Tensor | None  # [(Hq+2*Hkv)*D]
    q_norm: torch.Tensor | None  # [D]
    k_norm: torch.Tensor | None  # [D]
    out: ops.Weight  # [H, Hq*D]
    mlp_norm: torch.Tensor  # [H]
    gate_up: ops.Weight
    down: ops.Weight  # [H, F]

    @property
    def matrices(self) -> tuple[ops.Weight, ...]:
        return self.qkv, self.out, self.gate_up, self.down

    def packed(self) -> LayerWeights:
        """With each matrix packed, where its sides allow it (`ops.pack_weight`)."""
        qkv, out, gate_up, down = (pack(matrix) for matrix in self.matrices)
        return replace(self, qkv=qkv, out=out, gate_up=gate_up, down=down)


def pack(matrix: ops.Weight) -> ops.Weight:
    """The matrix packed; as it is where it is packed already or does not pack (`ops.pack_weight`)."""
    return matrix if isinstance(matrix, ops.PackedWeight) else ops.pack_weight(matrix) or matrix


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """embed and lm_head: [V, H], the same tensor where the model ties them; norm: [H]. lm_head_packed: lm_head once
    more, for the products of few rows; the plain one is what scores read."""

    embed: torch.Tensor
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor
    lm_head: torch.Tensor
    lm_head_packed: ops.PackedWeight | None = None

    def packed(self) -> DecoderWeights:
        """With the blocks' matrices packed and the LM head packed as well: a quarter less to read where few rows are
        decoded. No bit of a result changes."""
        layers = tuple(layer.packed() for layer in self.layers)
        return replace(self, layers=layers, lm_head_packed=ops.pack_weight(self.lm_head))


class Decoder:
    """Inference only: weights are plain tensors, so autograd never records; it holds no sequence state."""

    def __init__(self, config: ModelConfig, weights: DecoderWeights) -> None:
        self.config = config
        self.weights = weights
        self.cos, self.sin = rope_table(config, self.device)
        self._scratch = ops.Scratch()
        self._whole: ops.ForwardPass | None = None
        if self.device.type == "cpu" and ops.ForwardPass.serves(self.dtype):
            self._whole = ops.ForwardPass(
                weights.embed,
                [{field.name: getattr(layer, field.name) for field in fields(layer)} for layer in weights.layers],
                weights.norm,
                self.cos,
                self.sin,
                inner=config.intermediate_size,
                heads=config.num_heads,
                kv_heads=config.num_kv_heads,
                eps=config.rms_norm_eps,
            )

    @property
    def lm_head(self) -> torch.Tensor:
        return self.weights.lm_head

    @property
    def device(self) -> torch.device:
        return self.weights.embed.device

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.embed.dtype

    def forward(self, batch: ForwardBatch, kv: torch.Tensor) -> torch.Tensor:
        """Hidden states [N, H] after the final norm; writes the batch's keys and values into kv.

        kv: [L, 2, P, page, Hkv, D] in the decoder's dtype. Rows of one sequence may come in any number of
        calls, in order. On the CPU it is one call (`ops.ForwardPass`), with the bits of the ops below.
        """
        if self._whole is not None and self._whole.runs(kv):
            return self._whole(batch.ids, batch.positions, batch.block_table, batch.cu_q, batch.kv_len, kv)
        cos, sin = self.cos[batch.positions], self.sin[batch.positions]  # [N, D/2]
        slots = ops.kv_slots(batch.positions, batch.block_table, batch.cu_q, kv.shape[3])
        eps = self.config.rms_norm_eps
        x = F.embedding(batch.ids, self.weights.embed)
        normed = ops.rms_norm(x, self.weights.layers[0].attn_norm, eps)
        # A residual is added on the way into the norm behind it: the next block's, after the last block the final one.
        behind = [*(layer.attn_norm for layer in self.weights.layers[1:]), self.weights.norm]
        for layer, kv_layer, norm in zip(self.weights.layers, kv, behind, strict=True):
            mixed = self._attention(layer, normed, cos, sin, slots, batch, kv_layer)
            x, normed = ops.add_rms_norm(x, mixed, layer.mlp_norm, eps)
            x, normed = ops.add_rms_norm(x, self._mlp(layer, normed), norm, eps)
        return normed

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, V] in the decoder's dtype, of hidden[N, H]."""
        packed = self.weights.lm_head_packed
        if packed is not None and ops.runs_native("linear", hidden.device, hidden.dtype):
            return ops.linear(hidden, packed)
        return ops.linear(hidden, self.weights.lm_head)

    def _attention(
        self,
        layer: LayerWeights,
        normed: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        slots: torch.Tensor,
        batch: ForwardBatch,
        kv_layer: torch.Tensor,
    ) -> torch.Tensor:
        c = self.config
        rows = ops.linear(normed, layer.qkv, layer.qkv_bias)
        heads = rows.view(-1, c.num_heads + 2 * c.num_kv_heads, c.head_dim)
        q, k, v = torch.split(heads, [c.num_heads, c.num_kv_heads, c.num_kv_heads], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q = ops.rms_norm(q, layer.q_norm, c.rms_norm_eps)
            k = ops.rms_norm(k, layer.k_norm, c.rms_norm_eps)
        # Written before it is read: a row attends to itself and to earlier rows of the same batch.
        q = ops.rope_kv_append(q, k, v, cos, sin, kv_layer, slots)
        mixed = ops.paged_attention(
            q, kv_layer, batch.block_table, batch.cu_q, batch.kv_len, c.head_dim**-0.5, self._scratch
        )
        return ops.linear(mixed.reshape(-1, c.num_heads * c.head_dim), layer.out)

    def _mlp(self, layer: LayerWeights, normed: torch.Tensor) -> torch.Tensor:
        gate, up = ops.linear(normed, layer.gate_up).chunk(2, dim=-1)
        return ops.linear(ops.silu_mul(gate, up), layer.down)
