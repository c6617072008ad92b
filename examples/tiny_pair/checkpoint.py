"""Checkpoints to resume from, and export as Hugging Face model folders."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from .model import Llama, Shape
from .vocab import write_tokenizer


def save(path: Path, state: dict[str, object]) -> None:
    """Write a checkpoint atomically: a kill leaves the old one or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def load(path: Path, device: str) -> dict:
    """Read a checkpoint that `save` wrote."""
    return torch.load(path, map_location=device, weights_only=True)


def export(model: Llama, folder: Path) -> None:
    """Write ``config.json``, ``model.safetensors`` (float32, names of ``LlamaForCausalLM``) and the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().to("cpu", torch.float32).contiguous() for name, p in model.state_dict().items()}
    partial = folder / "model.safetensors.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.shape.to_hf(), indent=2) + "\n")
    write_tokenizer(folder)


def load_exported(folder: Path) -> Llama:
    """Read a folder that `export` wrote."""
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    shape = Shape(
        vocab=config["vocab_size"],
        width=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        hidden=config["intermediate_size"],
        context=config["max_position_embeddings"],
        rope_theta=config["rope_theta"],
        eps=config["rms_norm_eps"],
    )
    model = Llama(shape)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()
