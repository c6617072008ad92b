"""A decoder's forward pass in one call of csrc/, against the ops one by one: equal to the bit."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from atts_engine import ops
from atts_engine.errors import InputError
from atts_engine.models import Decoder, ForwardBatch
from atts_engine.models.config import ModelConfig
from atts_engine.models.decoder import DecoderWeights, LayerWeights
from atts_engine.ops import native
from tests.abi import DTYPES, STATUS, params

needs_library = pytest.mark.skipif(
    native.library() is None, reason="csrc/ was not built at installation: CMake and a C++ compiler are needed"
)
BF16 = torch.bfloat16
PAGE = 4
LLAMA = ModelConfig(
    family="llama", vocab_size=61, hidden_size=48, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=16,
    intermediate_size=72, rms_norm_eps=1e-5, rope_theta=10000.0, rope_scaling=None, max_positions=128,
    tie_embeddings=False, eos_token_ids=(), qkv_bias=False, qk_norm=False,
)  # fmt: skip
CONFIGS = {
    "llama": LLAMA,
    "llama, tied, a KV head each": replace(LLAMA, tie_embeddings=True, num_heads=3, num_kv_heads=3, head_dim=32),
    "mistral, one KV head": replace(LLAMA, family="mistral", num_kv_heads=1, intermediate_size=37),
    "qwen2": replace(LLAMA, family="qwen2", qkv_bias=True, num_heads=14, hidden_size=101),
    "qwen3, tied": replace(LLAMA, family="qwen3", qk_norm=True, tie_embeddings=True, head_dim=48, num_layers=1),
}
BATCHES = {
    "decode": ([1] * 5, [1, 30, 7, 64, 12]),
    "one row": ([1], [9]),
    "prefill": ([33], [33]),
    "mixed": ([1, 37, 0, 2, 1, 20], [17, 37, 6, 50, 1, 61]),
    "many rows": ([90, 110, 1, 100], [100, 110, 8, 120]),
}
"""(rows, tokens in the cache afterwards) of each sequence."""


dtypes = pytest.mark.parametrize("dtype", native.DTYPES, ids=str)


def bits(x: torch.Tensor) -> torch.Tensor:
    """As integers: what holds NaN is compared too."""
    return x.view(torch.int16 if x.element_size() == 2 else torch.int32)


def random_decoder(c: ModelConfig, dtype: torch.dtype = BF16) -> Decoder:
    g = torch.Generator().manual_seed(c.num_heads)

    def random(*shape: int, about: float = 0.0) -> torch.Tensor:
        return (about + torch.randn(shape, generator=g) * (shape[-1] ** -0.5 if len(shape) == 2 else 0.3)).to(dtype)

    qkv = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    layers = tuple(
        LayerWeights(
            attn_norm=random(c.hidden_size, about=1.0),
            qkv=random(qkv, c.hidden_size) * 2,
            qkv_bias=random(qkv) if c.qkv_bias else None,
            q_norm=random(c.head_dim, about=1.0) if c.qk_norm else None,
            k_norm=random(c.head_dim, about=1.0) if c.qk_norm else None,
            out=random(c.hidden_size, c.num_heads * c.head_dim),
            mlp_norm=random(c.hidden_size, about=1.0),
            gate_up=random(2 * c.intermediate_size, c.hidden_size),
            down=random(c.hidden_size, c.intermediate_size),
        )
        for _ in range(c.num_layers)
    )
    embed = random(c.vocab_size, c.hidden_size) * 5
    head = embed if c.tie_embeddings else random(c.vocab_size, c.hidden_size)
    return Decoder(c, DecoderWeights(embed, layers, random(c.hidden_size, about=1.0), head))


def random_batch(
    c: ModelConfig, counts: list[int], lengths: list[int], dtype: torch.dtype = BF16
) -> tuple[ForwardBatch, torch.Tensor]:
    """A batch and a cache of random keys and values; pages in random order, and NaN in those that no sequence has."""
    g = torch.Generator().manual_seed(sum(lengths))
    needed = [-(-length // PAGE) for length in lengths]
    pages = sum(needed) + 2
    order = torch.randperm(pages, generator=g).int()
    kv = torch.randn(c.num_layers, 2, pages, PAGE, c.num_kv_heads, c.head_dim, generator=g).to(dtype)
    kv[:, :, order[-2:].long()] = float("nan")
    table = torch.nn.utils.rnn.pad_sequence(order[: sum(needed)].split(needed), batch_first=True)
    batch = ForwardBatch(
        ids=torch.randint(0, c.vocab_size, (sum(counts),), generator=g),
        positions=torch.cat([torch.arange(n - count, n) for count, n in zip(counts, lengths, strict=True)]),
        block_table=table,
        cu_q=torch.tensor([0, *counts]).cumsum(0).int(),
        kv_len=torch.tensor(lengths, dtype=torch.int32),
    )
    return batch, kv


def one_by_one(decoder: Decoder, batch: ForwardBatch, kv: torch.Tensor) -> torch.Tensor:
    """`Decoder.forward` by the ops, which is what runs while their inputs are looked into."""
    with ops.checked():
        return decoder.forward(batch, kv)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each call of csrc/'s forward pass."""
    rows: list[int] = []
    run = native.decoder

    def counted(params: native.DecoderParams) -> None:  # type: ignore[valid-type]
        rows.append(params.rows)  # type: ignore[attr-defined]
        run(params)

    monkeypatch.setattr(native, "decoder", counted)
    return rows


@needs_library
@pytest.mark.usefixtures("native_ops")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("config", CONFIGS)
@dtypes
def test_hidden_states_and_cache_are_those_of_the_ops(
    dtype: torch.dtype, config: str, threads: int, calls: list[int]
) -> None:
    decoder = random_decoder(CONFIGS[config], dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for counts, lengths in BATCHES.values():  # one decoder: what a pass leaves behind must not reach the next
            batch, kv = random_batch(decoder.config, counts, lengths, dtype)
            other = kv.clone()
            found, expected = decoder.forward(batch, kv), one_by_one(decoder, batch, other)
            assert expected.float().std() > 0.1
            assert torch.equal(found, expected)
            assert torch.equal(bits(kv), bits(other))
    finally:
        torch.set_num_threads(before)
    assert calls == [sum(counts) for counts, _ in BATCHES.values()]


@needs_library
@pytest.mark.usefixtures("native_ops")
def test_a_batch_without_rows_and_arrays_with_strides() -> None:
    decoder = random_decoder(LLAMA)
    batch, kv = random_batch(LLAMA, [0, 0], [3, 5])
    before = kv.clone()
    assert decoder.forward(batch, kv).shape == (0, LLAMA.hidden_size)
    assert torch.equal(bits(kv), bits(before))
    batch, kv = random_batch(LLAMA, *BATCHES["mixed"])
    wide = replace(
        batch,
        ids=torch.stack((batch.ids, batch.ids), 1)[:, 0],
        block_table=torch.cat((batch.block_table, batch.block_table), 1)[:, : batch.block_table.shape[1]],
    )
    assert torch.equal(decoder.forward(wide, kv.clone()), decoder.forward(batch, kv))


@needs_library
def test_it_stands_aside_for_what_was_asked_for(calls: list[int]) -> None:
    batch, kv = random_batch(LLAMA, *BATCHES["mixed"])
    odd = replace(LLAMA, head_dim=24)
    with ops.use("native"):
        random_decoder(LLAMA).forward(batch, kv)
        assert calls == [len(batch.ids)]
        one_by_one(random_decoder(LLAMA), batch, kv)
        random_decoder(odd).forward(*random_batch(odd, *BATCHES["mixed"]))
    with ops.use("reference"):
        random_decoder(LLAMA).forward(batch, kv)
    assert calls == [len(batch.ids)]


@needs_library
def test_products_that_are_left_to_torch_leave_the_rest_to_the_ops(
    calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "products_are_torchs", lambda dtype: True)
    with ops.use(None):  # forgets what was decided before
        random_decoder(LLAMA).forward(*random_batch(LLAMA, *BATCHES["decode"]))
    ops.use(None)
    assert calls == []


WRONG: dict[str, tuple[Callable[[ForwardBatch], ForwardBatch], str]] = {
    "an id": (lambda b: replace(b, ids=b.ids + 61), "token id"),
    "a negative id": (lambda b: replace(b, ids=b.ids - 61), "token id"),
    "a position": (lambda b: replace(b, positions=b.positions + 128), "slot or page"),
    "a page": (lambda b: replace(b, block_table=b.block_table + 1000), "do not describe one batch"),
    "bounds": (lambda b: replace(b, cu_q=b.cu_q + 1), "do not describe one batch"),
    "lengths": (lambda b: replace(b, kv_len=b.kv_len * 0), "do not describe one batch"),
    "positions of another batch": (lambda b: replace(b, positions=b.positions[1:]), "positions does not fit"),
    "a table of another batch": (lambda b: replace(b, block_table=b.block_table[1:]), "block_table does not fit"),
    "bounds of another batch": (lambda b: replace(b, cu_q=b.cu_q[1:]), "cu_q does not fit"),
    "32-bit ids": (lambda b: replace(b, ids=b.ids.int()), "ids does not fit"),
    "64-bit lengths": (lambda b: replace(b, kv_len=b.kv_len.long()), "kv_len does not fit"),
}


@needs_library
@pytest.mark.parametrize("what", WRONG)
def test_a_batch_that_does_not_fit_is_refused_before_anything_is_written(what: str) -> None:
    spoil, words = WRONG[what]
    decoder = random_decoder(LLAMA)
    batch, kv = random_batch(LLAMA, *BATCHES["mixed"])
    before = kv.clone()
    with ops.use("native"), pytest.raises(InputError, match=f"decoder: .*{words}"):
        decoder.forward(spoil(batch), kv)
    assert torch.equal(bits(kv), bits(before))


@needs_library
def test_caches_and_weights_of_another_model_are_refused() -> None:
    decoder = random_decoder(LLAMA)
    batch, kv = random_batch(replace(LLAMA, num_kv_heads=3), *BATCHES["decode"])
    with ops.use("native"), pytest.raises(InputError, match="kv does not fit"):
        decoder.forward(batch, kv)
    batch, kv = random_batch(LLAMA, *BATCHES["decode"])
    with ops.use("native"), pytest.raises(InputError, match="kv must be contiguous"):
        decoder.forward(batch, kv.mT.contiguous().mT)
    w = decoder.weights
    short = replace(w, layers=(replace(w.layers[0], down=w.layers[0].down[:, 1:]), *w.layers[1:]))
    with pytest.raises(InputError, match="down does not fit"):
        Decoder(LLAMA, short)
    with pytest.raises(InputError, match="out does not fit"):
        Decoder(LLAMA, replace(w, layers=(replace(w.layers[0], out=w.layers[0].out.float()), *w.layers[1:])))


# The C ABI ----------------------------------------------------------------------------------------------------------


def c_call(**changed: object) -> str:
    """Name of the status of a call that is sound but for the fields that are named."""
    library = native.library()
    assert library is not None
    decoder = random_decoder(LLAMA)
    batch, kv = random_batch(LLAMA, *BATCHES["mixed"])
    whole = decoder._whole
    assert whole is not None
    sizes = {name: getattr(whole._params, name) for name in (
        "layer", "embed", "norm", "cosine", "sine", "layers", "vocab", "hidden", "inner", "heads", "kv_heads",
        "head_dim", "max_positions", "eps", "scale", "dtype",
    )}  # fmt: skip
    rows = len(batch.ids)
    out, room = torch.empty(rows, LLAMA.hidden_size, dtype=BF16), torch.empty(1 << 16, dtype=torch.int64)
    fields = {
        **sizes, "ids": batch.ids, "positions": batch.positions, "block_table": batch.block_table, "cu_q": batch.cu_q,
        "kv_len": batch.kv_len, "kv": kv, "out": out, "workspace": room, "workspace_bytes": room.nbytes, "rows": rows,
        "batch": len(batch.kv_len), "table_width": batch.block_table.shape[1], "pages": kv.shape[2], "page": PAGE,
        "threads": 1, **changed,
    }  # fmt: skip
    status = library.atts_decoder_cpu(ctypes.byref(as_params(fields)))
    return next(name for name, value in STATUS.items() if value == status)


def as_params(fields: dict[str, object]) -> native.DecoderParams:  # type: ignore[valid-type]
    return native.DecoderParams.from_buffer(params("decoder", **fields))  # type: ignore[arg-type]


@needs_library
def test_codes_of_the_c_function() -> None:
    huge = 1 << 62
    assert c_call() == "OK"
    sizes = ("layers", "vocab", "hidden", "inner", "heads", "kv_heads", "head_dim", "max_positions", "pages", "page")
    for field in (*sizes, "threads"):
        assert (field, c_call(**{field: 0})) == (field, "ERROR_SHAPE")
    for field in ("rows", "batch", "table_width"):
        assert (field, c_call(**{field: -1})) == (field, "ERROR_SHAPE")
    for field in ("rows", "batch", "table_width", "layers", "vocab", "hidden", "inner", "pages", "page"):
        assert (field, c_call(**{field: huge})) == (field, "ERROR_SHAPE")
    assert c_call(heads=5) == c_call(head_dim=24) == c_call(kv_heads=4) == "ERROR_SHAPE"
    for field in ("layer", "embed", "norm", "cosine", "sine", "ids", "positions", "block_table", "cu_q", "kv_len", "kv",
                  "out", "workspace"):  # fmt: skip
        assert (field, c_call(**{field: None})) == (field, "ERROR_NULL_POINTER")
    assert c_call(workspace_bytes=100) == "ERROR_WORKSPACE"
    assert c_call(kv=65) == c_call(ids=68) == c_call(workspace=72) == "ERROR_ALIGNMENT"
    assert c_call(dtype=0) == c_call(dtype=DTYPES[torch.float16]) == "ERROR_DTYPE"
    assert c_call(vocab=2) == c_call(max_positions=3) == "ERROR_KEY"
    assert c_call(pages=1) == c_call(batch=5) == "ERROR_BATCH"
    optional = ("q_norm", "k_norm", "qkv_bias")
    for pointer in ("attn_norm", "qkv", "out", "mlp_norm", "gate_up", "down"):
        layers = (native.DecoderLayer * 3)()
        for layer in layers:
            for name, _ in native.DecoderLayer._fields_:
                setattr(layer, name, 0 if name in (pointer, *optional) or name.endswith("_packed") else 64)
        assert (pointer, c_call(layer=ctypes.addressof(layers))) == (pointer, "ERROR_NULL_POINTER")


@needs_library
@dtypes
def test_the_workspace_that_is_asked_for_is_enough_and_no_more_than_needed(dtype: torch.dtype) -> None:
    library = native.library()
    assert library is not None
    needed = ctypes.c_uint64()
    sizes = {
        "rows": 300, "batch": 4, "table_width": 30, "pages": 90, "page": 4, "layers": 3, "vocab": 61, "hidden": 48,
        "inner": 72, "heads": 6, "kv_heads": 2, "head_dim": 16, "max_positions": 128, "threads": 1,
        "dtype": DTYPES[dtype],
    }  # fmt: skip
    asked = as_params(sizes)
    assert library.atts_decoder_cpu_workspace(ctypes.byref(asked), ctypes.byref(needed)) == STATUS["OK"]
    # x and what is added to it, q, k and v, q again, a slot; each array rounded up to 16 bytes.
    exact = 300 * (dtype.itemsize * (2 * 48 + 160 + 96) + 8)
    assert exact <= needed.value < exact + 5 * 16
    assert library.atts_decoder_cpu_workspace(ctypes.byref(asked), None) == STATUS["ERROR_NULL_POINTER"]
    asked.struct_size -= 8
    assert library.atts_decoder_cpu_workspace(ctypes.byref(asked), ctypes.byref(needed)) == STATUS["ERROR_ABI"]
