"""What the device needs for one step, as arrays on the host. Reads sequences, launches nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from atts_engine.runtime.records import SamplingParams
from atts_engine.runtime.scheduler import Step, Work

Ints = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
Ints32 = np.ndarray[tuple[int, ...], np.dtype[np.int32]]
Floats = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """S rows that give a token: parameters of `ops.sample`; `position` is the new token's. seed: int64."""

    temperature: Floats
    top_k: Ints
    top_p: Floats
    min_p: Floats
    seed: Ints
    position: Ints

    @classmethod
    def of(cls, params: Sequence[SamplingParams], positions: Sequence[int]) -> SamplingRows:
        return cls(
            np.array([p.temperature for p in params], dtype=np.float32),
            np.array([p.top_k for p in params], dtype=np.int64),
            np.array([p.top_p for p in params], dtype=np.float32),
            np.array([p.min_p for p in params], dtype=np.float32),
            np.array([p.seed for p in params], dtype=np.int64),
            np.array(positions, dtype=np.int64),
        )

    @property
    def arrays(self) -> list[np.ndarray[Any, Any]]:
        return [self.temperature, self.top_k, self.top_p, self.min_p, self.seed, self.position]


@dataclass(frozen=True, slots=True)
class StepArrays:
    """N rows of B sequences. ids, positions: [N]; block_table: int32 [B, W], padded with PAD_PAGE; cu_q: int32
    [B + 1]; kv_len: int32 [B] (see `ForwardBatch`).

    future_rows, future_from [F]: rows whose token the host does not know, and where the step before has sampled it; ids
    is 0 there. score_rows, score_ids [T]: rows that predict a scored token, and that token. sample_rows [S]: rows that
    give a token. asked [A]: which of those S tell its log-probability. judged: for each k that is asked for, ascending,
    which of those S tell the confidence of their k likeliest tokens. listed: likewise, which tell those tokens.
    """

    ids: Ints
    positions: Ints
    block_table: Ints32
    cu_q: Ints32
    kv_len: Ints32
    future_rows: Ints
    future_from: Ints
    score_rows: Ints
    score_ids: Ints
    sample_rows: Ints
    asked: Ints
    sampling: SamplingRows
    judged: tuple[tuple[int, Ints], ...] = ()
    listed: tuple[tuple[int, Ints], ...] = ()

    @property
    def decodes_only(self) -> bool:
        """One row of each sequence, and each gives a token."""
        return len(self.ids) == len(self.kv_len) == len(self.sample_rows) and not len(self.score_rows)


def draws_of(step: Step) -> list[Work]:
    """For every row that gives a token, in order, the work that it belongs to."""
    return [w for w in step.work for _ in range(w.draws)]


def arrays_of(step: Step, sampled_before: Mapping[int, int]) -> StepArrays:
    """sampled_before: for every sequence (by id) that the step in flight samples a token of, that token's row there."""
    work = step.work
    ids: list[int] = []
    positions: list[int] = []
    future_rows: list[int] = []
    future_from: list[int] = []
    score_rows: list[int] = []
    score_ids: list[int] = []
    sample_rows: list[int] = []
    sample_positions: list[int] = []
    for w in work:
        seq, offset, end = w.seq, len(ids), w.start + w.count
        ids.extend(seq.tokens[w.start : end])
        if end > len(seq.tokens):
            future_rows.append(len(ids))
            future_from.append(sampled_before[seq.id])
            ids.append(0)
        positions.extend(range(w.start, end))
        for first, last in w.score:
            # The row that predicts position p forwards position p - 1.
            score_rows.extend(range(offset + first - 1 - w.start, offset + last - 1 - w.start))
            score_ids.extend(seq.tokens[first:last])
        sample_rows.extend(range(len(ids) - w.draws, len(ids)))
        sample_positions.extend(range(end + 1 - w.draws, end + 1))
    table = np.zeros((len(work), max(len(w.seq.table.pages) for w in work)), dtype=np.int32)
    for row, w in enumerate(work):
        table[row, : len(w.seq.table.pages)] = w.seq.table.pages
    params = [w.sample.command.sampling for w in draws_of(step) if w.sample is not None]
    return StepArrays(
        ids=_ints(ids),
        positions=_ints(positions),
        block_table=table,
        cu_q=np.array([0, *accumulate(w.count for w in work)], dtype=np.int32),
        kv_len=np.array([w.start + w.count for w in work], dtype=np.int32),
        future_rows=_ints(future_rows),
        future_from=_ints(future_from),
        score_rows=_ints(score_rows),
        score_ids=_ints(score_ids),
        sample_rows=_ints(sample_rows),
        asked=_ints([i for i, p in enumerate(params) if p.logprobs]),
        sampling=SamplingRows.of(params, sample_positions),
        judged=_by_k([p.confidence for p in params]),
        listed=_by_k([p.alternatives for p in params]),
    )


def _by_k(asked: list[int]) -> tuple[tuple[int, Ints], ...]:
    """asked: of each row, 0 for nothing."""
    return tuple((k, _ints([i for i, own in enumerate(asked) if own == k])) for k in sorted(set(asked) - {0}))


def _ints(values: list[int]) -> Ints:
    return np.array(values, dtype=np.int64)
