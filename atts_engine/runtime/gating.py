"""The gate on the lane's device: span means, counts, tests and inserts, a batch at once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import numpy as np
import torch

from atts_engine import ops
from atts_engine.conformal import GateRequest, RingStore, lowest_score
from atts_engine.runtime.records import GateOutcome, SpanResult
from atts_engine.runtime.transfer import HostCopy, to_device

_WARM_CAPACITY = 16
"""Of a store that nobody asks for: a multiple of 16, as a kernel is compiled for those and for others."""


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

    def warm_up(self) -> None:
        """Run the kernels of `decide` once, on a store of their own. Nothing to do on the CPU."""
        if self._device.type != "cpu":
            request = GateRequest(RingStore(1, _WARM_CAPACITY), key=0, level=0, u=1, insert=True)
            DeviceGate(self._device).decide([ScoredSpan(np.zeros(1, dtype=np.float32), request)])

    @torch.inference_mode()
    def decide(self, spans: list[ScoredSpan]) -> list[SpanResult]:
        """One result per span. Spans with a gate are counted against their stores before any of them is inserted."""
        lengths = [len(s.logprobs) for s in spans]
        bounds = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        score, total = ops.span_mean(*to_device([np.concatenate([s.logprobs for s in spans]), bounds], self._device))
        means, sums = (values.tolist() for values in HostCopy([score, total]).wait())
        cut = [(i, s.gate.most) for i, s in enumerate(spans) if s.gate is not None and s.gate.most is not None]
        for i, most in cut:
            means[i] = lowest_score(sums[i], lengths[i], most)
        if cut:
            (score,) = to_device([np.array(means, dtype=np.float32)], self._device)
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
        columns = rows, *zip(*((r.key, r.level, r.u, int(r.insert)) for r in requests), strict=True)
        # One copy there and one event back: whatever else runs on the device, the host waits for it twice in all.
        chosen, key, level, u, insert = to_device([np.array(c, dtype=np.int64) for c in columns], self._device)
        counted = ops.gate(score[chosen], key, mirror.ring, mirror.size, mirror.head, level, u, insert.bool())
        self._batches += 1
        told = zip(*(values.tolist() for values in HostCopy(counted).wait()), strict=True)
        results = []
        for i, (greater, ties, n, takeover, p) in zip(rows, told, strict=True):
            outcome = GateOutcome(greater, ties, n, p, takeover, decision_seq=self._decisions, batch=self._batches)
            results.append(replace(plain[i], outcome=outcome))
            self._decisions += 1
        return results
