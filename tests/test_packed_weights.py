"""Weights in twelve bits each: the way there and back, and products with the bits of those of the plain weights."""

from __future__ import annotations

import ctypes
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atts_engine import ops
from atts_engine.errors import InputError
from atts_engine.models import Decoder, load_model
from atts_engine.ops import native
from tests.abi import STATUS, params
from tests.test_forward_pass import BATCHES, LLAMA, random_batch, random_decoder

pytestmark = pytest.mark.skipif(
    native.library() is None, reason="csrc/ was not built at installation: CMake and a C++ compiler are needed"
)
BF16 = torch.bfloat16
FITTING = replace(LLAMA, vocab_size=96, hidden_size=64, num_heads=4, head_dim=32, intermediate_size=128)
BLOCK_BYTES, RAW_BYTES, ENTRY_BYTES, HEADER_BYTES = 3072, 4096, 32, 64


def weight_of(bits: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(bits.astype(np.uint16).view(np.int16)).view(BF16)


def bits_of(weight: torch.Tensor) -> np.ndarray:
    return weight.view(torch.int16).numpy().view(np.uint16)


def packed_of(weight: torch.Tensor) -> torch.Tensor:
    packed = ops.pack_weight(weight)
    assert packed is not None
    return packed


def mixed_weight(rows: int, columns: int) -> torch.Tensor:
    """Ordinary weights, and blocks that are kept as they are: in the second columns of blocks, where there are two."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * 0.02
    weight[:, 64:128] *= torch.logspace(-20, 2, 64)[: max(0, min(64, columns - 64))]
    return weight.to(BF16)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.sampled_from([32, 96]),
    columns=st.sampled_from([64, 192]),
    exponents=st.lists(st.integers(0, 255), min_size=1, max_size=20, unique=True),
    seed=st.integers(0, 2**32 - 1),
)
def test_round_trip_is_exact_and_as_long_as_the_format_says(
    rows: int, columns: int, exponents: list[int], seed: int
) -> None:
    g = np.random.default_rng(seed)
    bits = g.choice(exponents, (rows, columns)) << 7 | g.integers(0, 2, (rows, columns)) << 15
    bits |= g.integers(0, 128, (rows, columns))
    packed = packed_of(weight_of(bits))
    assert np.array_equal(bits_of(ops.unpack_weight(packed, rows, columns)), bits)
    found = [len(np.unique(b >> 7 & 255)) for r in np.split(bits, rows // 32) for b in np.split(r, columns // 64, 1)]
    entries = -(-len(found) * ENTRY_BYTES // 64) * 64
    assert len(packed) == HEADER_BYTES + entries + sum(RAW_BYTES if n > 16 else BLOCK_BYTES for n in found)


def test_every_value_comes_back() -> None:
    """NaN, infinities, subnormal numbers and both zeros among them; in blocks that pack and in blocks that do not."""
    every = np.arange(1 << 16)
    by_exponent = every[np.argsort(every >> 7 & 255, kind="stable")].reshape(-1, 64)
    for bits in (by_exponent, every.reshape(-1, 64), every.reshape(32, -1)):
        packed = packed_of(weight_of(bits))
        assert np.array_equal(bits_of(ops.unpack_weight(packed, *bits.shape)), bits)


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.usefixtures("native_bf16")
def test_products_have_the_bits_of_those_of_the_plain_weight(isa: str) -> None:
    try:
        native.use_isa(isa)
    except InputError:
        pytest.skip(f"this processor has no {isa}")
    try:
        for width, columns in ((64, 32), (192, 160), (1600, 96)):
            weight = mixed_weight(columns, width)
            packed = packed_of(weight)
            x = torch.randn(70, width, generator=torch.Generator().manual_seed(1)).to(BF16)
            x[5, 3], x[6, 4], x[7] = float("nan"), float("inf"), -0.0
            bias = torch.randn(columns).to(BF16)
            whole = ops.linear(x, weight, bias)
            for rows in (*range(1, 15), 24, 25, 70):
                found = ops.linear(x[:rows], weight, bias, packed=packed)
                assert np.array_equal(bits_of(found), bits_of(whole[:rows])), (width, rows)
            ids = torch.arange(70) % columns
            scores = native.score_tokens(x, weight, ids)
            assert torch.equal(native.score_tokens(x, weight, ids, packed).nan_to_num(1.0), scores.nan_to_num(1.0))
    finally:
        native.use_isa(None)


@pytest.mark.usefixtures("native_bf16")
@pytest.mark.parametrize("batch", BATCHES)
def test_a_decoder_has_the_bits_of_one_with_plain_weights(batch: str) -> None:
    plain = random_decoder(FITTING)
    weights = plain.weights.packed()
    assert weights.lm_head_packed is not None
    assert all(getattr(layer, f.name) is not None for layer in weights.layers for f in fields(layer)
               if f.name.endswith("_packed"))  # fmt: skip
    inputs, kv = random_batch(FITTING, *BATCHES[batch])
    other = kv.clone()
    hidden = plain.forward(inputs, kv)
    decoder = Decoder(FITTING, weights)
    assert torch.equal(decoder.forward(inputs, other), hidden)
    assert torch.equal(other.view(torch.int16), kv.view(torch.int16))
    assert torch.equal(decoder.logits(hidden), plain.logits(hidden))


@pytest.mark.usefixtures("native_bf16")
def test_matrices_that_do_not_fit_stay_as_they_are() -> None:
    assert ops.pack_weight(torch.zeros(31, 64, dtype=BF16)) is None
    assert ops.pack_weight(torch.zeros(32, 72, dtype=BF16)) is None
    plain = random_decoder(LLAMA)
    assert plain.weights.packed().lm_head_packed is None
    inputs, kv = random_batch(LLAMA, *BATCHES["mixed"])
    other = kv.clone()
    assert torch.equal(Decoder(LLAMA, plain.weights.packed()).forward(inputs, other), plain.forward(inputs, kv))


def test_what_is_refused() -> None:
    with pytest.raises(InputError, match="weight does not fit"):
        ops.pack_weight(torch.zeros(32, 64))
    packed = packed_of(torch.zeros(64, 64, dtype=BF16))
    with pytest.raises(InputError, match="packed weights"):
        ops.unpack_weight(packed, 32, 128)
    with ops.use("native-bf16"), pytest.raises(InputError, match="packed weights"):
        ops.linear(torch.zeros(1, 64, dtype=BF16), torch.zeros(32, 64, dtype=BF16), packed=packed)
    with pytest.raises(InputError, match="load the model without them"):
        load_model("tiny-draft", "cpu", torch.float32, packed=True)


def test_codes_of_the_c_functions() -> None:
    library = native.library()
    assert library is not None
    weight, room = torch.zeros(32, 64, dtype=BF16), torch.empty(8192, dtype=torch.uint8)

    def code(op: str, **changed: object) -> str:
        given = {"weight": weight, "packed": room, "out_features": 32, "in_features": 64, "threads": 1, **changed}
        made = params(op, **given)  # type: ignore[arg-type]
        kind = native._PackWeight if op == "pack_weight" else native._UnpackWeight
        status = getattr(library, f"atts_{op}_cpu")(ctypes.byref(kind.from_buffer(made)))
        return next(name for name, value in STATUS.items() if value == status)

    size = HEADER_BYTES + 64 + BLOCK_BYTES
    assert code("pack_weight", packed_bytes=size - 1) == "ERROR_WORKSPACE"
    assert code("pack_weight", packed_bytes=size) == code("unpack_weight") == "OK"
    assert code("unpack_weight", out_features=64) == code("unpack_weight", packed=weight) == "ERROR_PACKED"
    for op in ("pack_weight", "unpack_weight"):
        for field, value in (("out_features", 48), ("in_features", 32), ("out_features", 0), ("threads", 0)):
            assert code(op, packed_bytes=size, **{field: value}) == "ERROR_SHAPE"
        assert code(op, packed_bytes=size, weight=None) == code(op, packed_bytes=size, packed=None)
        assert code(op, packed_bytes=size, packed=None) == "ERROR_NULL_POINTER"
        assert code(op, packed_bytes=size, packed=room[8:]) == "ERROR_ALIGNMENT"
