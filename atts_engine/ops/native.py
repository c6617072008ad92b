"""The C library of csrc/ on the CPU, through ctypes: no header of torch is in it, so one build serves every torch.

Each function below is the op of its name for tensors of DTYPES; the op has checked the shapes. A row's bits depend on
itself alone.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from atts_engine.errors import InputError
from atts_engine.ops.packed import PackedWeight, Weight

ABI = (0, 5)
"""Major and minor version of the header that the structs below follow."""

_P, _N, _F, _T = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int32


class _Params(ctypes.Structure):
    """A struct of csrc/include/atts/atts.h, whose first field is its own size."""

    function: ClassVar[str]


def _params(function: str, **kinds: type) -> type[_Params]:
    """The struct that `function` takes; fields in the header's order."""
    fields = (("struct_size", ctypes.c_uint64), *kinds.items())
    return type(f"{function}_params", (_Params,), {"function": f"atts_{function}_cpu", "_fields_": fields})


_PackWeight = _params(
    "pack_weight",
    weight=_P, packed=_P, packed_bytes=ctypes.c_uint64, out_features=_N, in_features=_N, threads=_T,
)  # fmt: skip
_UnpackWeight = _params("unpack_weight", packed=_P, weight=_P, out_features=_N, in_features=_N, threads=_T)
_Linear = _params(
    "linear",
    x=_P,
    weight=_P,
    packed=_P,
    bias=_P,
    out=_P,
    rows=_N,
    in_features=_N,
    out_features=_N,
    dtype=_T,
    threads=_T,
)
_ScoreTokens = _params(
    "score_tokens",
    hidden=_P,
    weight=_P,
    packed=_P,
    ids=_P,
    logprob=_P,
    rows=_N,
    width=_N,
    vocab=_N,
    dtype=_T,
    threads=_T,
)
_ScoreLogits = _params(
    "score_logits",
    logits=_P, ids=_P, logprob=_P, cu_seqlens=_P, score=_P, sum=_P, workspace=_P, error=_P, workspace_bytes=_N,
    rows=_N, vocab=_N, logits_stride=_N, batch=_N, dtype=_T, threads=_T,
)  # fmt: skip
_Attention = _params(
    "attention",
    q=_P, kv=_P, block_table=_P, cu_q=_P, kv_len=_P, out=_P,
    rows=_N, batch=_N, table_width=_N, pages=_N, page=_N, heads=_N, kv_heads=_N, head_dim=_N, scale=_F,
    dtype=_T, threads=_T,
)  # fmt: skip
_SpanMean = _params("span_mean", logprob=_P, cu_seqlens=_P, score=_P, sum=_P, error=_P, tokens=_N, batch=_N)
_Gate = _params(
    "gate",
    score=_P, key=_P, level=_P, u=_P, insert=_P, ring=_P, size=_P, head=_P, greater=_P, ties=_P, n=_P, takeover=_P,
    p=_P, workspace=_P, error=_P, workspace_bytes=ctypes.c_uint64, batch=_N, keys=_N, capacity=_N,
)  # fmt: skip
_RmsNorm = _params(
    "rms_norm",
    x=_P,
    delta=_P,
    weight=_P,
    sum=_P,
    out=_P,
    rows=_N,
    width=_N,
    x_stride=_N,
    eps=_F,
    dtype=_T,
    threads=_T,
)
_SiluMul = _params(
    "silu_mul",
    gate=_P,
    up=_P,
    out=_P,
    rows=_N,
    width=_N,
    gate_stride=_N,
    up_stride=_N,
    dtype=_T,
    threads=_T,
)
_Rope = _params(
    "rope",
    x=_P,
    cosine=_P,
    sine=_P,
    out=_P,
    rows=_N,
    heads=_N,
    head_dim=_N,
    row_stride=_N,
    dtype=_T,
    threads=_T,
)
_KvAppend = _params(
    "kv_append",
    k=_P, v=_P, kv=_P, q=_P, q_out=_P, cosine=_P, sine=_P, slots=_P, block_table=_P, cu_q=_P, kv_len=_P, error=_P,
    rows=_N, kv_heads=_N, head_dim=_N, heads=_N, k_stride=_N, k_head_stride=_N, v_stride=_N, v_head_stride=_N,
    q_stride=_N, q_head_stride=_N, q_out_stride=_N, q_out_head_stride=_N, slot_count=_N, page=_N, batch=_N,
    table_width=_N, dtype=_T,
)  # fmt: skip
_Sample = _params(
    "sample",
    logits=_P, temperature=_P, top_k=_P, top_p=_P, min_p=_P, seed=_P, position=_P, ids=_P,
    rows=_N, vocab=_N, logits_stride=_N, dtype=_T, threads=_T,
)  # fmt: skip
DecoderParams = _params(
    "decoder",
    layer=_P, embed=_P, norm=_P, cosine=_P, sine=_P, ids=_P, positions=_P, block_table=_P, cu_q=_P, kv_len=_P, kv=_P,
    out=_P, workspace=_P, workspace_bytes=ctypes.c_uint64,
    rows=_N, batch=_N, table_width=_N, pages=_N, page=_N, layers=_N, vocab=_N, hidden=_N, inner=_N, heads=_N,
    kv_heads=_N, head_dim=_N, max_positions=_N, eps=_F, scale=_F, dtype=_T, threads=_T,
)  # fmt: skip


class DecoderLayer(ctypes.Structure):
    """atts_decoder_layer."""

    _fields_ = tuple(
        (name, _P)
        for name in (
            "attn_norm", "qkv", "qkv_bias", "q_norm", "k_norm", "out", "mlp_norm", "gate_up", "down",
            "qkv_packed", "out_packed", "gate_up_packed", "down_packed",
        )
    )  # fmt: skip


DTYPES = {torch.float32: 1, torch.bfloat16: 3}
"""Of the host's ops, with their atts_dtype."""
_ALL = (
    _PackWeight, _UnpackWeight, _Linear, _ScoreTokens, _ScoreLogits, _Attention, _RmsNorm, _SiluMul, _Rope, _KvAppend,
    _Sample, _SpanMean, _Gate, DecoderParams,
)  # fmt: skip


@cache
def library() -> ctypes.CDLL | None:
    """The library that the installation built, or None where it could not (no CMake or no C++ compiler)."""
    built = sorted(Path(__file__).parent.glob("_libatts.*"))
    return load(built[0]) if built else None


def load(path: Path) -> ctypes.CDLL:
    """Raises `InputError` for a library that was built from other sources: an editable installation does not build it
    anew by itself."""
    loaded = ctypes.CDLL(str(path))
    try:
        if divmod(loaded.atts_version() // 100, 100) != ABI:
            raise AttributeError(f"its ABI is {loaded.atts_version()}")
        loaded.atts_strerror.restype = ctypes.c_char_p
        loaded.atts_cpu_isa.restype = ctypes.c_char_p
        for kind in _ALL:
            getattr(loaded, kind.function).argtypes = (ctypes.POINTER(kind),)
        for name, kind in (("atts_decoder_cpu_workspace", DecoderParams), ("atts_pack_weight_cpu_bytes", _PackWeight)):
            getattr(loaded, name).argtypes = (ctypes.POINTER(kind), ctypes.POINTER(ctypes.c_uint64))
    except AttributeError as error:
        raise InputError(f"{path} was built from other sources; install again (`make setup`)") from error
    return loaded


ISAS = ("avx512bf16", "avx2", "plain")
"""Instruction sets that csrc/ has kernels for, the best first."""


def isa() -> str | None:
    """The one of ISAS whose kernels run; None without csrc/."""
    loaded = library()
    return None if loaded is None else loaded.atts_cpu_isa().decode()


def use_isa(name: str | None) -> None:
    """Have the kernels of one instruction set run in every thread; None: the best that the processor has. For tests and
    comparisons: two instruction sets agree to rounding. Raises `InputError` for one that cannot be had here."""
    loaded = library()
    if loaded is None or loaded.atts_use_cpu_isa(None if name is None else name.encode()):
        raise InputError(f"the kernels of csrc/ for {name} cannot run here: it is one of {', '.join(ISAS)}")
    products_are_torchs.cache_clear()


@cache
def products_are_torchs(dtype: torch.dtype) -> bool:
    """Whether torch's own products are the faster ones. In fp32: csrc/ has no kernels for what the processor has. In
    bfloat16: the CPU multiplies it by an instruction that csrc/ does not use (AMX), or that the compiler of csrc/ did
    not know (AVX512-BF16)."""
    if dtype is torch.float32:
        return isa() == "plain"
    if torch.cpu._is_amx_tile_supported():
        return True
    return bool(torch.cpu._is_avx512_bf16_supported()) and isa() != "avx512bf16"


def _call(kind: type[_Params], *fields: float | None, **named: float | None) -> None:
    """Fields in the struct's order or by name; those left out are 0."""
    _run(kind.function, kind(ctypes.sizeof(kind), *fields, **named))


def _run(function: str, params: _Params, *results: object) -> None:
    loaded = library()
    assert loaded is not None
    status = getattr(loaded, function)(ctypes.byref(params), *results)
    if status:
        name = params.function.removeprefix("atts_").removesuffix("_cpu")
        raise InputError(f"{name}: {loaded.atts_strerror(status).decode()}")


def decoder_workspace(params: _Params) -> int:
    """Bytes of `workspace` that a `DecoderParams` of these sizes asks for."""
    needed = ctypes.c_uint64()
    _run("atts_decoder_cpu_workspace", params, ctypes.byref(needed))
    return needed.value


def decoder(params: _Params) -> None:
    """Run a `DecoderParams` whose every field is set."""
    _run("atts_decoder_cpu", params)


def _side_by_side(x: Tensor) -> Tensor:
    """x with all but its first dimension dense, and rows that do not overlap."""
    if x.is_contiguous():
        return x
    expected = 1
    for size, stride in zip(reversed(x.shape[1:]), reversed(x.stride()[1:]), strict=True):
        if stride != expected and size != 1:
            return x.contiguous()
        expected *= size
    return x if x.shape[0] <= 1 or x.stride(0) >= expected else x.contiguous()


PACKED_ROWS, PACKED_COLUMNS = 32, 64
"""A matrix packs where its sides are multiples of these."""


def pack_weight(weight: Tensor) -> Tensor:
    weight = weight.contiguous()
    params = _PackWeight(
        struct_size=ctypes.sizeof(_PackWeight),
        weight=weight.data_ptr(),
        out_features=weight.shape[0],
        in_features=weight.shape[1],
        threads=torch.get_num_threads(),
    )
    needed = ctypes.c_uint64()
    _run("atts_pack_weight_cpu_bytes", params, ctypes.byref(needed))
    packed = torch.empty(needed.value, dtype=torch.uint8)
    params.packed, params.packed_bytes = packed.data_ptr(), packed.numel()
    _run("atts_pack_weight_cpu", params)
    return packed


def unpack_weight(packed: Tensor, rows: int, columns: int) -> Tensor:
    weight = torch.empty(rows, columns, dtype=torch.bfloat16)
    _call(_UnpackWeight, packed.data_ptr(), weight.data_ptr(), rows, columns, torch.get_num_threads())
    return weight


def _plain_or_packed(weight: Weight) -> tuple[Tensor | None, Tensor | None]:
    """The two pointers' tensors, one of them None; to be held for as long as the pointers are in use."""
    return (None, weight.data) if isinstance(weight, PackedWeight) else (weight.contiguous(), None)


def linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    x = x.contiguous()
    plain, packed = _plain_or_packed(weight)
    bias = None if bias is None else bias.contiguous()
    out = x.new_empty(x.shape[0], weight.shape[0])
    _call(
        _Linear,
        x.data_ptr(),
        None if plain is None else plain.data_ptr(),
        None if packed is None else packed.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        x.shape[0],
        x.shape[1],
        weight.shape[0],
        DTYPES[x.dtype],
        torch.get_num_threads(),
    )
    return out


def score_tokens(hidden: Tensor, weight: Weight, ids: Tensor) -> Tensor:
    hidden, ids = hidden.contiguous(), ids.contiguous()
    plain, packed = _plain_or_packed(weight)
    rows, width = hidden.shape
    out = hidden.new_empty(rows, dtype=torch.float32)
    _call(
        _ScoreTokens,
        hidden=hidden.data_ptr(),
        weight=None if plain is None else plain.data_ptr(),
        packed=None if packed is None else packed.data_ptr(),
        ids=ids.data_ptr(),
        logprob=out.data_ptr(),
        rows=rows,
        width=width,
        vocab=weight.shape[0],
        dtype=DTYPES[hidden.dtype],
        threads=torch.get_num_threads(),
    )
    return out


def score_logits(logits: Tensor, ids: Tensor) -> Tensor:
    logits, ids = _side_by_side(logits), ids.contiguous()
    rows, vocab = logits.shape
    out = logits.new_empty(rows, dtype=torch.float32)
    _call(
        _ScoreLogits,
        logits=logits.data_ptr(),
        ids=ids.data_ptr(),
        logprob=out.data_ptr(),
        rows=rows,
        vocab=vocab,
        logits_stride=logits.stride(0),
        dtype=DTYPES[logits.dtype],
        threads=torch.get_num_threads(),
    )
    return out


def span_mean(logprob: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    logprob, cu_seqlens = logprob.contiguous(), cu_seqlens.long().contiguous()
    batch = cu_seqlens.shape[0] - 1
    score = logprob.new_empty(batch)
    total = logprob.new_empty(batch, dtype=torch.float64)
    _call(
        _SpanMean,
        logprob=logprob.data_ptr(),
        cu_seqlens=cu_seqlens.data_ptr(),
        score=score.data_ptr(),
        sum=total.data_ptr(),
        tokens=logprob.shape[0],
        batch=batch,
    )
    return score, total


def gate(
    score: Tensor, key: Tensor, ring: Tensor, size: Tensor, head: Tensor, level: Tensor, u: Tensor, insert: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    score, key, level, u, insert = (x.contiguous() for x in (score, key, level, u, insert))
    greater, ties, n = (torch.empty_like(key) for _ in range(3))
    takeover = torch.empty_like(insert)
    p = torch.empty_like(score, dtype=torch.float64)
    inputs = (score, key, level, u, insert, ring, size, head, greater, ties, n, takeover, p)
    _call(
        _Gate,
        *(x.data_ptr() for x in inputs),
        batch=score.shape[0],
        keys=ring.shape[0],
        capacity=ring.shape[1],
    )
    return greater, ties, n, takeover, p


def serves_attention(q: Tensor, kv_layer: Tensor) -> bool:
    """Whether head size, dtypes and layout are those of the native kernel."""
    return q.dtype is kv_layer.dtype and q.shape[2] % 16 == 0 and kv_layer.is_contiguous()


def paged_attention(
    q: Tensor, kv_layer: Tensor, block_table: Tensor, cu_q: Tensor, kv_len: Tensor, scale: float
) -> Tensor:
    q, block_table, cu_q, kv_len = (t.contiguous() for t in (q, block_table, cu_q, kv_len))
    if block_table.dtype != torch.int32 or cu_q.dtype != torch.int32 or kv_len.dtype != torch.int32:
        raise InputError("paged_attention: block_table, cu_q and kv_len must be int32")
    batch = kv_len.shape[0]
    if cu_q.shape != (batch + 1,) or block_table.shape[0] != batch:
        raise InputError(
            f"paged_attention: cu_q {tuple(cu_q.shape)}, block table {tuple(block_table.shape)}, {batch} sequences"
        )
    out = torch.empty_like(q)
    rows, heads, dim = q.shape
    _, pages, page, kv_heads, _ = kv_layer.shape
    pointers = (t.data_ptr() for t in (q, kv_layer, block_table, cu_q, kv_len, out))
    sizes = (rows, batch, block_table.shape[1], pages, page, heads, kv_heads, dim)
    _call(_Attention, *pointers, *sizes, scale, DTYPES[q.dtype], torch.get_num_threads())
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x, weight = _side_by_side(x), weight.contiguous()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows, width = x.shape
    _call(
        _RmsNorm,
        x.data_ptr(),
        None,
        weight.data_ptr(),
        None,
        out.data_ptr(),
        rows,
        width,
        x.stride(0),
        eps,
        DTYPES[x.dtype],
        torch.get_num_threads(),
    )
    return out


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x, delta, weight = _side_by_side(x), delta.contiguous(), weight.contiguous()
    total, out = torch.empty_like(delta), torch.empty_like(delta)
    pointers = (t.data_ptr() for t in (x, delta, weight, total, out))
    _call(_RmsNorm, *pointers, x.shape[0], x.shape[1], x.stride(0), eps, DTYPES[x.dtype], torch.get_num_threads())
    return total, out


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = _side_by_side(gate), _side_by_side(up)
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    pointers = (t.data_ptr() for t in (gate, up, out))
    strides = (gate.stride(0), up.stride(0))
    _call(_SiluMul, *pointers, *gate.shape, *strides, DTYPES[gate.dtype], torch.get_num_threads())
    return out


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x, cos, sin = _side_by_side(x), cos.contiguous(), sin.contiguous()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    pointers = (t.data_ptr() for t in (x, cos, sin, out))
    _call(_Rope, *pointers, *x.shape, x.stride(0), DTYPES[x.dtype], torch.get_num_threads())
    return out


def kv_append(k: Tensor, v: Tensor, kv_layer: Tensor, slots: Tensor) -> None:
    k, v, slots = _side_by_side(k), _side_by_side(v), slots.contiguous()
    _call(
        _KvAppend,
        k=k.data_ptr(),
        v=v.data_ptr(),
        kv=kv_layer.data_ptr(),
        slots=slots.data_ptr(),
        rows=k.shape[0],
        kv_heads=k.shape[1],
        head_dim=k.shape[2],
        k_stride=k.stride(0),
        k_head_stride=k.shape[2],
        v_stride=v.stride(0),
        v_head_stride=v.shape[2],
        slot_count=kv_layer.shape[1] * kv_layer.shape[2],
        dtype=DTYPES[kv_layer.dtype],
    )


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
) -> Tensor:
    logits = _side_by_side(logits)
    rows, vocab = logits.shape
    kinds = (torch.float32, torch.int64, torch.float32, torch.float32, torch.int64, torch.int64)
    parameters = [
        t.to(kind).contiguous()
        for t, kind in zip((temperature, top_k, top_p, min_p, seed, position), kinds, strict=True)
    ]
    out = logits.new_empty(rows, dtype=torch.int64)
    pointers = (t.data_ptr() for t in (logits, *parameters, out))
    _call(_Sample, *pointers, rows, vocab, logits.stride(0), DTYPES[logits.dtype], torch.get_num_threads())
    return out
