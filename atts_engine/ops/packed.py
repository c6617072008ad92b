"""A matrix of bfloat16 weights in three quarters of its bytes, in place of the tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """What `pack_weight` made of a bfloat16 matrix [rows, columns] on the CPU. data: uint8 [bytes], in the format of
    `atts_pack_weight_params` in csrc/include/atts/atts.h."""

    data: Tensor
    rows: int
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrix."""
        return torch.bfloat16

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def nbytes(self) -> int:
        """Of memory that it takes."""
        return self.data.nbytes


Weight = Tensor | PackedWeight
"""A matrix of weights, plain or packed; both have shape, dtype, device and nbytes."""
