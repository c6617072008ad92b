"""The C ABI as the header states it: statuses, struct checks of every entry point, and each error code provoked."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from atts_engine.ops import native
from tests.abi import DTYPES, OPERATIONS, STATUS, STRUCTS, params

ONE = 1 << 32
FLOAT32 = DTYPES[torch.float32]
NEVER_ON_A_CPU = {"ERROR_CUDA", "ERROR_DEVICE", "ERROR_WORKSPACE"}
"""Statuses of the device forms alone: tests/test_cuda_host.py and a GPU provoke them."""


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
    for kind in native._ALL:
        wanted = STRUCTS[OPERATIONS[kind.function.removeprefix("atts_")]]
        assert [name for name, *_ in kind._fields_] == [name for name, *_ in wanted._fields_]
        for name, *_ in wanted._fields_:
            mine, theirs = getattr(kind, name), getattr(wanted, name)
            assert (mine.offset, mine.size) == (theirs.offset, theirs.size), f"{kind.function}: {name}"


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


# Calls that succeed, and what breaks them -----------------------------------------------------------------------------


def _ints(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def _valid(name: str) -> dict[str, Any]:
    """Fields of a call of atts_`name`_cpu that succeeds; tensors stand for their addresses."""
    cache = {
        "layers": 2,
        "pages": 4,
        "page": 2,
        "kv_heads": 1,
        "head_dim": 4,
        "count": 2,
        "dtype": FLOAT32,
    }
    counts = {field: torch.zeros(2, dtype=torch.int64) for field in ("greater", "ties", "n")}
    fields: dict[str, dict[str, Any]] = {
        "gate": {
            "score": torch.ones(2), "key": _ints(0, 1), "level": _ints(0, ONE), "u": _ints(1, ONE),
            "insert": torch.ones(2, dtype=torch.bool), "ring": torch.zeros(2, 4), "size": _ints(0, 4),
            "head": _ints(0, 3), **counts, "takeover": torch.zeros(2, dtype=torch.bool),
            "p": torch.zeros(2, dtype=torch.float64), "batch": 2, "keys": 2, "capacity": 4,
        },
        "span_mean": {
            "logprob": torch.zeros(5), "cu_seqlens": _ints(0, 2, 5), "score": torch.zeros(2),
            "sum": torch.zeros(2, dtype=torch.float64), "tokens": 5, "batch": 2,
        },
        "score_logits": {
            "logits": torch.zeros(2, 8), "ids": _ints(0, 7), "logprob": torch.zeros(2), "rows": 2, "vocab": 8,
            "logits_stride": 8, "dtype": FLOAT32, "threads": 1,
        },
        "kv_append": {
            "k": torch.zeros(2, 2, 4), "v": torch.zeros(2, 2, 4), "kv": torch.zeros(2, 6, 2, 4),
            "slots": _ints(0, 5), "rows": 2, "kv_heads": 2, "head_dim": 4, "k_stride": 8,
            "k_head_stride": 4, "v_stride": 8, "v_head_stride": 4, "slot_count": 6, "dtype": FLOAT32,
        },
        "kv_append by table": {
            "k": torch.zeros(2, 1, 4), "v": torch.zeros(2, 1, 4), "kv": torch.zeros(2, 6, 1, 4),
            "block_table": _ints(2, 0, dtype=torch.int32), "cu_q": _ints(0, 2, dtype=torch.int32),
            "kv_len": _ints(3, dtype=torch.int32), "rows": 2, "kv_heads": 1, "head_dim": 4, "k_stride": 4,
            "k_head_stride": 4, "v_stride": 4, "v_head_stride": 4, "slot_count": 6, "page": 2, "batch": 1,
            "table_width": 2, "dtype": FLOAT32,
        },
        "kv_copy_pages": {**cache, "kv": torch.zeros(2, 2, 4, 2, 1, 4), "src": _ints(0, 1), "dst": _ints(2, 3)},
        "kv_gather": {
            **cache, "kv": torch.zeros(2, 2, 4, 2, 1, 4), "dense": torch.zeros(2, 2, 2, 2, 1, 4),
            "page_ids": _ints(3, 1),
        },
        "kv_swap": {
            **cache, "kv": torch.zeros(2, 2, 4, 2, 1, 4), "host": torch.zeros(3, 2, 2, 2, 1, 4), "host_slots": 3,
            "page_ids": _ints(3, 1), "slots": _ints(2, 0), "to_host": 1,
        },
        "linear": {
            "x": torch.zeros(4).bfloat16(), "weight": torch.zeros(16).bfloat16(), "out": torch.zeros(4).bfloat16(),
            "rows": 1, "in_features": 4, "out_features": 4, "threads": 1,
        },
    }  # fmt: skip
    return fields[name]


def _status(library: ctypes.CDLL, name: str, fields: dict[str, Any]) -> str:
    op = name.partition(" ")[0]
    return _call(library, f"{op}_cpu", params(op, **fields))


def _put(field: str, *values: int) -> Callable[[dict[str, Any]], None]:
    """Other content of an array of integers."""

    def change(fields: dict[str, Any]) -> None:
        fields[field] = _ints(*values, dtype=fields[field].dtype)

    return change


def _moved(field: str) -> Callable[[dict[str, Any]], None]:
    """The array one byte further on."""

    def change(fields: dict[str, Any]) -> None:
        fields[field] = fields[field].data_ptr() + 1

    return change


def _set(**values: object) -> Callable[[dict[str, Any]], None]:
    return lambda fields: fields.update(values)


HUGE = 1 << 62
BREAKS: tuple[tuple[str, str, str, Callable[[dict[str, Any]], None]], ...] = (
    ("gate", "a missing array", "NULL_POINTER", _set(score=None)),
    ("gate", "a negative batch", "SHAPE", _set(batch=-1)),
    ("gate", "a capacity that the integers do not allow", "SHAPE", _set(capacity=(1 << 28) + 1)),
    ("gate", "more keys than can be addressed", "SHAPE", _set(keys=HUGE)),
    ("gate", "an address off its element", "ALIGNMENT", _moved("ring")),
    ("gate", "a key outside the store", "KEY", _put("key", 0, 2)),
    ("gate", "a negative key", "KEY", _put("key", -1, 0)),
    ("gate", "a level above 1", "VALUE", _put("level", 0, ONE + 1)),
    ("gate", "a uniform of 0", "VALUE", _put("u", 0, 1)),
    ("gate", "a ring fuller than full", "STORE", _put("size", 5, 0)),
    ("gate", "a head outside its ring", "STORE", _put("head", 4, 0)),
    ("span_mean", "a missing array", "NULL_POINTER", _set(sum=None)),
    ("span_mean", "negative tokens", "SHAPE", _set(tokens=-1)),
    ("span_mean", "more tokens than can be addressed", "SHAPE", _set(tokens=HUGE)),
    ("span_mean", "an address off its element", "ALIGNMENT", _moved("sum")),
    ("span_mean", "an empty span", "BATCH", _put("cu_seqlens", 0, 0, 5)),
    ("span_mean", "bounds that do not reach the end", "BATCH", _put("cu_seqlens", 0, 2, 4)),
    ("score_logits", "a missing array", "NULL_POINTER", _set(ids=None)),
    ("score_logits", "spans' scores without spans", "NULL_POINTER", _set(score=1 << 12)),
    ("score_logits", "an unknown dtype", "DTYPE", _set(dtype=0)),
    ("score_logits", "rows that overlap", "STRIDE", _set(logits_stride=7)),
    ("score_logits", "a product above 64 bits", "SHAPE", _set(logits_stride=HUGE)),
    ("score_logits", "no vocabulary", "SHAPE", _set(vocab=0)),
    ("score_logits", "an address off its element", "ALIGNMENT", _moved("logits")),
    ("score_logits", "an id outside the vocabulary", "KEY", _put("ids", 0, 8)),
    ("kv_append", "a missing array", "NULL_POINTER", _set(k=None)),
    ("kv_append", "an unknown dtype", "DTYPE", _set(dtype=4)),
    ("kv_append", "heads that overlap", "STRIDE", _set(v_head_stride=3)),
    ("kv_append", "rows and heads that overlap", "STRIDE", _set(k_stride=4)),
    ("kv_append", "a cache that cannot be addressed", "SHAPE", _set(slot_count=HUGE)),
    ("kv_append", "an address off its element", "ALIGNMENT", _moved("kv")),
    ("kv_append", "a slot outside the cache", "KEY", _put("slots", 0, 6)),
    ("kv_append by table", "a page outside the pool", "KEY", _put("block_table", 2, 3)),
    ("kv_append by table", "more new rows than tokens", "BATCH", _put("kv_len", 1)),
    ("kv_append by table", "bounds of another batch", "BATCH", _put("cu_q", 0, 1)),
    ("kv_copy_pages", "a missing array", "NULL_POINTER", _set(dst=None)),
    ("kv_copy_pages", "an unknown dtype", "DTYPE", _set(dtype=-1)),
    ("kv_copy_pages", "no layer", "SHAPE", _set(layers=0)),
    ("kv_copy_pages", "a pool that cannot be addressed", "SHAPE", _set(pages=HUGE)),
    ("kv_copy_pages", "an address off its element", "ALIGNMENT", _moved("src")),
    ("kv_copy_pages", "a page outside the pool", "KEY", _put("src", 0, 4)),
    ("kv_copy_pages", "a page written twice", "OVERLAP", _put("dst", 2, 2)),
    ("kv_copy_pages", "a page read and written", "OVERLAP", _put("dst", 2, 0)),
    ("kv_gather", "a missing array", "NULL_POINTER", _set(dense=None)),
    ("kv_gather", "a direction that is none", "SHAPE", _set(scatter=2)),
    ("kv_gather", "a page outside the pool", "KEY", _put("page_ids", 3, -1)),
    ("kv_swap", "a missing array", "NULL_POINTER", _set(host=None)),
    ("kv_swap", "a host pool without a slot", "SHAPE", _set(host_slots=0)),
    ("kv_swap", "a slot outside the host's pool", "KEY", _put("slots", 2, 3)),
    ("kv_swap", "a page outside the pool", "KEY", _put("page_ids", 4, 1)),
    ("kv_swap", "a slot written twice", "OVERLAP", _put("slots", 2, 2)),
    ("linear", "no thread", "SHAPE", _set(threads=0)),
)  # fmt: skip


@pytest.mark.parametrize("name", dict.fromkeys(name for name, *_ in BREAKS))
def test_calls_that_are_right_succeed(library: ctypes.CDLL, name: str) -> None:
    assert _status(library, name, _valid(name)) == "OK"


@pytest.mark.parametrize(("name", "what", "status", "change"), BREAKS, ids=[f"{b[0]}: {b[1]}" for b in BREAKS])
def test_what_is_wrong_has_its_code_and_nothing_is_written(
    library: ctypes.CDLL, name: str, what: str, status: str, change: Callable[[dict[str, Any]], None]
) -> None:
    fields = _valid(name)
    arrays = {field: value for field, value in fields.items() if isinstance(value, Tensor)}
    before = {field: value.clone() for field, value in arrays.items()}
    change(fields)
    assert _status(library, name, fields) == f"ERROR_{status}"
    assert all(torch.equal(value, before[field]) for field, value in arrays.items())


def test_an_instruction_set_that_is_not_there_has_its_code(library: ctypes.CDLL) -> None:
    assert library.atts_use_cpu_isa(b"z80") == STATUS["ERROR_ISA"]


def test_every_code_that_a_cpu_can_give_is_provoked_here() -> None:
    provoked = {f"ERROR_{status}" for _, _, status, _ in BREAKS}
    elsewhere = {"OK", "ERROR_ABI", "ERROR_NO_CUDA", "ERROR_ISA"}
    assert provoked | elsewhere | NEVER_ON_A_CPU == set(STATUS)


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
