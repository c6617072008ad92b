"""What ops refuse before they launch: shapes, dtypes and devices always, since the host knows them; values where that
is cheap on a CPU, and on any device inside `checked()`, since reading them back waits for the device.

One function per op, called on its first line. Those that run in every layer compare inline and leave it to `_misfit` to
find the words.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from atts_engine.errors import InputError
from atts_engine.ops.packed import Weight

_FP32, _FP16, _BF16, _INT32, _INT64 = torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64
FLOATS = (_FP32, _FP16, _BF16)
LEVEL_ONE = 1 << 32
"""The integer that stands for a level, or a uniform, of 1."""
_Dtypes = tuple[torch.dtype, ...]


class _Values:
    """Whether values are looked into on every device. The process's own, like the choice of implementation: lanes run
    in threads."""

    on: bool = False


def checked(on: bool = True) -> AbstractContextManager[None]:
    """Look into the values of every op's inputs from here on (or no longer), on any device; also a context manager that
    restores what was set before. A CUDA graph cannot be captured meanwhile, and `capturable` says so."""
    before, _Values.on = _Values.on, on

    @contextmanager
    def restored() -> Iterator[None]:
        try:
            yield
        finally:
            _Values.on = before

    return restored()


# What the functions below are made of ---------------------------------------------------------------------------------


def tensor(op: str, name: str, x: Weight, shape: tuple[int, ...], dtypes: _Dtypes, like: Tensor) -> None:
    """x must have this shape (-1: any size), one of the dtypes, and the device of `like`."""
    if (
        x.dtype not in dtypes
        or x.device != like.device
        or len(x.shape) != len(shape)
        or any(wanted not in (-1, size) for wanted, size in zip(shape, x.shape, strict=True))
    ):
        wanted = f"[{', '.join('any' if size < 0 else str(size) for size in shape)}] {_names(dtypes)} on {like.device}"
        raise InputError(f"{op}: {name} does not fit: it must be {wanted}, not {_described(x)}")


def dense(op: str, name: str, x: Tensor) -> None:
    """x must be contiguous: the op writes to it, or kernels take its strides for granted."""
    if not x.is_contiguous():
        raise InputError(f"{op}: {name} must be contiguous, not {list(x.shape)} with strides {list(x.stride())}")


def rows_without_gaps(op: str, name: str, x: Tensor) -> None:
    """The last dimension of x must lie side by side in memory."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise InputError(f"{op}: the rows of {name} have gaps: its last stride is {x.stride(-1)}, not 1")


def within(op: str, name: str, x: Tensor, low: int, high: int, of: str) -> None:
    """Every value of an integer tensor must be in low .. high - 1. Reads x back."""
    if x.numel():
        least, most = (int(value) for value in x.aminmax())
        if least < low or most >= high:
            worst = least if least < low else most
            raise InputError(f"{op}: {name} holds {worst}, which is outside {of} ({low} .. {high - 1})")


def distinct(op: str, name: str, x: Tensor) -> None:
    """No value may stand in x twice: which of two writes stays is not defined. Reads x back."""
    if x.unique().numel() != x.numel():
        ordered = x.sort().values
        twice = int(ordered[1:][ordered[1:] == ordered[:-1]][0])
        raise InputError(f"{op}: {name} names {twice} twice; which write stays is not defined")


def apart(op: str, name: str, x: Tensor, other: str, y: Tensor) -> None:
    """x, which is read, must not share memory with y, which is written."""
    if x.numel() and y.numel() and x.device == y.device:
        x_start, y_start = x.data_ptr(), y.data_ptr()
        if x_start < y_start + _span(y) and y_start < x_start + _span(x):
            raise InputError(f"{op}: {name} lies in the memory of {other}, which the op writes")


def _span(x: Tensor) -> int:
    """Bytes from the first element to the end of the last; strides are not negative in torch."""
    reach = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (reach + 1) * x.element_size()


def in_force() -> bool:
    """Whether values are looked into on every device now."""
    return _Values.on


def values_read(x: Tensor) -> bool:
    """Whether values on the device of x are looked into: always on a CPU, elsewhere inside `checked()`."""
    return _Values.on or not x.is_cuda


def _names(dtypes: _Dtypes) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _described(x: Weight) -> str:
    return f"{list(x.shape)} {_names((x.dtype,))} on {x.device}"


def _misfit(op: str, first: Tensor, *wanted: tuple[str, Weight, tuple[int, ...], _Dtypes]) -> None:
    """Say which of an op's tensors does not fit; `first` gives the device."""
    for name, x, shape, dtypes in wanted:
        tensor(op, name, x, shape, dtypes, first)


def _side(x: Tensor, dim: int) -> int:
    """Size of a dimension; -1, which fits anything, where x has no such dimension."""
    return x.shape[dim] if x.dim() > dim else -1


# Dense ----------------------------------------------------------------------------------------------------------------


def linear(x: Tensor, weight: Weight, bias: Tensor | None) -> None:
    if (
        x.dim() != 2
        or len(weight.shape) != 2
        or x.shape[1] != weight.shape[1]
        or x.dtype is not weight.dtype
        or x.device != weight.device
    ):
        own = (x.dtype,)
        _misfit("linear", x, ("x", x, (-1, -1), own), ("weight", weight, (-1, _side(x, 1)), own))
    if bias is not None:
        tensor("linear", "bias", bias, (weight.shape[0],), (x.dtype,), x)


def rms_norm(x: Tensor, weight: Tensor) -> None:
    if x.dim() not in (2, 3) or weight.shape != x.shape[-1:] or x.dtype not in FLOATS or _differ(x, weight):
        sides = (-1, -1, -1) if x.dim() == 3 else (-1, -1)
        _misfit("rms_norm", x, ("x", x, sides, FLOATS), ("weight", weight, (_side(x, x.dim() - 1),), (x.dtype,)))


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor) -> None:
    shape = x.shape
    if (
        len(shape) != 2
        or delta.shape != shape
        or weight.shape != shape[1:]
        or x.dtype not in FLOATS
        or _differ(x, delta)
        or _differ(x, weight)
    ):
        own = (x.dtype,)
        width = _side(x, 1)
        found = (
            ("x", x, (-1, -1), FLOATS),
            ("delta", delta, (_side(x, 0), width), own),
            ("weight", weight, (width,), own),
        )
        _misfit("add_rms_norm", x, *found)


def silu_mul(gate: Tensor, up: Tensor) -> None:
    if gate.dim() != 2 or up.shape != gate.shape or gate.dtype not in FLOATS or _differ(gate, up):
        found = ("gate", gate, (-1, -1), FLOATS), ("up", up, (_side(gate, 0), _side(gate, 1)), (gate.dtype,))
        _misfit("silu_mul", gate, *found)


def rope(x: Tensor, cos: Tensor, sin: Tensor, op: str = "rope", name: str = "x") -> None:
    shape = x.shape
    if (
        len(shape) != 3
        or shape[2] % 2
        or cos.shape != (shape[0], shape[2] // 2)
        or sin.shape != cos.shape
        or cos.dtype is not _FP32
        or x.dtype not in FLOATS
        or _differ(cos, sin)
        or x.device != cos.device
    ):
        tensor(op, name, x, (-1, -1, -1), FLOATS, x)
        if shape[2] % 2:
            raise InputError(f"{op}: {name} has heads of {shape[2]} elements, which do not halve")
        halves = (shape[0], shape[2] // 2)
        _misfit(op, x, ("cos", cos, halves, (_FP32,)), ("sin", sin, halves, (_FP32,)))


def _differ(x: Tensor, y: Tensor) -> bool:
    """In dtype or device."""
    return x.dtype is not y.dtype or x.device != y.device


# Paging ---------------------------------------------------------------------------------------------------------------


def kv_slots(positions: Tensor, block_table: Tensor, cu_q: Tensor, page: int) -> None:
    if (
        positions.dim() != 1
        or block_table.dim() != 2
        or cu_q.shape != (block_table.shape[0] + 1,)
        or (positions.dtype, block_table.dtype, cu_q.dtype) != (_INT64, _INT32, _INT32)
        or not (positions.device == block_table.device == cu_q.device)
    ):
        table = ("block_table", block_table, (-1, -1), (_INT32,))
        bounds = ("cu_q", cu_q, (_side(block_table, 0) + 1,), (_INT32,))
        _misfit("kv_slots", positions, ("positions", positions, (-1,), (_INT64,)), table, bounds)
    if page < 1:
        raise InputError(f"kv_slots: a page holds at least one token, not {page}")
    if _Values.on:
        within("kv_slots", "positions", positions, 0, block_table.shape[1] * page, "a row of the block table")


def kv_append(k: Tensor, v: Tensor, kv_layer: Tensor, slots: Tensor, op: str = "kv_append") -> None:
    if (
        kv_layer.dim() != 5
        or k.dim() != 3
        or k.shape != v.shape
        or k.shape[1:] != kv_layer.shape[3:]
        or slots.shape != k.shape[:1]
        or slots.dtype is not _INT64
        or _differ(k, v)
        or k.device != kv_layer.device
        or slots.device != k.device
    ):
        heads = (_side(kv_layer, 3), _side(kv_layer, 4))
        cache = ("kv_layer", kv_layer, (2, -1, -1, -1, -1), FLOATS)
        rows = ("k", k, (-1, *heads), FLOATS), ("v", v, (_side(k, 0), *heads), (k.dtype,))
        _misfit(op, kv_layer, cache, *rows, ("slots", slots, (_side(k, 0),), (_INT64,)))
    dense(op, "kv_layer", kv_layer)
    if _Values.on:
        within(op, "slots", slots, 0, kv_layer.shape[1] * kv_layer.shape[2], "the cache")
        # Rows that only fill a step up all write to page 0, which holds nobody's tokens.
        distinct(op, "slots", slots[slots >= kv_layer.shape[2]])
        apart(op, "k", k, "kv_layer", kv_layer)
        apart(op, "v", v, "kv_layer", kv_layer)


def rope_kv_append(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, kv_layer: Tensor, slots: Tensor) -> None:
    op = "rope_kv_append"
    rope(q, cos, sin, op, "q")
    rope(k, cos, sin, op, "k")
    if q.dtype is not k.dtype:
        tensor(op, "q", q, (-1, -1, -1), (k.dtype,), k)
    kv_append(k, v, kv_layer, slots, op)


def kv_copy_pages(kv: Tensor, src: Tensor, dst: Tensor) -> None:
    pool = ("kv", kv, (-1, 2, -1, -1, -1, -1), (kv.dtype,))  # moved as it is, whatever it is
    pages = ("src", src, (-1,), (_INT64,)), ("dst", dst, (_side(src, 0),), (_INT64,))
    _misfit("kv_copy_pages", kv, pool, *pages)
    if values_read(kv):
        within("kv_copy_pages", "src", src, 0, kv.shape[2], "the pool")
        within("kv_copy_pages", "dst", dst, 0, kv.shape[2], "the pool")
        distinct("kv_copy_pages", "dst", dst)
        both = src[torch.isin(src, dst)]
        if both.numel():
            raise InputError(f"kv_copy_pages: page {int(both[0])} is read and written in one call, in no order")


def kv_gather(kv: Tensor, pages: Tensor) -> None:
    _misfit("kv_gather", kv, ("kv", kv, (-1, 2, -1, -1, -1, -1), (kv.dtype,)), ("pages", pages, (-1,), (_INT64,)))
    if values_read(kv):
        within("kv_gather", "pages", pages, 0, kv.shape[2], "the pool")


def kv_scatter(staged: Tensor, kv: Tensor, pages: Tensor) -> None:
    op = "kv_scatter"
    _misfit(op, kv, ("kv", kv, (-1, 2, -1, -1, -1, -1), (kv.dtype,)), ("pages", pages, (-1,), (_INT64,)))
    tensor(op, "staged", staged, (pages.shape[0], *kv.shape[:2], *kv.shape[3:]), (kv.dtype,), kv)
    if values_read(kv):
        within(op, "pages", pages, 0, kv.shape[2], "the pool")
        distinct(op, "pages", pages)


def kv_swap(kv: Tensor, host: Tensor, pages: Tensor, slots: Tensor, to_host: bool) -> None:
    _misfit("kv_swap", kv, ("kv", kv, (-1, 2, -1, -1, -1, -1), FLOATS), ("pages", pages, (-1,), (_INT64,)))
    place = (-1, kv.shape[0], 2, *kv.shape[3:])
    _misfit("kv_swap", host, ("host", host, place, (kv.dtype,)), ("slots", slots, (pages.shape[0],), (_INT64,)))
    if host.device.type != "cpu":
        raise InputError(f"kv_swap: host belongs on the CPU, not on {host.device}")
    within("kv_swap", "slots", slots, 0, host.shape[0], "the host's pool")
    if to_host:
        distinct("kv_swap", "slots", slots)
    if values_read(kv):
        within("kv_swap", "pages", pages, 0, kv.shape[2], "the pool")
        if not to_host:
            distinct("kv_swap", "pages", pages)


# Attention ------------------------------------------------------------------------------------------------------------


def paged_attention(q: Tensor, kv_layer: Tensor, block_table: Tensor, cu_q: Tensor, kv_len: Tensor) -> None:
    shape, pool = q.shape, kv_layer.shape
    device = q.device
    if (
        len(shape) != 3
        or len(pool) != 5
        or pool[3] < 1
        or shape[1] % pool[3]
        or shape[2] != pool[4]
        or q.dtype not in FLOATS
        or kv_layer.dtype not in FLOATS
        or kv_layer.device != device
        or block_table.dim() != 2
        or block_table.shape[:1] != kv_len.shape
        or cu_q.shape != (kv_len.shape[0] + 1,)
        or not (block_table.dtype is cu_q.dtype is kv_len.dtype is _INT32)
        or not (block_table.device == cu_q.device == kv_len.device == device)
    ):
        _attention_misfit(q, kv_layer, block_table, cu_q, kv_len)
    if _Values.on:
        lengths_fit("paged_attention", cu_q, kv_len, q.shape[0], block_table.shape[1] * pool[2])
        pages_in_pool("paged_attention", block_table, kv_len, pool[2], pool[1])


def _attention_misfit(q: Tensor, kv_layer: Tensor, block_table: Tensor, cu_q: Tensor, kv_len: Tensor) -> None:
    op, batch = "paged_attention", _side(kv_len, 0)
    _misfit(op, q, ("q", q, (-1, -1, -1), FLOATS), ("kv_layer", kv_layer, (2, -1, -1, -1, _side(q, 2)), FLOATS))
    if kv_layer.shape[3] < 1 or q.shape[1] % kv_layer.shape[3]:
        raise InputError(f"{op}: {q.shape[1]} heads of q does not fit {kv_layer.shape[3]} heads of the cache")
    table = ("block_table", block_table, (batch, -1), (_INT32,))
    bounds = ("cu_q", cu_q, (batch + 1,), (_INT32,))
    _misfit(op, q, ("kv_len", kv_len, (-1,), (_INT32,)), table, bounds)


def lengths_fit(op: str, cu_q: Tensor, kv_len: Tensor, rows: int, most: int) -> None:
    """cu_q must rise from 0 to `rows`, by no more for a sequence than its tokens, of which there are `most` at most.
    Reads both back."""
    if int(cu_q[0]) != 0 or int(cu_q[-1]) != rows:
        raise InputError(f"{op}: cu_q runs {int(cu_q[0])} .. {int(cu_q[-1])} for {rows} rows")
    counts = cu_q.diff()
    if bool(((counts < 0) | (counts > kv_len)).any()):
        raise InputError(f"{op}: a sequence has more query rows than tokens, or fewer than none")
    within(op, "kv_len", kv_len, 0, most + 1, "a row of the block table")


def pages_in_pool(op: str, block_table: Tensor, kv_len: Tensor, page: int, pages: int) -> None:
    """The entries of block_table[B, maxpages] that kv_len[B] makes use of must name pages of the pool. Reads both."""
    index = torch.arange(block_table.shape[1], device=block_table.device)
    used = index * page < kv_len[:, None]
    bad = used & ((block_table < 0) | (block_table >= pages))
    if bool(bad.any()):
        sequence, at = (int(value) for value in bad.nonzero()[0])
        named = int(block_table[sequence, at])
        raise InputError(f"{op}: block_table[{sequence}, {at}] is {named}, which is outside the pool of {pages} pages")


# Scoring and sampling -------------------------------------------------------------------------------------------------


def score_tokens(hidden: Tensor, weight: Tensor, ids: Tensor, op: str = "score_tokens") -> None:
    own = (hidden.dtype,)
    found = ("hidden", hidden, (-1, -1), FLOATS), ("weight", weight, (-1, _side(hidden, 1)), own)
    _misfit(op, hidden, *found, ("ids", ids, (_side(hidden, 0),), (_INT64,)))
    rows_without_gaps(op, "hidden", hidden)
    rows_without_gaps(op, "weight", weight)
    if values_read(ids):
        within(op, "ids", ids, 0, weight.shape[0], "the vocabulary")


def score_logits(logits: Tensor, ids: Tensor) -> None:
    _misfit("score_logits", logits, ("logits", logits, (-1, -1), FLOATS), ("ids", ids, (_side(logits, 0),), (_INT64,)))
    if values_read(ids):
        within("score_logits", "ids", ids, 0, logits.shape[1], "the vocabulary")


def token_confidence(logits: Tensor, k: int) -> None:
    _misfit("token_confidence", logits, ("logits", logits, (-1, -1), FLOATS))
    if k < 1:
        raise InputError(f"token_confidence: k must be 1 or more, not {k}")


def span_mean(logprob: Tensor, cu_seqlens: Tensor) -> None:
    found = ("logprob", logprob, (-1,), (_FP32,)), ("cu_seqlens", cu_seqlens, (-1,), (_INT32, _INT64))
    _misfit("span_mean", logprob, *found)
    if cu_seqlens.shape[0] < 1:
        raise InputError("span_mean: cu_seqlens has no bound: it must begin with 0")
    if values_read(logprob):
        span_bounds("span_mean", cu_seqlens, logprob.shape[0])


def span_bounds(op: str, cu_seqlens: Tensor, tokens: int) -> None:
    """cu_seqlens must rise from 0 to `tokens`, by one or more for each span. Reads it back."""
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last != tokens:
        raise InputError(f"{op}: cu_seqlens runs {first} .. {last} for {tokens} tokens")
    if cu_seqlens.shape[0] > 1 and int(cu_seqlens.diff().amin()) < 1:
        raise InputError(f"{op}: a span without tokens has no score")


def score_gate(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    cu_seqlens: Tensor,
    key: Tensor,
    ring: Tensor,
    size: Tensor,
    head: Tensor,
    level: Tensor,
    u: Tensor,
    insert: Tensor,
) -> None:
    op = "score_gate"
    score_tokens(hidden, weight, ids, op)
    tensor(op, "cu_seqlens", cu_seqlens, (-1,), (_INT32, _INT64), hidden)
    if cu_seqlens.shape[0] < 1:
        raise InputError(f"{op}: cu_seqlens has no bound: it must begin with 0")
    if values_read(hidden):
        span_bounds(op, cu_seqlens, hidden.shape[0])
    gate_store(op, hidden, cu_seqlens.shape[0] - 1, key, ring, size, head, level, u, insert)


def gate(
    score: Tensor, key: Tensor, ring: Tensor, size: Tensor, head: Tensor, level: Tensor, u: Tensor, insert: Tensor
) -> None:
    tensor("gate", "score", score, (-1,), (_FP32,), score)
    gate_store("gate", score, score.shape[0], key, ring, size, head, level, u, insert)


def gate_store(
    op: str,
    like: Tensor,
    batch: int,
    key: Tensor,
    ring: Tensor,
    size: Tensor,
    head: Tensor,
    level: Tensor,
    u: Tensor,
    insert: Tensor,
) -> None:
    """What every op that gates takes beside its scores; `like` gives the device."""
    rows, keys = (batch,), (_side(ring, 0),)
    _misfit(op, like, ("key", key, rows, (_INT64,)), ("level", level, rows, (_INT64,)), ("u", u, rows, (_INT64,)))
    store = ("ring", ring, (-1, -1), (_FP32,)), ("size", size, keys, (_INT64,)), ("head", head, keys, (_INT64,))
    _misfit(op, like, ("insert", insert, rows, (torch.bool,)), *store)
    for name, x, _, _ in store:
        dense(op, name, x)
    if values_read(like):
        within(op, "key", key, 0, ring.shape[0], "the store")
    if _Values.on:
        within(op, "level", level, 0, LEVEL_ONE + 1, "the levels")
        within(op, "u", u, 1, LEVEL_ONE + 1, "the uniforms")
        within(op, "size", size, 0, ring.shape[1] + 1, "a ring")
        within(op, "head", head, 0, ring.shape[1], "a ring")


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor, position: Tensor
) -> None:
    op, rows = "sample", (_side(logits, 0),)
    reals = ("temperature", temperature), ("top_p", top_p), ("min_p", min_p)
    numbers = ("top_k", top_k), ("seed", seed), ("position", position)
    _misfit(op, logits, ("logits", logits, (-1, -1), FLOATS))
    _misfit(op, logits, *((name, x, rows, (_FP32,)) for name, x in reals))
    _misfit(op, logits, *((name, x, rows, (_INT64,)) for name, x in numbers))
    if logits.shape[1] < 1:
        raise InputError("sample: logits has no column to draw from")
    if _Values.on and rows[0]:
        within(op, "top_k", top_k, 0, 1 << 62, "what top_k can be")
        for name, x in reals:
            most = float("inf") if name == "temperature" else 1.0
            if not bool(((x >= 0) & (x <= most)).all()):  # false for NaN too
                raise InputError(f"sample: {name} must be 0 .. {most} in every row")
