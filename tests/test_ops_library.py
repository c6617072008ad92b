"""The ops as torch.ops.atts.*: schemas, fakes and mutation as torch's own checker sees them; the choice of
implementation."""

from __future__ import annotations

import pytest
import torch

from atts_engine import ops
from atts_engine.errors import InputError


def _samples() -> dict[str, tuple[object, ...]]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5, 16, generator=g)
    q, kv_layer = torch.randn(5, 4, 8, generator=g), torch.randn(2, 6, 4, 2, 8, generator=g)
    angle, index = torch.randn(5, 4, generator=g), torch.arange(5)
    table, cu_q, kv_len = torch.arange(6).view(2, 3).int(), torch.tensor([0, 2, 5]).int(), torch.tensor([9, 3]).int()
    rows = torch.full((5,), 0.5)
    store = (torch.zeros(3, 4), torch.zeros(3).long(), torch.zeros(3).long())
    return {
        "linear": (x, torch.randn(7, 16, generator=g)),
        "rms_norm": (x, torch.ones(16), 1e-5),
        "add_rms_norm": (x, x.clone(), torch.ones(16), 1e-5),
        "silu_mul": (x, x.clone()),
        "rope": (q, angle.cos(), angle.sin()),
        "kv_append": (q[:, :2].contiguous(), q[:, 2:].contiguous(), kv_layer, index),
        "kv_copy_pages": (kv_layer[None].contiguous(), index[:2], index[3:]),
        "kv_swap": (kv_layer[None].contiguous(), torch.zeros(4, 1, 2, 4, 2, 8), index[:3], index[1:4], True),
        "paged_attention": (q, kv_layer, table, cu_q, kv_len, 0.3),
        "score_tokens": (x, torch.randn(40, 16, generator=g), index),
        "score_logits": (x, index),
        "span_mean": (rows, torch.tensor([0, 2, 5])),
        "gate": (rows, index % 3, *store, index + 1, index + 1, index > 0),
        "score_gate": (
            x,
            torch.randn(40, 16, generator=g),
            index,
            torch.tensor([0, 2, 5]),
            index[:2],
            *(t.clone() for t in store),
            index[:2] + 1,
            index[:2] + 1,
            index[:2] > 0,
        ),  # fmt: skip
        "sample": (x, rows, index, rows, rows, index, index),
    }


@pytest.mark.parametrize("name", ops.available())
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.atts, name).default, _samples()[name])


def test_an_implementation_that_cannot_be_had_is_an_error() -> None:
    assert ops.chosen("gate", "cpu") == "reference"
    with pytest.raises(InputError, match="'reference', 'triton' or 'native-bf16'"):
        ops.use("cuda")
    with pytest.raises(InputError, match="no op is named"):
        ops.chosen("softmax", "cpu")
    with ops.use("reference"):
        assert ops.chosen("gate", "cuda") == "reference"
    assert set(ops.available()) == set(_samples())


def test_triton_without_a_device_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atts_engine.ops.dispatch._triton_devices", frozenset)
    with pytest.raises(InputError, match="need a CUDA device"):
        ops.use("triton")
