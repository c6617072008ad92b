"""Sampling: the distribution by chi-squared, filters against sets built by hand, and draws that belong to a stream."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from atts_engine import ops
from atts_engine.errors import InputError

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.5, 0.0, -1.0, -2.0, -30.0])


def _draw(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    first_seed: int = 0,
) -> Tensor:
    rows = logits.shape[0]
    index = torch.arange(rows)
    return ops.sample(
        logits,
        torch.full((rows,), temperature),
        torch.full((rows,), top_k),
        torch.full((rows,), top_p),
        torch.full((rows,), min_p),
        first_seed + index // 100,
        index % 100,
    )


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({}, 8),
        ({"temperature": 0.5}, 8),
        ({"top_k": 1}, 1),
        ({"top_k": 3}, 4),  # the third place is a tie: both stay
        ({"top_p": 0.45}, 1),
        ({"top_p": 0.6}, 2),
        ({"min_p": 0.3}, 2),
        ({"top_k": 2, "top_p": 0.7}, 1),  # top_p of what top_k left
        ({"top_k": 100, "top_p": 0.999999, "min_p": 1e-9}, 7),
    ],
)
def test_distribution(filters: dict[str, float], kept: int) -> None:
    draws = _draw(LOGITS.expand(40_000, -1), **filters)
    weights = (LOGITS.double() / filters.get("temperature", 1.0)).softmax(0)[:kept]
    expected = weights / weights.sum() * len(draws)
    counts = draws.bincount(minlength=8).double()
    assert counts[kept:].sum() == 0
    likely = expected > 5
    assert counts[:kept][~likely].sum() <= 5
    if likely.sum() > 1:
        seen = counts[:kept][likely]
        assert chisquare(seen, expected[likely] / expected[likely].sum() * seen.sum()).pvalue > 1e-3


def test_greedy_takes_the_first_of_ties_and_rows_mix() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [0.0, 0.0, 9.0]])
    assert _draw(logits, temperature=0.0).tolist() == [1, 2]
    one, off = torch.ones(2), torch.zeros(2).long()
    mixed = ops.sample(logits, torch.tensor([0.0, 1.0]), torch.tensor([0, 1]), one, one * 0, off, off)
    assert mixed.tolist() == [1, 2]


def test_rows_without_an_answer_give_minus_one() -> None:
    logits = torch.tensor([[1.0, float("nan")], [float("-inf"), float("-inf")], [0.0, float("-inf")]])
    assert _draw(logits).tolist() == [-1, -1, 0]
    assert _draw(logits, temperature=0.0).tolist() == [-1, -1, 0]


@pytest.mark.parametrize("filters", [{}, {"top_k": 20, "top_p": 0.9, "min_p": 0.01}])
def test_a_draw_does_not_depend_on_place_or_company(filters: dict[str, float]) -> None:
    g = torch.Generator().manual_seed(0)
    rows, vocab = 50, 777
    logits = torch.randn(rows, vocab, generator=g)
    seed = torch.randint(-(1 << 62), 1 << 62, (rows,), generator=g)
    position = torch.randint(0, 10_000, (rows,), generator=g)
    settings = [
        torch.full((rows,), filters.get(name, off))
        for name, off in (("temperature", 0.8), ("top_k", 0), ("top_p", 1.0), ("min_p", 0.0))
    ]
    whole = ops.sample(logits, *settings, seed, position)
    order = torch.randperm(rows, generator=g)
    shuffled = ops.sample(*(t[order] for t in (logits, *settings, seed, position)))
    assert torch.equal(shuffled, whole[order])
    for row in (0, 17, 49):
        alone = ops.sample(*(t[row : row + 1] for t in (logits, *settings, seed, position)))
        assert alone[0] == whole[row]


def test_neighbouring_streams_are_unlike() -> None:
    flat = torch.zeros(2_000, 64)
    by_seed = _draw(flat, first_seed=0)
    by_next = _draw(flat, first_seed=1)
    assert chisquare(by_seed.bincount(minlength=64)).pvalue > 1e-3
    # Independent draws agree 31 times of 2000 on average; 70 has a probability below 1e-8.
    assert int((by_seed == by_next).sum()) < 70


def test_refuses_parameters_of_another_length() -> None:
    one = torch.ones(1)
    with pytest.raises(InputError, match="temperature does not fit"):
        ops.sample(torch.zeros(2, 4), one, one.long(), one, one, one.long(), one.long())
