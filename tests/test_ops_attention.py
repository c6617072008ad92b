"""Paged attention against dense float64 attention, and the promise that a row's bits are its own."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atts_engine import ops
from atts_engine.errors import InputError

PAGE = 16


@dataclass(frozen=True)
class Case:
    """Sequences with all their queries, and a cache that holds their keys and values."""

    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]
    kv_layer: Tensor
    table: Tensor


def _case(lengths: list[int], heads: int, kv_heads: int, dim: int, page: int = PAGE, seed: int = 0) -> Case:
    g = torch.Generator().manual_seed(seed)
    pages = -(-max(lengths) // page)
    total = len(lengths) * pages
    # What nobody wrote is NaN: none of it may reach a result.
    kv_layer = torch.full((2, total, page, kv_heads, dim), float("nan"))
    table = torch.randperm(total, generator=g).view(len(lengths), pages).int()
    q, k, v = ([torch.randn(length, h, dim, generator=g) for length in lengths] for h in (heads, kv_heads, kv_heads))
    for b, length in enumerate(lengths):
        at = torch.arange(length)
        ops.kv_append(k[b], v[b], kv_layer, table[b].long()[at // page] * page + at % page)
    return Case(q, k, v, kv_layer, table)


def _run(case: Case, parts: list[tuple[int, int, int]]) -> list[Tensor]:
    """Attention of queries start..end of sequence b for each (b, start, end), in one call."""
    q = torch.cat([case.q[b][start:end] for b, start, end in parts])
    counts = [end - start for _, start, end in parts]
    cu_q = torch.tensor([0, *counts]).cumsum(0).int()
    table = case.table[torch.tensor([b for b, _, _ in parts])]
    kv_len = torch.tensor([end for _, _, end in parts]).int()
    return list(ops.paged_attention(q, case.kv_layer, table, cu_q, kv_len, 0.2).split(counts))


def _dense(case: Case, b: int) -> Tensor:
    q, k, v = (t[b].double().transpose(0, 1) for t in (case.q, case.k, case.v))
    group = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2).transpose(0, 1)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "page"), [(4, 4, 32, 16), (9, 3, 64, 16), (4, 1, 16, 7), (2, 2, 8, 64)]
)
def test_against_dense_attention(heads: int, kv_heads: int, dim: int, page: int) -> None:
    lengths = [1, 5, 64, 65, 130, 17]
    case = _case(lengths, heads, kv_heads, dim, page)
    for b, got in enumerate(_run(case, [(b, 0, length) for b, length in enumerate(lengths)])):
        torch.testing.assert_close(got.double(), _dense(case, b), atol=2e-6, rtol=0)
    starts = [0, 4, 0, 30, 129, 3]
    for b, got in enumerate(_run(case, [(b, starts[b], length) for b, length in enumerate(lengths)])):
        torch.testing.assert_close(got.double(), _dense(case, b)[starts[b] :], atol=2e-6, rtol=0)


@settings(max_examples=12)
@given(st.data())
def test_bits_do_not_depend_on_chunks_or_company(data: st.DataObject) -> None:
    heads, kv_heads, dim = data.draw(st.sampled_from([(4, 4, 32), (9, 3, 64), (2, 1, 16)]))
    lengths = data.draw(st.lists(st.integers(1, 150), min_size=1, max_size=4))
    case = _case(lengths, heads, kv_heads, dim)
    alone = [_run(case, [(b, 0, length)])[0] for b, length in enumerate(lengths)]
    done = [0] * len(lengths)
    while any(at < length for at, length in zip(done, lengths)):
        step = []
        for b in data.draw(st.permutations(range(len(lengths)))):
            if done[b] < lengths[b] and (data.draw(st.booleans()) or not step):
                end = data.draw(st.integers(done[b] + 1, lengths[b]))
                step.append((b, done[b], end))
                done[b] = end
        for (b, start, end), got in zip(step, _run(case, step)):
            assert torch.equal(got, alone[b][start:end])


@pytest.mark.parametrize("threads", [1, 2])
def test_bits_do_not_depend_on_threads_or_group_size(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = _case([150] * 6, 4, 2, 32)
    wanted = [_run(case, [(b, 0, 150)])[0] for b in range(6)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    monkeypatch.setattr("atts_engine.ops.attention._WORKSPACE", 1 << 14)
    try:
        got = _run(case, [(b, 149, 150) for b in range(6)] + [(b, 0, 149) for b in range(6)])
    finally:
        torch.set_num_threads(before)
    for b in range(6):
        assert torch.equal(got[b][0], wanted[b][149])
        assert torch.equal(got[6 + b], wanted[b][:149])


def test_nan_stays_in_its_own_sequence() -> None:
    case = _case([40, 40], 4, 4, 32)
    clean = _run(case, [(0, 0, 40)])[0]
    case.q[1][:] = float("nan")
    assert torch.equal(_run(case, [(1, 0, 40), (0, 0, 40)])[1], clean)


def test_refuses_what_does_not_fit() -> None:
    case = _case([20], 4, 4, 32)
    cu_q, table = torch.tensor([0, 20]).int(), case.table
    for cu, length, match in ((cu_q, 19, "more query rows"), (cu_q[:1], 20, "cu_q"), (cu_q, 100, "longer than")):
        with pytest.raises(InputError, match=match):
            ops.paged_attention(case.q[0], case.kv_layer, table, cu, torch.tensor([length]).int(), 1.0)
    with pytest.raises(InputError, match="does not fit"):
        ops.paged_attention(case.q[0][..., :16], case.kv_layer, table, cu_q, torch.tensor([20]).int(), 1.0)


def test_pages_are_copied_in_every_layer_as_they_were() -> None:
    kv = torch.randn(3, 2, 6, 4, 2, 8, generator=torch.Generator().manual_seed(0))
    before = kv.clone()
    ops.kv_copy_pages(kv, torch.tensor([0, 0, 2]), torch.tensor([1, 4, 5]))
    for target, source in ((0, 0), (1, 0), (2, 2), (3, 3), (4, 0), (5, 2)):
        assert torch.equal(kv[:, :, target], before[:, :, source])
    with pytest.raises(InputError, match="dst does not fit"):
        ops.kv_copy_pages(kv, torch.tensor([0]), torch.tensor([1, 2]))
    for src, dst, match in (
        ([0, 1], [1, 2], "in one call"),
        ([1, 0], [2, 1], "in one call"),
        ([0, 1], [2, 2], "dst names 2 twice"),
    ):
        with pytest.raises(InputError, match=match):
            ops.kv_copy_pages(kv, torch.tensor(src), torch.tensor(dst))


def test_append_writes_its_slots_and_nothing_else() -> None:
    layer = torch.zeros(2, 3, 4, 2, 8)
    k, v = torch.ones(2, 2, 8), torch.full((2, 2, 8), 2.0)
    ops.kv_append(k, v, layer, torch.tensor([5, 11]))
    rows = layer.view(2, 12, 2, 8)
    assert rows[0, [5, 11]].eq(1).all() and rows[1, [5, 11]].eq(2).all()
    assert layer.count_nonzero() == 4 * 16
    with pytest.raises(InputError, match="slots does not fit"):
        ops.kv_append(k, v, layer, torch.tensor([5]))
