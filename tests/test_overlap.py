"""Launching ahead changes nothing but the time: a lane whose device is late, step by step against one that waits."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atts_engine.errors import ChainError
from atts_engine.kv.pages import PAD_PAGE
from atts_engine.runtime import graphs as graphs_module
from atts_engine.runtime import lane as lane_module
from atts_engine.runtime.commands import Append, Decode, Fork, Propose, Truncate, Verdict
from atts_engine.runtime.lane import LaneCore
from atts_engine.runtime.records import SamplingParams
from tests.fakes import EOS, VOCAB, fake_model, greedy
from tests.late import LateRunner, fake_capture

PAGE = 4
ROOMY = 4000


@pytest.fixture(scope="module", autouse=True)
def small_graphs_of_spans() -> Iterator[None]:
    """Sizes that steps of these lanes have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs_module, "SPAN_ROWS", (2, 4, 6))
        patch.setattr(graphs_module, "SPAN_SEQUENCES", (2, 7))
        yield


@dataclass(frozen=True)
class Order:
    """One command, as data, so that two lanes can be given the same."""

    kind: str
    tokens: tuple[int, ...] = ()
    n: int = 0
    sampling: SamplingParams = SamplingParams(temperature=0.0)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane_module, "Runner", LateRunner)


def lane(
    *,
    overlap: bool,
    kv_tokens: int = ROOMY,
    budget: int = 6,
    poison: int | None = None,
    graphs: int = 0,
    swap: bool = False,
) -> LaneCore:
    core = LaneCore(
        "fake",
        fake_model(poison=poison),
        kv_tokens=kv_tokens,
        page_size=PAGE,
        max_batch_tokens=budget,
        device=torch.device("cpu"),
        overlap=overlap,
        host_kv_tokens=64 if swap else 0,
        preemption="swap" if swap else "recompute",
    )
    if graphs:
        core._runner.capture(fake_capture, graphs)
    return core


def late_lane(**options: Any) -> LaneCore:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lane_module, "Runner", LateRunner)
        return lane(overlap=True, **options)


def give(core: LaneCore, seq: int, order: Order, heard: list[Any]) -> None:
    """What comes of the order goes to `heard`: chunks, then its answer."""

    def reply(value: Any, error: BaseException | None) -> None:
        heard.append((order.kind, value, type(error), str(error)))

    command = {
        "append": lambda: Append(order.tokens, False, reply),
        "score": lambda: Append(order.tokens, True, reply),
        "decode": lambda: Decode(order.n, order.sampling, 3, heard.append, reply),
        "propose": lambda: Propose(order.tokens, order.n, order.sampling, 0, reply),
        "truncate": lambda: Truncate(order.n, reply),
        "verdict": lambda: Verdict(None, reply),
    }[order.kind]()
    core.command(seq, command)


def run(core: LaneCore, *, wait: bool = True) -> None:
    # A late step is not ready when it is asked for the first time.
    while core.step(lambda request, result: None, wait=wait) or core.in_flight:
        check_pages(core)
    check_pages(core)


def check_pages(core: LaneCore) -> None:
    held: dict[int, int] = {}
    for seq in (*core._sequences.values(), *core._leaving):
        for page in seq.table.pages:
            held[page] = held.get(page, 0) + 1
    assert PAD_PAGE not in held
    assert all(core.pool.refs(page) == n for page, n in held.items())
    for pending in core._flight:
        assert all(work.seq.flights for work in pending.step.work)
        # A page in flight is nobody else's: whoever it is written for still holds it, alone.
        assert all(held.get(page) == 1 for page in getattr(pending, "owners", ()))


TOKENS = st.lists(st.integers(0, VOCAB - 2), min_size=1, max_size=7).map(tuple)
SAMPLING = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 3.0, 50.0]),
    seed=st.integers(0, 3),
    stop=st.sampled_from([(), ("a",), ("bc",), ("f", "g", "h")]),
    stop_token_ids=st.sampled_from([(), (3, 5)]),
    ignore_eos=st.booleans(),
    logprobs=st.booleans(),
    confidence=st.sampled_from([0, 3]),
)
APPENDS = [st.builds(Order, st.just("append"), TOKENS), st.builds(Order, st.just("score"), TOKENS)]
DECODE = st.builds(Order, st.just("decode"), n=st.integers(1, 9), sampling=SAMPLING)
PROPOSE = st.builds(Order, st.just("propose"), TOKENS, st.integers(1, 9), SAMPLING)
TRUNCATE = st.builds(Order, st.just("truncate"), n=st.integers(1, 9))
VERDICT = st.builds(Order, st.just("verdict"))


def scripts(*orders: st.SearchStrategy[Order]) -> st.SearchStrategy[Any]:
    """For each sequence a prompt, its orders, and those of a child that is forked off behind them."""
    some = st.one_of(*orders)
    each = st.tuples(TOKENS, st.lists(some, max_size=6), st.lists(some, max_size=3))
    return st.lists(each, min_size=1, max_size=5)


def play(core: LaneCore, scripts: list[Any], *, wait: bool = True) -> dict[int, list[Any]]:
    """All sequences at once; then a child of each goes on, while the parents are closed under it."""
    ids = itertools.count(len(scripts))
    heard: dict[int, list[Any]] = {}
    children = {}
    for seq, (prompt, orders, _) in enumerate(scripts):
        core.open(seq, prompt)
        heard[seq] = []
        for order in orders:
            give(core, seq, order, heard[seq])
        children[seq] = next(ids)
        core.command(seq, Fork((children[seq],), lambda value, error: None))
    run(core, wait=wait)
    for seq, (_, _, orders) in enumerate(scripts):
        heard[children[seq]] = []
        for order in orders:
            give(core, children[seq], order, heard[children[seq]])
    core.step(lambda request, result: None)
    for seq in range(len(scripts)):
        core.close(seq)
    run(core, wait=wait)
    for seq in children.values():
        core.close(seq)
    run(core, wait=wait)
    assert core.open_sequences == 0
    assert core.pool.used == len(core.pool.quarantined)
    return heard


@settings(max_examples=60)
@given(
    script=scripts(*APPENDS, DECODE, DECODE, PROPOSE, VERDICT), wait=st.booleans(), graphs=st.sampled_from([0, 1, 4])
)
def test_a_late_device_gives_the_same_chunks_and_scores(script: Any, wait: bool, graphs: int) -> None:
    """To the bit, and each distinct token is computed once in both."""
    plain, late = lane(overlap=False), late_lane(graphs=graphs)
    assert play(late, script, wait=wait) == play(plain, script)
    assert plain.stats.discarded_rows == 0
    for name in ("recomputed_tokens", "sampled_tokens", "scored_tokens", "proposed_tokens", "accepted_tokens"):
        assert getattr(late.stats, name) == getattr(plain.stats, name)
    # Where the budget cuts a proposal, which a discarded row may change, decides how much of it is forwarded in vain.
    useful = [core.stats.computed_tokens - core.stats.rejected_rows for core in (late, plain)]
    assert useful[0] == useful[1]


@settings(max_examples=60)
@given(script=scripts(DECODE, DECODE, PROPOSE, TRUNCATE), wait=st.booleans(), graphs=st.sampled_from([0, 4]))
def test_a_nan_that_only_a_discarded_row_meets_harms_nobody(script: Any, wait: bool, graphs: int) -> None:
    """EOS gives NaN to whoever forwards it. A chain that ends in it does not, but a row launched ahead does."""
    plain, late = lane(overlap=False, poison=EOS), late_lane(graphs=graphs, poison=EOS)
    assert play(late, script, wait=wait) == play(plain, script)


@settings(max_examples=60)
@given(script=scripts(*APPENDS, DECODE, DECODE, PROPOSE, TRUNCATE, VERDICT), wait=st.booleans(), swap=st.booleans())
def test_the_same_with_a_pool_that_forces_preemption(swap: bool, script: Any, wait: bool) -> None:
    tight = {"kv_tokens": 36, "swap": swap}
    assert play(late_lane(**tight), script, wait=wait) == play(lane(overlap=False, **tight), script)


@pytest.mark.parametrize("swap", [False, True])
def test_preemption_happens_under_overlap_and_the_text_stays(late: None, swap: bool) -> None:
    core = lane(overlap=True, kv_tokens=40, budget=64, swap=swap)
    texts: dict[int, list[Any]] = {i: [] for i in range(4)}
    for i, heard in texts.items():
        core.open(i, (i, i + 1))
        give(core, i, Order("decode", n=30), heard)
    run(core)
    assert core.stats.preemptions > 0
    assert (core.stats.preemptions_swap > 0) == swap
    for i, heard in texts.items():
        assert [t for chunk in heard[:-1] for t in chunk.tokens] == greedy([i, i + 1], 30)


def test_a_step_is_launched_before_the_last_one_is_known(late: None) -> None:
    """And none beyond what max_tokens allows: that much is known without the device."""
    core = lane(overlap=True)
    runner = core._runner
    assert isinstance(runner, LateRunner)
    core.open(0, (1, 2))
    give(core, 0, Order("decode", n=5), [])
    core.step(lambda request, result: None)
    assert (len(core._flight), core.stats.steps, len(runner.queue)) == (1, 0, 1)
    core.step(lambda request, result: None)
    assert (len(core._flight), core.stats.steps, len(runner.queue)) == (1, 1, 1)
    run(core)
    assert (core.stats.steps, core.stats.discarded_rows) == (5, 0)


def test_a_row_behind_a_stop_is_discarded_and_counted(late: None) -> None:
    core, heard = lane(overlap=True), []
    core.open(0, (1, 2))
    want = greedy([1, 2], 12)
    give(core, 0, Order("decode", n=12, sampling=SamplingParams(temperature=0.0, stop_token_ids=(want[3],))), heard)
    run(core)
    stop = want.index(want[3])
    assert [t for chunk in heard[:-1] for t in chunk.tokens] == want[: stop + 1]
    assert core.stats.discarded_rows == 1
    assert core.stats.computed_tokens == 2 + stop
    give(core, 0, Order("decode", n=4), heard)
    run(core)
    assert core.stats.recomputed_tokens == 0
    assert [t for chunk in heard if not isinstance(chunk, tuple) for t in chunk.tokens] == want[: stop + 5]


@pytest.mark.parametrize("closed", [True, False])
def test_a_row_behind_a_stop_that_gives_nan_leaves_none_in_a_page(late: None, closed: bool) -> None:
    prompt = (2, 4, 6)
    want = greedy(prompt, 5)
    stop = want[4]
    assert stop not in (*prompt, *want[:4])
    core, heard, after = lane(overlap=True, poison=stop, kv_tokens=8), [], []
    core.open(0, prompt)
    give(core, 0, Order("decode", n=12, sampling=SamplingParams(temperature=0.0, stop_token_ids=(stop,))), heard)
    run(core)
    assert heard[-1][2] is type(None)
    assert core.stats.discarded_rows == 1
    if closed:
        core.close(0)
        core.open(1, prompt)  # needs every page there is, the poisoned one with them
    else:
        give(core, 0, Order("truncate", n=6), heard)  # keeps the page
    give(core, int(closed), Order("decode", n=4 if closed else 1), after)
    run(core)
    assert [t for chunk in after[:-1] for t in chunk.tokens] == (want[:4] if closed else want[3:4])


def test_a_row_launched_ahead_is_no_reason_to_fail(late: None) -> None:
    """The pool holds all that the chain forwards up to its stop, and not one token more."""
    want = greedy([3, 1, 5], 6)
    assert want.index(want[5]) == 5
    core, heard = lane(overlap=True, kv_tokens=8), []
    core.open(0, (3, 1, 5))
    give(core, 0, Order("decode", n=30, sampling=SamplingParams(temperature=0.0, stop_token_ids=(want[5],))), heard)
    run(core)
    assert [t for chunk in heard[:-1] for t in chunk.tokens] == want


def test_pages_of_a_closed_sequence_come_back_when_its_step_has_arrived(late: None) -> None:
    core = lane(overlap=True)
    core.open(0, (1, 2, 3))
    heard: list[Any] = []
    give(core, 0, Order("decode", n=9), heard)
    core.step(lambda request, result: None)
    core.close(0)
    assert heard[-1][2] is ChainError
    assert (core.open_sequences, core.pool.used) == (1, 1)
    run(core)
    assert (core.open_sequences, core.pool.used) == (0, 0)
    assert core.stats.discarded_rows == 1


def test_a_stopped_decode_forgets_what_is_in_flight(late: None) -> None:
    core, first, second = lane(overlap=True), [], []
    core.open(0, (1, 2, 3))
    give(core, 0, Order("decode", n=9), first)
    for _ in range(3):
        core.step(lambda request, result: None)
    core.stop_decode(0)
    give(core, 0, Order("truncate", n=3), second)
    give(core, 0, Order("decode", n=6), second)
    run(core)
    assert [t for chunk in second[1:-1] for t in chunk.tokens] == greedy([1, 2, 3], 6)


def test_a_fault_with_steps_in_flight_gives_every_page_back(late: None, monkeypatch: pytest.MonkeyPatch) -> None:
    core = lane(overlap=True)
    for seq in range(3):
        core.open(seq, (1, 2, 3))
        give(core, seq, Order("decode", n=9), [])
    core.step(lambda request, result: None)
    core.close(2)

    def broken(*_: object) -> None:
        raise RuntimeError("device lost")

    monkeypatch.setattr(core.model.decoder, "forward", broken)
    run(core)
    assert (core.open_sequences, core.pool.used) == (0, 0)
