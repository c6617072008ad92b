"""A model from one GGUF file: config and tensors under their Hugging Face names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from atts_engine.errors import InputError
from atts_engine.models.config import ModelConfig, RopeScaling
from atts_engine.models.decoder import Decoder
from atts_engine.models.gguf_file import GGUFFile
from atts_engine.models.gguf_tokenizer import tokenizer_from_gguf
from atts_engine.models.tokenizer import Tokenizer
from atts_engine.models.weights import load_decoder

ARCHITECTURES = ("llama", "qwen2", "qwen3")
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_DIVISORS = "rope_freqs.weight"


def load_gguf(
    path: Path, device: torch.device, dtype: torch.dtype, *, packed: bool = False
) -> tuple[ModelConfig, Decoder, Tokenizer]:
    """Weights are dequantised one tensor at a time into `dtype`; packed: as in `load_decoder`. InputError names
    what is damaged or not supported."""
    file = GGUFFile(path)
    tokenizer = tokenizer_from_gguf(file)
    config = config_from_gguf(file, tokenizer.eos_token_ids)
    return config, load_decoder(config, GGUFSource(file, config), device, dtype, packed=packed), tokenizer


def config_from_gguf(file: GGUFFile, eos_token_ids: tuple[int, ...]) -> ModelConfig:
    family = file.metadata.get("general.architecture")
    if family not in ARCHITECTURES:
        raise InputError(
            f"{file.path}: architecture {family!r} is not supported; supported are {', '.join(ARCHITECTURES)}"
        )
    metadata = {
        key.removeprefix(f"{family}."): value for key, value in file.metadata.items() if key.startswith(f"{family}.")
    }

    def need(key: str) -> Any:
        if key not in metadata:
            raise InputError(f"{file.path}: metadata {family}.{key} is missing")
        return metadata[key]

    if file.metadata.get("split.count", 1) > 1:
        raise InputError(f"{file.path} is one part of a split GGUF; merge the parts first (llama-gguf-split --merge)")
    if metadata.get("expert_count", 0) > 0:
        raise InputError(f"{file.path}: mixture-of-experts models are not supported")
    window = metadata.get("attention.sliding_window")
    if window and window < need("context_length"):
        raise InputError(
            f"{file.path}: sliding-window attention ({family}.attention.sliding_window {window}) is not supported"
        )
    if "token_embd.weight" not in file.tensors:
        raise InputError(f"{file.path}: tensor token_embd.weight is missing")
    hidden, heads = need("embedding_length"), need("attention.head_count")
    head_dim = metadata.get("attention.key_length", hidden // heads)
    if metadata.get("rope.dimension_count", head_dim) != head_dim:
        raise InputError(f"{file.path}: rotary embeddings over part of a head are not supported")
    return ModelConfig(
        family=family,
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        hidden_size=hidden,
        num_layers=need("block_count"),
        num_heads=heads,
        num_kv_heads=metadata.get("attention.head_count_kv", heads),
        head_dim=head_dim,
        intermediate_size=need("feed_forward_length"),
        rms_norm_eps=need("attention.layer_norm_rms_epsilon"),
        rope_theta=metadata.get("rope.freq_base", 10000.0),
        rope_scaling=_rope_scaling(file, metadata),
        max_positions=need("context_length"),
        tie_embeddings="output.weight" not in file.tensors,
        eos_token_ids=eos_token_ids,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
    )


def _rope_scaling(file: GGUFFile, metadata: dict[str, Any]) -> RopeScaling | None:
    if _ROPE_DIVISORS in file.tensors:  # how llama.cpp's converter writes Llama 3.1's scaling
        return RopeScaling("divisors", divisors=tuple(file.dequantised(_ROPE_DIVISORS).tolist()))
    kind = metadata.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind == "linear":
        return RopeScaling("linear", factor=metadata.get("rope.scaling.factor", 1.0))
    raise InputError(
        f"{file.path}: RoPE scaling {kind!r} is not supported; supported are 'none', 'linear' and frequency divisors"
    )


class GGUFSource:
    """TensorSource over a GGUF file: names and the row order of q and k as in Hugging Face checkpoints."""

    def __init__(self, file: GGUFFile, config: ModelConfig) -> None:
        self.where = str(file.path)
        self._file = file
        self._heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads} if config.family == "llama" else {}
        self._gguf_name = {_hf_name(name): name for name in file.tensors if name != _ROPE_DIVISORS}

    def names(self) -> frozenset[str]:
        return frozenset(self._gguf_name)

    def read(self, name: str) -> torch.Tensor:
        gguf_name = self._gguf_name[name]
        tensor = torch.tensor(self._file.dequantised(gguf_name))
        heads = next((count for part, count in self._heads.items() if f".{part}." in gguf_name), None)
        return tensor if heads is None else _halves_first(tensor, heads)


def _hf_name(name: str) -> str:
    """Hugging Face name of a GGUF tensor; a name this table does not hold stays as it is and is refused by
    the loader."""
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match and match[2] in _BLOCK:
        return f"model.layers.{match[1]}.{_BLOCK[match[2]]}.{match[3]}"
    return _TOP.get(name, name)


def _halves_first(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's row order for rotary embeddings of interleaved pairs: rows (0, D/2, 1, D/2+1, ...) of
    each head become (0, 1, ..., D-1), the "rotate_half" convention."""
    return weight.view(heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
