"""Scores against float64 log-softmax, tile by tile; means of spans in a fixed order."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atts_engine import ops
from atts_engine.errors import InputError
from atts_engine.ops import scoring


def _inputs(rows: int, hidden: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(rows)
    return (
        torch.randn(rows, hidden, generator=g),
        torch.randn(vocab, hidden, generator=g),
        torch.randint(0, vocab, (rows,), generator=g),
    )


@pytest.mark.parametrize(("rows", "hidden", "vocab"), [(1, 8, 48), (37, 64, 1003), (600, 16, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_against_float64(
    rows: int, hidden: int, vocab: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "vocabulary_tile", lambda vocab, hidden: 128)  # ragged last tile, several tiles
    x, weight, ids = _inputs(rows, hidden, vocab)
    x, weight = x.to(dtype), weight.to(dtype)
    logits = x.double() @ weight.double().T
    wanted = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
    torch.testing.assert_close(ops.score_tokens(x, weight, ids).double(), wanted, atol=3e-5, rtol=0)
    torch.testing.assert_close(ops.score_logits(logits.float(), ids).double(), wanted, atol=3e-5, rtol=0)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("vocab", [48, 49152, 151936])
def test_a_row_of_logits_has_the_same_bits_alone_and_in_company(threads: int, vocab: int) -> None:
    g = torch.Generator().manual_seed(vocab)
    logits = torch.randn(17, vocab, generator=g) * 4
    ids = torch.randint(0, vocab, (17,), generator=g)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        among = ops.score_logits(logits, ids)
        for rows in (1, 2, 3, 7):
            for at in range(0, 17 - rows + 1, rows):
                assert torch.equal(ops.score_logits(logits[at : at + rows], ids[at : at + rows]), among[at : at + rows])
    finally:
        torch.set_num_threads(before)


def test_extreme_logits_and_failures_stay_in_their_row() -> None:
    x = torch.tensor([[1.0], [1e4], [float("nan")], [-1e4]])
    weight = torch.tensor([[10.0], [-10.0], [0.0]])
    got = ops.score_tokens(x, weight, torch.tensor([0, 0, 0, 0]))
    assert got[0] == pytest.approx(-math.log1p(math.exp(-10) + math.exp(-20)), abs=1e-6)
    assert got[1] == 0.0 and got[2].isnan() and got[3] == -2e5
    assert ops.score_tokens(x[:0], weight, torch.empty(0, dtype=torch.int64)).shape == (0,)


def test_refuses_what_does_not_fit() -> None:
    x, weight, ids = _inputs(3, 8, 48)
    for bad in (torch.tensor([0, 1, 48]), torch.tensor([-1, 0, 0])):
        with pytest.raises(InputError, match="outside the vocabulary"):
            ops.score_tokens(x, weight, bad)
    with pytest.raises(InputError, match="score_tokens"):
        ops.score_tokens(x, weight[:, :4], ids)
    with pytest.raises(InputError, match="ids does not fit"):
        ops.score_logits(x, ids[:2])


@given(st.lists(st.lists(st.floats(-50, 0, width=32), min_size=1, max_size=9), min_size=1, max_size=5))
def test_span_mean_adds_in_order(spans: list[list[float]]) -> None:
    flat = torch.tensor([value for span in spans for value in span], dtype=torch.float32)
    bounds = torch.tensor([0, *(len(span) for span in spans)]).cumsum(0)
    score, total = ops.span_mean(flat, bounds)
    for b, span in enumerate(spans):
        wanted = 0.0
        for value in span:
            wanted += value
        assert total[b].item() == wanted
        assert score[b] == torch.tensor(-wanted / len(span), dtype=torch.float64).float()


def test_span_mean_refuses_empty_spans_and_loose_bounds() -> None:
    with pytest.raises(InputError, match="without tokens"):
        ops.span_mean(torch.zeros(3), torch.tensor([0, 3, 3]))
    with pytest.raises(InputError, match="cu_seqlens"):
        ops.span_mean(torch.zeros(3), torch.tensor([0, 2]))
