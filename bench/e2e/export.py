"""A loaded model as a folder in the Hugging Face layout, so that another engine serves the very same weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from atts_engine import ops
from atts_engine.models import Model


def export(model: Model, folder: Path) -> None:
    """Write configuration, weights and tokenizer of a Llama without biases and without scaled positions."""
    c, w = model.config, model.decoder.weights
    if c.family != "llama" or c.rope_scaling is not None:
        raise SystemExit(f"{model.name}: only a plain Llama can be exported")
    q, k = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    tensors: dict[str, torch.Tensor] = {"model.embed_tokens.weight": w.embed, "model.norm.weight": w.norm}
    if not c.tie_embeddings:
        tensors["lm_head.weight"] = w.lm_head
    for index, layer in enumerate(w.layers):
        qkv, out, gate_up, down = (ops.unpack_weight(matrix) for matrix in layer.matrices)
        query, key, value = qkv.split([q, k, k])
        gate, up = gate_up.chunk(2)
        parts = {
            "self_attn.q_proj": query,
            "self_attn.k_proj": key,
            "self_attn.v_proj": value,
            "self_attn.o_proj": out,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": down,
            "input_layernorm": layer.attn_norm,
            "post_attention_layernorm": layer.mlp_norm,
        }
        tensors |= {f"model.layers.{index}.{name}.weight": part.clone() for name, part in parts.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "vocab_size": c.vocab_size,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope_theta,
        "max_position_embeddings": c.max_positions,
        "tie_word_embeddings": c.tie_embeddings,
        "eos_token_id": list(c.eos_token_ids),
        "torch_dtype": str(model.decoder.dtype).removeprefix("torch."),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    model.tokenizer.save(folder)
