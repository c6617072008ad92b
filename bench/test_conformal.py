"""What a p-value and a decision cost on the host.

    python -m pytest bench/test_conformal.py --benchmark-columns=median,iqr,ops --benchmark-sort=name

Limits: a count is two binary searches, about 2 log2(n) probes of some 50 ns in CPython; an insertion moves n / 2
float32 values on average (200 kB at n = 10^5), some 10 us at 20 GB/s.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from atts_engine.conformal import LEVEL_ONE, Adaptive, Mondrian, RingStore

pytest.importorskip("pytest_benchmark", reason="the extra dev brings pytest-benchmark")
SIZES = (1_000, 10_000, 100_000, 1_000_000)


def _store(n: int) -> RingStore:
    ring = np.random.default_rng(0).normal(size=(1, n)).astype(np.float32)
    return RingStore.of(ring, np.array([n]), np.zeros(1, dtype=np.int64))


def _filled(kind: type[Mondrian], n: int) -> Mondrian:
    calibrator = kind(0.4, keys=1, capacity=n)
    calibrator.store = _store(n)
    return calibrator


@pytest.mark.parametrize("n", SIZES)
def test_p_value(benchmark: Any, n: int) -> None:
    calibrator = _filled(Mondrian, n)
    p = benchmark(calibrator.p_value, 0.2533, 0, LEVEL_ONE // 2)
    assert abs(p - 0.4) < 5 / np.sqrt(n)


@pytest.mark.parametrize("kind", [Mondrian, Adaptive])
@pytest.mark.parametrize("n", [1_000, 100_000])
def test_decide(benchmark: Any, kind: type[Mondrian], n: int) -> None:
    calibrator = _filled(kind, n)
    ruling = benchmark(calibrator.decide, 3.0, 0, LEVEL_ONE // 2)
    assert ruling.takeover


@pytest.mark.parametrize("n", [1_000, 100_000])
def test_observe(benchmark: Any, n: int) -> None:
    calibrator = _filled(Adaptive, n)
    benchmark(calibrator.observe, 0.2533, 0, True)
    assert calibrator.filled(0) == n


@pytest.mark.parametrize("n", [1_000, 100_000])
def test_brute_force_peer(benchmark: Any, n: int) -> None:
    """The same count by comparing with every score, in numpy."""
    ring = _store(n).ring[0]
    score = np.float32(0.2533)
    greater = benchmark(lambda: int(np.count_nonzero(ring > score)) + int(np.count_nonzero(ring == score)))
    assert greater == _store(n).count(0.2533, 0)[0]
