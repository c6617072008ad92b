"""The dense layer of csrc/ on the CPU."""

from __future__ import annotations

import pytest
import torch

from atts_engine import ops
from atts_engine.errors import InputError
from atts_engine.ops import native

needs_library = pytest.mark.skipif(
    native.library() is None, reason="csrc/ was not built at installation: CMake and a C++ compiler are needed"
)
SHAPES = [(1, 8, 1), (3, 5, 7), (16, 576, 64), (7, 577, 101), (70, 64, 33), (27, 1601, 300), (2, 1, 16), (13, 31, 17)]


ROUNDING = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
dtypes = pytest.mark.parametrize("dtype", native.DTYPES, ids=str)


def inputs(
    rows: int, width: int, columns: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(rows * 1000 + columns)
    shapes = ((rows, width), (columns, width), (columns,))
    x, weight, bias = (torch.randn(shape).to(dtype) for shape in shapes)
    return x, weight, bias


@needs_library
@pytest.mark.usefixtures("native_ops")
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@dtypes
def test_equals_float64(dtype: torch.dtype, shape: tuple[int, int, int], with_bias: bool) -> None:
    x, weight, bias = inputs(*shape, dtype)
    oracle = x.double() @ weight.double().T + (bias.double() if with_bias else 0.0)
    # Sums of K terms in fp32, then one rounding.
    terms = x.double().abs() @ weight.double().abs().T + bias.double().abs()
    bound = terms * shape[1] * 2.0**-24 + oracle.abs() * ROUNDING[dtype]
    found = ops.linear(x, weight, bias if with_bias else None)
    assert found.dtype == dtype
    assert bool(((found.double() - oracle).abs() <= bound).all())


@needs_library
@pytest.mark.usefixtures("native_ops")
@dtypes
def test_a_row_has_its_bits_whatever_company_it_keeps(dtype: torch.dtype) -> None:
    x, weight, _ = inputs(70, 576, 101, dtype)
    whole = ops.linear(x, weight)
    for rows in (1, 2, 3, 4, 5, 16, 17, 69):
        assert torch.equal(ops.linear(x[:rows], weight), whole[:rows])
        assert torch.equal(ops.linear(x[-rows:], weight), whole[-rows:])
    order = torch.randperm(70)
    assert torch.equal(ops.linear(x[order], weight), whole[order])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(ops.linear(x, weight), whole)
        torch.set_num_threads(2)
        assert torch.equal(ops.linear(x, weight), whole)
    finally:
        torch.set_num_threads(threads)


@needs_library
@pytest.mark.usefixtures("native_ops")
@dtypes
def test_strides_empty_batches_and_values_that_are_not_finite(dtype: torch.dtype) -> None:
    x, weight, bias = inputs(6, 64, 32, dtype)
    assert torch.equal(ops.linear(x[::2], weight, bias), ops.linear(x[::2].contiguous(), weight, bias))
    assert torch.equal(ops.linear(x, weight.T.contiguous().T), ops.linear(x, weight))
    assert ops.linear(x[:0], weight).shape == (0, 32)
    x[2, 3], x[4, 5] = float("nan"), float("inf")
    found = ops.linear(x, weight)
    assert bool(found[2].isnan().all()) and not bool(found[4].isfinite().any())
    assert torch.equal(found[[0, 1, 3, 5]], ops.linear(x[[0, 1, 3, 5]], weight))


@needs_library
def test_other_dtypes_run_the_reference_bit_for_bit() -> None:
    x, weight, bias = inputs(5, 64, 32, torch.float16)
    with ops.use("reference"):
        reference = ops.linear(x, weight, bias)
    with ops.use("native"):
        assert torch.equal(ops.linear(x, weight, bias), reference)


def test_without_the_library_it_cannot_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    ops.use(None)  # forgets what was decided before
    assert ops.available()["linear"] == ["reference"]
    assert ops.chosen("linear", "cpu") == "reference"
    with pytest.raises(InputError, match="CMake"):
        ops.use("native")


@needs_library
def test_an_instruction_set_that_is_not_there_is_refused() -> None:
    before = native.isa()
    assert before in native.ISAS
    with pytest.raises(InputError, match="for sse9 cannot run here"):
        native.use_isa("sse9")
    assert native.isa() == before
