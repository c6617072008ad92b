"""Rotary position embeddings: frequencies with their scaling, and the table of cosines and sines."""

from __future__ import annotations

import math

import torch

from atts_engine.errors import InputError
from atts_engine.models.config import ModelConfig, RopeScaling


def inverse_frequencies(config: ModelConfig) -> torch.Tensor:
    """float32 [D/2] on the CPU: theta^(-2i/D), scaled as `config.rope_scaling` says."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64).to(torch.float32) / config.head_dim
    frequency = 1.0 / config.rope_theta**exponent
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    if scaling.kind == "llama3":
        return _llama3(frequency, scaling)
    if scaling.kind == "divisors":
        return frequency / torch.tensor(scaling.divisors, dtype=torch.float32)
    raise InputError(f"RoPE scaling {scaling.kind!r} is not supported")


def _llama3(frequency: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Llama 3.1: wavelengths beyond context/low_freq_factor are stretched, those below
    context/high_freq_factor kept, those between blended linearly in context/wavelength."""
    context, low, high = scaling.original_max_positions, scaling.low_freq_factor, scaling.high_freq_factor
    wavelength = 2 * math.pi / frequency
    blend = (context / wavelength - low) / (high - low)
    blended = (1 - blend) * frequency / scaling.factor + blend * frequency
    scaled = torch.where(wavelength > context / low, frequency / scaling.factor, blended)
    return torch.where(wavelength < context / high, frequency, scaled)


def rope_table(config: ModelConfig, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin), float32 [max_positions, D/2].

    Looked up, never recomputed per batch: a vectorised cosine gives other bits in the tail of an array than
    in its body, and a token's result must not depend on its place in the batch.
    """
    positions = torch.arange(config.max_positions, dtype=torch.float32)
    angles = torch.outer(positions, inverse_frequencies(config))
    return angles.cos().to(device), angles.sin().to(device)
