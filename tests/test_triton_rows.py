"""Norms, SwiGLU's product and rotary embedding in Triton, against float64 and the references."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atts_engine import ops
from atts_engine.errors import InputError
from atts_engine.models import load_model
from tests.models_oracle import paged_logits

atts_triton = pytest.importorskip("atts_triton", reason="triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = st.sampled_from((torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])))


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype).to(DEVICE)


def strided(x: Tensor, gap: int) -> Tensor:
    """x in memory that has `gap` elements of NaN behind each row of its last dimension."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + gap), float("nan"), dtype=x.dtype, device=x.device)
    view = wide[..., : x.shape[-1]]
    view.copy_(x)
    return view


def assert_as_exact(ours: Tensor, reference: Tensor, oracle: Tensor, factor: float = 2.0, tiny: float = 1e-6) -> None:
    """No element further from the float64 oracle than `factor` times the reference is, but for roundings."""
    assert ours.shape == reference.shape and ours.dtype == reference.dtype
    bound = factor * (reference.double() - oracle).abs()
    # Where the reference happens to be exact: one rounding of the result, and the last bits of a GPU's rsqrt, exp and
    # quotient in fp32.
    rounding = max(torch.finfo(ours.dtype).eps, 4 * torch.finfo(torch.float32).eps)
    bound = bound + rounding * oracle.abs() + tiny
    assert bool(((ours.double() - oracle).abs() <= bound).all())


def norm_oracle(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@settings(max_examples=50)
@given(
    rows=st.integers(0, 9),
    heads=st.integers(0, 5),
    width=st.sampled_from((1, 3, 16, 61, 64, 128, 500, 1025, 2048)),
    gap=st.sampled_from((0, 3, 16)),
    dtype=DTYPES,
    scale=st.sampled_from((1e-3, 1.0, 30.0)),
)
def test_rms_norm(rows: int, heads: int, width: int, gap: int, dtype: torch.dtype, scale: float) -> None:
    """Heads 0 stands for x[N, H]."""
    shape = (rows, heads, width) if heads else (rows, width)
    x, weight = strided(random(*shape, dtype=dtype, scale=scale), gap), random(width, dtype=dtype, seed=1)
    with ops.use("triton"):
        ours = ops.rms_norm(x, weight, 1e-5)
    with ops.use("reference"):
        assert_as_exact(ours, ops.rms_norm(x, weight, 1e-5), norm_oracle(x, weight, 1e-5))
    assert ours.is_contiguous()


@settings(max_examples=50)
@given(
    rows=st.integers(0, 9),
    width=st.sampled_from((1, 3, 61, 576, 1025, 4096)),
    gaps=st.tuples(st.sampled_from((0, 3, 16)), st.sampled_from((0, 16))),
    dtype=DTYPES,
)
def test_add_rms_norm(rows: int, width: int, gaps: tuple[int, int], dtype: torch.dtype) -> None:
    x = strided(random(rows, width, dtype=dtype), gaps[0])
    delta = strided(random(rows, width, dtype=dtype, seed=1, scale=3), gaps[1])
    weight = random(width, dtype=dtype, seed=2)
    with ops.use("triton"):
        total, normed = ops.add_rms_norm(x, delta, weight, 1e-6)
        alone = ops.rms_norm(total, weight, 1e-6)
    assert torch.equal(total, x + delta)
    assert torch.equal(normed, alone)
    with ops.use("reference"):
        assert_as_exact(normed, ops.rms_norm(total, weight, 1e-6), norm_oracle(total, weight, 1e-6))


def test_a_norm_is_rounded_where_the_reference_rounds() -> None:
    """Before the weight and after it; one rounding less would change every third element. Sums in another order may
    still move a few."""
    x, weight = random(40, 576, dtype=torch.float16), random(576, dtype=torch.float16, seed=1)
    with ops.use("triton"):
        ours = ops.rms_norm(x, weight, 1e-5)
    with ops.use("reference"):
        assert (ours != ops.rms_norm(x, weight, 1e-5)).float().mean() < 0.01


@pytest.mark.parametrize("width", [16384, 16385, 40000])
def test_wide_rows(width: int) -> None:
    """The widest that stay in registers, and such as are read twice."""
    x, delta, weight = random(2, width), random(2, width, seed=1), random(width, seed=2)
    with ops.use("triton"):
        total, normed = ops.add_rms_norm(x, delta, weight, 1e-5)
    assert torch.equal(total, x + delta)
    with ops.use("reference"):
        assert_as_exact(normed, ops.rms_norm(total, weight, 1e-5), norm_oracle(total, weight, 1e-5))


@settings(max_examples=50)
@given(
    rows=st.integers(0, 7),
    width=st.sampled_from((1, 5, 61, 128, 1024, 1500)),
    halves=st.booleans(),
    dtype=DTYPES,
    scale=st.sampled_from((0.1, 1.0, 20.0)),
)
def test_silu_mul(rows: int, width: int, halves: bool, dtype: torch.dtype, scale: float) -> None:
    both = random(rows, 2 * width, dtype=dtype, scale=scale)
    gate, up = both.chunk(2, dim=-1)
    if not halves:
        gate, up = gate.contiguous(), strided(up, 1)
    with ops.use("triton"):
        ours = ops.silu_mul(gate, up)
    oracle = gate.double() * torch.sigmoid(gate.double()) * up.double()
    with ops.use("reference"):
        assert_as_exact(ours, ops.silu_mul(gate, up), oracle)
    assert ours.is_contiguous()


def test_silu_mul_far_out() -> None:
    gate = torch.tensor([[-300.0, -88.0, 0.0, 88.0, 300.0, float("nan"), float("inf")]], device=DEVICE)
    with ops.use("triton"):
        found = ops.silu_mul(gate, torch.ones_like(gate))
    assert found[0, :2].abs().max() < 1e-30
    assert torch.equal(found[0, 2:5], gate[0, 2:5])
    assert bool(found[0, 5].isnan()) and bool(found[0, 6].isinf())


@settings(max_examples=50)
@given(
    tokens=st.integers(0, 6),
    heads=st.integers(1, 5),
    half=st.sampled_from((1, 3, 8, 15, 32, 64)),
    gap=st.sampled_from((0, 2, 16)),
    dtype=DTYPES,
)
def test_rope_has_the_bits_of_the_reference(tokens: int, heads: int, half: int, gap: int, dtype: torch.dtype) -> None:
    x = strided(random(tokens, heads + 2, 2 * half, dtype=dtype), gap)[:, 1 : heads + 1]
    angle = random(tokens, half, seed=1, scale=9)
    cos, sin = strided(angle.cos(), gap), strided(angle.sin(), 0)
    with ops.use("reference"):
        wanted = ops.rope(x, cos, sin)
    with ops.use("triton"):
        found = ops.rope(x, cos, sin)
    assert found.dtype == dtype and found.is_contiguous()
    assert torch.equal(found, wanted)


def _cases() -> dict[str, Any]:
    square = random(3, 300, seed=1)
    angle = random(9, 30, seed=2)
    return {
        "rms_norm": (lambda x: (ops.rms_norm(x, square[0], 1e-5),), (300,)),
        "rms_norm of heads": (lambda x: (ops.rms_norm(x, square[0, :60], 1e-5),), (5, 60)),
        "add_rms_norm": (lambda x: ops.add_rms_norm(x, x * 3, square[0], 1e-5), (300,)),
        "silu_mul": (lambda x: (ops.silu_mul(*x.chunk(2, -1)),), (600,)),
        "rope": (lambda x: (ops.rope(x, *(angle[: len(x)] * 0 + 0.6).split(30, -1) * 2),), (5, 60)),
    }


@pytest.mark.parametrize("name", _cases())
def test_a_row_has_the_same_bits_in_any_company(name: str) -> None:
    function, shape = _cases()[name]
    x = random(9, *shape, seed=5)
    x[4] = float("nan")
    with ops.use("triton"):
        whole = function(x)
        for part in (slice(0, 1), slice(2, 4), slice(3, 9), slice(8, 9)):
            for mine, theirs in zip(function(x[part]), whole, strict=True):
                torch.testing.assert_close(mine, theirs[part], rtol=0, atol=0, equal_nan=True)
    for out in whole:
        # NaN stays in its row and fills it.
        assert out.isnan().flatten(1).all(1).tolist() == [i == 4 for i in range(9)]


def test_a_decoder_in_triton_gives_the_logits_of_the_references() -> None:
    decoder = load_model("tiny-draft", DEVICE).decoder
    texts = [[5, 7, 11, 2, 9, 4], [3, 1]]
    with torch.inference_mode():
        with ops.use("reference"):
            wanted = paged_logits(decoder, texts, page=4, chunks=Random(1))
        with ops.use("triton"):
            found = paged_logits(decoder, texts, page=4, chunks=Random(1))
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)


def test_what_does_not_fit_is_named() -> None:
    x, angle = random(3, 2, 8), random(3, 4)
    with pytest.raises(InputError, match=r"rms_norm: .*weight"):
        ops.rms_norm(x, angle[0], 1e-5)
    with pytest.raises(InputError, match=r"rms_norm: .*float16"):
        ops.rms_norm(x, x[0, 0].half(), 1e-5)
    with pytest.raises(InputError, match=r"add_rms_norm: .*weight"):
        ops.add_rms_norm(x[0], x[1], angle[0], 1e-5)
    with pytest.raises(InputError, match="silu_mul: up"):
        ops.silu_mul(x[0], x[0, :1])
    with pytest.raises(InputError, match="rope: cos"):
        ops.rope(x, angle[:1], angle[:1])
    with pytest.raises(InputError, match="rope: x"):
        ops.rope(x[..., :7], angle[:, :3], angle[:, :3])
    for call in (
        lambda: atts_triton.rms_norm(x.double(), x[0, 0].double(), 1e-5),
        lambda: atts_triton.silu_mul(x[0], x[0].half()),
        lambda: atts_triton.rope(x, angle.half(), angle.half()),
    ):
        with pytest.raises(ValueError, match="takes one of fp32, fp16, bf16"):
            call()
