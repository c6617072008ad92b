"""The ops as torch.ops.atts.*: schemas, fakes and mutation as torch's own checker sees them, under torch.compile and
with fake tensors; the choice of implementation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map, tree_map_only

from atts_engine import ops
from atts_engine.errors import InputError
from atts_engine.ops import native
from atts_engine.ops.dispatch import runs_native


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
        "kv_slots": (torch.tensor([7, 8, 0, 1, 2]), table, cu_q, 4),
        "rope_kv_append": (q, q[:, :2], q[:, 2:], angle.cos(), angle.sin(), kv_layer, index),
        "kv_gather": (kv_layer[None].contiguous(), index[:2]),
        "kv_scatter": (torch.randn(2, 1, 2, 4, 2, 8, generator=g), kv_layer[None].contiguous(), index[:2]),
        "kv_swap": (kv_layer[None].contiguous(), torch.zeros(4, 1, 2, 4, 2, 8), index[:3], index[1:4], True),
        "paged_attention": (q, kv_layer, table, cu_q, kv_len, 0.3),
        "score_tokens": (x, torch.randn(40, 16, generator=g), index),
        "score_logits": (x, index),
        "token_confidence": (x, 3),
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


FLOATS = (torch.float32, torch.float16, torch.bfloat16)
ALWAYS_FP32 = frozenset({"cos", "sin", "logprob", "min_p", "ring", "score", "temperature", "top_p"})
"""Arguments that keep their dtype whatever that of the others."""


def overload(op: str) -> Any:
    """The op as torch sees it."""
    return getattr(torch.ops.atts, op).default


def arguments(op: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Valid arguments of op by name, fresh at every call: some ops write to theirs."""
    schema = overload(op)._schema.arguments
    named = {declared.name: value for declared, value in zip(schema, _samples()[op], strict=False)}
    for name, value in named.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and name not in ALWAYS_FP32:
            named[name] = value.to(dtype)
    return named


def cases() -> list[tuple[str, torch.dtype]]:
    """Every op with every dtype that its floating inputs can have."""
    found = []
    for op in ops.available():
        floating = {n for n, v in arguments(op).items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
        found += [(op, dtype) for dtype in (FLOATS if floating - ALWAYS_FP32 else FLOATS[:1])]
    return found


@pytest.mark.parametrize(("op", "dtype"), cases())
def test_opcheck(op: str, dtype: torch.dtype) -> None:
    torch.library.opcheck(overload(op), tuple(arguments(op, dtype).values()))


@pytest.mark.parametrize(("op", "dtype"), cases())
def test_fake_tensors_have_the_shape_and_dtype_of_real_ones(op: str, dtype: torch.dtype) -> None:
    real = overload(op)(**arguments(op, dtype))
    mode = FakeTensorMode()
    with mode:
        fakes = tree_map_only(torch.Tensor, mode.from_tensor, arguments(op, dtype))
        fake = overload(op)(**fakes)

    def facts(x: object) -> object:
        return (x.shape, x.dtype, x.device, x.stride()) if isinstance(x, torch.Tensor) else x

    assert tree_map(facts, fake) == tree_map(facts, real)


def _layer(x: Tensor, w: Tensor, square: Tensor, cos: Tensor, sin: Tensor, kv: Tensor, paging: list[Tensor]) -> Tensor:
    """A decoder layer in small, from hidden states to log-probabilities."""
    atts = torch.ops.atts
    rows, (slots, table, cu_q, kv_len) = x.shape[0], paging
    normed = atts.rms_norm(x, w, 1e-5)
    q, k = (atts.rope(atts.linear(normed, square).view(rows, 2, 8), cos, sin) for _ in range(2))
    atts.kv_append(k, atts.linear(normed, square).view(rows, 2, 8), kv, slots)
    mixed = atts.linear(atts.paged_attention(q, kv, table, cu_q, kv_len, 0.3).view(rows, 16), square)
    x, normed = atts.add_rms_norm(x, mixed, w, 1e-5)
    logprob = atts.score_tokens(atts.silu_mul(normed, x), square, slots)
    return logprob + atts.score_logits(atts.linear(normed, square), slots)


@pytest.mark.parametrize("dtype", FLOATS)
def test_ops_chain_in_one_compiled_graph(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    x, w, square = (torch.randn(shape, generator=g).to(dtype) for shape in ((5, 16), (16,), (16, 16)))
    angle, slots = torch.randn(5, 4, generator=g), torch.tensor([0, 1, 12, 13, 14])
    paging = [slots, *(torch.tensor(t, dtype=torch.int32) for t in ([[0, 1], [3, 4]], [0, 2, 5], [2, 3]))]
    pools = [torch.zeros(2, 6, 4, 2, 8, dtype=dtype) for _ in range(2)]
    compiled = torch.compile(_layer, fullgraph=True, backend="aot_eager")
    eager = _layer(x, w, square, angle.cos(), angle.sin(), pools[0], paging)
    assert torch.equal(compiled(x, w, square, angle.cos(), angle.sin(), pools[1], paging), eager)
    assert torch.equal(pools[0], pools[1]) and pools[0].count_nonzero()


def test_an_implementation_that_cannot_be_had_is_an_error() -> None:
    assert ops.chosen("kv_slots", "cpu") == "reference"
    with pytest.raises(InputError, match="reference, triton, native, flashinfer, cuda, not 'cutlass'"):
        ops.use("cutlass")
    with pytest.raises(InputError, match="no op is named"):
        ops.chosen("softmax", "cpu")
    with ops.use("reference"):
        assert ops.chosen("gate", "cuda") == "reference"
    assert set(ops.available()) == set(_samples())


def test_what_was_decided_is_forgotten_when_another_is_forced() -> None:
    x = torch.zeros(2, 4, dtype=torch.bfloat16)
    before = ops.chosen("rms_norm", x.device)
    with ops.use("reference"):
        assert ops.chosen("rms_norm", x.device) == ops.chosen("rms_norm", "cpu") == "reference"
        assert not runs_native("rms_norm", x.device, x.dtype)
    assert ops.chosen("rms_norm", x.device) == before
    assert runs_native("rms_norm", x.device, torch.bfloat16) == (before == "native")
    assert runs_native("rms_norm", x.device, torch.float32) == (before == "native")
    assert not runs_native("rms_norm", x.device, torch.float16)


@pytest.mark.skipif(native.library() is None, reason="csrc/ was not built at installation")
def test_a_forced_kernel_is_not_replaced_where_it_cannot_run() -> None:
    with ops.use("native"), pytest.raises(InputError, match="rms_norm: native kernels run on the CPU, not on cud"):
        ops.chosen("rms_norm", "cuda")
    assert ops.obstacle("rms_norm", "native", "cuda").short == "CPU only"


def test_why_an_implementation_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(ops.obstacle(op, "reference", "cpu") is None for op in ops.available())
    assert ops.obstacle("linear", "triton", "cpu").short == "no kernel"
    assert "linear has no triton kernel" in ops.obstacle("linear", "triton", "cpu").sentence
    monkeypatch.setattr(native, "library", lambda: None)
    assert ops.obstacle("linear", "native", "cpu").short == "not built"
    monkeypatch.setattr("atts_engine.ops.dispatch._triton_devices", frozenset)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert ops.obstacle("gate", "triton", "cuda").short == "not installed"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert [ops.obstacle("gate", "triton", kind).short for kind in ("cpu", "cuda")] == ["GPU only", "no GPU"]


def test_triton_without_a_device_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atts_engine.ops.dispatch._triton_devices", frozenset)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InputError, match="need a CUDA device"):
        ops.use("triton")


def test_the_page_on_kernels_names_every_op_and_its_examples_run(root: Path) -> None:
    page = (root / "docs" / "kernels.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE)
    assert sorted(named) == sorted(ops.available())
    examples = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        exec(compile(example, "docs/kernels.md", "exec"), {})
