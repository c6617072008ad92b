"""Weights in twelve bits each: the way there and back, and products with the bits of those of the plain weights."""

from __future__ import annotations

import ctypes
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atts_engine import AsyncEngine, ops
from atts_engine.errors import InputError
from atts_engine.models import Decoder, load_model, resolve
from atts_engine.models.safetensors_folder import SafetensorsSource
from atts_engine.models.weights import load_decoder
from atts_engine.ops import native
from tests.abi import STATUS, params
from tests.test_engine import CONFIG, PARAMS, content, frozen_calibrator, problems, with_engine
from tests.test_forward_pass import BATCHES, LLAMA, one_by_one, random_batch, random_decoder
from tests.test_models_oracle import CASES, save

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


def packed_of(weight: torch.Tensor) -> ops.PackedWeight:
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
    assert np.array_equal(bits_of(ops.unpack_weight(packed)), bits)
    found = [len(np.unique(b >> 7 & 255)) for r in np.split(bits, rows // 32) for b in np.split(r, columns // 64, 1)]
    entries = -(-len(found) * ENTRY_BYTES // 64) * 64
    assert packed.nbytes == HEADER_BYTES + entries + sum(RAW_BYTES if n > 16 else BLOCK_BYTES for n in found)


def test_every_value_comes_back() -> None:
    """NaN, infinities, subnormal numbers and both zeros among them; in blocks that pack and in blocks that do not."""
    every = np.arange(1 << 16)
    by_exponent = every[np.argsort(every >> 7 & 255, kind="stable")].reshape(-1, 64)
    for bits in (by_exponent, every.reshape(-1, 64), every.reshape(32, -1)):
        packed = packed_of(weight_of(bits))
        assert np.array_equal(bits_of(ops.unpack_weight(packed)), bits)


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.usefixtures("native_ops")
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
                found = ops.linear(x[:rows], packed, bias)
                assert np.array_equal(bits_of(found), bits_of(whole[:rows])), (width, rows)
            ids = torch.arange(70) % columns
            scores = native.score_tokens(x, weight, ids)
            assert torch.equal(native.score_tokens(x, packed, ids).nan_to_num(1.0), scores.nan_to_num(1.0))
    finally:
        native.use_isa(None)


@pytest.mark.usefixtures("native_ops")
@pytest.mark.parametrize("batch", BATCHES)
def test_a_decoder_has_the_bits_of_one_with_plain_weights(batch: str) -> None:
    plain = random_decoder(FITTING)
    weights = plain.weights.packed()
    assert weights.lm_head_packed is not None
    assert all(isinstance(matrix, ops.PackedWeight) for layer in weights.layers for matrix in layer.matrices)
    inputs, kv = random_batch(FITTING, *BATCHES[batch])
    other = kv.clone()
    hidden = plain.forward(inputs, kv)
    decoder = Decoder(FITTING, weights)
    assert torch.equal(decoder.forward(inputs, other), hidden)
    assert torch.equal(other.view(torch.int16), kv.view(torch.int16))
    assert torch.equal(decoder.logits(hidden), plain.logits(hidden))
    by_ops = kv.clone()
    assert torch.equal(one_by_one(decoder, inputs, by_ops), hidden)
    assert torch.equal(by_ops.view(torch.int16), kv.view(torch.int16))


def test_packed_weights_run_where_csrc_does_not() -> None:
    """By the reference, which unpacks them: forced after the model was loaded, say."""
    plain = random_decoder(FITTING)
    inputs, kv = random_batch(FITTING, *BATCHES["mixed"])
    other = kv.clone()
    decoder = Decoder(FITTING, plain.weights.packed())
    with ops.use("reference"):
        hidden = plain.forward(inputs, kv)
        assert torch.equal(decoder.forward(inputs, other), hidden)
        assert torch.equal(decoder.logits(hidden), plain.logits(hidden))


@pytest.mark.usefixtures("native_ops")
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
        ops.unpack_weight(replace(packed, rows=32, columns=128))
    with ops.use("native"), pytest.raises(InputError, match="packed weights"):
        ops.linear(torch.zeros(1, 64, dtype=BF16), replace(packed, rows=32))
    with pytest.raises(InputError, match=r"weight does not fit: it must be \[any, 32\] .* not \[64, 64\]"):
        ops.linear(torch.zeros(1, 32, dtype=BF16), packed)


def matrices(decoder: Decoder) -> list[ops.Weight]:
    return [matrix for layer in decoder.weights.layers for matrix in layer.matrices]


@pytest.mark.parametrize("name", ["tiny-draft", "tiny-target"])
def test_a_model_is_packed_by_itself_where_that_helps(name: str) -> None:
    helps = ops.packing_obstacle("cpu", BF16) is None
    for packed, expected in ((None, helps), (False, False)):
        found = matrices(load_model(name, "cpu", BF16, packed=packed).decoder)
        assert {isinstance(matrix, ops.PackedWeight) for matrix in found} == {expected}
    assert not any(isinstance(m, ops.PackedWeight) for m in matrices(load_model(name).decoder))
    with ops.use("reference"):
        assert not any(isinstance(m, ops.PackedWeight) for m in matrices(load_model(name, "cpu", BF16).decoder))


def test_packed_weights_that_cannot_be_had_are_refused(tmp_path: Path) -> None:
    def refusal(name: str, dtype: torch.dtype = BF16) -> str:
        with pytest.raises(InputError) as error:
            load_model(name, "cpu", dtype, packed=True)
        return str(error.value)

    assert "for bfloat16 on the CPU, not for float32 on cpu" in refusal("tiny-draft", torch.float32)
    native.use_isa("plain")
    try:
        assert "csrc/ runs plain kernels here" in refusal("tiny-draft")
    finally:
        native.use_isa(None)
    if native.isa() == native.ISAS[0]:
        with ops.use("reference"):
            assert "linear runs reference here" in refusal("tiny-draft")
    assert "not for bfloat16 on cuda" in str(ops.packing_obstacle("cuda", BF16))
    if ops.packing_obstacle("cpu", BF16) is None:
        save(CASES["llama"], tmp_path)
        assert "has no matrix that packs" in refusal(str(tmp_path))
        assert load_model(str(tmp_path), "cpu", BF16).decoder.weights.lm_head_packed is None


def test_a_packed_model_holds_one_plain_matrix_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """And none in the end but embedding and LM head. `export` and the like get the plain ones back."""
    source, place = SafetensorsSource(resolve("tiny-target")), torch.device("cpu")
    config = load_model("tiny-target").config
    plain = load_decoder(config, source, place, BF16)
    seen: list[weakref.ref[torch.Tensor]] = []
    pack = ops.pack_weight

    def watched(weight: torch.Tensor) -> ops.PackedWeight | None:
        assert all(former() is None for former in seen)
        seen.append(weakref.ref(weight))
        return pack(weight)

    monkeypatch.setattr(ops, "pack_weight", watched)
    packed = load_decoder(config, source, place, BF16, packed=True)
    assert len(seen) == 4 * config.num_layers + 1
    assert [former() for former in seen[:-1]] == [None] * (len(seen) - 1) and seen[-1]() is packed.lm_head
    assert sum(m.nbytes for m in matrices(packed)) < 0.8 * sum(m.nbytes for m in matrices(plain))
    for matrix, other in zip(matrices(packed), matrices(plain), strict=True):
        assert torch.equal(ops.unpack_weight(matrix), ops.unpack_weight(other))


def test_an_engine_writes_the_same_chains_packed_and_plain() -> None:
    """Both lanes have one model, which is packed once."""
    config = replace(CONFIG, dtype="bfloat16", target=CONFIG.draft)

    def solved(packed: bool | None) -> tuple[object, bool]:
        async def work(engine: AsyncEngine) -> tuple[object, bool]:
            weights = [model.decoder.weights for model in (engine.draft_model, engine.target_model)]
            assert weights[0] is weights[1]
            params = replace(PARAMS, chains=2, turns=3)
            solution = await engine.solve(problems(1)[0], params, calibrator=frozen_calibrator())
            chains = [content(chain) for chain in solution.chains]
            return chains, isinstance(weights[0].layers[0].qkv, ops.PackedWeight)

        found: tuple[object, bool] = with_engine(work, replace(config, packed_weights=packed))
        return found

    plain, was_packed = solved(False)
    assert not was_packed
    assert solved(None) == (plain, ops.packing_obstacle("cpu", BF16) is None)


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
