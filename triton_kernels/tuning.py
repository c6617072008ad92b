"""Launch settings that were measured on a device, in place of the defaults that kernels compute from shapes.

A table is data: for each kernel, choices in order, of which the first that fits a launch's dtype and sizes gives its
settings. Nothing is measured here and nothing read from a device, so a launch stays one that a CUDA graph can hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

TUNABLE: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "score_tokens": {"block_t": (16, 32, 64, 128, 256), "num_warps": (2, 4, 8), "num_stages": (2, 3, 4, 5)},
}
"""Settings that a table may give for each kernel, and the values they can take. What the bits of a score depend on is
not among them: tiles and splits along the vocabulary and the hidden size belong to the calibration's conditions."""
SIZES: Mapping[str, tuple[str, ...]] = {"score_tokens": ("T", "V", "H")}
"""Sizes that a choice for each kernel may ask about."""


@dataclass(frozen=True, slots=True)
class Choice:
    """settings for launches of one dtype whose sizes lie within bounds[name] = (low, high), both included."""

    dtype: torch.dtype
    bounds: Mapping[str, tuple[int, int]]
    settings: Mapping[str, int]


class _Table:
    """The table in force. The process's own: every lane's thread launches by it."""

    choices: Mapping[str, tuple[Choice, ...]] = {}


def set_table(choices: Mapping[str, tuple[Choice, ...]]) -> Mapping[str, tuple[Choice, ...]]:
    """Put a table in force ({}: none) and return the one before. Graphs captured under another keep their settings."""
    before, _Table.choices = _Table.choices, choices
    return before


def settings(kernel: str, dtype: torch.dtype, **sizes: int) -> Mapping[str, int]:
    """What the table says for a launch; {} leaves it to the kernel's defaults."""
    for choice in _Table.choices.get(kernel, ()):
        if choice.dtype is dtype and all(low <= sizes[name] <= high for name, (low, high) in choice.bounds.items()):
            return choice.settings
    return {}
