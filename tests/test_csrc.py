"""The native gate, built with CMake for the CPU, against ops.gate to the bit; its error codes."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from atts_engine import ops

ONE = 1 << 32
_ARRAYS = (
    "score", "key", "level", "u", "insert", "ring", "size", "head", "greater", "ties", "n", "takeover", "p",
    "workspace", "error",
)  # fmt: skip


class Params(ctypes.Structure):
    """atts_gate_params."""

    _fields_ = (
        ("struct_size", ctypes.c_uint64),
        *((name, ctypes.c_void_p) for name in _ARRAYS),
        ("workspace_bytes", ctypes.c_uint64),
        ("batch", ctypes.c_int64),
        ("keys", ctypes.c_int64),
        ("capacity", ctypes.c_int64),
    )


@pytest.fixture(scope="module")
def library(csrc_install: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(csrc_install / "lib" / "libatts.so"))
    loaded.atts_strerror.restype = ctypes.c_char_p
    return loaded


def _tensors(batch: int, keys: int, capacity: int, seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    score = torch.randint(0, 5, (batch,), generator=g).float()
    if batch > 3:
        score[1], score[2] = float("nan"), float("-inf")
    counts = torch.zeros(batch, dtype=torch.int64)
    return {
        "score": score,
        "key": torch.randint(0, keys, (batch,), generator=g),
        "level": torch.randint(0, ONE + 1, (batch,), generator=g),
        "u": torch.randint(1, ONE + 1, (batch,), generator=g),
        "insert": torch.rand(batch, generator=g) < 0.7,
        "ring": torch.zeros(keys, capacity),
        "size": torch.zeros(keys, dtype=torch.int64),
        "head": torch.zeros(keys, dtype=torch.int64),
        "greater": counts,
        "ties": counts.clone(),
        "n": counts.clone(),
        "takeover": torch.zeros(batch, dtype=torch.bool),
        "p": torch.zeros(batch, dtype=torch.float64),
    }


def _params(tensors: dict[str, torch.Tensor]) -> Params:
    keys, capacity = tensors["ring"].shape
    pointers = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    batch = tensors["score"].shape[0]
    return Params(struct_size=ctypes.sizeof(Params), batch=batch, keys=keys, capacity=capacity, **pointers)


@pytest.mark.parametrize("capacity", [1, 4, 64])
def test_gate_equals_the_reference(library: ctypes.CDLL, capacity: int) -> None:
    store = {"ring": torch.zeros(3, capacity), "size": torch.zeros(3).long(), "head": torch.zeros(3).long()}
    native_store = {name: tensor.clone() for name, tensor in store.items()}
    for seed, batch in enumerate((1, 7, 0, 40, 23)):
        tensors = _tensors(batch, 3, capacity, seed) | native_store
        assert library.atts_gate_cpu(ctypes.byref(_params(tensors))) == 0
        inputs = {name: tensors[name] for name in ("score", "key", "level", "u", "insert")}
        wanted = ops.gate(**inputs, **store)
        for name, value in wanted._asdict().items():
            torch.testing.assert_close(tensors[name], value, rtol=0, atol=0, equal_nan=True)
        for name, value in store.items():
            assert torch.equal(native_store[name], value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("struct_size", 8, "different headers"),
        ("score", None, "null"),
        ("ring", None, "null"),
        ("capacity", 0, "out of range"),
        ("capacity", (1 << 28) + 1, "out of range"),
        ("batch", -1, "out of range"),
        ("keys", 1, "outside the store"),
    ],
)
def test_bad_arguments_have_a_code_and_change_nothing(
    library: ctypes.CDLL, field: str, value: int | None, message: str
) -> None:
    tensors = _tensors(8, 3, 4, 0)
    params = _params(tensors)
    setattr(params, field, value)
    status = library.atts_gate_cpu(ctypes.byref(params))
    assert message in library.atts_strerror(status).decode()
    assert not tensors["size"].any() and not tensors["n"].any()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("level", -1, "uniform"), ("u", ONE + 1, "uniform"), ("head", 4, "head"), ("size", -1, "size")],
)
def test_bad_values_have_a_code(library: ctypes.CDLL, name: str, value: int, message: str) -> None:
    tensors = _tensors(8, 3, 4, 0)
    tensors[name][:] = value
    status = library.atts_gate_cpu(ctypes.byref(_params(tensors)))
    assert message in library.atts_strerror(status).decode()


def test_without_cuda_the_device_gate_says_so(library: ctypes.CDLL) -> None:
    assert library.atts_version() == 500
    assert library.atts_has_cuda() == 0
    status = library.atts_gate(ctypes.byref(_params(_tensors(1, 1, 1, 0))), None)
    assert b"without CUDA" in library.atts_strerror(status)
    assert library.atts_strerror(999) == b"unknown status"
    assert b"null" in library.atts_strerror(library.atts_gate_cpu(None))
