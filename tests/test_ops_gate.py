"""The gate against a plain Python oracle: ties, NaN, empty rings, wrap-around, order inside a batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atts_engine import ops
from atts_engine.errors import InputError

ONE = 1 << 32


@dataclass
class Oracle:
    """Rings as lists, oldest overwritten first; decisions in exact fractions."""

    keys: int
    capacity: int
    rings: list[list[float]] = field(default_factory=list)
    heads: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rings, self.heads = [[] for _ in range(self.keys)], [0] * self.keys

    def gate(self, rows: list[tuple[float, int, int, int, bool]]) -> list[tuple[int, int, int, bool, float]]:
        results = []
        for score, key, level, u, _ in rows:
            n = len(self.rings[key])
            if not math.isfinite(score):
                results.append((-1, 0, n, False, math.nan))
                continue
            greater = sum(held > score for held in self.rings[key])
            ties = sum(held == score for held in self.rings[key])
            p = (greater + Fraction(u, ONE) * (1 + ties)) / (n + 1)
            results.append((greater, ties, n, p <= Fraction(level, ONE), float(p)))
        for score, key, _, _, insert in rows:
            if insert and math.isfinite(score):
                ring, head = self.rings[key], self.heads[key]
                ring[head : head + 1] = [score]
                self.heads[key] = (head + 1) % self.capacity
        return results


SCORES = st.sampled_from([0.0, 0.5, 1.0, 1.5, math.nan, math.inf, -math.inf, -1.0])
ROW = st.tuples(SCORES, st.integers(0, 2), st.integers(1, ONE), st.integers(1, ONE), st.booleans())


@pytest.fixture(params=["reference", "native"])
def impl(request: pytest.FixtureRequest) -> Iterator[None]:
    lacking = ops.obstacle("gate", request.param, "cpu")
    if lacking is not None:
        pytest.skip(lacking.sentence)
    with ops.use(request.param):
        yield


# One implementation for all examples of a test is what is wanted.
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 5), st.lists(st.lists(ROW, max_size=9), max_size=5))
@pytest.mark.usefixtures("impl")
def test_against_the_oracle(capacity: int, batches: list[list[tuple[float, int, int, int, bool]]]) -> None:
    oracle = Oracle(3, capacity)
    ring, size, head = torch.zeros(3, capacity), torch.zeros(3).long(), torch.zeros(3).long()
    for rows in batches:
        score = torch.tensor([row[0] for row in rows], dtype=torch.float32)
        key, level, u = (torch.tensor([row[i] for row in rows], dtype=torch.int64) for i in (1, 2, 3))
        insert = torch.tensor([row[4] for row in rows], dtype=torch.bool)
        got = ops.gate(score, key, ring, size, head, level, u, insert)
        for b, (greater, ties, n, takeover, p) in enumerate(oracle.gate(rows)):
            assert (int(got.greater[b]), int(got.ties[b]), int(got.n[b])) == (greater, ties, n)
            assert bool(got.takeover[b]) == takeover
            assert got.p[b].item() == pytest.approx(p, rel=1e-15, nan_ok=True)
        for k in range(3):
            assert size[k] == len(oracle.rings[k]) and head[k] == oracle.heads[k]
            assert ring[k, : int(size[k])].tolist() == oracle.rings[k]


def _call(**changes: torch.Tensor) -> None:
    arguments = {
        "score": torch.zeros(2), "key": torch.zeros(2).long(), "ring": torch.zeros(3, 4), "size": torch.zeros(3).long(),
        "head": torch.zeros(3).long(), "level": torch.full((2,), ONE), "u": torch.full((2,), ONE),
        "insert": torch.ones(2, dtype=torch.bool),
    }  # fmt: skip
    ops.gate(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"key": torch.tensor([0, 3])}, "outside the store"),
        ({"key": torch.tensor([0, -1])}, "outside the store"),
        ({"level": torch.tensor([1])}, "level does not fit"),
        ({"ring": torch.zeros(2, 4)}, "size does not fit"),
        ({"score": torch.zeros(2, dtype=torch.float64)}, "float32"),
    ],
)
def test_refuses_what_does_not_fit(changes: dict[str, torch.Tensor], match: str) -> None:
    with pytest.raises(InputError, match=match):
        _call(**changes)
