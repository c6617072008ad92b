"""Every error code of the C ABI, from the form for the device (on the host's CUDA) and from that for the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch

from atts_engine.ops import native
from tests.abi import STATUS, params
from tests.cuda_host.calls import Form, cpu_form

Fields = dict[str, "torch.Tensor | int | float | None"]
HUGE = 1 << 62


def gate() -> Fields:
    long = torch.zeros(4, dtype=torch.int64)
    names = ("score", "level", "u", "greater", "ties", "n", "p", "key", "insert", "takeover")
    arrays: Fields = {name: torch.ones(4, dtype=torch.int64) for name in names}
    return arrays | {
        "key": long, "ring": torch.zeros(2, 4), "size": torch.zeros(2).long(), "head": torch.zeros(2).long(),
        "batch": 4, "keys": 2, "capacity": 4,
    }  # fmt: skip


def span_mean() -> Fields:
    arrays = {"logprob": torch.zeros(4), "cu_seqlens": torch.tensor([0, 2, 4]), "score": torch.zeros(2)}
    return {**arrays, "sum": torch.zeros(2).double(), "tokens": 4, "batch": 2}


def score_logits() -> Fields:
    arrays = {"logits": torch.zeros(4, 16), "ids": torch.zeros(4).long(), "logprob": torch.zeros(4)}
    spans = {name: span_mean()[name] for name in ("cu_seqlens", "score", "sum", "batch")}
    return {**arrays, **spans, "rows": 4, "vocab": 16, "logits_stride": 16, "dtype": 1, "threads": 1}


def kv_append() -> Fields:
    return {
        "k": torch.zeros(4, 2, 8), "v": torch.zeros(4, 2, 8), "kv": torch.zeros(2, 8, 2, 8), "q": torch.zeros(4, 2, 8),
        "q_out": torch.zeros(4, 2, 8), "cosine": torch.zeros(4, 4), "sine": torch.zeros(4, 4),
        "block_table": torch.tensor([[0, 1], [1, 0]], dtype=torch.int32),
        "cu_q": torch.tensor([0, 1, 4], dtype=torch.int32), "kv_len": torch.tensor([1, 7], dtype=torch.int32),
        "rows": 4, "kv_heads": 2, "head_dim": 8, "heads": 2, "k_stride": 16, "k_head_stride": 8, "v_stride": 16,
        "v_head_stride": 8, "q_stride": 16, "q_head_stride": 8, "q_out_stride": 16, "q_out_head_stride": 8,
        "slot_count": 8, "page": 4, "batch": 2, "table_width": 2, "dtype": 1,
    }  # fmt: skip


def append_to_slots() -> Fields:
    gone = ("block_table", "cu_q", "kv_len", "page", "batch", "table_width")
    kept = {name: value for name, value in kv_append().items() if name not in gone}
    return kept | {"slots": torch.arange(4)}


POOL: Fields = {"layers": 2, "pages": 4, "page": 2, "kv_heads": 2, "head_dim": 4, "count": 2, "dtype": 3}


def kv_copy_pages() -> Fields:
    kv = torch.zeros(2, 2, 4, 2, 2, 4, dtype=torch.bfloat16)
    return {**POOL, "kv": kv, "src": torch.tensor([0, 1]), "dst": torch.tensor([2, 3])}


def kv_gather() -> Fields:
    dense = torch.zeros(2, 2, 2, 2, 2, 4, dtype=torch.bfloat16)
    return {**POOL, "kv": kv_copy_pages()["kv"], "dense": dense, "page_ids": torch.tensor([2, 3])}


def kv_swap() -> Fields:
    fields = {name: value for name, value in kv_gather().items() if name != "dense"}
    pool = torch.zeros(3, 2, 2, 2, 2, 4, dtype=torch.bfloat16)
    return {**fields, "host": pool, "host_slots": 3, "slots": torch.tensor([2, 0]), "to_host": 1}


CALLS: dict[str, tuple[str, Callable[[], Fields]]] = {
    "gate": ("gate", gate),
    "span_mean": ("span_mean", span_mean),
    "score_logits": ("score_logits", score_logits),
    "kv_append": ("kv_append", kv_append),
    "kv_append, slots": ("kv_append", append_to_slots),
    "kv_copy_pages": ("kv_copy_pages", kv_copy_pages),
    "kv_gather": ("kv_gather", kv_gather),
    "kv_swap": ("kv_swap", kv_swap),
}
REFUSED: dict[str, list[tuple[str, str, int | None]]] = {
    "gate": [
        ("ABI", "struct_size", 8), ("SHAPE", "batch", -1), ("SHAPE", "keys", 0), ("SHAPE", "capacity", 0),
        ("SHAPE", "capacity", (1 << 28) + 1), ("SHAPE", "keys", HUGE),
    ],
    "span_mean": [("ABI", "struct_size", 0), ("SHAPE", "tokens", -1), ("SHAPE", "batch", HUGE)],
    "score_logits": [
        ("ABI", "struct_size", 119), ("SHAPE", "rows", -1), ("SHAPE", "vocab", 0), ("SHAPE", "vocab", -5),
        ("STRIDE", "logits_stride", 15), ("SHAPE", "logits_stride", HUGE), ("DTYPE", "dtype", 0), ("DTYPE", "dtype", 4),
        ("SHAPE", "batch", HUGE),
    ],
    "kv_append": [
        ("ABI", "struct_size", 239), ("SHAPE", "rows", -1), ("SHAPE", "kv_heads", 0), ("SHAPE", "head_dim", 7),
        ("SHAPE", "heads", 0), ("SHAPE", "slot_count", HUGE), ("SHAPE", "page", 0), ("SHAPE", "page", 3),
        ("SHAPE", "table_width", HUGE), ("STRIDE", "k_stride", 7), ("STRIDE", "v_head_stride", 7),
        ("STRIDE", "q_stride", 12), ("STRIDE", "q_out_stride", 0), ("SHAPE", "k_stride", HUGE), ("DTYPE", "dtype", 9),
        ("NULL_POINTER", "sine", None), ("NULL_POINTER", "cosine", None), ("NULL_POINTER", "q_out", None),
    ],
    "kv_append, slots": [
        ("SHAPE", "batch", 1), ("SHAPE", "slot_count", -1), ("NULL_POINTER", "cu_q", 8),
    ],
    "kv_copy_pages": [
        ("SHAPE", "layers", 0), ("SHAPE", "pages", HUGE), ("SHAPE", "page", -1), ("SHAPE", "head_dim", 0),
        ("SHAPE", "count", -1), ("DTYPE", "dtype", 0),
    ],
    "kv_gather": [("SHAPE", "scatter", 2), ("SHAPE", "kv_heads", 0), ("SHAPE", "count", HUGE), ("DTYPE", "dtype", 5)],
    "kv_swap": [
        ("SHAPE", "to_host", 2), ("SHAPE", "host_slots", 0), ("SHAPE", "host_slots", HUGE), ("DTYPE", "dtype", 0),
    ],
}  # fmt: skip
"""(code, field, value) of one field that is wrong in an otherwise sound call."""
OPTIONAL = {"slots": "kv_append", "q": "kv_append", "cu_seqlens": "score_logits"}
"""Arrays that may be missing, and the ops where they may; REFUSED has the combinations that may not."""
BYTES = ("insert", "takeover")
BAD_VALUES: list[tuple[str, str, str, list[int]]] = [
    ("KEY", "gate", "key", [0, 0, 2, 0]), ("VALUE", "gate", "level", [1, -1, 1, 1]),
    ("VALUE", "gate", "u", [1, 0, 1, 1]), ("STORE", "gate", "size", [5, 0]), ("STORE", "gate", "head", [4, 0]),
    ("BATCH", "span_mean", "cu_seqlens", [0, 2, 3]), ("BATCH", "span_mean", "cu_seqlens", [0, 4, 4]),
    ("KEY", "score_logits", "ids", [0, 16, 0, 0]), ("BATCH", "score_logits", "cu_seqlens", [1, 2, 4]),
    ("KEY", "kv_append, slots", "slots", [0, 8, 1, 2]), ("KEY", "kv_append", "block_table", [0, 1, 1, 2]),
    ("BATCH", "kv_append", "cu_q", [0, 1, 3]), ("BATCH", "kv_append", "kv_len", [0, 7]),
    ("BATCH", "kv_append", "kv_len", [1, 9]), ("KEY", "kv_copy_pages", "src", [4, 0]),
    ("KEY", "kv_copy_pages", "dst", [2, -1]), ("OVERLAP", "kv_copy_pages", "dst", [1, 3]),
    ("OVERLAP", "kv_copy_pages", "dst", [3, 3]), ("KEY", "kv_gather", "page_ids", [4, 0]),
    ("OVERLAP", "kv_swap", "slots", [2, 2]),
]  # fmt: skip
"""(code, call, array, its content) that only the form for the CPU can refuse."""


def pin(library: ctypes.CDLL, fields: Fields) -> None:
    """The pool of a swap is host memory, as the form for the device wants it."""
    pool = fields.get("host")
    if isinstance(pool, torch.Tensor):
        library.cuda_host_memory(ctypes.c_void_p(pool.data_ptr()), ctypes.c_uint64(pool.nbytes), 1, 0)


@pytest.fixture(params=["device", "cpu"])
def either(request: pytest.FixtureRequest, device: Form) -> Form:
    return device if request.param == "device" else cpu_form()


@pytest.mark.parametrize("name", CALLS)
def test_the_calls_below_are_sound_but_for_one_thing(name: str, host: ctypes.CDLL, either: Form) -> None:
    op, fields = CALLS[name][0], CALLS[name][1]()
    pin(host, fields)
    assert either(op, **fields) == 0


@pytest.mark.parametrize("name", CALLS)
def test_fields_that_are_wrong(name: str, either: Form) -> None:
    op, make = CALLS[name]
    for code, field, value in REFUSED[name]:
        assert (field, value, either(op, **{**make(), field: value})) == (field, value, STATUS[f"ERROR_{code}"])


@pytest.mark.parametrize("name", CALLS)
def test_arrays_that_are_missing_or_not_aligned(name: str, either: Form) -> None:
    op, make = CALLS[name]
    for array, tensor in make().items():
        if not isinstance(tensor, torch.Tensor):
            continue
        if OPTIONAL.get(array) != op:
            assert (array, either(op, **{**make(), array: None})) == (array, STATUS["ERROR_NULL_POINTER"])
        if array not in BYTES:
            odd = {**make(), array: tensor.data_ptr() + 1}
            assert (array, either(op, **odd)) == (array, STATUS["ERROR_ALIGNMENT"])


@pytest.mark.parametrize(("code", "name", "array", "content"), BAD_VALUES)
def test_values_that_the_host_can_see(code: str, name: str, array: str, content: list[int]) -> None:
    op, fields = CALLS[name][0], CALLS[name][1]()
    before = {key: value.clone() for key, value in fields.items() if isinstance(value, torch.Tensor)}
    tensor = fields[array]
    assert isinstance(tensor, torch.Tensor)
    tensor.view(-1).copy_(torch.tensor(content))
    assert cpu_form()(op, **fields) == STATUS[f"ERROR_{code}"]
    for key, value in before.items():  # nothing was written
        assert key == array or torch.equal(fields[key], value)  # type: ignore[arg-type]


def test_what_is_written_by_a_scatter_or_swap_is_named_once() -> None:
    for name in ("kv_gather", "kv_swap"):
        fields = {**CALLS[name][1](), "page_ids": torch.tensor([1, 1])}
        assert cpu_form()(name, **fields) == 0
        way = {"scatter": 1} if name == "kv_gather" else {"to_host": 0}
        assert cpu_form()(name, **{**fields, **way}) == STATUS["ERROR_OVERLAP"]


def test_lists_of_a_swap_are_checked_by_both_forms(host: ctypes.CDLL, either: Form) -> None:
    for array, content in (("page_ids", [4, 0]), ("slots", [3, 0]), ("slots", [-1, 0])):
        fields = {**kv_swap(), array: torch.tensor(content)}
        pin(host, fields)
        assert either("kv_swap", **fields) == STATUS["ERROR_KEY"]


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("gate", "ring"), ("span_mean", "cu_seqlens"), ("score_logits", "logits"), ("kv_append", "kv"),
        ("kv_copy_pages", "kv"), ("kv_gather", "kv"), ("kv_gather", "dense"), ("kv_swap", "kv"),
    ],
)  # fmt: skip
def test_memory_of_the_wrong_device(host: ctypes.CDLL, device: Form, name: str, array: str) -> None:
    for kind, number in ((0, 0), (1, 0), (2, 1)):  # pageable, pinned, of another device
        fields = CALLS[name][1]()
        host.cuda_host_forget_memory()
        pin(host, fields)
        tensor = fields[array]
        assert isinstance(tensor, torch.Tensor)
        host.cuda_host_memory(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_uint64(tensor.nbytes), kind, number)
        assert device(name, **fields) == STATUS["ERROR_DEVICE"]


def test_a_swap_wants_pinned_memory(device: Form) -> None:
    assert device("kv_swap", **kv_swap()) == STATUS["ERROR_DEVICE"]


def test_workspaces(host: ctypes.CDLL, device: Form) -> None:
    wide = {**score_logits(), "logits": torch.zeros(4, 20000), "vocab": 20000, "logits_stride": 20000}
    long = {**gate(), "ring": torch.zeros(2, 5000), "capacity": 5000}
    for op, fields in (("score_logits", wide), ("gate", long)):
        needed = ctypes.c_uint64()
        query = getattr(host, f"atts_{op}_workspace")
        assert query(ctypes.byref(params(op, **fields)), ctypes.byref(needed)) == 0
        room = torch.zeros(needed.value // 8 + 2, dtype=torch.int64)
        at = room.data_ptr() + room.data_ptr() % 16
        assert device(op, **fields, workspace=at, workspace_bytes=needed.value) == 0
        assert device(op, **fields, workspace=at, workspace_bytes=needed.value - 1) == STATUS["ERROR_WORKSPACE"]
        assert device(op, **fields, workspace=at + 8, workspace_bytes=needed.value) == STATUS["ERROR_ALIGNMENT"]
        assert query(None, ctypes.byref(needed)) == query(ctypes.byref(params(op, **fields)), None) == 2
        assert query(ctypes.byref(params(op, **{**fields, "struct_size": 1})), ctypes.byref(needed)) == 1
        assert query(ctypes.byref(params(op, **{**fields, "batch": -1})), ctypes.byref(needed)) == STATUS["ERROR_SHAPE"]


def test_a_launch_of_too_many_blocks(device: Form) -> None:
    rows = 1 << 36
    assert device("kv_append", **{**append_to_slots(), "rows": rows}) == STATUS["ERROR_SHAPE"]
    assert device("score_logits", **{**score_logits(), "rows": rows}) == STATUS["ERROR_SHAPE"]
    assert device("kv_copy_pages", **{**kv_copy_pages(), "count": rows}) == STATUS["ERROR_SHAPE"]
    assert device("span_mean", **{**span_mean(), "batch": rows}) == STATUS["ERROR_SHAPE"]
    assert device("gate", **{**gate(), "batch": rows, "keys": rows}) == STATUS["ERROR_SHAPE"]


def test_a_launch_that_fails(host: ctypes.CDLL, device: Form) -> None:
    host.cuda_host_launches_fail(1)
    for name, (op, make) in CALLS.items():
        assert name == "kv_swap" or device(op, **make()) == STATUS["ERROR_CUDA"]
    host.cuda_host_launches_fail(0)


def test_no_params_at_all(host: ctypes.CDLL) -> None:
    for op, _ in CALLS.values():
        assert getattr(host, f"atts_{op}")(None, None) == STATUS["ERROR_NULL_POINTER"]


def test_a_library_without_cuda_says_so() -> None:
    installed = native.library()
    if installed is None or installed.atts_has_cuda():
        pytest.skip("csrc/ was not built at installation, or was built with CUDA")
    for op, _ in CALLS.values():
        assert getattr(installed, f"atts_{op}")(None, None) == STATUS["ERROR_NO_CUDA"]


def test_every_code_has_a_line() -> None:
    installed = native.library()
    if installed is None:
        pytest.skip("csrc/ was not built at installation: CMake and a C++ compiler are needed")
    lines = [installed.atts_strerror(code) for code in STATUS.values()]
    assert len(set(lines)) == len(lines) and b"unknown status" not in lines
