"""What is measured: an op, the sizes it is called with, and the least that any implementation must move and compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Make = Callable[[torch.device, int], tuple[Any, ...]]
CONFIDENCE_TOKENS = 20
"""Likeliest tokens that a confidence is the mean of: DeepConf's number."""


@dataclass(frozen=True, slots=True)
class Case:
    """One call of an op. make(device, seed): its arguments. bytes: what must cross memory once; link_bytes: what must
    cross the link to the host; flops: of matrix products."""

    op: str
    label: str
    dtype: torch.dtype
    make: Make
    bytes: int
    flops: int = 0
    link_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Sizes:
    """A model's sizes, and how much work there is of each kind."""

    hidden: int
    vocab: int
    heads: int
    kv_heads: int
    dim: int
    inner: int
    layers: int
    page: int
    rows: tuple[int, ...]
    """Tokens of a step."""
    decode: tuple[int, int]
    """Sequences, and tokens that each holds."""
    span: tuple[int, int, int]
    """Sequences, tokens that each holds, tokens that each brings."""
    forks: int
    """Pages that are copied."""
    calibration: tuple[int, int, int]
    """Rows, keys, scores of a key."""


SIZES = {
    # Llama 3.1 8B.
    "8b": Sizes(
        4096, 128256, 32, 8, 128, 14336, 32, 16, (1, 64, 512, 8000), (64, 4096), (16, 4096, 500), 16, (64, 16, 4096)
    ),
    # SmolLM2 135M.
    "135m": Sizes(576, 49152, 9, 3, 64, 1536, 30, 16, (1, 64, 512), (16, 512), (4, 512, 64), 16, (64, 16, 4096)),
    "tiny": Sizes(32, 97, 4, 2, 16, 64, 2, 4, (3,), (2, 9), (2, 9, 4), 2, (4, 2, 8)),
}


class _Random:
    """Random tensors of one seed, made where they are needed."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        x = torch.randn(shape, generator=self._generator, device=self.device, dtype=dtype or self.dtype)
        return x.mul_(scale)

    def ints(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self._generator, device=self.device)

    def pages(self, n: int, of: int) -> Tensor:
        """n different numbers below `of`."""
        return torch.randperm(of, generator=self._generator, device=self.device)[:n]


def cases(size: str, dtype: torch.dtype) -> Iterator[Case]:
    """The cases of every op for one of `SIZES`, in an order that keeps ops together."""
    s, item = SIZES[size], dtype.itemsize
    for rows in s.rows:
        yield from _dense(s, rows, dtype, item)
    yield from _paging(s, dtype, item)
    yield from _attention(s, dtype, item)
    for rows in s.rows:
        yield _score_tokens(s, rows, dtype, item)
    yield _score_gate(s, dtype, item)
    yield from _scores(s, dtype, item)
    yield _gate(s)
    for top_p in (1.0, 0.95):
        yield _sample(s, top_p, dtype, item)


def _dense(s: Sizes, rows: int, dtype: torch.dtype, item: int) -> Iterator[Case]:
    h, f, wide = s.hidden, s.inner, rows * s.hidden * item

    def linear(device: torch.device, seed: int) -> tuple[Any, ...]:
        r = _Random(device, dtype, seed)
        return r.normal(rows, h), r.normal(f, h, scale=h**-0.5)

    def norm(device: torch.device, seed: int) -> tuple[Any, ...]:
        r = _Random(device, dtype, seed)
        return r.normal(rows, h), r.normal(h), 1e-5

    def add_norm(device: torch.device, seed: int) -> tuple[Any, ...]:
        r = _Random(device, dtype, seed)
        return r.normal(rows, h), r.normal(rows, h), r.normal(h), 1e-5

    def silu(device: torch.device, seed: int) -> tuple[Any, ...]:
        both = _Random(device, dtype, seed).normal(rows, 2 * f)
        return both[:, :f], both[:, f:]

    def rope(device: torch.device, seed: int) -> tuple[Any, ...]:
        r = _Random(device, dtype, seed)
        angle = r.normal(rows, s.dim // 2, dtype=torch.float32)
        return r.normal(rows, s.heads, s.dim), angle.cos(), angle.sin()

    label = f"N={rows} H={h}"
    flops = 2 * rows * h * f
    yield Case("linear", f"{label} M={f}", dtype, linear, wide + f * h * item + rows * f * item, flops)
    yield Case("rms_norm", label, dtype, norm, 2 * wide + h * item)
    yield Case("add_rms_norm", label, dtype, add_norm, 4 * wide + h * item)
    yield Case("silu_mul", f"N={rows} F={f}", dtype, silu, 3 * rows * f * item)
    turned = 2 * rows * s.heads * s.dim * item + rows * s.dim * 4
    yield Case("rope", f"N={rows} h={s.heads} D={s.dim}", dtype, rope, turned)


def _pool(r: _Random, s: Sizes, pages: int, layers: int | None = None) -> Tensor:
    shape = (2, pages, s.page, s.kv_heads, s.dim)
    return r.normal(*shape) if layers is None else r.normal(layers, *shape)


def _paging(s: Sizes, dtype: torch.dtype, item: int) -> Iterator[Case]:
    token = 2 * s.kv_heads * s.dim * item  # of one layer
    for rows in s.rows:

        def append(device: torch.device, seed: int, rows: int = rows) -> tuple[Any, ...]:
            r = _Random(device, dtype, seed)
            pool = _pool(r, s, rows // s.page + 2)
            k, v = (r.normal(rows, s.kv_heads, s.dim) for _ in range(2))
            return k, v, pool, r.pages(rows, pool.shape[1] * s.page)

        def turn_and_append(device: torch.device, seed: int, rows: int = rows) -> tuple[Any, ...]:
            r = _Random(device, dtype, seed)
            pool = _pool(r, s, rows // s.page + 2)
            q, k, v = r.normal(rows, s.heads + 2 * s.kv_heads, s.dim).split([s.heads, s.kv_heads, s.kv_heads], 1)
            angle = r.normal(rows, s.dim // 2, dtype=torch.float32)
            return q, k, v, angle.cos(), angle.sin(), pool, r.pages(rows, pool.shape[1] * s.page)

        def slots(device: torch.device, seed: int, rows: int = rows) -> tuple[Any, ...]:
            table = _Random(device, dtype, seed).pages(rows // s.page + 1, rows // s.page + 1).int()[None]
            bounds = torch.tensor([0, rows], dtype=torch.int32, device=device)
            return torch.arange(rows, device=device), table, bounds, s.page

        label = f"N={rows} h={s.kv_heads} D={s.dim}"
        yield Case("kv_append", label, dtype, append, 2 * rows * token + 8 * rows)
        turned = 2 * rows * s.heads * s.dim * item + rows * s.dim * 4
        yield Case("rope_kv_append", label, dtype, turn_and_append, turned + 2 * rows * token + 8 * rows)
        yield Case("kv_slots", f"N={rows}", dtype, slots, 16 * rows + 4 * (rows // s.page))

    def copy(device: torch.device, seed: int) -> tuple[Any, ...]:
        r = _Random(device, dtype, seed)
        return _pool(r, s, 2 * s.forks, s.layers), *r.pages(2 * s.forks, 2 * s.forks).chunk(2)

    def gather(device: torch.device, seed: int) -> tuple[Any, ...]:
        r = _Random(device, dtype, seed)
        return _pool(r, s, 2 * s.forks, s.layers), r.pages(s.forks, 2 * s.forks)

    def scatter(device: torch.device, seed: int) -> tuple[Any, ...]:
        kv, pages = gather(device, seed)
        staged = _Random(device, dtype, seed + 1).normal(s.forks, s.layers, 2, *kv.shape[3:])
        return staged, kv, pages

    def swap(device: torch.device, seed: int) -> tuple[Any, ...]:
        r = _Random(device, dtype, seed)
        kv = _pool(r, s, 2 * s.forks, s.layers)
        host = torch.empty(s.forks, s.layers, 2, *kv.shape[3:], dtype=dtype, pin_memory=device.type == "cuda")
        return kv, host, r.pages(s.forks, 2 * s.forks), torch.arange(s.forks), True

    moved = s.forks * s.layers * s.page * token
    label = f"pages={s.forks} layers={s.layers}"
    yield Case("kv_copy_pages", label, dtype, copy, 2 * moved)
    yield Case("kv_gather", label, dtype, gather, 2 * moved)
    yield Case("kv_scatter", label, dtype, scatter, 2 * moved)
    yield Case("kv_swap", label, dtype, swap, moved, link_bytes=moved)


def _attention(s: Sizes, dtype: torch.dtype, item: int) -> Iterator[Case]:
    for batch, length, new in ((*s.decode, 1), s.span):

        def make(
            device: torch.device,
            seed: int,
            batch: int = batch,
            length: int = length,
            new: int = new,
        ) -> tuple[Any, ...]:
            r, width = _Random(device, dtype, seed), -(-length // s.page)
            table = r.pages(batch * width, batch * width).view(batch, width).int()
            cu_q = torch.arange(0, batch * new + 1, new, device=device, dtype=torch.int32)
            kv_len = torch.full((batch,), length, device=device, dtype=torch.int32)
            q = r.normal(batch * new, s.heads, s.dim)
            return q, _pool(r, s, batch * width), table, cu_q, kv_len, s.dim**-0.5

        keys = batch * length * 2 * s.kv_heads * s.dim * item
        seen = new * length - new * (new - 1) // 2  # pairs of query and key, causal
        yield Case(
            "paged_attention",
            f"B={batch} q={new} kv={length} h={s.heads}/{s.kv_heads} D={s.dim}",
            dtype,
            make,
            keys + 2 * batch * new * s.heads * s.dim * item,
            4 * batch * seen * s.heads * s.dim,
        )


def _score_tokens(s: Sizes, rows: int, dtype: torch.dtype, item: int) -> Case:
    h, v = s.hidden, s.vocab

    def make(device: torch.device, seed: int) -> tuple[Any, ...]:
        r = _Random(device, dtype, seed)
        return r.normal(rows, h), r.normal(v, h, scale=h**-0.5), r.ints(0, v, rows)

    return Case(
        "score_tokens",
        f"T={rows} H={h} V={v}",
        dtype,
        make,
        (v * h + rows * h) * item + 12 * rows,
        2 * rows * h * v,
    )


def _score_gate(s: Sizes, dtype: torch.dtype, item: int) -> Case:
    spans, _, new = s.span
    tokens = _score_tokens(s, spans * new, dtype, item)
    gated = _gate(s)

    def make(device: torch.device, seed: int) -> tuple[Any, ...]:
        bounds = torch.arange(0, spans * new + 1, new, device=device)
        _, key, ring, size, head, level, u, insert = gated.make(device, seed)
        key, level, u, insert = (x[:spans].contiguous() for x in (key, level, u, insert))
        return *tokens.make(device, seed), bounds, key, ring, size, head, level, u, insert

    label = f"B={spans} {tokens.label}"
    return Case("score_gate", label, dtype, make, tokens.bytes + gated.bytes, tokens.flops)


def _scores(s: Sizes, dtype: torch.dtype, item: int) -> Iterator[Case]:
    rows, v = min(512, s.rows[-1]), s.vocab

    def logits(device: torch.device, seed: int) -> tuple[Any, ...]:
        r = _Random(device, dtype, seed)
        return r.normal(rows, v), r.ints(0, v, rows)

    def spans(device: torch.device, seed: int) -> tuple[Any, ...]:
        batch, _, new = s.span
        r = _Random(device, torch.float32, seed)
        return r.normal(batch * new), torch.arange(0, batch * new + 1, new, device=device)

    def sure(device: torch.device, seed: int) -> tuple[Any, ...]:
        return _Random(device, dtype, seed).normal(s.decode[0], v), CONFIDENCE_TOKENS

    tokens = s.span[0] * s.span[2]
    yield Case("token_confidence", f"T={s.decode[0]} V={v}", dtype, sure, s.decode[0] * (v * item + 4))
    yield Case("score_logits", f"T={rows} V={v}", dtype, logits, rows * v * item + 12 * rows)
    yield Case("span_mean", f"B={s.span[0]} T={tokens}", torch.float32, spans, 4 * tokens + 20 * s.span[0])


def _gate(s: Sizes) -> Case:
    rows, keys, held = s.calibration

    def make(device: torch.device, seed: int) -> tuple[Any, ...]:
        r = _Random(device, torch.float32, seed)
        full, half = (torch.full((n,), 1 << 31, device=device) for n in (keys, rows))
        store = r.normal(keys, held), torch.full_like(full, held), torch.zeros_like(full)
        return r.normal(rows), r.ints(0, keys, rows), *store, half, half.clone(), torch.ones_like(half).bool()

    return Case("gate", f"B={rows} K={keys} n={held}", torch.float32, make, min(rows, keys) * held * 4 + 80 * rows)


def _sample(s: Sizes, top_p: float, dtype: torch.dtype, item: int) -> Case:
    rows = s.decode[0]

    def make(device: torch.device, seed: int) -> tuple[Any, ...]:
        r = _Random(device, dtype, seed)
        warm, off = torch.full((rows,), 0.8, device=device), torch.zeros(rows, device=device)
        index = torch.arange(rows, device=device)
        return r.normal(rows, s.vocab), warm, off.long(), off + top_p, off, index + seed, index

    label = f"B={rows} V={s.vocab}" + (f" top_p={top_p}" if top_p < 1 else "")
    return Case("sample", label, dtype, make, rows * s.vocab * item)
