"""The paged cache: the CUDA kernels of csrc/ on the host, and their forms for the CPU, against torch."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atts_engine import ops
from tests.abi import DTYPES, STATUS
from tests.cuda_host.calls import Form, counts, device_form, random

# kv_append ----------------------------------------------------------------------------------------------------------


def append_case(
    dtype: torch.dtype, kv_heads: int, heads: int, dim: int, layout: str
) -> tuple[dict[str, torch.Tensor | int | None], dict[str, torch.Tensor]]:
    """Fields of a call for 13 rows of three sequences, and what it must leave in kv and q_out."""
    page, pages, lengths, news = 4, 9, [9, 3, 12], [5, 1, 7]
    rows = sum(news)
    # One projection's output: queries, keys and values of a token side by side, as a fused layer leaves them.
    width = (heads + 2 * kv_heads) * dim
    gap = {"dense": 0, "odd": 1}[layout]
    fused = random(rows, width + gap, dtype=dtype)[:, :width].view(rows, -1, dim)
    q, k, v = fused.split((heads, kv_heads, kv_heads), dim=1)
    table = torch.tensor([[7, 0, 3], [1, -5, -5], [8, 2, 5]], dtype=torch.int32)
    cu_q = torch.tensor([0, *news]).cumsum(0).int()
    slots = [
        int(table[b, t // page]) * page + t % page
        for b, (length, new) in enumerate(zip(lengths, news, strict=True))
        for t in range(length - new, length)
    ]
    kv = random(2, pages * page, kv_heads, dim, dtype=dtype)
    angle = random(rows, dim // 2, scale=3.0)
    cosine, sine = angle.cos(), angle.sin()
    turned = bool(heads)
    wanted = kv.clone()
    wanted[0, slots] = ops.rope(k, cosine, sine) if turned else k
    wanted[1, slots] = v
    q_out = torch.zeros(rows, heads, dim, dtype=dtype)
    wanted_q = ops.rope(q, cosine, sine) if heads else q_out
    fields: dict[str, torch.Tensor | int | None] = {
        "k": k, "v": v, "kv": kv, "rows": rows, "kv_heads": kv_heads, "head_dim": dim, "heads": heads,
        "k_stride": k.stride(0), "k_head_stride": dim, "v_stride": v.stride(0), "v_head_stride": dim,
        "slot_count": pages * page, "dtype": DTYPES[dtype],
        "block_table": table, "cu_q": cu_q, "kv_len": torch.tensor(lengths, dtype=torch.int32),
        "page": page, "batch": 3, "table_width": 3,
    }  # fmt: skip
    if turned:
        fields |= {
            "cosine": cosine, "sine": sine, "q": q, "q_out": q_out, "q_stride": q.stride(0), "q_head_stride": dim,
            "q_out_stride": heads * dim, "q_out_head_stride": dim,
        }  # fmt: skip
    slot_tensor = torch.tensor(slots)
    return fields, {"kv": wanted, "q_out": wanted_q, "slots": slot_tensor}


def with_slots(
    fields: dict[str, torch.Tensor | int | None], slots: torch.Tensor
) -> dict[str, torch.Tensor | int | None]:
    gone = ("block_table", "cu_q", "kv_len", "page", "batch", "table_width")
    return {**{name: value for name, value in fields.items() if name not in gone}, "slots": slots}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["dense", "odd"])
@pytest.mark.parametrize(("kv_heads", "heads", "dim"), [(1, 3, 16), (2, 4, 64), (3, 0, 20), (1, 2, 6), (2, 0, 5)])
def test_append_writes_its_slots_and_turns_keys_and_queries(
    form: Form, dtype: torch.dtype, kv_heads: int, heads: int, dim: int, layout: str
) -> None:
    for named in (False, True):
        fields, wanted = append_case(dtype, kv_heads, heads, dim, layout)
        assert form("kv_append", **(with_slots(fields, wanted["slots"]) if named else fields)) == 0
        assert torch.equal(fields["kv"], wanted["kv"])  # type: ignore[arg-type]
        if heads:
            assert torch.equal(fields["q_out"], wanted["q_out"])  # type: ignore[arg-type]


@settings(max_examples=25)
@given(st.data())
def test_append_of_any_batch(host: ctypes.CDLL, data: st.DataObject) -> None:
    """Sequences without a row, pages of any size, prefixes of any length: each token goes where its table says."""
    news = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=40))
    page = data.draw(st.integers(1, 9))
    lengths = [new + data.draw(st.integers(0, 20)) for new in news]
    width = max(1, -(-max(lengths) // page))
    pages = len(news) * width
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(pages)).int().view(-1, width)
    rows, slots = sum(news), []
    for b, (length, new) in enumerate(zip(lengths, news, strict=True)):
        slots += [int(order[b, t // page]) * page + t % page for t in range(length - new, length)]
    k, v = random(rows, 1, 4), random(rows + 1, 1, 4)[1:]
    kv = torch.zeros(2, pages * page, 1, 4)
    wanted = kv.clone()
    wanted[0, slots], wanted[1, slots] = k, v
    cu_q, kv_len = torch.tensor([0, *news]).cumsum(0).int(), torch.tensor(lengths, dtype=torch.int32)
    status = device_form(host, rows)(
        "kv_append", k=k, v=v, kv=kv, block_table=order, cu_q=cu_q, kv_len=kv_len, rows=rows, kv_heads=1, head_dim=4,
        k_stride=4, k_head_stride=4, v_stride=4, v_head_stride=4, slot_count=pages * page, page=page, batch=len(news),
        table_width=width, dtype=1,
    )  # fmt: skip
    assert status == 0 and torch.equal(kv, wanted)


def test_queries_may_be_turned_in_place(form: Form) -> None:
    fields, wanted = append_case(torch.bfloat16, 2, 4, 64, "dense")
    in_place = {"q_out": fields["q"], "q_out_stride": fields["q_stride"]}
    assert form("kv_append", **{**fields, **in_place}) == 0
    assert torch.equal(fields["q"], wanted["q_out"]) and torch.equal(fields["kv"], wanted["kv"])  # type: ignore[arg-type]


def test_rows_of_padding_write_nothing(form: Form) -> None:
    fields, wanted = append_case(torch.float32, 2, 0, 8, "dense")
    before = fields["kv"].clone()  # type: ignore[union-attr]
    slots = wanted["slots"].clone()
    slots[3] = -1
    assert form("kv_append", **with_slots(fields, slots)) == 0
    wanted["kv"][:, wanted["slots"][3]] = before[:, wanted["slots"][3]]
    assert torch.equal(fields["kv"], wanted["kv"])  # type: ignore[arg-type]


def test_rows_outside_the_cache_write_nothing_on_a_device(device: Form) -> None:
    for name, value, row, status in (("slots", 36, 2, "KEY"), ("block_table", 9, 1, "KEY"), ("kv_len", 4, 0, "BATCH")):
        fields, wanted = append_case(torch.float16, 2, 0, 16, "dense")
        before, error = fields["kv"].clone(), torch.zeros(1, dtype=torch.int32)  # type: ignore[union-attr]
        if name == "slots":
            fields = with_slots(fields, wanted["slots"].clone())
        fields[name].view(-1)[row] = value  # type: ignore[union-attr]
        assert device("kv_append", **fields, error=error) == 0
        assert error.item() == STATUS[f"ERROR_{status}"]
        changed = (fields["kv"] != before).flatten(2).any(2).all(0)  # type: ignore[union-attr]
        assert changed.sum() < 13 and not torch.equal(fields["kv"], wanted["kv"])  # type: ignore[arg-type]
    # A launch that was captured for 13 rows, with fewer today.
    fields, wanted = append_case(torch.float16, 2, 4, 16, "dense")
    fields["cu_q"][3] = 9  # type: ignore[index]
    fields["kv_len"][2] = 8  # type: ignore[index]
    before, error = fields["kv"].clone(), torch.zeros(1, dtype=torch.int32)  # type: ignore[union-attr]
    assert device("kv_append", **fields, error=error) == 0
    wanted["kv"][:, wanted["slots"][9:]] = before[:, wanted["slots"][9:]]
    assert torch.equal(fields["kv"], wanted["kv"]) and error.item() == 0  # type: ignore[arg-type]
    assert not fields["q_out"][9:].any()  # type: ignore[index]


# Pages --------------------------------------------------------------------------------------------------------------

PAGE_SHAPES = [(2, 7, 4, 2, 16), (1, 5, 3, 1, 3), (3, 4, 16, 4, 80)]
"""(layers, pages, page, kv_heads, head_dim): vectors, single elements, more than one chunk of a page."""


def pool_of(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, dict[str, int]]:
    layers, pages, page, kv_heads, dim = shape
    kv = random(layers, 2, pages, page, kv_heads, dim, dtype=dtype)
    names = ("layers", "pages", "page", "kv_heads", "head_dim")
    return kv, {**dict(zip(names, shape, strict=True)), "dtype": DTYPES[dtype]}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", PAGE_SHAPES)
def test_pages_are_copied_gathered_and_scattered(form: Form, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    kv, sizes = pool_of(shape, dtype)
    wanted = kv.clone()
    src, dst = torch.tensor([0, 0, 2]), torch.tensor([3, 1, shape[1] - 1])
    if shape[1] == 4:
        src, dst = src[:2], dst[:2]
    ops.kv_copy_pages(wanted, src, dst)
    assert form("kv_copy_pages", kv=kv, src=src, dst=dst, count=len(src), **sizes) == 0
    assert torch.equal(kv, wanted)
    dense = torch.zeros(len(dst), shape[0], 2, *shape[2:], dtype=dtype)
    assert form("kv_gather", kv=kv, dense=dense, page_ids=dst, count=len(dst), **sizes) == 0
    assert torch.equal(dense, kv.movedim(2, 0)[dst]) and torch.equal(kv, wanted)
    other = torch.zeros_like(kv)
    assert form("kv_gather", kv=other, dense=dense, page_ids=dst, count=len(dst), scatter=1, **sizes) == 0
    assert torch.equal(other.movedim(2, 0)[dst], dense)
    assert other.count_nonzero() == dense.count_nonzero()


def test_pages_outside_the_pool_are_left_out_on_a_device(device: Form) -> None:
    kv, sizes = pool_of(PAGE_SHAPES[0], torch.float16)
    wanted, error = kv.clone(), torch.zeros(1, dtype=torch.int32)
    ops.kv_copy_pages(wanted, torch.tensor([1]), torch.tensor([4]))
    pages = {"src": torch.tensor([0, 1, -1]), "dst": torch.tensor([7, 4, 5])}
    assert device("kv_copy_pages", kv=kv, **pages, count=3, error=error, **sizes) == 0
    assert torch.equal(kv, wanted) and error.item() == STATUS["ERROR_KEY"]


@pytest.mark.parametrize("shape", PAGE_SHAPES)
def test_pages_swap_to_the_host_and_back(form: Form, host: ctypes.CDLL, shape: tuple[int, ...]) -> None:
    kv, sizes = pool_of(shape, torch.bfloat16)
    pool = torch.zeros(6, shape[0], 2, *shape[2:], dtype=torch.bfloat16)
    host.cuda_host_memory(ctypes.c_void_p(pool.data_ptr()), ctypes.c_uint64(2 * pool.numel()), 1, 0)
    pages, slots = torch.tensor([3, 0, 2]), torch.tensor([5, 1, 2])
    lists = {"page_ids": pages, "slots": slots, "count": 3, "host_slots": 6}
    wanted, wanted_pool = kv.clone(), pool.clone()
    ops.kv_swap(wanted, wanted_pool, pages, slots, True)
    assert form("kv_swap", kv=kv, host=pool, **lists, **sizes, to_host=1) == 0
    assert torch.equal(pool, wanted_pool) and torch.equal(kv, wanted)
    kv.zero_()
    assert form("kv_swap", kv=kv, host=pool, **lists, **sizes, to_host=0) == 0
    assert torch.equal(kv[:, :, pages], wanted[:, :, pages])
    host.cuda_host_forget_memory()


@pytest.mark.parametrize(
    ("stream", "batches", "way"),
    [(2, 1, "batches"), (2, 0, "rectangles"), (None, 1, "rectangles"), (1, 1, "rectangles"), (3, 1, "rectangles")],
)
def test_the_way_a_swap_takes(host: ctypes.CDLL, device: Form, stream: int | None, batches: int, way: str) -> None:
    """In batches, unless the driver has none, or the stream is the default one or being captured."""
    kv, sizes = pool_of((70, 4, 1, 1, 2), torch.float32)
    pool = torch.zeros(3, 70, 2, 1, 1, 2)
    host.cuda_host_memory(ctypes.c_void_p(pool.data_ptr()), ctypes.c_uint64(4 * pool.numel()), 1, 0)
    host.cuda_host_batches(batches)
    pages, slots = torch.tensor([3, 0]), torch.tensor([0, 2])
    lists = {"page_ids": pages, "slots": slots, "count": 2, "host_slots": 3}
    assert device("kv_swap", stream, kv=kv, host=pool, **lists, **sizes, to_host=1) == 0
    assert torch.equal(pool[slots], kv.movedim(2, 0)[pages])
    used = counts(host)
    assert (used["batches"], used["batched"]) == ((2, 280) if way == "batches" else (0, 0))
    assert used["rectangles"] == (2 if way == "rectangles" else 0)
