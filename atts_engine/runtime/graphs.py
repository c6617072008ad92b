"""Steps as CUDA graphs: one for each of a few sizes, replayed over buffers that never move."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from atts_engine.models import ForwardBatch
from atts_engine.runtime.batch import StepArrays
from atts_engine.runtime.transfer import Array, Layout, fill_futures, pinned, to_device

MAX_GRAPH_BATCH = 256
"""Sequences of the largest decode graph. Beyond that a step is long enough to hide its own launches."""
SPAN_ROWS = (16, 32, 64, 96, 128, 192, 256, 384, 512)
"""Rows of graphs for spans. A larger step computes for longer than its launches take, and would be padded by more."""
SPAN_SEQUENCES = (17, 65)
"""Sequences of graphs for spans: 16 and 64, and one that has the idle rows."""


class Shape(NamedTuple):
    """Of a graph's batch."""

    rows: int
    sequences: int


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


def decode_shapes(largest: int) -> tuple[Shape, ...]:
    """One row of each of 1, 2, 4, 8, ... sequences, and of the largest number itself."""
    sizes = [1 << bit for bit in range(largest.bit_length()) if 1 << bit < largest]
    return tuple(Shape(n, n) for n in (*sizes, largest))


def span_shapes(max_rows: int) -> tuple[Shape, ...]:
    """Of steps of up to `max_rows` rows in which sequences have any number of them."""
    sizes = ((n, min(sequences, n)) for n in SPAN_ROWS if n <= max_rows for sequences in SPAN_SEQUENCES)
    return tuple(dict.fromkeys(Shape(*size) for size in sizes))


class StepGraphs:
    """One graph of `work(batch) -> [N, X]` for each of the shapes, ascending.

    A step with fewer rows or sequences than its graph is padded: idle sequences share the idle rows. All of these are
    tokens in the first slot of PAD_PAGE, which their sequences' rows of the table name: they write there, nobody reads
    it but them, and what they write is finite.
    """

    def __init__(
        self,
        work: Callable[[ForwardBatch], torch.Tensor],
        device: torch.device,
        shapes: Sequence[Shape],
        max_pages: int,
        page_size: int,
        capture: Capture,
    ) -> None:
        self._work = work
        self._shapes = tuple(shapes)
        self._max_idle = max_pages * page_size
        rows, sequences = (max(sizes) for sizes in zip(*self._shapes, strict=True))
        self._idle: list[Array] = [
            *(np.zeros(rows, dtype=np.int64) for _ in range(2)),
            *(np.zeros(n, dtype=np.int32) for n in (sequences, sequences + 1)),
        ]
        self._layout = Layout.of(self._idle)
        self._block = torch.zeros(self._layout.size, dtype=torch.uint8, device=device)
        self._ids, self._positions, self._kv_len, self._cu_q = self._layout.views(self._block)
        self._table = torch.zeros((sequences, max_pages), dtype=torch.int32, device=device)
        # The largest first: the smaller ones then fit into the memory that it took.
        self._graphs = {shape: self._captured(shape, capture) for shape in reversed(self._shapes)}

    def shape_for(self, rows: int, sequences: int) -> Shape | None:
        """The first that holds them, with an idle sequence for idle rows; None: the step is not for a graph."""
        for shape in self._shapes:
            idle, free = shape.rows - rows, shape.sequences - sequences
            if idle >= 0 and free >= 0 and (idle == 0 or 0 < idle <= free * self._max_idle):
                return shape
        return None

    def run(self, shape: Shape, arrays: StepArrays, futures: torch.Tensor | None) -> torch.Tensor:
        """What the work gives for the rows of a step that `shape_for` has found a graph for. It lies in the graph's own
        memory: whatever reads it must be enqueued before the next run of a graph of this capturer."""
        rows, sequences = len(arrays.ids), len(arrays.kv_len)
        self._fill(shape, arrays)
        width = arrays.block_table.shape[1]
        padded = np.zeros((shape.sequences, width), dtype=np.int32)
        padded[:sequences] = arrays.block_table
        table, late, source = to_device([padded, arrays.future_rows, arrays.future_from], self._block.device)
        # Pages of an earlier step, beyond this one's width, may hold NaN; PAD_PAGE does not.
        self._table[: shape.sequences].zero_()
        self._table[: shape.sequences, :width] = table
        fill_futures(self._ids, late, source, futures)
        replay, output = self._graphs[shape]
        replay()
        return output[:rows]

    def _captured(self, shape: Shape, capture: Capture) -> tuple[Callable[[], object], torch.Tensor]:
        self._fill(shape, None)
        return capture(partial(self._run, shape))

    def _fill(self, shape: Shape, arrays: StepArrays | None) -> None:
        """The buffers for a step of that shape; None: one without rows of its own."""
        ids, positions, kv_len, cu_q = filled = [idle.copy() for idle in self._idle]
        rows = sequences = 0
        if arrays is not None:
            rows, sequences = len(arrays.ids), len(arrays.kv_len)
            ids[:rows], positions[:rows] = arrays.ids, arrays.positions
            kv_len[:sequences], cu_q[: sequences + 1] = arrays.kv_len, arrays.cu_q
        free = shape.sequences - sequences
        if free:
            shares = np.arange(free + 1) * (shape.rows - rows) // free
            cu_q[sequences : shape.sequences + 1] = rows + shares
            kv_len[sequences : shape.sequences] = np.diff(shares)
        host = pinned(self._layout.size) if self._block.is_cuda else torch.empty(self._layout.size, dtype=torch.uint8)
        self._layout.pack(filled, host)
        self._block.copy_(host, non_blocking=True)

    def _run(self, shape: Shape) -> torch.Tensor:
        batch = ForwardBatch(
            ids=self._ids[: shape.rows],
            positions=self._positions[: shape.rows],
            block_table=self._table[: shape.sequences],
            cu_q=self._cu_q[: shape.sequences + 1],
            kv_len=self._kv_len[: shape.sequences],
        )
        return self._work(batch)
