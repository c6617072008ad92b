"""Pages under pressure: moved to the host pool or dropped, the same text afterwards, nothing left in either pool."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atts_engine import ops
from atts_engine.errors import InputError
from atts_engine.kv import BlockTable, OutOfPages, PagePool
from atts_engine.ops import paging
from atts_engine.runtime import runner
from atts_engine.runtime.commands import Decode, Fork
from atts_engine.runtime.lane import LaneCore
from atts_engine.runtime.preemption import Costs, forward_flops
from atts_engine.runtime.records import SamplingParams, TokenChunk
from atts_engine.runtime.runner import Runner, _last_writes, copy_rounds
from atts_engine.runtime.scheduler import Step
from tests.fakes import EOS, fake_model, greedy

GREEDY = SamplingParams(temperature=0.0)


def lane(kv_tokens: int, host: int, preemption: str = "swap", budget: int = 16, poison: int | None = None) -> LaneCore:
    return LaneCore(
        "fake", fake_model(poison=poison), kv_tokens=kv_tokens, page_size=4, max_batch_tokens=budget,
        device=torch.device("cpu"), host_kv_tokens=host, preemption=preemption,
    )  # fmt: skip


def write(core: LaneCore, seq: int, n: int) -> list[TokenChunk]:
    """Ask for n greedy tokens; the list fills as the lane is stepped."""
    chunks: list[TokenChunk] = []
    core.command(seq, Decode(n, GREEDY, 64, chunks.append, lambda value, error: None))
    return chunks


def run(core: LaneCore, steps: int = 5000) -> None:
    for _ in range(steps):
        if not core.step(lambda request, result: None):
            return
    raise AssertionError("the lane does not come to an end")


def text(chunks: list[TokenChunk]) -> list[int]:
    return [t for c in chunks for t in c.tokens]


def park(core: LaneCore, seq: int) -> None:
    core._runner.move(Step((), (), (), swap_out=tuple(core._sequences[seq].park_kv())))


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 14), min_size=2, max_size=7),
    kv_pages=st.integers(9, 16),
    host_pages=st.integers(0, 12),
    budget=st.integers(1, 20),
    priorities=st.lists(st.integers(0, 2), min_size=7, max_size=7),
)
def test_sequences_side_by_side_write_the_same_text_in_any_pools(
    lengths: list[int], kv_pages: int, host_pages: int, budget: int, priorities: list[int]
) -> None:
    core = lane(4 * kv_pages, 4 * host_pages, budget=budget)
    chunks = {}
    for i, n in enumerate(lengths):
        core.open(i, tuple((i + j) % EOS for j in range(n)), priority=priorities[i])
        core.command(i, Fork((100 + i, 200 + i), lambda value, error: None))
    # A fork is carried out when its prompt is computed, and what its children are asked before that is refused.
    while any(len(s.pending) for s in core._sequences.values()):
        assert core.step(lambda request, result: None)
    for i in range(len(lengths)):
        for seq in (i, 100 + i, 200 + i):
            chunks[seq] = write(core, seq, 18)
    run(core)
    for i, n in enumerate(lengths):
        for seq in (i, 100 + i, 200 + i):
            assert text(chunks[seq]) == greedy([(i + j) % EOS for j in range(n)], 18)
            core.close(seq)
    assert core.pool.used == core.host_pool.used == 0
    stats = core.stats
    assert stats.preemptions == stats.preemptions_swap + stats.preemptions_recompute
    assert stats.swapped_in_pages <= stats.swapped_out_pages


def test_moved_pages_are_not_computed_again_and_dropped_ones_only_where_nobody_shares_them() -> None:
    for host, recomputed in ((400, False), (0, True)):
        core = lane(kv_tokens=40, host=host)
        chunks = []
        for i in range(4):
            core.open(i, (i, i + 1))
            chunks.append(write(core, i, 30))
        run(core)
        assert [text(c) for c in chunks] == [greedy([i, i + 1], 30) for i in range(4)]
        assert core.stats.preemptions > 0
        assert (core.stats.recomputed_tokens > 0) is recomputed
        assert (core.stats.swapped_in_pages > 0) is not recomputed
    # A dropped chain keeps its prompt, which its sibling holds too.
    core = lane(kv_tokens=400, host=0)
    core.open(0, tuple(range(9)))
    core.command(0, Fork((1,), lambda value, error: None))
    run(core)
    written = write(core, 1, 6)
    run(core)
    core._sequences[1].drop_kv()
    assert core._sequences[1].computed == 8
    again = write(core, 1, 6)
    run(core)
    assert text(written) + text(again) == greedy(list(range(9)), 12)
    assert core.stats.recomputed_tokens == 6


def test_parked_pages_can_be_forked_and_truncated() -> None:
    core = lane(kv_tokens=400, host=400)
    core.open(0, (1, 2, 3, 4, 5, 6))
    first = write(core, 0, 9)
    run(core)
    park(core, 0)
    assert (core.pool.used, core.host_pool.used) == (0, 4)
    core.command(0, Fork((1, 2), lambda value, error: None))
    assert [core.host_pool.refs(slot) for slot in core._sequences[0].table.parked] == [3] * 4
    core._sequences[2].truncate(7)
    history = [1, 2, 3, 4, 5, 6, *text(first)]
    chunks = [write(core, 1, 5), write(core, 2, 5)]
    run(core)
    assert [text(c) for c in chunks] == [greedy(history, 5), greedy(history[:7], 5)]
    core.close(0)
    assert core.host_pool.used == 0
    assert core.stats.recomputed_tokens == 0


def test_pages_that_may_hold_nan_are_never_moved() -> None:
    core = lane(kv_tokens=24, host=400, poison=EOS)
    core.open(0, (1, 2, 3, 4, 5))
    core.command(0, Fork((1,), lambda value, error: None))
    run(core)
    core.pool.taint(core._sequences[1].table.pages)
    core.close(1)
    core.open(2, (2,))
    chunks = [write(core, 2, 23)]
    run(core)
    assert core._sequences[0].preempted
    assert (core.stats.preemptions_swap, core.stats.preemptions_recompute) == (0, 1)
    chunks.append(write(core, 0, 8))
    run(core)
    assert [text(c) for c in chunks] == [greedy([2], 23), greedy([1, 2, 3, 4, 5], 8)]


def test_auto_moves_what_takes_longer_to_compute() -> None:
    """Seven billion parameters against a model of nothing but KV."""
    config = replace(
        fake_model().config, num_layers=32, hidden_size=4096, num_heads=32, num_kv_heads=32, head_dim=128,
        intermediate_size=11008,
    )  # fmt: skip
    assert forward_flops(config, 0, 1) == pytest.approx(2 * 6.476e9, rel=1e-3)
    whole = forward_flops(config, 0, 4000)
    assert whole == pytest.approx(forward_flops(config, 0, 1500) + forward_flops(config, 1500, 4000))
    page_bytes = 16 * 2 * 32 * 32 * 128 * 2
    costs = Costs(config, page_bytes, link_bytes_s=20e9, compute_flop_s=200e12)
    assert costs.worth_moving(100, 0, 1600)
    assert not replace(costs, link_bytes_s=5e9).worth_moving(100, 0, 1600)
    # The longer the sequence, the more attention there is to compute, and the same bytes to move.
    assert replace(costs, link_bytes_s=10e9).worth_moving(1, 29984, 30000)
    for preemption in ("auto", "swap", "recompute"):
        core = lane(kv_tokens=40, host=400, preemption=preemption)
        core._scheduler._costs = None if preemption == "swap" else replace(costs, compute_flop_s=1e30)
        chunks = [write(core, i, 20) for i in range(4) if core.open(i, (i,)) is None]
        run(core)
        assert [text(c) for c in chunks] == [greedy([i], 20) for i in range(4)]
        assert (core.stats.preemptions_swap > 0) is (preemption == "swap")


@settings(max_examples=40)
@given(data=st.data(), staged=st.sampled_from([1, 700, 64 << 20]))
def test_kv_swap_copies_the_named_pages_both_ways(data: st.DataObject, staged: int) -> None:
    g = torch.Generator().manual_seed(0)
    kv, host = torch.randn(3, 2, 7, 4, 2, 8, generator=g), torch.randn(9, 3, 2, 4, 2, 8, generator=g)
    n = data.draw(st.integers(0, 7))
    pages = torch.tensor(data.draw(st.permutations(range(7)))[:n], dtype=torch.int64)
    slots = torch.tensor(data.draw(st.permutations(range(9)))[:n], dtype=torch.int64)
    to_host = data.draw(st.booleans())
    wanted_kv, wanted_host = kv.clone(), host.clone()
    for page, slot in zip(pages.tolist(), slots.tolist(), strict=True):
        for layer in range(3):
            if to_host:
                wanted_host[slot, layer] = kv[layer, :, page]
            else:
                wanted_kv[layer, :, page] = host[slot, layer]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paging, "_STAGED_BYTES", staged)
        ops.kv_swap(kv, host, pages, slots, to_host)
    assert torch.equal(kv, wanted_kv) and torch.equal(host, wanted_host)


def test_a_page_that_was_copied_from_is_given_away_in_the_same_step_and_written_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    core, rounds = lane(36, 0, budget=4), []
    monkeypatch.setattr(runner, "copy_rounds", lambda copies: rounds.append(copy_rounds(copies)) or rounds[-1])
    prompts = [tuple((i + j) % EOS for j in range(10)) for i in range(2)]
    for i, prompt in enumerate(prompts):
        core.open(i, prompt)
        core.command(i, Fork((100 + i, 200 + i), lambda value, error: None))
    while any(len(s.pending) for s in core._sequences.values()):
        core.step(lambda request, result: None)
    chunks = {seq: write(core, seq, 18) for i in range(2) for seq in (i, 100 + i, 200 + i)}
    run(core)
    for seq, written in chunks.items():
        assert text(written) == greedy(list(prompts[seq % 100]), 18)
    # Otherwise nothing was tested: one launch would have raced.
    assert max(map(len, rounds)) > 1


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12))
def test_copies_in_rounds_are_copies_one_after_the_other(copies: list[tuple[int, int]]) -> None:
    copies = [(source, destination) for source, destination in copies if source != destination]
    model = fake_model()
    kv = Runner(model.decoder, 7, 4, torch.device("cpu"), torch.float32)
    kv.kv.copy_(torch.arange(7.0).view(7, 1, 1, 1).expand_as(kv.kv))
    wanted = list(range(7))
    for source, destination in copies:
        wanted[destination] = wanted[source]
    kv.move(Step((), tuple(copies), ()))
    assert kv.kv[0, 0, :, 0, 0, 0].tolist() == wanted
    assert sum(len(sources) for sources, _ in copy_rounds(copies)) == len(copies)


def test_misuse_is_named() -> None:
    kv, index = torch.zeros(3, 2, 7, 4, 2, 8), torch.arange(2)
    with pytest.raises(InputError, match="host does not fit"):
        ops.kv_swap(kv, torch.zeros(9, 3, 2, 4, 2, 4), index, index, True)
    with pytest.raises(InputError, match="host does not fit"):
        ops.kv_swap(kv, torch.zeros(9, 3, 2, 4, 2, 8, dtype=torch.float64), index, index, True)
    with pytest.raises(InputError, match="slots does not fit"):
        ops.kv_swap(kv, torch.zeros(9, 3, 2, 4, 2, 8), index, index[:1], True)
    pool, host = PagePool(8, 4), PagePool(2, 4, padding=False)
    table = BlockTable(pool, host)
    table.reserve(0, 12)
    with pytest.raises(OutOfPages):
        table.park()
    assert (len(table.pages), table.parked, host.free) == (3, [], 2)


def test_a_place_that_is_taken_twice_in_a_step_is_written_once() -> None:
    """A host slot that was given up and taken again within a step: an op may write its destinations in any order."""
    assert _last_writes([(5, 0), (6, 1), (7, 0)]) == ((7, 6), (0, 1))
