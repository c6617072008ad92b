"""The gate on the lane's device: span means, counts, tests and inserts, a batch at once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import numpy as np
import torch

from atts_engine import ops
from atts_engine.conformal import GateRequest, RingStore, lowest_score
from atts_engine.runtime.records import GateOutcome, SpanResult


@dataclass(frozen=True, slots=True)
class ScoredSpan:
    """Log-probabilities float32[n] of one span, in order, and the gate to pass, if any."""

    logprobs: np.ndarray[tuple[int, ...], np.dtype[np.float32]]
    gate: GateRequest | None


@dataclass(frozen=True, slots=True)
class _Mirror:
    """A calibration store on the device. From the first request on the lane inserts into the mirror, the pipeline into
    the host's store, both in decision_seq order, so the two stay equal."""

    ring: torch.Tensor
    size: torch.Tensor
    head: torch.Tensor

    @staticmethod
    def of(store: RingStore, device: torch.device) -> _Mirror:
        # Copies, never views: the host's store changes under the calibrator's hands.
        return _Mirror(*(torch.from_numpy(np.array(a)).to(device) for a in (store.ring, store.size, store.head)))


class DeviceGate:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._mirrors: WeakKeyDictionary[RingStore, _Mirror] = WeakKeyDictionary()
        self._decisions = 0
        self._batches = 0

    @torch.inference_mode()
    def decide(self, spans: list[ScoredSpan]) -> list[SpanResult]:
        """One result per span. Spans with a gate are counted against their stores before any of them is inserted."""
        lengths = [len(s.logprobs) for s in spans]
        logprobs = torch.from_numpy(np.concatenate([s.logprobs for s in spans])).to(self._device)
        bounds = torch.tensor(np.concatenate([[0], np.cumsum(lengths)]), dtype=torch.int64, device=self._device)
        score, total = ops.span_mean(logprobs, bounds)
        sums, means = total.tolist(), score.tolist()
        cut = [(i, s.gate.most) for i, s in enumerate(spans) if s.gate is not None and s.gate.most is not None]
        for i, most in cut:
            means[i] = lowest_score(sums[i], lengths[i], most)
        if cut:
            score = torch.tensor(means, dtype=torch.float32, device=self._device)
        results = [
            SpanResult(sums[i], lengths[i], means[i], logprobs=tuple(s.logprobs.tolist())) for i, s in enumerate(spans)
        ]
        gated = [i for i, s in enumerate(spans) if s.gate is not None]
        by_store: dict[int, list[int]] = {}
        for i in gated:
            by_store.setdefault(id(spans[i].gate.store), []).append(i)  # type: ignore[union-attr]
        for rows in by_store.values():
            for i, result in zip(rows, self._count(rows, spans, score, results), strict=True):
                results[i] = result
        return results

    def _count(
        self, rows: list[int], spans: list[ScoredSpan], score: torch.Tensor, plain: list[SpanResult]
    ) -> list[SpanResult]:
        requests = [g for g in (spans[i].gate for i in rows) if g is not None]
        store = requests[0].store
        mirror = self._mirrors.get(store)
        if mirror is None:
            mirror = self._mirrors[store] = _Mirror.of(store, self._device)

        def column(values: list[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=self._device)

        counted = ops.gate(
            score[column(rows)],
            column([r.key for r in requests]),
            mirror.ring,
            mirror.size,
            mirror.head,
            column([r.level for r in requests]),
            column([r.u for r in requests]),
            column([int(r.insert) for r in requests], torch.bool),
        )
        self._batches += 1
        columns = zip(
            counted.greater.tolist(), counted.ties.tolist(), counted.n.tolist(), counted.p.tolist(),
            counted.takeover.tolist(), strict=True,
        )  # fmt: skip
        results = []
        for i, (greater, ties, n, p, takeover) in zip(rows, columns, strict=True):
            outcome = GateOutcome(greater, ties, n, p, takeover, decision_seq=self._decisions, batch=self._batches)
            results.append(replace(plain[i], outcome=outcome))
            self._decisions += 1
        return results
