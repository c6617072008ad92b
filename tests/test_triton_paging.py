"""Appends, page copies and slots in Triton: exact, and nothing but the named places changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from torch import Tensor

from atts_engine import ops
from atts_engine.errors import InputError
from atts_engine.kv import BlockTable, PagePool
from tests.test_ops_library import _samples
from tests.test_triton_rows import DEVICE, DTYPES, random, strided

atts_triton = pytest.importorskip("atts_triton", reason="triton is not installed")

LAYOUTS = st.sampled_from(((1, 8), (3, 64), (2, 30), (5, 2), (8, 128)))
"""Heads of keys and values, size of a head."""


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def assert_same_bits(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=DEVICE)


# Slots --------------------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(st.data())
def test_slots_are_read_off_the_block_table(data: st.DataObject) -> None:
    page = data.draw(st.sampled_from((1, 3, 16)))
    counts = data.draw(st.lists(st.integers(0, 7) | st.sampled_from((0, 130)), max_size=9))
    starts = [data.draw(st.integers(0, 40)) for _ in counts]
    width = max((-(-(s + n) // page) for s, n in zip(starts, counts)), default=0) + 1
    table = torch.randint(0, 1 << 20, (len(counts), width), generator=torch.Generator().manual_seed(width)).int()
    bounds = torch.tensor([0, *counts]).cumsum(0).int().to(DEVICE)
    positions = [p for s, n in zip(starts, counts) for p in range(s, s + n)]
    owners = [b for b, n in enumerate(counts) for _ in range(n)]
    wanted = [int(table[b, p // page]) * page + p % page for b, p in zip(owners, positions)]
    held = strided(table.float(), 0).int().to(DEVICE) if data.draw(st.booleans()) else table.to(DEVICE).T.contiguous().T
    for implementation in ("triton", "reference"):
        with ops.use(implementation):
            found = ops.kv_slots(ints(positions), held, bounds, page)
        assert found.dtype == torch.int64 and found.tolist() == wanted


def test_a_row_without_a_place_has_no_slot() -> None:
    table = torch.tensor([[7, 8]], dtype=torch.int32, device=DEVICE)
    bounds = torch.tensor([0, 3], dtype=torch.int32, device=DEVICE)
    found = atts_triton.kv_slots(ints([7, 8, -1, 0]), table, bounds, 4)
    assert found.tolist() == [8 * 4 + 3, -1, -1, -1]


def test_padding_rows_of_a_graph_go_to_the_padding_page() -> None:
    table = torch.tensor([[5, 3], [0, 0], [0, 0]], dtype=torch.int32, device=DEVICE)
    with ops.use("triton"):
        slots = ops.kv_slots(ints([6, 0, 0]), table, torch.arange(4, dtype=torch.int32, device=DEVICE), 4)
    assert slots.tolist() == [3 * 4 + 2, 0, 0]


# Appends ------------------------------------------------------------------------------------------------------------


def projection(tokens: int, heads: int, layout: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v as views of one tensor."""
    kv_heads, dim = layout
    qkv = random(tokens, heads + 2 * kv_heads, dim, dtype=dtype)
    return torch.split(qkv, [heads, kv_heads, kv_heads], dim=1)


@settings(max_examples=40)
@given(
    tokens=st.integers(0, 12),
    layout=LAYOUTS,
    page=st.sampled_from((1, 4, 7)),
    dtype=DTYPES,
    kept=DTYPES,
    gap=st.booleans(),
)
def test_append_writes_its_slots_and_nothing_else(
    tokens: int, layout: tuple[int, int], page: int, dtype: torch.dtype, kept: torch.dtype, gap: bool
) -> None:
    _, k, v = projection(tokens, 3, layout, dtype)
    if gap:
        k, v = strided(k, 3), v.contiguous()
    pool = poisoned(2, 15, page, *layout, dtype=kept)
    slots = torch.randperm(15 * page, generator=torch.Generator().manual_seed(tokens))[:tokens].to(DEVICE)
    wanted = pool.clone()
    rows = wanted.view(2, -1, *layout)
    rows[0, slots], rows[1, slots] = k.to(kept), v.to(kept)
    with ops.use("triton"):
        ops.kv_append(k, v, pool, slots)
    assert_same_bits(pool, wanted)


@settings(max_examples=40)
@given(
    tokens=st.integers(0, 12), group=st.sampled_from((1, 3, 7)), layout=LAYOUTS, page=st.sampled_from((1, 4, 7)),
    dtype=DTYPES, kept=DTYPES, gap=st.booleans(),
)  # fmt: skip
def test_rope_append_is_rope_and_append_to_the_bit(
    tokens: int, group: int, layout: tuple[int, int], page: int, dtype: torch.dtype, kept: torch.dtype, gap: bool
) -> None:
    q, k, v = projection(tokens, group * layout[0], layout, dtype)
    if gap:
        q, k, v = strided(q, 2), k.contiguous(), strided(v, 3)
    angle = random(tokens, layout[1] // 2, seed=1, scale=9)
    slots = torch.randperm(15 * page, generator=torch.Generator().manual_seed(tokens))[:tokens].to(DEVICE)
    pool = poisoned(2, 15, page, *layout, dtype=kept)
    wanted = pool.clone()
    with ops.use("reference"):
        ops.kv_append(ops.rope(k, angle.cos(), angle.sin()), v, wanted, slots)
        turned = ops.rope(q, angle.cos(), angle.sin())
    with ops.use("triton"):
        found = ops.rope_kv_append(q, k, v, angle.cos(), angle.sin(), pool, slots)
    assert torch.equal(found, turned) and found.dtype == dtype and found.is_contiguous()
    assert_same_bits(pool, wanted)
    with ops.use("reference"):
        assert torch.equal(ops.rope_kv_append(q, k, v, angle.cos(), angle.sin(), pool, slots), turned)
    assert_same_bits(pool, wanted)


def test_a_slot_that_the_cache_does_not_have_is_not_written() -> None:
    q, k, v = projection(4, 2, (2, 8), torch.float32)
    angle = random(4, 4, seed=1)
    for slots in (ints([-1, 12, 1 << 40, 5]), ints([-(1 << 40), 24, -12, 5])):
        alone, fused = (torch.zeros(3, 3, 4, 2, 8, device=DEVICE) for _ in range(2))
        # Memory behind the cache belongs to somebody else.
        atts_triton.kv_append(k, v, alone[:2], slots)
        atts_triton.rope_kv_append(q, k, v, angle.cos(), angle.sin(), fused[:2], slots)
        for pool in (alone, fused):
            written = pool.view(3, 12, 16).any(-1).nonzero().tolist()
            assert written == [[0, 5], [1, 5]]


def test_nan_is_stored_and_stays_in_its_row() -> None:
    q, k, v = (t.contiguous() for t in projection(3, 2, (2, 8), torch.float32))
    for t in (q, k, v):
        t[1] = float("nan")
    pool, angle = torch.zeros(2, 1, 4, 2, 8, device=DEVICE), random(3, 4)
    with ops.use("triton"):
        out = ops.rope_kv_append(q, k, v, angle.cos(), angle.sin(), pool, ints([0, 1, 2]))
    assert out.isnan().flatten(1).all(1).tolist() == out.isnan().flatten(1).any(1).tolist() == [False, True, False]
    stored = pool.isnan().view(2, 4, -1)
    assert stored.all(-1).tolist() == stored.any(-1).tolist() == [[False, True, False, False]] * 2


# Copies -------------------------------------------------------------------------------------------------------------


def bits(*shape: int, dtype: torch.dtype) -> Tensor:
    """Any bit pattern, NaNs of every kind among them."""
    raw = torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), generator=torch.Generator().manual_seed(3))
    return raw.to(torch.uint8).view(dtype).to(DEVICE)


def raw(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


ANY_DTYPE = st.sampled_from((torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float64))


@settings(max_examples=40)
@given(
    layers=st.integers(1, 3),
    shape=st.sampled_from(((16, 2, 8), (3, 1, 5), (1, 1, 1), (7, 3, 64), (16, 8, 36))),
    dtype=ANY_DTYPE,
    order=st.permutations(range(9)),
    n=st.integers(0, 4),
    forks=st.booleans(),
)
def test_pages_are_copied_gathered_and_scattered_bit_for_bit(
    layers: int, shape: tuple[int, int, int], dtype: torch.dtype, order: list[int], n: int, forks: bool
) -> None:
    kv = bits(layers, 2, 9, *shape, dtype=dtype)
    before = kv.clone()
    sources = [order[8]] * n if forks else order[4 : 4 + n]
    src, dst = ints(sources), ints(order[:n])
    with ops.use("triton"):
        ops.kv_copy_pages(kv, src, dst)
        wanted = before.clone()
        for source, destination in zip(sources, order[:n], strict=True):
            wanted[:, :, destination] = before[:, :, source]
        assert torch.equal(raw(kv), raw(wanted))

        staged = ops.kv_gather(kv, src)
        assert staged.shape == (n, layers, 2, *shape) and staged.is_contiguous()
        for i, source in enumerate(sources):
            assert torch.equal(raw(staged[i]), raw(kv[:, :, source]))

        staged = bits(n, layers, 2, *shape, dtype=dtype) if n else staged
        ops.kv_scatter(staged, kv, dst)
        for i, destination in enumerate(order[:n]):
            wanted[:, :, destination] = staged[i]
        assert torch.equal(raw(kv), raw(wanted))


def test_pages_longer_than_a_program_and_a_page_that_is_not_aligned() -> None:
    kv = bits(2, 2, 4, 16, 9, 24, dtype=torch.float32)
    loose = torch.zeros(kv.numel() + 1, device=DEVICE)[1:].view_as(kv).copy_(kv)
    for held in (kv, loose):
        with ops.use("triton"):
            ops.kv_copy_pages(held, ints([3]), ints([1]))
            found = ops.kv_gather(held, ints([1, 3, 0]))
        assert torch.equal(raw(found[0]), raw(found[1])) and torch.equal(raw(held[:, :, 1]), raw(held[:, :, 3]))
        assert torch.equal(raw(found[2]), raw(held[:, :, 0]))


@pytest.mark.parametrize("to_host", [True, False])
def test_swapping_stages_pages_in_triton(to_host: bool) -> None:
    kv, host = random(2, 2, 7, 4, 1, 6), random(9, 2, 2, 4, 1, 6, seed=1).cpu()
    pages, slots = ints([5, 0, 6]), torch.tensor([3, 8, 4])
    wanted_kv, wanted_host = kv.clone(), host.clone()
    if to_host:
        wanted_host[slots] = kv.movedim(2, 0)[pages].cpu()
    else:
        wanted_kv[:, :, pages] = host[slots].to(DEVICE).movedim(0, 2)
    with ops.use("triton"):
        ops.kv_swap(kv, host, pages, slots, to_host)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    assert torch.equal(kv, wanted_kv) and torch.equal(host, wanted_host)


def test_the_reference_gathers_and_scatters_too() -> None:
    kv = random(3, 2, 6, 4, 2, 8)
    wanted, pages = kv.clone(), ints([5, 0, 3])
    with ops.use("reference"):
        staged = ops.kv_gather(kv, pages)
        assert torch.equal(staged, kv.movedim(2, 0)[pages])
        ops.kv_scatter(staged.flip(0), kv, pages)
    wanted[:, :, pages] = wanted[:, :, pages.flip(0)]
    assert torch.equal(kv, wanted)


def test_what_does_not_fit_is_named() -> None:
    q, k, v = projection(3, 4, (2, 8), torch.float32)
    angle, pool, slots = random(3, 4), torch.zeros(2, 3, 4, 2, 8, device=DEVICE), ints([0, 1, 2])
    for changed, match in (
        ((q, k, v[:, :1], angle, angle, pool, slots), "v does not fit"),
        ((q, k, v, angle, angle, pool, slots[:2]), "slots does not fit"),
        ((q, k, v, angle[:2], angle[:2], pool, slots), "cos does not fit"),
        ((q[:, :, :4], k, v, angle[:, :2], angle[:, :2], pool, slots), "cos does not fit"),
        ((q.half(), k, v, angle, angle, pool, slots), "float16"),
    ):
        for implementation in ("triton", "reference"):
            with ops.use(implementation), pytest.raises(InputError, match=match):
                ops.rope_kv_append(*changed)
        assert not pool.any()
    table, bounds = torch.zeros(1, 2, dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32)
    for positions, pages, ends in (
        (slots.int(), table, bounds),
        (slots, table.long(), bounds),
        (slots, table, bounds.long()),
        (slots, table, bounds[:1]),
    ):
        with pytest.raises(InputError, match="kv_slots: .* does not fit"):
            ops.kv_slots(positions, pages, ends, 4)
    kv = torch.zeros(1, *pool.shape, device=DEVICE)
    with pytest.raises(InputError, match="kv_scatter"):
        ops.kv_scatter(torch.zeros(2, 1, 2, 4, 2, 7), kv, slots[:2])
    for call in (
        lambda: atts_triton.kv_append(k.double(), v.double(), pool, slots),
        lambda: atts_triton.kv_append(k, v, pool.transpose(1, 2), slots),
        lambda: atts_triton.rope_kv_append(q, k, v, angle.half(), angle, pool, slots),
        lambda: atts_triton.kv_gather(kv.transpose(2, 3), slots),
        lambda: atts_triton.kv_scatter(torch.zeros(1, 1, 2, 4, 2, 8).half(), kv, slots[:1]),
        lambda: atts_triton.kv_slots(slots.int(), table, bounds, 4),
    ):
        with pytest.raises(ValueError, match=r"take|gaps|contiguous|one dtype"):
            call()


@pytest.mark.parametrize(
    "name",
    ["add_rms_norm", "kv_append", "kv_copy_pages", "kv_gather", "kv_scatter", "kv_slots", "rms_norm", "rope",
     "rope_kv_append", "silu_mul"],
)  # fmt: skip
def test_opcheck(name: str) -> None:
    arguments = tuple(a.to(DEVICE) if isinstance(a, Tensor) else a for a in _samples()[name])
    with ops.use("triton"):
        torch.library.opcheck(getattr(torch.ops.atts, name).default, arguments)


# A pool and lists of tokens -----------------------------------------------------------------------------------------

PAGE, LAYERS = 3, 2


class PagedSequences(RuleBasedStateMachine):
    """Sequences in a pool of poisoned pages: appended to, forked, cut, gathered, moved. A token's key in layer l is
    token + 100 l, its value the negative of that."""

    def __init__(self) -> None:
        super().__init__()
        self.kv = poisoned(LAYERS, 2, 14, PAGE, 1, 2, dtype=torch.float32)
        self.pool, self.host = PagePool(14, PAGE), PagePool(0, PAGE, padding=False)
        self.held: list[tuple[BlockTable, list[int]]] = [(BlockTable(self.pool, self.host), [])]

    def check(self) -> None:
        for table, tokens in self.held:
            with ops.use("triton"):
                found = ops.kv_gather(self.kv, ints(table.pages))  # [C, L, 2, page, 1, 2]
            rows = found.permute(1, 2, 0, 3, 4, 5).reshape(LAYERS, 2, -1, 2)[:, :, : len(tokens)]
            for layer in range(LAYERS):
                wanted = torch.tensor(tokens, device=DEVICE).float() + 100 * layer
                assert torch.equal(rows[layer], torch.stack((wanted, -wanted))[..., None].expand(-1, -1, 2))

    @rule(data=st.data(), counts=st.lists(st.integers(0, 5), min_size=1, max_size=4))
    def append(self, data: st.DataObject, counts: list[int]) -> None:
        """One step: some sequences get tokens, in one call a layer."""
        chosen = data.draw(st.permutations(range(len(self.held))))[: len(counts)]
        copies, step = [], []
        for index, count in zip(chosen, counts):
            table, tokens = self.held[index]
            if table.needed(len(tokens), len(tokens) + count) <= self.pool.free:
                copies += table.reserve(len(tokens), len(tokens) + count)
                step.append((table, tokens, count))
        bounds, positions, values = [0], [], []
        width = max((len(table.pages) for table, _, _ in step), default=0)
        pages = torch.zeros((len(step), width), dtype=torch.int32)
        for row, (table, tokens, count) in enumerate(step):
            pages[row, : len(table.pages)] = torch.tensor(table.pages, dtype=torch.int32)
            positions += range(len(tokens), len(tokens) + count)
            added = [data.draw(st.integers(0, 99)) for _ in range(count)]
            values += added
            tokens += added
            bounds.append(len(positions))
        ends = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
        with ops.use("triton"):
            if copies:
                ops.kv_copy_pages(self.kv, *(ints(list(side)) for side in zip(*copies)))
            slots = ops.kv_slots(ints(positions), pages.to(DEVICE), ends, PAGE)
            for layer in range(LAYERS):
                k = (ints(values).float() + 100 * layer).view(-1, 1, 1).expand(-1, 1, 2)
                ops.kv_append(k, -k, self.kv[layer], slots)
        self.check()

    @precondition(lambda self: len(self.held) < 5)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        table, tokens = data.draw(st.sampled_from(self.held))
        self.held.append((table.fork(), list(tokens)))
        self.check()

    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        table, tokens = data.draw(st.sampled_from(self.held))
        length = data.draw(st.integers(0, len(tokens)))
        table.truncate(length)
        del tokens[length:]
        self.check()

    @rule(data=st.data())
    def move(self, data: st.DataObject) -> None:
        """A sequence's own pages go elsewhere by way of a staging tensor, and what they were is poisoned."""
        table, tokens = data.draw(st.sampled_from(self.held))
        own = table.private
        if not own or len(own) > self.pool.free:
            return
        shared = table.pages[: len(table.pages) - len(own)]
        fresh = self.pool.allocate(len(own))
        with ops.use("triton"):
            staged = ops.kv_gather(self.kv, ints(own))
            self.kv[:, :, own] = float("nan")
            ops.kv_scatter(staged, self.kv, ints(fresh))
        self.pool.release(own)
        table.pages = shared + fresh
        self.check()


PagedSequences.TestCase.settings = settings(max_examples=12, stateful_step_count=15)
TestPagedSequences = PagedSequences.TestCase
