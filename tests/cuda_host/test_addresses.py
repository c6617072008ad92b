"""Offsets that 32 bits do not hold, in elements and in bytes: arrays of many GiB of which a few pages are touched."""

from __future__ import annotations

import mmap

import pytest
import torch

from tests.abi import DTYPES
from tests.cuda_host.calls import Form, random

ONE = 1 << 32


def sparse(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """A tensor of zeros that takes memory where it is written."""
    count = torch.Size(shape).numel()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    try:
        pages = mmap.mmap(-1, count * dtype.itemsize, flags=flags)
    except OSError as error:
        pytest.skip(f"this machine lends no address space of {count * dtype.itemsize >> 30} GiB: {error}")
    return torch.frombuffer(pages, dtype=dtype, count=count).view(shape)


def test_rows_of_logits_far_apart(form: Form) -> None:
    stride = ONE + 8
    logits = sparse(stride + 100)
    rows = logits.as_strided((2, 100), (stride, 1))
    rows.copy_(random(2, 100, scale=3.0))
    ids, logprob = torch.tensor([3, 99]), torch.zeros(2)
    sizes = {"rows": 2, "vocab": 100, "logits_stride": stride, "dtype": DTYPES[torch.float16], "threads": 1}
    assert form("score_logits", logits=logits, ids=ids, logprob=logprob, **sizes) == 0
    wanted = torch.log_softmax(rows.float(), 1).gather(1, ids[:, None])[:, 0]
    torch.testing.assert_close(logprob, wanted, rtol=0, atol=1e-5)


def test_slots_far_behind(form: Form) -> None:
    slot_count, rows = 1 << 27, 2
    kv = sparse(2, slot_count, 2, 16)  # 2^33 elements
    k, v = random(rows, 2, 16, dtype=torch.float16), random(rows + 1, 2, 16, dtype=torch.float16)[1:]
    slots = torch.tensor([slot_count - 1, 5])
    sizes = {"rows": rows, "kv_heads": 2, "head_dim": 16, "slot_count": slot_count, "dtype": DTYPES[torch.float16]}
    strides = {"k_stride": 32, "k_head_stride": 16, "v_stride": 32, "v_head_stride": 16}
    assert form("kv_append", k=k, v=v, kv=kv, slots=slots, **sizes, **strides) == 0
    assert torch.equal(kv[0, slots], k) and torch.equal(kv[1, slots], v)


def test_pages_far_behind(form: Form) -> None:
    pages = 1 << 18
    kv = sparse(2, 2, pages, 4, 2, 1024)  # 2^33 elements
    kv[:, :, 7] = random(2, 2, 4, 2, 1024)
    sizes = {"layers": 2, "pages": pages, "page": 4, "kv_heads": 2, "head_dim": 1024, "dtype": DTYPES[torch.float16]}
    last = torch.tensor([pages - 1])
    assert form("kv_copy_pages", kv=kv, src=torch.tensor([7]), dst=last, count=1, **sizes) == 0
    assert torch.equal(kv[:, :, pages - 1], kv[:, :, 7])
    dense = torch.zeros(1, 2, 2, 4, 2, 1024, dtype=torch.float16)
    assert form("kv_gather", kv=kv, dense=dense, page_ids=last, count=1, **sizes) == 0
    assert torch.equal(dense[0], kv[:, :, 7])


def test_keys_far_behind(form: Form) -> None:
    keys, capacity = 1 << 20, 1 << 13
    ring = sparse(keys, capacity, dtype=torch.float32)  # 2^33 elements
    ring[-1, :3] = torch.tensor([1.0, 2.0, 3.0])
    size, head = sparse(keys, dtype=torch.int64), sparse(keys, dtype=torch.int64)
    size[-1] = head[-1] = 3
    long = {name: torch.zeros(1, dtype=torch.int64) for name in ("greater", "ties", "n")}
    inputs = {
        "score": torch.tensor([2.0]), "key": torch.tensor([keys - 1]), "level": torch.tensor([ONE // 2]),
        "u": torch.tensor([ONE]), "insert": torch.tensor([True]), "takeover": torch.zeros(1, dtype=torch.bool),
        "p": torch.zeros(1, dtype=torch.float64),
    }  # fmt: skip
    store = {"ring": ring, "size": size, "head": head}
    assert form("gate", **inputs, **long, **store, batch=1, keys=keys, capacity=capacity) == 0
    assert [int(value) for value in long.values()] == [1, 1, 3]
    assert float(inputs["p"]) == 0.75 and not inputs["takeover"]
    assert ring[-1, :5].tolist() == [1, 2, 3, 2, 0] and int(size[-1]) == 4
