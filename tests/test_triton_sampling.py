"""The Triton sampler against the reference and against float64: bits of the hash, noise, filters at their borders, the
distribution, and draws that belong to a row. In the interpreter where there is no GPU."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from torch import Tensor

from atts_engine import ops
from atts_engine.ops.sampling import _GOLDEN, _mix

triton = pytest.importorskip("triton", reason="triton is not installed")
import triton.language as tl  # noqa: E402

from atts_triton.sample import SPLIT, _bound, gumbel_of, stream_of, token_bits  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BORDER = 2.0**-18
"""How far from top_p, in units of the total mass, a token may fall on either side; so for min_p, relative."""
MASK = (1 << 64) - 1


class Rows(NamedTuple):
    """Arguments of `ops.sample`."""

    logits: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor
    position: Tensor

    def at(self, index: object) -> Rows:
        return Rows(*(t[index] for t in self))

    def draw(self) -> Tensor:
        with ops.use("triton"):
            return ops.sample(*(t.to(DEVICE) for t in self)).cpu()


def rows_of(
    logits: Tensor,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    seed: int = 0,
) -> Rows:
    rows = len(logits)
    g = torch.Generator().manual_seed(seed)

    def full(value: float | Tensor, dtype: torch.dtype) -> Tensor:
        return value.to(dtype) if isinstance(value, Tensor) else torch.full((rows,), value, dtype=dtype)

    return Rows(
        logits,
        full(temperature, torch.float32),
        full(top_k, torch.int64),
        full(top_p, torch.float32),
        full(min_p, torch.float32),
        torch.randint(-(1 << 62), 1 << 62, (rows,), generator=g),
        torch.randint(0, 1 << 40, (rows,), generator=g),
    )


def mixed(rows: int, vocab: int, dtype: torch.dtype, seed: int) -> Rows:
    """Rows of every kind side by side."""
    g = torch.Generator().manual_seed(seed)
    temperature, top_p, min_p = torch.rand(rows, generator=g) * 2, torch.rand(rows, generator=g), torch.zeros(rows)
    top_k = torch.randint(-1, vocab + 3, (rows,), generator=g)
    temperature[::6] = 0.0
    top_k[::2], top_p[1::3], min_p[::4] = 0, 1.0, 0.05
    top_k[1::4] = 7
    logits = (torch.randn(rows, vocab, generator=g) * 3).to(dtype)
    return rows_of(logits, temperature, top_k, top_p, min_p, seed)


def python_bits(seed: int, position: int, vocab: int) -> list[int]:
    """SplitMix64 in plain integers."""
    golden = 0x9E3779B97F4A7C15

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
        return x ^ (x >> 31)

    stream = mix((mix((position * golden + seed) & MASK) + seed) & MASK)
    return [mix((stream + (token + 1) * golden) & MASK) & (MASK >> 1) for token in range(vocab)]


def exact_noise(bits: list[int]) -> np.ndarray:
    v = np.maximum(np.array(bits, dtype=np.float64) * 2.0**-63, 2.0**-64)
    with np.errstate(divide="ignore"):
        return -np.log(-np.log1p(-v))


def allowed(row: Rows) -> tuple[set[int], set[int]]:
    """(tokens that the filters surely keep, those at a border within rounding) of one row, by sorting in float64."""
    scaled = row.logits[0].float().numpy() / np.float32(row.temperature)
    order = sorted(range(len(scaled)), key=lambda token: (-float(scaled[token]), token))
    top_k, top_p, min_p = int(row.top_k), float(row.top_p), float(row.min_p)
    kth = scaled[order[top_k - 1]] if 0 < top_k < len(order) else -np.inf
    mass = {token: math.exp(float(scaled[token]) - float(scaled[order[0]])) for token in order if scaled[token] >= kth}
    total = math.fsum(mass.values())
    sure, border, before = set(), set(), 0.0
    for token in order:
        if token not in mass:
            break
        room = top_p * total - before if top_p < 1 and token != order[0] else math.inf
        weight = mass[token] / min_p - 1.0 if min_p > 0 and token != order[0] else math.inf
        if min(room / total, weight) > BORDER:
            sure.add(token)
        elif min(room / total, weight) > -BORDER:
            border.add(token)
        before += mass[token]
    return sure, border


def check_draw(row: Rows, drawn: int) -> None:
    """drawn has the largest perturbed logit of the kept tokens, to within the rounding of float32."""
    sure, border = allowed(row)
    scaled = (row.logits[0].float().numpy() / np.float32(row.temperature)).astype(np.float64)
    noise = exact_noise(python_bits(int(row.seed), int(row.position), len(scaled)))
    best = max(sure, key=lambda token: scaled[token] + noise[token])
    assert drawn in sure | border
    rounding = 2.0**-22 * (1.0 + abs(scaled[best]) + abs(noise[best]))
    assert scaled[drawn] + noise[drawn] >= scaled[best] + noise[best] - rounding


@triton.jit
def hash_kernel(seed_ptr, position_ptr, bits_ptr, V: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, V)
    stream = stream_of(tl.load(seed_ptr + row), tl.load(position_ptr + row))
    tl.store(bits_ptr + row * V + column, token_bits(stream, column))


@triton.jit
def noise_kernel(bits_ptr, noise_ptr, N: tl.constexpr):
    column = tl.arange(0, N)
    tl.store(noise_ptr + column, gumbel_of(tl.load(bits_ptr + column)))


@triton.jit
def bound_kernel(raw_ptr, bits_ptr, temperature_ptr, bound_ptr, value_ptr, N: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, N)
    raw, bits, temperature = tl.load(raw_ptr + column), tl.load(bits_ptr + column), tl.load(temperature_ptr + row)
    tl.store(bound_ptr + row * N + column, _bound(raw, temperature, bits))
    tl.store(value_ptr + row * N + column, tl.math.div_rn(raw, temperature) + gumbel_of(bits))


def test_the_bits_of_a_token_are_those_of_the_reference_and_of_plain_integers() -> None:
    extremes = [0, 1, -1, 12345, (1 << 63) - 1, -(1 << 63), 1 << 40, -(1 << 33)]
    seed, position = torch.tensor([[s, p] for s in extremes for p in extremes[:4] + extremes[4:7:2]]).unbind(1)
    vocab = 64
    bits = torch.empty(len(seed), vocab, dtype=torch.int64, device=DEVICE)
    hash_kernel[(len(seed),)](seed.contiguous().to(DEVICE), position.contiguous().to(DEVICE), bits, V=vocab)
    stream = _mix(_mix(position * _GOLDEN + seed) + seed)
    reference = _mix(stream[:, None] + torch.arange(1, vocab + 1) * _GOLDEN) & (MASK >> 1)
    assert torch.equal(bits.cpu(), reference)
    for row in range(0, len(seed), 7):
        assert bits[row].tolist() == python_bits(int(seed[row]), int(position[row]), vocab)


def test_noise_is_as_near_to_float64_as_that_of_torch() -> None:
    top = (1 << 63) - 1
    powers = [1 << shift for shift in range(63)] + [top - (1 << shift) for shift in range(20, 62)] + [0]
    drawn = python_bits(5, 7, 4096 - len(powers))
    bits = torch.tensor(powers + drawn)
    noise = torch.empty(len(bits), device=DEVICE)
    noise_kernel[(1,)](bits.to(DEVICE), noise, N=len(bits))
    exact = torch.from_numpy(exact_noise(bits.tolist()))
    torchs = -torch.log(-torch.log1p(-(bits.float() * 2.0**-63).clamp(min=2.0**-64)))
    # Where v is next to 1 its own rounding decides: both have 1 - v from the same float32.
    live = bits < top - (1 << 40)
    error, allowance = (noise.cpu().double() - exact).abs(), 3 * (torchs.double() - exact).abs()
    assert bool((error <= allowance + 4e-7 * (1 + exact.abs()))[live].all())
    assert noise[-1].isfinite() and noise.max() < 45


def test_no_perturbed_logit_is_above_its_bound_nor_far_below() -> None:
    top = (1 << 63) - 1
    some = [0, 1, 1 << 30, (1 << 31) - 1, 1 << 31, 3 << 31, 1 << 40, 1 << 62, top - (1 << 50), top]
    bits = torch.tensor(some + python_bits(3, 4, 1024 - len(some)))
    raw = torch.randn(1024, generator=torch.Generator().manual_seed(0)) * 8
    raw[20:24] = torch.tensor([0.0, -math.inf, 3e4, -3e4])
    temperature = torch.tensor([3e-39, 1e-30, 1e-3, 0.6, 1.0, 1.7, 50.0, 3e38])
    bound, value = torch.empty(2, len(temperature), 1024, device=DEVICE)
    bound_kernel[(len(temperature),)](*(t.to(DEVICE) for t in (raw, bits, temperature)), bound, value, N=1024)
    assert not bound.isnan().any() and bool((bound >= value).all())
    likely = (bits > 1 << 42) & (bits < 1 << 61) & (raw.abs() < 1e3)
    slack = 0.0625 + 0.14 + 2e-4 + 2e-6 * value[3:].abs().cpu()
    assert bool((bound[3:].cpu() - value[3:].cpu() <= slack)[:, likely].all())


@pytest.mark.parametrize(
    ("rows", "vocab", "dtype"),
    [(12, 2 * SPLIT + 37, torch.float32), (9, 999, torch.float16), (9, 1024, torch.bfloat16), (6, 1, torch.float32)],
)
def test_ids_are_those_of_the_reference(rows: int, vocab: int, dtype: torch.dtype) -> None:
    batch = mixed(rows, vocab, dtype, seed=vocab)
    with ops.use("reference"):
        wanted = ops.sample(*batch)
    got = batch.draw()
    for row in range(rows):
        one = batch.at(slice(row, row + 1))
        if float(one.temperature) > 0:
            check_draw(one, int(got[row]))
        if got[row] != wanted[row]:  # only where the two are level to within rounding
            assert float(one.temperature) > 0
            check_draw(one, int(wanted[row]))


def test_any_strides() -> None:
    batch = mixed(5, 70, torch.float32, seed=1)
    wanted = batch.draw()
    wide = torch.full((5, 100), 50.0)
    wide[:, 3:73] = batch.logits
    assert torch.equal(batch._replace(logits=wide[:, 3:73]).draw(), wanted)
    assert torch.equal(batch._replace(logits=batch.logits.T.contiguous().T).draw(), wanted)
    shared = batch._replace(logits=batch.logits[:1].expand(5, -1))
    assert torch.equal(shared.draw(), batch._replace(logits=batch.logits[:1].repeat(5, 1)).draw())


def test_a_draw_does_not_depend_on_place_or_company() -> None:
    batch = mixed(14, 300, torch.float32, seed=3)
    whole = batch.draw()
    order = torch.randperm(14, generator=torch.Generator().manual_seed(0))
    assert torch.equal(batch.at(order).draw(), whole[order])
    for row in (0, 5, 13):
        assert torch.equal(batch.at(slice(row, row + 1)).draw(), whole[row : row + 1])


VALUES = st.sampled_from([-math.inf, -3.0, -0.5, -0.0, 0.0, 0.25, 1.0, 1.5, 2.0])


@st.composite
def filtered_rows(draw: st.DrawFn) -> Rows:
    """Few distinct values, so ties everywhere; filters at both ends of their ranges and between."""
    vocab = draw(st.integers(1, 40))
    values = draw(st.lists(VALUES, min_size=vocab, max_size=vocab))
    values[draw(st.integers(0, vocab - 1))] = 2.5
    return rows_of(
        torch.tensor([values]),
        draw(st.sampled_from([0.3, 1.0, 1.7])),
        draw(st.sampled_from([0, 1, 2, vocab - 1, vocab, vocab + 1, vocab // 2])),
        draw(st.sampled_from([1e-6, 0.2, 0.5, 0.9, 0.999, 1.0]) | st.floats(1 / 64, 63 / 64, width=32)),
        draw(st.sampled_from([0.0, 1e-3, 0.1, 0.6, 1.0])),
        draw(st.integers(0, 1000)),
    )


@settings(max_examples=60)
@given(filtered_rows())
def test_filters_keep_what_sorting_keeps(row: Rows) -> None:
    check_draw(row, int(row.draw()))


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({"top_p": 0.5}, 2500),  # half of what is level, the lower ids
        ({"top_k": 1}, 5000),  # all of what is level
        ({"top_p": 1e-9}, 1),
        ({"top_k": 4999, "top_p": 0.001, "min_p": 0.5}, 5),
    ],
)
def test_ties_over_several_blocks(filters: dict[str, float], kept: int) -> None:
    logits = torch.full((4, 5000), 0.75)
    batch = rows_of(logits, **filters)
    for row, drawn in enumerate(batch.draw().tolist()):
        sure, border = allowed(batch.at(slice(row, row + 1)))
        assert sure | border <= set(range(kept + 1)) and len(sure) >= kept - 1
        check_draw(batch.at(slice(row, row + 1)), drawn)


@pytest.mark.parametrize("filters", [{}, {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.02}])
def test_distribution(filters: dict[str, float]) -> None:
    """Chi-squared below its 1 - 1e-4 quantile; the seeds are fixed, so this holds always or never."""
    draws = 100_000 if DEVICE == "cuda" else 60 if filters else 200
    logits = torch.tensor([2.0, 1.5, 1.0, 1.0, 0.5, 0.5, 0.0, -1.0])
    batch = rows_of(logits.expand(draws, -1), **filters)
    sure, border = allowed(batch.at(slice(0, 1)))
    assert not border
    kept = sorted(sure)
    counts = batch.draw().bincount(minlength=8).double()
    expected = (logits[kept].double() / filters.get("temperature", 1.0)).softmax(0) * draws
    assert counts.sum() == counts[kept].sum() == draws
    statistic = float(((counts[kept] - expected) ** 2 / expected).sum())
    assert statistic < chi2.ppf(1 - 1e-4, len(kept) - 1)


def test_greedy_takes_the_first_of_ties_in_any_split() -> None:
    logits = torch.zeros(3, 2 * SPLIT + 5)
    logits[0, [SPLIT - 1, SPLIT]] = 4.0
    logits[1, [2 * SPLIT + 4, 7]] = 4.0
    logits[2, 2 * SPLIT + 4] = 4.0
    for row in (rows_of(logits, 0.0), rows_of(logits, 0.0, 3, 0.5, 0.1), rows_of(logits, 1e-20)):
        assert row.draw().tolist() == [SPLIT - 1, 7, 2 * SPLIT + 4]


@pytest.mark.parametrize("settings_", [(0.0,), (1.0,), (1.0, 3, 0.9, 0.1)])
def test_rows_without_an_answer_give_minus_one(settings_: tuple[float, ...]) -> None:
    vocab = SPLIT + 3
    logits = torch.zeros(5, vocab)
    logits[0, vocab - 1] = math.nan
    logits[1] = -math.inf
    logits[2, 0], logits[2, 1] = math.inf, math.nan
    logits[3, SPLIT] = math.inf
    logits[4] = -math.inf
    logits[4, SPLIT + 1] = -5.0
    assert rows_of(logits, *settings_).draw().tolist() == [-1, -1, -1, -1, SPLIT + 1]


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_extreme_temperatures(implementation: str) -> None:
    def draw(batch: Rows) -> list[int]:
        with ops.use(implementation):
            return ops.sample(*(t.to(DEVICE) for t in batch)).tolist()

    logits = torch.tensor([[1.0, 3.0, 2.0, -math.inf], [-9.0, -7.0, -8.0, -math.inf]]).repeat(4, 1)
    for filters in ({}, {"top_k": 2, "top_p": 0.99}):
        # The smaller ones take scaled logits out of float32 on both sides: what remains is the argmax.
        for temperature in (1e-30, 1e-38, 1e-45):
            assert draw(rows_of(logits, temperature, **filters)) == [1, 1] * 4
    for temperature in (1e30, math.inf):
        assert set(draw(rows_of(logits, temperature))) == {0, 1, 2}
        assert set(draw(rows_of(logits, temperature, 0, 0.5))) == {1, 2}
    assert draw(rows_of(logits[:1], math.nan)) == [-1]


def test_is_captured_where_it_runs_as_a_kernel() -> None:
    with ops.use("triton"):
        assert ops.capturable("sample", "cuda")
    with ops.use("reference"):
        assert not ops.capturable("sample", "cuda")


def test_refuses_what_it_cannot_read() -> None:
    from atts_triton import sample

    batch = rows_of(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="fp32, fp16 or bf16"):
        sample(*batch._replace(logits=batch.logits.double()))
    with pytest.raises(ValueError, match="one token or more"):
        sample(*batch._replace(logits=batch.logits[:, :0]))
    assert sample(*batch.at(slice(0, 0))).shape == (0,)


@pytest.mark.gpu
def test_a_graph_draws_with_the_parameters_of_each_replay() -> None:
    batch = Rows(*(t.to(DEVICE) for t in mixed(24, 5003, torch.bfloat16, seed=11)))
    held = Rows(*(torch.zeros_like(t) for t in batch))
    held.temperature.fill_(1.0)
    with ops.use("triton"):
        ops.sample(*held)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            drawn = ops.sample(*held)
        for t, fresh in zip(held, batch):
            t.copy_(fresh)
        graph.replay()
        assert torch.equal(drawn, ops.sample(*batch))
