"""Host to device and back: many small arrays in one copy, and copies that nobody waits for until they are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Self

import numpy as np
import torch

Array = np.ndarray[Any, Any]
_ALIGN = 16
_DTYPES = {np.dtype(np.int64): torch.int64, np.dtype(np.int32): torch.int32, np.dtype(np.float32): torch.float32}


@dataclass(frozen=True, slots=True)
class Layout:
    """Where arrays of given shapes and dtypes (int64, int32, float32) lie, one after the other, in a block of bytes."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[np.dtype[Any], ...]
    offsets: tuple[int, ...]
    size: int
    """Bytes of the block."""

    @classmethod
    def of(cls, arrays: Sequence[Array]) -> Self:
        offsets, end = [], 0
        for array in arrays:
            offsets.append(end)
            end += -(-array.nbytes // _ALIGN) * _ALIGN
        return cls(tuple(a.shape for a in arrays), tuple(a.dtype for a in arrays), tuple(offsets), end)

    def pack(self, arrays: Sequence[Array], block: torch.Tensor) -> None:
        """Write the arrays into block: uint8 [size] on the host."""
        held = block.numpy()
        for array, shape, dtype, offset in zip(arrays, self.shapes, self.dtypes, self.offsets, strict=True):
            assert array.shape == shape and array.dtype == dtype
            held[offset : offset + array.nbytes].view(dtype)[:] = array.reshape(-1)

    def views(self, block: torch.Tensor) -> list[torch.Tensor]:
        """The arrays as tensors that share the memory of block: uint8 [size] anywhere."""
        found = []
        for shape, dtype, offset in zip(self.shapes, self.dtypes, self.offsets, strict=True):
            end = offset + prod(shape) * dtype.itemsize
            found.append(block[offset:end].view(_DTYPES[dtype]).view(shape))
        return found


def pinned(size: int) -> torch.Tensor:
    """uint8 [size] of page-locked memory. torch's allocator gives it to nobody else before the copies that read or
    write it have run, so it may be let go at once."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def to_device(arrays: Sequence[Array], device: torch.device) -> list[torch.Tensor]:
    """The arrays on the device, in one copy that does not wait. On the CPU the tensors share the arrays' memory."""
    if device.type == "cpu":
        return [torch.from_numpy(a) for a in arrays]
    layout = Layout.of(arrays)
    host = pinned(layout.size)
    layout.pack(arrays, host)
    return layout.views(host.to(device, non_blocking=True))


def fill_futures(ids: torch.Tensor, rows: torch.Tensor, source: torch.Tensor, sampled: torch.Tensor | None) -> None:
    """ids[rows] = sampled[source], on the device, in place."""
    if len(rows):
        assert sampled is not None
        # A sequence whose logits held NaN has -1 there, no token; its row is dropped once the host knows.
        ids.index_copy_(0, rows, sampled.index_select(0, source).clamp_(min=0))


def take_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """x[rows] of x[N, H]; rows: int64, ascending, each once. x itself where they are all of them."""
    if len(rows) == len(x):
        return x
    if x.is_cuda:
        return x[rows]
    # torch gathers even a few rows with all its threads: a barrier, behind which they poll beside those of csrc/.
    taken = x.new_empty(len(rows), x.shape[1])
    x.contiguous().view(torch.uint8).numpy().take(rows.numpy(), axis=0, out=taken.view(torch.uint8).numpy())
    return taken


class HostCopy:
    """Tensors on their way to the host. On a GPU the copies are enqueued on the current stream, and an event behind
    them tells when they have arrived; on the CPU the tensors are there already."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._event: torch.cuda.Event | None = None
        self._tensors = list(tensors)
        if tensors and tensors[0].is_cuda:
            # The sources may be freed at once: their memory is reused on this stream only, behind the copies.
            self._tensors = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
            for host, source in zip(self._tensors, tensors, strict=True):
                host.copy_(source, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def ready(self) -> bool:
        return self._event is None or self._event.query()

    def wait(self) -> list[torch.Tensor]:
        """The tensors on the host, once they are there; waits for nothing that was enqueued later."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensors
