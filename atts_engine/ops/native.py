"""The C library of csrc/ on the CPU, through ctypes: no header of torch is in it, so one build serves every torch."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from atts_engine.errors import InputError


class _LinearParams(ctypes.Structure):
    """`atts_linear_params` of csrc/include/atts/atts.h."""

    _fields_ = (
        ("struct_size", ctypes.c_uint64),
        ("x", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
        ("threads", ctypes.c_int32),
    )


@cache
def library() -> ctypes.CDLL | None:
    """The library that the installation built, or None where it could not (no CMake or no C++ compiler)."""
    for path in sorted(Path(__file__).parent.glob("_libatts*")):
        loaded = ctypes.CDLL(str(path))
        loaded.atts_strerror.restype = ctypes.c_char_p
        loaded.atts_linear_cpu.argtypes = (ctypes.POINTER(_LinearParams),)
        return loaded
    return None


@cache
def multiplies_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 by itself (AVX512-BF16 or AMX): there torch's own products are fast."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x[N, K] @ weight[M, K].T + bias[M] -> [N, M], all bfloat16 on the CPU, summed in fp32; shapes are the caller's
    care. A row's bits depend on itself alone."""
    loaded = library()
    assert loaded is not None
    x, weight = x.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    out = x.new_empty(x.shape[0], weight.shape[0])
    params = _LinearParams(
        ctypes.sizeof(_LinearParams),
        x.data_ptr(),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        x.shape[0],
        x.shape[1],
        weight.shape[0],
        torch.get_num_threads(),
    )
    status = loaded.atts_linear_cpu(ctypes.byref(params))
    if status:
        raise InputError(f"linear: {loaded.atts_strerror(status).decode()}")
    return out
