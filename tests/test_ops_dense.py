"""Dense ops against float64, and the promise that a row's bits are its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from atts_engine import ops
from atts_engine.errors import InputError


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_linear_is_the_product() -> None:
    x, weight, bias = _random(37, 48), _random(20, 48, seed=1), _random(20, seed=2)
    wanted = x.double() @ weight.double().T + bias.double()
    torch.testing.assert_close(ops.linear(x, weight, bias).double(), wanted, atol=1e-5, rtol=0)
    with pytest.raises(InputError, match="does not fit"):
        ops.linear(x, weight[:, :-1])
    with pytest.raises(InputError, match="does not fit"):
        ops.linear(x, weight.half())


def test_rms_norm_against_float64() -> None:
    x, weight = _random(9, 96) * 3, _random(96, seed=1)
    wide = x.double()
    wanted = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-5).double(), wanted, atol=1e-5, rtol=0)
    assert ops.rms_norm(x.half(), weight.half(), 1e-5).dtype == torch.float16


def test_silu_mul_against_float64() -> None:
    gate, up = _random(9, 50) * 20, _random(9, 50, seed=1)
    gate[0, 0], gate[0, 1] = 200.0, -200.0  # exp overflows here; the result must not
    wanted = torch.nn.functional.silu(gate.double()) * up.double()
    torch.testing.assert_close(ops.silu_mul(gate, up).double(), wanted, atol=1e-4, rtol=1e-6)


def test_rope_rotates_pairs_of_halves() -> None:
    x, angle = _random(5, 3, 16), _random(5, 8, seed=1)
    pairs = torch.complex(x[..., :8].double(), x[..., 8:].double())
    turned = pairs * torch.exp(1j * angle.double()[:, None])
    wanted = torch.cat((turned.real, turned.imag), -1)
    torch.testing.assert_close(ops.rope(x, angle.cos(), angle.sin()).double(), wanted, atol=1e-6, rtol=0)


def _rowwise_ops() -> dict[str, tuple[Callable[[Tensor], Tensor], int]]:
    square, tall, head = _random(384, 128, seed=1), _random(128, 384, seed=2), _random(1003, 48, seed=3)
    ids = torch.randint(0, 1003, (1000,), generator=torch.Generator().manual_seed(4))
    return {
        "linear up": (lambda x: ops.linear(x, square), 128),
        "linear down": (lambda x: ops.linear(x, tall, tall[:, 0].contiguous()), 384),
        "rms_norm": (lambda x: ops.rms_norm(x, square[0], 1e-5), 128),
        "silu_mul": (lambda x: ops.silu_mul(x, x), 100),
        "silu_mul strided": (lambda x: ops.silu_mul(x[:, :50], x[:, 50:]), 100),
        "rope": (lambda x: ops.rope(x.view(-1, 2, 50), x[:, :25], x[:, 25:50]), 100),
        "score_tokens": (lambda x: ops.score_tokens(x, head, ids[: x.shape[0]] * 0 + 7), 48),
        "score_logits": (lambda x: ops.score_logits(x, ids[: x.shape[0]] * 0 + 7), 99),
    }


@pytest.mark.parametrize("name", _rowwise_ops())
def test_a_row_has_the_same_bits_in_any_company(name: str, threads: int) -> None:
    function, width = _rowwise_ops()[name]
    x = _random(700, width, seed=5)
    whole = function(x)
    for rows in (1, 3, 7, 11, 17, 150):
        for start in (0, 97):
            part = slice(start, start + rows)
            assert torch.equal(function(x[part].contiguous()), whole[part]), (rows, start)


@given(st.permutations(range(23)), st.integers(1, 23))
def test_linear_does_not_see_the_order_of_rows(order: list[int], rows: int) -> None:
    x, weight = _random(23, 64), _random(48, 64, seed=1)
    picked = torch.tensor(order[:rows])
    assert torch.equal(ops.linear(x[picked], weight), ops.linear(x, weight)[picked])
