"""Decode steps as CUDA graphs: one for each of a few batch sizes, replayed over buffers that never move."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from atts_engine.models import ForwardBatch
from atts_engine.runtime.batch import StepArrays
from atts_engine.runtime.transfer import Array, Layout, fill_futures, pinned, to_device

MAX_GRAPH_BATCH = 256
"""Sequences of the largest graph. Beyond that a step is long enough to hide its own launches."""

Work = Callable[[], torch.Tensor]
Capture = Callable[[Work], tuple[Callable[[], object], torch.Tensor]]
"""Records the kernels of a work; returns what repeats them, and the tensor that every repetition writes anew."""


class CudaCapture:
    """Captures on a stream; all graphs of one capturer share a memory pool, so they must never run side by side."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> tuple[Callable[[], object], torch.Tensor]:
        # Outside the capture first: kernels are compiled and library workspaces allocated on the first call.
        work()
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # thread_local: another lane's thread may allocate while this one captures.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            output = work()
        return graph.replay, output


def batch_sizes(largest: int) -> tuple[int, ...]:
    """1, 2, 4, 8, ... and the largest itself."""
    sizes = [1 << bit for bit in range(largest.bit_length()) if 1 << bit < largest]
    return (*sizes, largest)


class DecodeGraphs:
    """One graph of `decode(batch) -> logits [B, V]` for each batch size, for steps with one row of each sequence.

    A step with fewer rows than its graph is padded with rows of one token in the first slot of PAD_PAGE, which their
    rows of the table name: they write there, nobody reads it but them, and what they write is finite.
    """

    def __init__(
        self,
        decode: Callable[[ForwardBatch], torch.Tensor],
        device: torch.device,
        largest: int,
        max_pages: int,
        capture: Capture,
    ) -> None:
        self._model = decode
        self._sizes = batch_sizes(largest)
        self._idle: list[Array] = [
            *(np.zeros(largest, dtype=np.int64) for _ in range(2)),
            np.ones(largest, dtype=np.int32),
        ]
        self._layout = Layout.of(self._idle)
        self._block = torch.zeros(self._layout.size, dtype=torch.uint8, device=device)
        self._ids, self._positions, self._kv_len = self._layout.views(self._block)
        self._table = torch.zeros((largest, max_pages), dtype=torch.int32, device=device)
        self._cu_q = torch.arange(largest + 1, dtype=torch.int32, device=device)
        self._fill(self._idle)
        # The largest first: the smaller ones then fit into the memory that it took.
        self._graphs = {n: capture(partial(self._decode, n)) for n in reversed(self._sizes)}

    def holds(self, rows: int) -> bool:
        return rows <= self._sizes[-1]

    def size_for(self, rows: int) -> int:
        return self._sizes[bisect_left(self._sizes, rows)]

    def run(self, arrays: StepArrays, futures: torch.Tensor | None) -> torch.Tensor:
        """Logits [S, V] of a step with `arrays.decodes_only`. They lie in the graph's own memory: whatever reads them
        must be enqueued before the next run."""
        rows = len(arrays.ids)
        size = self.size_for(rows)
        filled = [idle.copy() for idle in self._idle]
        for buffer, values in zip(filled, (arrays.ids, arrays.positions, arrays.kv_len), strict=True):
            buffer[:rows] = values
        self._fill(filled)
        width = arrays.block_table.shape[1]
        padded = np.zeros((size, width), dtype=np.int32)
        padded[:rows] = arrays.block_table
        table, late, source = to_device([padded, arrays.future_rows, arrays.future_from], self._block.device)
        # Pages of an earlier step, beyond this one's width, may hold NaN; PAD_PAGE does not.
        self._table[:size].zero_()
        self._table[:size, :width] = table
        fill_futures(self._ids, late, source, futures)
        replay, logits = self._graphs[size]
        replay()
        return logits[:rows]

    def _fill(self, arrays: list[Array]) -> None:
        if self._block.is_cuda:
            host = pinned(self._layout.size)
        else:
            host = torch.empty(self._layout.size, dtype=torch.uint8)
        self._layout.pack(arrays, host)
        self._block.copy_(host, non_blocking=True)

    def _decode(self, size: int) -> torch.Tensor:
        batch = ForwardBatch(
            ids=self._ids[:size],
            positions=self._positions[:size],
            block_table=self._table[:size],
            cu_q=self._cu_q[: size + 1],
            kv_len=self._kv_len[:size],
        )
        return self._model(batch)
