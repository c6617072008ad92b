"""Carries a step out on the device: one forward pass, then log-probabilities and samples of the rows that want them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from atts_engine import ops
from atts_engine.models import Decoder, ForwardBatch
from atts_engine.runtime.scheduler import Step, Work

_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class StepOutput:
    """logprobs: float32 on the host, for every position of every `Work.score` in order; sampled: for every
    `Work.sample` in order the token id, -1 where the logits held NaN, and its log-probability (temperature 1, no
    filters, float32) where the decode asks for it."""

    logprobs: np.ndarray[tuple[int, ...], np.dtype[np.float32]]
    sampled: list[tuple[int, float | None]]


class Runner:
    """Owns the KV tensor `[layers, 2, pages, page_size, kv_heads, head_dim]` of a lane, and its host pool
    `[host_pages, layers, 2, page_size, kv_heads, head_dim]`, pinned where the device is a GPU."""

    def __init__(
        self,
        decoder: Decoder,
        num_pages: int,
        page_size: int,
        device: torch.device,
        dtype: torch.dtype,
        host_pages: int = 0,
    ) -> None:
        config = decoder.config
        self.decoder = decoder
        self.device = device
        # Zeros, not empty: attention multiplies padding by weight 0, and 0 * NaN is NaN.
        page = (page_size, config.num_kv_heads, config.head_dim)
        self.kv = _zeros((config.num_layers, 2, num_pages, *page), dtype, device)
        slots = (host_pages, config.num_layers, 2, *page)
        if device.type == "cuda":
            self._host = torch.empty(slots, dtype=dtype, pin_memory=True)
        else:
            self._host = _zeros(slots, dtype, torch.device("cpu"))

    @torch.inference_mode()
    def run(self, step: Step) -> StepOutput:
        self.move(step)
        hidden = self.decoder.forward(self._batch(step.work), self.kv)
        return StepOutput(self._score(step.work, hidden), self._sample(step.work, hidden))

    @torch.inference_mode()
    def move(self, step: Step) -> None:
        """Carry out the page copies of a step; its forward pass comes after them.

        The order matters: a page that is swapped out may be written by any of the rest, and what is copied from may
        be written by what is swapped in.
        """
        if step.swap_out:
            pages, slots = zip(*step.swap_out, strict=True)
            ops.kv_swap(self.kv, self._host, self._ints(list(pages)), torch.tensor(slots), True)
        if step.copies:
            source, destination = (self._ints(list(side)) for side in zip(*step.copies, strict=True))
            ops.kv_copy_pages(self.kv, source, destination)
        if step.swap_in:
            slots, pages = zip(*step.swap_in, strict=True)
            ops.kv_swap(self.kv, self._host, self._ints(list(pages)), torch.tensor(slots), False)

    @torch.inference_mode()
    def wipe(self, pages: list[int]) -> None:
        """Zero pages that may hold NaN before somebody else gets them."""
        self.kv[:, :, self._ints(pages)] = 0

    def _batch(self, work: tuple[Work, ...]) -> ForwardBatch:
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        for w in work:
            end = w.start + w.count
            ids.extend(w.seq.tokens[w.start : end])
            positions.extend(range(w.start, end))
            slots.extend(w.seq.table.slots(w.start, end))
        width = max(len(w.seq.table.pages) for w in work)
        table = np.zeros((len(work), width), dtype=np.int32)
        for row, w in enumerate(work):
            table[row, : len(w.seq.table.pages)] = w.seq.table.pages
        return ForwardBatch(
            ids=self._ints(ids),
            positions=self._ints(positions),
            slots=self._ints(slots),
            block_table=torch.from_numpy(table).to(self.device),
            cu_q=self._ints([0, *accumulate(w.count for w in work)], torch.int32),
            kv_len=self._ints([w.start + w.count for w in work], torch.int32),
        )

    def _score(self, work: tuple[Work, ...], hidden: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        rows: list[int] = []
        ids: list[int] = []
        offset = 0
        for w in work:
            for first, last in w.score:
                # The row that predicts position p forwards position p - 1.
                rows.extend(range(offset + first - 1 - w.start, offset + last - 1 - w.start))
                ids.extend(w.seq.tokens[first:last])
            offset += w.count
        if not rows:
            return np.empty(0, dtype=np.float32)
        logprobs = ops.score_tokens(hidden[self._ints(rows)], self.decoder.lm_head, self._ints(ids))
        return logprobs.cpu().numpy()

    def _sample(self, work: tuple[Work, ...], hidden: torch.Tensor) -> list[tuple[int, float | None]]:
        ends = list(accumulate(w.count for w in work))
        rows = [end - 1 for end, w in zip(ends, work, strict=True) if w.sample]
        if not rows:
            return []
        states = [(w.seq, w.seq.decode.command.sampling) for w in work if w.sample and w.seq.decode is not None]
        logits = self.decoder.logits(hidden[self._ints(rows)])
        sampled = ops.sample(
            logits,
            temperature=torch.tensor([p.temperature for _, p in states], dtype=torch.float32, device=self.device),
            top_k=self._ints([p.top_k for _, p in states]),
            top_p=torch.tensor([p.top_p for _, p in states], dtype=torch.float32, device=self.device),
            min_p=torch.tensor([p.min_p for _, p in states], dtype=torch.float32, device=self.device),
            seed=self._ints([p.seed for _, p in states]),
            position=self._ints([seq.total for seq, _ in states]),
        )
        asked = [i for i, (_, p) in enumerate(states) if p.logprobs]
        if not asked:
            return [(token, None) for token in sampled.tolist()]
        # A row without a draw holds NaN, so any id will do for it.
        ids = sampled.clamp(min=0)
        if len(asked) < len(states):
            some = self._ints(asked)
            logits, ids = logits[some], ids[some]
        found = dict(zip(asked, ops.score_logits(logits, ids).tolist(), strict=True))
        return [(token, found.get(i)) for i, token in enumerate(sampled.tolist())]

    def _ints(self, values: list[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # The system's own zero pages are had on first touch, so a pool larger than what is used takes neither time nor
    # memory; torch.zeros would write all of it. Aligned as torch aligns.
    size = math.prod(shape) * dtype.itemsize
    raw = np.zeros(size + _ALIGNMENT, dtype=np.uint8)
    first = -raw.ctypes.data % _ALIGNMENT
    return torch.from_numpy(raw[first : first + size]).view(dtype).view(shape)
