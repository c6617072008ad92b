"""What a kernel's compiled code depends on: the list of variants that each kernel module gives to `atts_triton.aot`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
"""Triton's name for a pointer to each floating dtype that kernels take."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One kernel with all that its code depends on.

    signature: type of every argument that is not a constant. options: num_warps and so on.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]
    multiples_of_16: frozenset[str] = frozenset()
    """Integer arguments that the just-in-time compiler would see to be multiples of 16."""
    capabilities: frozenset[int] = frozenset()
    """Compute capabilities that it is launched on; none named means all."""
