"""Attention, row ops, scores and sampling of csrc/ on the CPU, against float64 or the reference."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from atts_engine import ops
from atts_engine.errors import InputError
from atts_engine.ops import native
from atts_engine.ops.sampling import gumbel_noise

pytestmark = [
    pytest.mark.skipif(
        native.library() is None, reason="csrc/ was not built at installation: CMake and a C++ compiler are needed"
    ),
    pytest.mark.usefixtures("native_ops"),
]
Dtype = torch.dtype
HALF_ULP = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-20}
"""What one rounding to bfloat16 may move a value by, relative to it; for fp32 what a few operations may."""


@pytest.fixture(params=native.DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> Dtype:
    return request.param  # type: ignore[no-any-return]


def random(dtype: Dtype, *shape: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


# Attention ----------------------------------------------------------------------------------------------------------

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
LAYOUTS = [(3, 3, 64, 16), (1, 2, 16, 4), (7, 2, 128, 8), (4, 1, 48, 3)]
"""(query heads of a KV head, KV heads, head size, page)"""


def batch_of(dtype: Dtype, layout: tuple[int, int, int, int], counts: list[int], lengths: list[int]) -> Batch:
    """Pages that no sequence owns, and slots past a sequence's end, hold NaN."""
    group, kv_heads, dim, page = layout
    needed = [-(-n // page) for n in lengths]
    pages = sum(needed) + 3
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(pages)).tolist()
    kv = torch.full((2, pages, page, kv_heads, dim), float("nan"), dtype=dtype)
    table = torch.zeros(len(counts), max(needed) + 1, dtype=torch.int32)
    for b, (n, length) in enumerate(zip(needed, lengths, strict=True)):
        own = [order.pop() for _ in range(n)]
        table[b, :n] = torch.tensor(own, dtype=torch.int32)
        values = random(dtype, 2, n * page, kv_heads, dim + b)[..., :dim].clone()
        values[:, length:] = float("nan")
        kv[:, own] = values.view(2, n, page, kv_heads, dim)
    cu_q = torch.tensor([0, *counts]).cumsum(0).int()
    q = random(dtype, sum(counts), group * kv_heads, dim)
    return q, kv, table, cu_q, torch.tensor(lengths, dtype=torch.int32)


def attention_oracle(batch: Batch, scale: float) -> torch.Tensor:
    """[N, Hq, D] in float64, one row and head after the other."""
    q, kv, table, cu_q, kv_len = batch
    page, kv_heads = kv.shape[2], kv.shape[3]
    group = q.shape[1] // kv_heads
    out = torch.empty(q.shape, dtype=torch.float64)
    for b in range(len(kv_len)):
        length, rows = int(kv_len[b]), range(int(cu_q[b]), int(cu_q[b + 1]))
        where = torch.arange(length)
        seen = kv[:, table[b, where // page].long(), where % page].double()  # [2, length, kv_heads, D]
        for row in rows:
            visible = length - len(rows) + (row - rows[0]) + 1
            for head in range(q.shape[1]):
                keys, values = seen[:, :visible, head // group]
                weights = torch.softmax(keys @ q[row, head].double() * scale, 0)
                out[row, head] = weights @ values
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention_equals_float64(dtype: Dtype, layout: tuple[int, int, int, int]) -> None:
    batch = batch_of(dtype, layout, counts=[1, 5, 3, 1, 37, 2], lengths=[1, 5, 40, 77, 50, 19])
    scale = layout[2] ** -0.5
    found = ops.paged_attention(*batch, scale).double()
    oracle = attention_oracle(batch, scale)
    # fp32 inside: what it loses is far below one rounding to bfloat16 of a mean of values of at most 5.
    assert bool(((found - oracle).abs() <= oracle.abs() * HALF_ULP[dtype] + 2e-5).all())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention_gives_a_row_its_bits_alone_in_chunks_and_in_company(
    dtype: Dtype, layout: tuple[int, int, int, int]
) -> None:
    q, kv, table, cu_q, kv_len = batch = batch_of(dtype, layout, counts=[23, 1, 6], lengths=[61, 30, 6])
    whole = ops.paged_attention(*batch, 0.2)
    for b in range(3):
        first, last, length = int(cu_q[b]), int(cu_q[b + 1]), int(kv_len[b])
        for size in (1, 4, 23):
            for at in range(first, last, size):
                end = min(at + size, last)
                bounds = torch.tensor([0, end - at], dtype=torch.int32)
                seen = torch.tensor([length - (last - end)], dtype=torch.int32)
                alone = ops.paged_attention(q[at:end], kv, table[b : b + 1], bounds, seen, 0.2)
                assert torch.equal(alone, whole[at:end])


def test_attention_of_short_sequences_beside_a_long_one() -> None:
    # Heads of a long sequence are taken one by one, those of a short one eight at once: the scratch has to hold either.
    # A write behind it ends the process, so another one runs this.
    code = f"""
import torch
from atts_engine.ops import native
from tests.test_ops_native import batch_of
torch.set_num_threads(1)
for dtype in native.DTYPES:
    native.use_isa({native.isa()!r})
    q, kv, table, cu_q, kv_len = batch_of(dtype, (256, 8, 16, 16), [1, 16, 16, 16], [17000, 16, 40, 300])
    found = native.paged_attention(q, kv, table, cu_q, kv_len, 0.25)
    alone = native.paged_attention(q[1:], kv, table[1:], cu_q[1:] - 1, kv_len[1:], 0.25)
    assert torch.equal(found[1:], alone)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_attention_refuses_what_is_not_a_batch(dtype: Dtype) -> None:
    q, kv, table, cu_q, kv_len = batch_of(dtype, LAYOUTS[0], counts=[2, 1], lengths=[5, 30])
    wrong_page = table.clone()
    wrong_page[1, 1] = kv.shape[1]
    for changed, words in (
        ((q, kv, table, cu_q + 1, kv_len), "cu_q ends at 4 for 3 rows"),
        ((q, kv, table, cu_q, torch.tensor([1, 30], dtype=torch.int32)), "more query rows than tokens"),
        ((q, kv, table, cu_q, torch.tensor([5, 3000], dtype=torch.int32)), "longer than its row of the block table"),
        ((q, kv, wrong_page, cu_q, kv_len), r"block_table\[1, 1\] is \d+, which is outside the pool"),
    ):
        with pytest.raises(InputError, match=words):
            ops.paged_attention(*changed, 0.2)
    with pytest.raises(InputError, match="int32"):
        ops.paged_attention(q, kv, table.long(), cu_q, kv_len, 0.2)
    with pytest.raises(InputError, match="block_table"):
        ops.paged_attention(q, kv, table[:1], cu_q, kv_len, 0.2)


# Row ops ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 1, 33, 200])
@pytest.mark.parametrize("width", [8, 61, 576])
def test_rms_norm(dtype: Dtype, rows: int, width: int) -> None:
    x, weight = random(dtype, rows, width + 8)[:, :width], random(dtype, width)
    found = ops.rms_norm(x, weight, 1e-5)
    wide = x.double()
    normed = wide / (wide.square().mean(1, keepdim=True) + 1e-5).sqrt()
    oracle = normed * weight.double()
    assert bool(((found.double() - oracle).abs() <= oracle.abs() * 2.1 * HALF_ULP[dtype]).all())


@pytest.mark.parametrize("rows", [0, 1, 33, 200])
@pytest.mark.parametrize("width", [8, 61, 576])
def test_add_rms_norm_is_a_sum_and_its_norm(dtype: Dtype, rows: int, width: int) -> None:
    x, delta, weight = (
        random(dtype, rows, width + 8)[:, :width],
        random(dtype, rows, width, scale=3),
        random(dtype, width),
    )
    total, normed = ops.add_rms_norm(x, delta, weight, 1e-5)
    assert torch.equal(total, x + delta)
    assert torch.equal(normed, ops.rms_norm(total, weight, 1e-5))


@pytest.mark.parametrize("rows", [0, 1, 33])
@pytest.mark.parametrize("width", [8, 61, 1536])
def test_silu_mul_of_halves(dtype: Dtype, rows: int, width: int) -> None:
    gate, up = random(dtype, rows, 2 * width, scale=8).chunk(2, dim=-1)
    found = ops.silu_mul(gate, up)
    oracle = gate.double() * torch.sigmoid(gate.double()) * up.double()
    assert bool(((found.double() - oracle).abs() <= oracle.abs() * 1.01 * HALF_ULP[dtype] + 1e-35).all())


def test_silu_mul_far_out(dtype: Dtype) -> None:
    gate = torch.tensor([[-300.0, -88.0, 0.0, 88.0, 300.0, float("nan"), float("inf")]]).to(dtype)
    found = ops.silu_mul(gate, torch.ones_like(gate))
    assert found[0, :2].abs().max() < 1e-30
    assert found[0, 2:5].tolist() == gate[0, 2:5].tolist()
    assert bool(found[0, 5].isnan()) and bool(found[0, 6].isinf())


@pytest.mark.parametrize("dim", [16, 30, 64])
def test_rope_of_a_part_of_the_heads(dtype: Dtype, dim: int) -> None:
    x = random(dtype, 17, 9, dim)[:, 2:7]
    cos, sin = torch.rand(17, dim // 2), torch.rand(17, dim // 2)
    found = ops.rope(x, cos, sin)
    low, high = x.double().chunk(2, -1)
    c, s = cos.double()[:, None], sin.double()[:, None]
    oracle = torch.cat((low * c - high * s, high * c + low * s), -1)
    assert bool(((found.double() - oracle).abs() <= oracle.abs() * HALF_ULP[dtype] + 1e-6).all())


def test_kv_append_writes_its_slots_and_nothing_else(dtype: Dtype) -> None:
    heads = random(dtype, 5, 7, 16)
    k, v = heads[:, 3:5], heads[:, 5:]
    cache = random(dtype, 2, 4, 3, 2, 16)
    expected = cache.clone()
    slots = torch.tensor([11, 0, 7, 3, 4])
    expected.view(2, 12, 2, 16)[0, slots] = k
    expected.view(2, 12, 2, 16)[1, slots] = v
    ops.kv_append(k, v, cache, slots)
    assert torch.equal(cache, expected)
    with pytest.raises(InputError, match="slot"):
        ops.kv_append(k, v, cache, slots + 1)
    assert torch.equal(cache, expected)


# Scores -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [5, 512, 1301])
def test_score_tokens_equals_float64_and_a_row_keeps_its_bits(dtype: Dtype, vocab: int) -> None:
    hidden, weight = random(dtype, 70, 64), random(dtype, vocab, 64, scale=0.5)
    ids = torch.randint(0, vocab, (70,), generator=torch.Generator().manual_seed(1))
    found = ops.score_tokens(hidden, weight, ids)
    oracle = torch.log_softmax(hidden.double() @ weight.double().T, 1).gather(1, ids[:, None])[:, 0]
    assert found.dtype == torch.float32
    assert float((found.double() - oracle).abs().max()) < 1e-5
    for rows in (1, 2, 3, 4, 64, 69):
        assert torch.equal(ops.score_tokens(hidden[:rows], weight, ids[:rows]), found[:rows])
    with pytest.raises(InputError, match="vocabulary"):
        ops.score_tokens(hidden, weight, ids + vocab)


def test_score_tokens_of_rows_that_are_not_finite(dtype: Dtype) -> None:
    hidden, weight = random(dtype, 4, 64), random(dtype, 700, 64)
    hidden[1, 3], hidden[2, 5] = float("nan"), float("inf")
    found = ops.score_tokens(hidden, weight, torch.zeros(4, dtype=torch.int64))
    assert found.isnan().tolist() == [False, True, True, False]


@pytest.mark.parametrize("vocab", [1, 7, 512, 1301])
def test_score_logits_equals_float64_and_a_row_keeps_its_bits(dtype: Dtype, vocab: int) -> None:
    logits = random(dtype, 9, vocab + 3, scale=4.0)[:, :vocab]
    ids = torch.randint(0, vocab, (9,), generator=torch.Generator().manual_seed(2))
    found = ops.score_logits(logits, ids)
    oracle = torch.log_softmax(logits.double(), 1).gather(1, ids[:, None])[:, 0]
    assert found.dtype == torch.float32
    assert float((found.double() - oracle).abs().max()) < 1e-5
    for row in range(9):
        assert torch.equal(ops.score_logits(logits[row : row + 1], ids[row : row + 1]), found[row : row + 1])
    with pytest.raises(InputError, match="score_logits"):
        ops.score_logits(logits, ids + vocab)


def test_score_logits_of_values_that_are_not_finite(dtype: Dtype) -> None:
    logits = random(dtype, 5, 1100)
    logits[1, 600], logits[2, :512], logits[3], logits[4, 3] = float("nan"), -float("inf"), -float("inf"), float("inf")
    found = ops.score_logits(logits, torch.full((5,), 700))
    assert found.isnan().tolist() == [False, True, False, True, True]
    oracle = torch.log_softmax(logits[2].double(), 0)[700]
    assert abs(float(found[2]) - float(oracle)) < 1e-5


# Sampling -----------------------------------------------------------------------------------------------------------


def sampling_rows(rows: int, seed: int) -> list[torch.Tensor]:
    """temperature, top_k, top_p, min_p, seed, position: every filter alone, together and off."""
    g = torch.Generator().manual_seed(seed)
    temperature = torch.rand(rows, generator=g) * 1.5 + 0.02
    temperature[::7] = 0
    top_k = torch.randint(0, 60, (rows,), generator=g)
    top_p, min_p = torch.rand(rows, generator=g), torch.rand(rows, generator=g) * 0.2
    top_k[::3], top_p[::2], min_p[::5] = 0, 1.0, 0.0
    top_k[1::4], top_p[1::4], min_p[1::4] = 0, 1.0, 0.0
    seeds = torch.randint(-(2**62), 2**62, (rows,), generator=g)
    return [temperature, top_k, top_p, min_p, seeds, torch.arange(rows)]


@pytest.mark.parametrize("vocab", [1, 3, 1000, 49152])
@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0, 20.0])
def test_sample_draws_what_the_reference_draws(dtype: Dtype, vocab: int, spread: float) -> None:
    rows = 64 if vocab > 1000 else 256
    logits = random(dtype, rows, vocab, scale=spread)
    parameters = sampling_rows(rows, vocab)
    found = ops.sample(logits, *parameters)
    with ops.use("reference"):
        reference = ops.sample(logits, *parameters)
    for row in (found != reference).nonzero().view(-1).tolist():
        # Logarithms of two libraries: two tokens may lie closer together than these agree.
        noise = gumbel_noise(parameters[4][row : row + 1], parameters[5][row : row + 1], vocab)[0].double()
        value = logits[row].double() / parameters[0][row].double() + noise
        assert abs(float(value[found[row]] - value[reference[row]])) < 1e-5 * max(1.0, float(value.abs().max()))


def test_sample_of_rows_that_cannot_be_drawn_from(dtype: Dtype) -> None:
    logits = random(dtype, 5, 40)
    logits[0, 3], logits[1, 4], logits[3] = float("nan"), float("inf"), float("-inf")
    logits[4, 7:] = float("-inf")
    found = ops.sample(logits, *(t[1:6] for t in sampling_rows(6, 3)))
    assert found[[0, 1, 3]].tolist() == [-1, -1, -1] and int(found[2]) >= 0 and 0 <= int(found[4]) < 7


def test_sample_at_extreme_temperatures(dtype: Dtype) -> None:
    nan = torch.tensor([float("nan")])
    parameters = [t[:1] for t in sampling_rows(6, 4)]
    for sign, least in ((1.0, 1), (-1.0, 0)):
        logits = sign * torch.tensor([[1.0, 3.0, 2.0, sign * float("-inf")]], dtype=dtype)
        for temperature in (1e-30, 1e-45):
            assert ops.sample(logits, torch.tensor([temperature]), *parameters[1:]).tolist() == [least]
        assert 0 <= int(ops.sample(logits, 1 / torch.zeros(1), *parameters[1:])) < 3
        assert ops.sample(logits, nan, *parameters[1:]).tolist() == [-1]


def test_sample_of_ties_at_zero_where_the_temperature_has_no_reciprocal(dtype: Dtype) -> None:
    logits = torch.tensor([0.0, -0.0, -1e-38, -1.0] * 3, dtype=dtype).expand(64, -1)
    parameters = [torch.full((64,), 1e-40), *sampling_rows(64, 5)[1:]]
    found = ops.sample(logits, *parameters)
    with ops.use("reference"):
        assert torch.equal(found, ops.sample(logits, *parameters))
    assert len(found.unique()) > 1


def test_sample_of_strided_rows(dtype: Dtype) -> None:
    logits, parameters = random(dtype, 12, 300), sampling_rows(6, 4)
    assert torch.equal(ops.sample(logits[::2], *parameters), ops.sample(logits[::2].contiguous(), *parameters))


# The pool of threads ------------------------------------------------------------------------------------------------


def test_callers_in_several_threads_do_not_disturb_each_other(dtype: Dtype) -> None:
    x, weight = random(dtype, 9, 64), random(dtype, 513, 64)
    expected = ops.linear(x, weight)
    wrong: list[int] = []

    def repeat() -> None:
        for i in range(200):
            if not torch.equal(ops.linear(x, weight), expected):
                wrong.append(i)

    threads = [threading.Thread(target=repeat) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_works_alone(dtype: Dtype) -> None:
    x, weight = random(dtype, 9, 64), random(dtype, 513, 64)
    expected = ops.linear(x, weight)  # the pool's threads exist now, and the child has none of them
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(ops.linear(x, weight), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_library_of_other_sources_is_refused() -> None:
    with pytest.raises(InputError, match="built from other sources"):
        native.load(Path(torch._C.__file__))
