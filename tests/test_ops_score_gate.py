"""The fused op against its three parts, the soft-cap against float64, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atts_engine import ops
from atts_engine.errors import InputError

ONE = 1 << 32


def _store(keys: int, capacity: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.zeros(keys, capacity), torch.zeros(keys).long(), torch.zeros(keys).long()


@settings(max_examples=25)
@given(st.lists(st.integers(1, 5), max_size=6), st.integers(1, 4), st.sampled_from([0.0, 3.0]), st.integers(0, 99))
def test_is_its_three_parts(lengths: list[int], capacity: int, softcap: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    tokens, spans = sum(lengths), len(lengths)
    hidden, weight = torch.randn(tokens, 8, generator=g), torch.randn(30, 8, generator=g)
    ids, bounds = torch.randint(0, 30, (tokens,), generator=g), torch.tensor([0, *lengths]).cumsum(0)
    key, level = torch.randint(0, 2, (spans,), generator=g), torch.randint(0, ONE + 1, (spans,), generator=g)
    u, insert = torch.randint(1, ONE + 1, (spans,), generator=g), torch.rand(spans, generator=g) < 0.7
    stores = _store(2, capacity), _store(2, capacity)
    for _ in range(2):
        got = ops.score_gate(hidden, weight, ids, bounds, key, *stores[0], level, u, insert, softcap)
        score, sums = ops.span_mean(ops.score_tokens(hidden, weight, ids, softcap), bounds)
        wanted = (score, sums, *ops.gate(score, key, *stores[1], level, u, insert))
        for mine, theirs in zip((*got, *stores[0]), (*wanted, *stores[1]), strict=True):
            assert torch.equal(mine, theirs)


def test_soft_cap_against_float64() -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(20, 16, generator=g) * 3, torch.randn(300, 16, generator=g)
    ids = torch.randint(0, 300, (20,), generator=g)
    logits = hidden.double() @ weight.double().T
    for softcap in (0.5, 30.0, 1e4):
        wanted = (softcap * (logits / softcap).tanh()).log_softmax(-1).gather(1, ids[:, None])[:, 0]
        for got in (ops.score_tokens(hidden, weight, ids, softcap), ops.score_logits(logits.float(), ids, softcap)):
            torch.testing.assert_close(got.double(), wanted, atol=2e-5, rtol=0)


def test_the_logits_of_the_caller_stay_as_they_are() -> None:
    logits = torch.randn(3, 7)
    before = logits.clone()
    ops.score_logits(logits, torch.tensor([0, 1, 2]), 2.0)
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"ids": torch.tensor([0, 1, 30])}, "score_gate: ids holds 30"),
        ({"key": torch.tensor([0, 2])}, "score_gate: key holds 2"),
        ({"key": torch.tensor([0])}, "score_gate: key does not fit"),
        ({"cu_seqlens": torch.tensor([0, 3, 3])}, "without tokens"),
        ({"cu_seqlens": torch.tensor([0, 1, 2])}, "cu_seqlens runs"),
        ({"weight": torch.zeros(30, 7)}, "score_gate: weight does not fit"),
        ({"softcap": -1.0}, "softcap must be"),
        ({"softcap": float("nan")}, "softcap must be"),
    ],
)
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_refuses_what_does_not_fit(impl: str, changes: dict[str, torch.Tensor | float], match: str) -> None:
    if impl == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
    ring, size, head = _store(2, 4)
    arguments = {
        "hidden": torch.zeros(3, 8), "weight": torch.zeros(30, 8), "ids": torch.zeros(3).long(),
        "cu_seqlens": torch.tensor([0, 1, 3]), "key": torch.tensor([0, 1]), "ring": ring, "size": size, "head": head,
        "level": torch.full((2,), ONE), "u": torch.full((2,), ONE), "insert": torch.ones(2, dtype=torch.bool),
    }  # fmt: skip
    with ops.use(impl), pytest.raises(InputError, match=match):
        ops.score_gate(**(arguments | changes))
