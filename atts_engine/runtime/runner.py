"""Carries a step out on the device: one forward pass, then log-probabilities and samples of the rows that want them.

`launch` enqueues and returns; `Pending.collect` waits for that step alone. Everything that touches a lane's KV goes
on the lane's one stream, in the order in which it was scheduled: a step reads what the step before it wrote, and a
page that changes hands is written behind whoever read it last.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from atts_engine import ops
from atts_engine.errors import InputError
from atts_engine.models import Decoder, ForwardBatch
from atts_engine.runtime.batch import SamplingRows, StepArrays, arrays_of, draws_of
from atts_engine.runtime.graphs import (
    MAX_GRAPH_BATCH,
    Capture,
    CudaCapture,
    Shape,
    StepGraphs,
    decode_shapes,
    span_shapes,
)
from atts_engine.runtime.likeliest import alternatives, top_logprobs
from atts_engine.runtime.records import Alternatives, SamplingParams
from atts_engine.runtime.scheduler import Step
from atts_engine.runtime.transfer import HostCopy, fill_futures, take_rows, to_device

_ALIGNMENT = 64
_SHORT_CHUNK = 128
_LONG_CONTEXT = 2048
"""Tokens that a warm-up takes for a chunk, and for a context of several splits."""
GRAPH_OPS = ("add_rms_norm", "kv_slots", "linear", "paged_attention", "rms_norm", "rope_kv_append", "silu_mul")
"""What graphs hold. Scores and sampling stay outside: their rows and parameters change from step to step."""


class Draw(NamedTuple):
    """A token id, -1 where the logits held NaN, with its log-probability (temperature 1, no filters, float32), and the
    confidence and the likeliest tokens at its place, where the decode asks for them."""

    token: int
    logprob: float | None
    confidence: float | None
    alternatives: Alternatives | None


@dataclass(frozen=True, slots=True)
class StepOutput:
    """logprobs: float32 on the host, for every position of every `Work.score` in order; sampled: for every row that
    gives a token (`Work.draws`), in order."""

    logprobs: np.ndarray[tuple[int, ...], np.dtype[np.float32]]
    sampled: list[Draw]


@dataclass(frozen=True, slots=True)
class Pending:
    """A step in flight. sampled: int64 [S] on the device, -1 where the logits held NaN; rows: which of them is the last
    of which sequence (by id). The next step takes its ids from there before the host has seen them."""

    step: Step
    sampled: torch.Tensor | None = None
    rows: dict[int, int] = field(default_factory=dict)
    scores: HostCopy | None = None
    drawn: HostCopy | None = None
    asked: tuple[int, ...] = ()
    judged: tuple[int, ...] = ()
    listed: tuple[tuple[int, ...], ...] = ()
    """Rows that tell a log-probability, a confidence, and their likeliest tokens, these for each number of them;
    `drawn` holds what they tell behind the tokens."""

    def ready(self) -> bool:
        """Whether `collect` would not wait."""
        return all(copy is None or copy.ready() for copy in (self.scores, self.drawn))

    def collect(self) -> StepOutput:
        scores = np.empty(0, dtype=np.float32)
        if self.scores is not None:
            # A copy: the page-locked memory goes back as soon as possible.
            scores = self.scores.wait()[0].numpy().copy()
        if self.drawn is None:
            return StepOutput(scores, [])
        tokens, *told = (values.tolist() for values in self.drawn.wait())
        logprobs = dict(zip(self.asked, told.pop(0), strict=True)) if self.asked else {}
        confidences = dict(zip(self.judged, told.pop(0), strict=True)) if self.judged else {}
        likeliest = {
            row: alternatives(ids, values)
            for rows in self.listed
            for row, ids, values in zip(rows, told.pop(0), told.pop(0), strict=True)
        }
        draws = [Draw(token, logprobs.get(i), confidences.get(i), likeliest.get(i)) for i, token in enumerate(tokens)]
        return StepOutput(scores, draws)


class Runner:
    """Owns the KV tensor `[layers, 2, pages, page_size, kv_heads, head_dim]` of a lane, its host pool `[host_pages,
    layers, 2, page_size, kv_heads, head_dim]`, pinned where the device is a GPU, and its streams there.

    graphs: forward passes as CUDA graphs; None: where the ops can be captured. Raises `InputError` when they are asked
    for and cannot be had.
    """

    def __init__(
        self,
        decoder: Decoder,
        num_pages: int,
        page_size: int,
        device: torch.device,
        dtype: torch.dtype,
        host_pages: int = 0,
        *,
        graphs: bool | None = False,
        stream_priority: int = 0,
    ) -> None:
        config = decoder.config
        self.decoder = decoder
        self.device = device
        self._decodes: StepGraphs | None = None
        self._spans: StepGraphs | None = None
        self._want_graphs = _graphs_wanted(graphs, device)
        self._max_pages = min(num_pages, -(-config.max_positions // page_size))
        self._stream: torch.cuda.Stream | None = None
        self._side: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device, priority=stream_priority)
            # Ahead of everything: the verdict's few small kernels would wait for room between the blocks of a step.
            self._side = torch.cuda.Stream(device, priority=stream_priority - 1)
            # The weights were put on the device by the default stream, which the lane's streams do not wait for.
            torch.cuda.synchronize(device)
        page = (page_size, config.num_kv_heads, config.head_dim)
        slots = (host_pages, config.num_layers, 2, *page)
        with self.on_stream():
            # Zeros, not empty: attention multiplies padding by weight 0, and 0 * NaN is NaN.
            self.kv = _zeros((config.num_layers, 2, num_pages, *page), dtype, device)
        if device.type == "cuda":
            self._host = torch.empty(slots, dtype=dtype, pin_memory=True)
        else:
            self._host = _zeros(slots, dtype, torch.device("cpu"))

    def on_stream(self) -> AbstractContextManager[object]:
        """Where everything that touches the KV is enqueued."""
        return torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()

    def aside(self) -> AbstractContextManager[object]:
        """Where work that needs no KV is enqueued: waiting for it does not wait for the step in flight."""
        return torch.cuda.stream(self._side) if self._side is not None else nullcontext()

    def launch(self, step: Step, before: Pending | None) -> Pending:
        """Enqueue a step. before: the step in flight, if the host has not collected it; it samples the futures."""
        return self.execute(step, arrays_of(step, before.rows if before is not None else {}), before)

    @torch.inference_mode()
    def execute(self, step: Step, arrays: StepArrays, before: Pending | None) -> Pending:
        """The device's part of `launch`. Reads no sequence: these may have moved on already."""
        futures = before.sampled if before is not None else None
        with self.on_stream():
            self.move(step)
            logits: torch.Tensor | None
            scores: torch.Tensor | None
            decodes = _shape(self._decodes, arrays) if arrays.decodes_only else None
            if self._decodes is not None and decodes is not None:
                logits, scores = self._decodes.run(decodes, arrays, futures), None
            else:
                logits, scores = self._forward(arrays, futures)
            rows = {w.seq.id: i for i, w in enumerate(draws_of(step))}
            arrived = HostCopy([scores]) if scores is not None else None
            if logits is None:
                return Pending(step, scores=arrived)
            sampled, told = self._sample(arrays, logits)
            judged = tuple(row for _, rows in arrays.judged for row in rows.tolist())
            listed = tuple(tuple(rows.tolist()) for _, rows in arrays.listed)
            drawn = HostCopy([sampled, *told])
            return Pending(step, sampled, rows, arrived, drawn, tuple(arrays.asked.tolist()), judged, listed)

    @torch.inference_mode()
    def move(self, step: Step) -> None:
        """Carry out the page copies of a step; its forward pass comes after them.

        The order matters: a page that is swapped out may be written by any of the rest, and what is copied from may
        be written by what is swapped in.
        """
        with self.on_stream():
            if step.swap_out:
                pages, slots = _last_writes(step.swap_out)
                ops.kv_swap(self.kv, self._host, self._ints(pages), torch.tensor(slots), True)
            for source, destination in copy_rounds(step.copies):
                ops.kv_copy_pages(self.kv, self._ints(source), self._ints(destination))
            if step.swap_in:
                slots, pages = _last_writes(step.swap_in)
                ops.kv_swap(self.kv, self._host, self._ints(pages), torch.tensor(slots), False)

    @torch.inference_mode()
    def wipe(self, pages: list[int]) -> None:
        """Zero pages that may hold NaN before somebody else gets them."""
        with self.on_stream():
            self.kv.index_fill_(2, self._ints(pages), 0)

    @torch.inference_mode()
    def warm_up(self, max_rows: int) -> None:
        """Run a step of every kind, a copy of a page, and capture every graph, so that no request pays for compilation.
        Nothing to do on the CPU. Before the first step: page 1 gets what PAD_PAGE holds."""
        if self.device.type != "cuda":
            return
        with self.on_stream():
            for shape in _warm_shapes(max_rows, self._max_pages, self.kv.shape[3]):
                arrays = _idle_arrays(*shape)
                logits, _ = self._forward(arrays, None)
                assert logits is not None
                self._sample(arrays, logits)
            if self.kv.shape[2] > 1:
                ops.kv_copy_pages(self.kv, self._ints([0]), self._ints([1]))
            assert self._stream is not None
            if self._want_graphs:
                self.capture(CudaCapture(self._stream), max_rows)
            self._stream.synchronize()

    def capture(self, capture: Capture, max_rows: int) -> None:
        """Have forward passes of up to `max_rows` rows run as graphs that `capture` makes, where there is one of their
        size."""
        pool = self._max_pages, self.kv.shape[3]
        spans = span_shapes(max_rows)
        if spans:
            self._spans = StepGraphs(self._hidden, self.device, spans, *pool, capture)
        decodes = decode_shapes(min(max_rows, MAX_GRAPH_BATCH))
        self._decodes = StepGraphs(self._decode, self.device, decodes, *pool, capture)

    def _ints(self, values: Sequence[int]) -> torch.Tensor:
        return to_device([np.array(values, dtype=np.int64)], self.device)[0]

    def _hidden(self, batch: ForwardBatch) -> torch.Tensor:
        return self.decoder.forward(batch, self.kv)

    def _decode(self, batch: ForwardBatch) -> torch.Tensor:
        return self.decoder.logits(self._hidden(batch))

    def _forward(
        self, arrays: StepArrays, futures: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(logits [S, V], log-probabilities [T] of scored tokens), None where nobody wants them."""
        a = arrays
        spans = _shape(self._spans, arrays)
        if self._spans is not None and spans is not None:
            hidden = self._spans.run(spans, arrays, futures)
            score_rows, score_ids, sample_rows = to_device([a.score_rows, a.score_ids, a.sample_rows], self.device)
        else:
            ids, positions, table, cu_q, kv_len, late, source, score_rows, score_ids, sample_rows = to_device(
                [
                    a.ids, a.positions, a.block_table, a.cu_q, a.kv_len, a.future_rows, a.future_from, a.score_rows,
                    a.score_ids, a.sample_rows,
                ],
                self.device,
            )  # fmt: skip
            fill_futures(ids, late, source, futures)
            hidden = self._hidden(ForwardBatch(ids, positions, table, cu_q, kv_len))
        scores = logits = None
        if len(score_rows):
            scores = ops.score_tokens(take_rows(hidden, score_rows), self.decoder.lm_head, score_ids)
        if len(sample_rows):
            logits = self.decoder.logits(take_rows(hidden, sample_rows))
        return logits, scores

    def _sample(self, arrays: StepArrays, logits: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Ids int64 [S]; log-probabilities float32 [A], confidences float32, and for each number of likeliest tokens
        their ids int64 and log-probabilities float32, [rows, number]; each where some are asked for."""
        some = [rows for _, rows in (*arrays.judged, *arrays.listed)]
        asked, *others = to_device([arrays.asked, *some, *arrays.sampling.arrays], self.device)
        rows, parameters = others[: len(some)], others[len(some) :]
        judged, listed = rows[: len(arrays.judged)], rows[len(arrays.judged) :]
        sampled = ops.sample(logits, *parameters)
        told = []
        if len(asked):
            # A row without a draw holds NaN, so any id will do for it.
            ids = sampled.clamp(min=0)
            every = len(asked) == len(sampled)
            told.append(ops.score_logits(logits, ids) if every else ops.score_logits(logits[asked], ids[asked]))
        if judged:
            confidences = [
                ops.token_confidence(logits[at], k) for (k, _), at in zip(arrays.judged, judged, strict=True)
            ]
            told.append(torch.cat(confidences))
        for (k, _), at in zip(arrays.listed, listed, strict=True):
            told.extend(top_logprobs(logits[at], k))
        return sampled, told


def _shape(graphs: StepGraphs | None, arrays: StepArrays) -> Shape | None:
    """Of the graph that a step runs as, if there is one."""
    return None if graphs is None else graphs.shape_for(len(arrays.ids), len(arrays.kv_len))


def _last_writes(moves: Iterable[tuple[int, int]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(sources, destinations) of (source, destination) pairs in the order they were decided in. A destination that was
    given up and taken again within the step appears once, with its last source: an op may write it in any order."""
    last = {destination: source for source, destination in moves}
    return tuple(last.values()), tuple(last)


def _graphs_wanted(graphs: bool | None, device: torch.device) -> bool:
    if graphs is False:
        return False
    missing = [op for op in GRAPH_OPS if not ops.capturable(op, device)]
    if graphs and missing:
        raise InputError(
            f"CUDA graphs cannot be had on {device}: {', '.join(missing)} cannot be captured there; leave graphs out"
        )
    return not missing


def copy_rounds(copies: Iterable[tuple[int, int]]) -> list[tuple[list[int], list[int]]]:
    """(sources, destinations) of copies that may be made in any order, one list of them after the other.

    Mostly one: only where a sequence gave up a page that was copied from earlier in the step, and another one's copy
    goes there, must the first have been made.
    """
    rounds: list[tuple[list[int], list[int]]] = []
    touched: set[int] = set()
    written: set[int] = set()
    for source, destination in copies:
        if not rounds or destination in touched or source in written:
            rounds.append(([], []))
            touched, written = set(), set()
        rounds[-1][0].append(source)
        rounds[-1][1].append(destination)
        touched |= {source, destination}
        written.add(destination)
    return rounds


def _warm_shapes(max_rows: int, max_pages: int, page_size: int) -> list[tuple[int, int, int]]:
    """(rows, sequences, pages of a sequence's row of the block table) of steps that between them launch every kernel.

    Kernels differ by the number of rows (of those that are scored: up to 64, up to 128, more), by rows a sequence, and
    by how keys are cut into splits, which follows the width of the table and the number of rows.
    """
    few = {1, min(MAX_GRAPH_BATCH, max_rows)}
    longest = max_pages * page_size
    chunks = {min(n, max_rows, longest) for n in (_SHORT_CHUNK, max_rows)}
    wide = min(max_pages, -(-_LONG_CONTEXT // page_size))
    return sorted(
        {
            *((n, n, pages) for n in few for pages in (1, max_pages)),
            (max_rows, max_rows, 1),
            *((n, 1, pages) for n in chunks for pages in (wide, max_pages)),
        }
    )


def _idle_arrays(rows: int, sequences: int, pages: int) -> StepArrays:
    """A step of `rows` tokens in equal shares for each sequence, which all lie in the first slot of PAD_PAGE: it writes
    where nobody's tokens are, and what it writes is finite."""
    none, zeros, some = (np.zeros(n, dtype=np.int64) for n in (0, rows, min(rows, MAX_GRAPH_BATCH)))
    bounds = (np.arange(sequences + 1) * rows // sequences).astype(np.int32)
    return StepArrays(
        ids=zeros.copy(),
        positions=zeros,
        block_table=np.zeros((sequences, pages), dtype=np.int32),
        cu_q=bounds,
        kv_len=np.diff(bounds),
        future_rows=none,
        future_from=none,
        score_rows=np.arange(rows),
        score_ids=zeros,
        sample_rows=np.arange(len(some)),
        asked=np.arange(len(some)),
        sampling=SamplingRows.of([SamplingParams()] * len(some), [1] * len(some)),
        judged=((1, np.arange(len(some))),),
        listed=((1, np.arange(len(some))),),
    )


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # The system's own zero pages are had on first touch, so a pool larger than what is used takes neither time nor
    # memory; torch.zeros would write all of it. Aligned as torch aligns.
    size = math.prod(shape) * dtype.itemsize
    raw = np.zeros(size + _ALIGNMENT, dtype=np.uint8)
    first = -raw.ctypes.data % _ALIGNMENT
    return torch.from_numpy(raw[first : first + size]).view(dtype).view(shape)
