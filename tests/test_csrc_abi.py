"""The C ABI as the header states it, for every entry point at once. One by one: tests/cuda_host/test_errors.py."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from atts_engine.ops import native
from tests.abi import DTYPES, OPERATIONS, STATUS, STRUCTS, VERSION, params


@pytest.fixture(scope="module")
def library(csrc_install: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(csrc_install / "lib" / "libatts.so"))
    loaded.atts_strerror.restype = ctypes.c_char_p
    return loaded


def _call(library: ctypes.CDLL, form: str, struct: ctypes.Structure | None) -> str:
    """Name of the status of one call."""
    stream = () if form.endswith("_cpu") else (None,)
    status = getattr(library, f"atts_{form}")(None if struct is None else ctypes.byref(struct), *stream)
    return next(name for name, value in STATUS.items() if value == status)


def test_every_status_has_a_sentence_of_its_own(library: ctypes.CDLL) -> None:
    said = [library.atts_strerror(value).decode() for value in STATUS.values()]
    assert len(set(said)) == len(said) and "unknown status" not in said
    assert sorted(STATUS.values()) == list(range(len(STATUS)))
    assert library.atts_strerror(-1) == library.atts_strerror(len(STATUS)) == b"unknown status"


def test_the_structs_of_python_are_those_of_the_header() -> None:
    assert VERSION[:2] == native.ABI
    pairs = [(kind, STRUCTS[OPERATIONS[kind.function.removeprefix("atts_")]]) for kind in native._ALL]
    for kind, wanted in [*pairs, (native.DecoderLayer, STRUCTS["decoder_layer"])]:
        assert ctypes.sizeof(kind) == ctypes.sizeof(wanted)
        assert [name for name, *_ in kind._fields_] == [name for name, *_ in wanted._fields_]
        for name, *_ in wanted._fields_:
            mine, theirs = getattr(kind, name), getattr(wanted, name)
            assert (mine.offset, mine.size) == (theirs.offset, theirs.size), f"{kind.__name__}: {name}"


@pytest.mark.parametrize("form", [form for form in OPERATIONS if form.endswith("_cpu")])
def test_no_struct_and_another_headers_struct_are_refused(library: ctypes.CDLL, form: str) -> None:
    assert _call(library, form, None) == "ERROR_NULL_POINTER"
    struct = params(OPERATIONS[form])
    assert _call(library, form, struct) != "ERROR_ABI"
    for size in (0, 8, ctypes.sizeof(struct) - 8, ctypes.sizeof(struct) + 8):
        struct.struct_size = size
        assert _call(library, form, struct) == "ERROR_ABI"


@pytest.mark.parametrize("form", [form for form in OPERATIONS if not form.endswith("_cpu")])
def test_without_cuda_a_device_form_says_so(library: ctypes.CDLL, form: str) -> None:
    assert library.atts_has_cuda() == 0
    assert _call(library, form, None) == _call(library, form, params(OPERATIONS[form])) == "ERROR_NO_CUDA"
    assert f"{form}_cpu" in OPERATIONS


def test_an_instruction_set_that_is_not_there_has_its_code(library: ctypes.CDLL) -> None:
    assert library.atts_use_cpu_isa(b"z80") == STATUS["ERROR_ISA"]


def test_workspace_sizes_are_asked_for_without_arrays(library: ctypes.CDLL) -> None:
    size = ctypes.c_uint64(7)
    logits = {"rows": 4, "vocab": 1 << 17, "logits_stride": 1 << 17, "dtype": DTYPES[torch.bfloat16]}
    for op, sizes in (("gate", {"batch": 64, "keys": 2, "capacity": 1 << 17}), ("score_logits", logits)):
        struct, ask = params(op, **sizes), getattr(library, f"atts_{op}_workspace")
        assert ask(ctypes.byref(struct), None) == STATUS["ERROR_NULL_POINTER"]
        assert ask(ctypes.byref(struct), ctypes.byref(size)) == STATUS["OK"]
        assert 0 < size.value < 1 << 24
        setattr(struct, next(iter(sizes)), 0)
        assert ask(ctypes.byref(struct), ctypes.byref(size)) == STATUS["OK"]
        assert size.value == 0
        struct.struct_size -= 8
        assert ask(ctypes.byref(struct), ctypes.byref(size)) == STATUS["ERROR_ABI"]


_ARRAY = torch.zeros(4096)
_LONG = torch.zeros(64, dtype=torch.int64)
_INT = torch.zeros(64, dtype=torch.int32)
_KINDS = {"dtype": DTYPES[torch.float32], "threads": 1}
_REFUSABLE = {
    "linear": params("linear", x=_ARRAY, weight=_ARRAY, out=_ARRAY, rows=1, in_features=4, out_features=4, **_KINDS),
    "score_tokens": params(
        "score_tokens", hidden=_ARRAY, weight=_ARRAY, ids=_LONG, logprob=_ARRAY, rows=1, width=4, vocab=4, **_KINDS
    ),
    "attention": params(
        "attention", q=_ARRAY, kv=_ARRAY, block_table=_INT, cu_q=_INT, kv_len=_INT, out=_ARRAY,
        rows=1, batch=1, table_width=1, pages=1, page=4, heads=1, kv_heads=1, head_dim=16, **_KINDS,
    ),
    "rms_norm": params("rms_norm", x=_ARRAY, weight=_ARRAY, out=_ARRAY, rows=2, width=4, x_stride=4, **_KINDS),
    "silu_mul": params(
        "silu_mul", gate=_ARRAY, up=_ARRAY, out=_ARRAY, rows=2, width=4, gate_stride=4, up_stride=4, **_KINDS
    ),
    "rope": params(
        "rope", x=_ARRAY, cosine=_ARRAY, sine=_ARRAY, out=_ARRAY, rows=2, heads=1, head_dim=4, row_stride=4, **_KINDS
    ),
    "sample": params(
        "sample", logits=_ARRAY, temperature=_ARRAY, top_k=_LONG, top_p=_ARRAY, min_p=_ARRAY, seed=_LONG,
        position=_LONG, ids=_LONG, rows=2, vocab=4, logits_stride=4, **_KINDS,
    ),
}  # fmt: skip


@pytest.mark.parametrize("op", _REFUSABLE)
def test_the_hosts_own_ops_check_alignment_strides_and_reach(library: ctypes.CDLL, op: str) -> None:
    good = _REFUSABLE[op]
    for name, kind in good._fields_:
        value = getattr(good, name)
        if kind is ctypes.c_void_p and value is not None:
            changes = [(value + 1, "ERROR_ALIGNMENT")]
        elif name.endswith("_stride"):
            changes = [(3, "ERROR_STRIDE"), (-4, "ERROR_STRIDE"), (2**62, "ERROR_SHAPE")]
        elif name in ("rows", "width", "vocab", "in_features", "out_features", "page", "head_dim"):
            changes = [(2**62, "ERROR_SHAPE")]
        else:
            continue
        for bad, status in changes:
            changed = type(good).from_buffer_copy(good)
            setattr(changed, name, bad)
            if name in ("width", "vocab"):  # rows that are less far apart would be refused for that
                for stride in (field for field, _ in good._fields_ if field.endswith("_stride")):
                    setattr(changed, stride, bad)
            assert (name, _call(library, f"{op}_cpu", changed)) == (name, status)
