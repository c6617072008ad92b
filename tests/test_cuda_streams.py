"""The pretended CUDA device keeps CUDA's rules: orders, events, races, copies, freed memory, graphs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cuda_streams import Ahead, Early, Late, Machine, Memory, Order, Shuffled, Work
from tests.cuda_tensors import CUDA, pretend_cuda

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here, and nothing to pretend")
ORDERS: list[Callable[[], Order]] = [Late, Early, Ahead, *(lambda seed=seed: Shuffled(seed) for seed in range(6))]


@pytest.mark.parametrize("linked", [False, True])
def test_every_order_that_the_rules_allow_happens_and_no_other(linked: bool) -> None:
    """Two streams with two pieces of work each; linked: the second of b behind the first of a."""
    allowed = {
        order
        for order in itertools.permutations(("a1", "a2", "b1", "b2"))
        if order.index("a1") < order.index("a2")
        and order.index("b1") < order.index("b2")
        and (not linked or order.index("a1") < order.index("b2"))
    }
    met = set()
    for seed in range(300):
        machine, ran = Machine(Shuffled(seed)), []
        a, b = (machine.new_stream() for _ in range(2))

        def put(stream: Any, name: str, machine: Machine = machine, ran: list[str] = ran) -> None:
            with machine.on(stream):
                machine.put(Work(name, lambda: ran.append(name)))

        put(a, "a1")
        first = a.record_event()
        put(a, "a2")
        put(b, "b1")
        if linked:
            b.wait_event(first)
        put(b, "b2")
        machine.synchronize()
        met.add(tuple(ran))
    assert met == allowed


STREAMS, CELLS, EVENTS = (st.integers(0, n) for n in (2, 2, 2))
PROGRAMS = st.lists(
    st.one_of(
        st.tuples(st.just("mix"), STREAMS, CELLS, CELLS),
        st.tuples(st.just("mix"), STREAMS, CELLS, CELLS),
        st.tuples(st.just("record"), STREAMS, EVENTS),
        st.tuples(st.just("wait"), STREAMS, EVENTS),
        st.tuples(st.just("host"), EVENTS),
    ),
    max_size=14,
)


def execute(program: list[Any], order: Order) -> tuple[list[int], list[str]]:
    """What the cells hold in the end: "mix" writes target = 3 target + source + 1."""
    machine, cells = Machine(order), [0, 1, 2]
    memories = [Memory(lambda: None) for _ in cells]
    streams = [machine.new_stream() for _ in range(3)]
    events = [machine.new_event() for _ in range(3)]
    for step in program:
        match step:
            case ("mix", stream, target, source):

                def mix(target: int = target, source: int = source) -> None:
                    cells[target] = (3 * cells[target] + cells[source] + 1) % 1_000_003

                with machine.on(streams[stream]):
                    machine.put(Work("mix", mix, [memories[source]], [memories[target]]))
            case ("record", stream, event):
                events[event].record(streams[stream])
            case ("wait", stream, event):
                streams[stream].wait_event(events[event])
            case ("host", event):
                events[event].synchronize()
    machine.synchronize()
    return cells, machine.reports


def has_race(program: list[Any]) -> bool:
    """By reachability: each step comes behind what it must, and two that share a cell which one writes are ordered."""
    last: dict[Any, set[int]] = {}
    done: list[tuple[int, int, int]] = []
    for i, step in enumerate(program):
        kind, *rest = step
        if kind == "host":
            last["host"] = last.get("host", set()) | last.get(("event", rest[0]), set())
        elif kind == "record":
            last["event", rest[1]] = set(last.get(("stream", rest[0]), set()))
        elif kind == "wait":
            last["stream", rest[0]] = last.get(("stream", rest[0]), set()) | last.get(("event", rest[1]), set())
        else:
            stream, target, source = rest
            before = last.get(("stream", stream), set()) | last.get("host", set())
            for j, other_target, other_source in done:
                shared = target in (other_target, other_source) or other_target == source
                if shared and j not in before:
                    return True
            done.append((i, target, source))
            last["stream", stream] = before | {i}
    return False


@settings(max_examples=300)
@given(program=PROGRAMS, seed=st.integers(0, 2**32))
def test_a_program_races_iff_two_of_its_steps_are_in_no_order_and_else_any_order_gives_the_same(
    program: list[Any], seed: int
) -> None:
    want, reports = execute(program, Early())
    assert bool(reports) is has_race(program)
    for order in (Late(), Ahead(), Shuffled(seed)):
        found, again = execute(program, order)
        assert again == reports
        assert reports or found == want


def test_a_copy_to_the_host_is_there_behind_its_event_and_not_before() -> None:
    with pretend_cuda(Late()):
        source = torch.arange(3, device=CUDA) + 1
        there = torch.empty(3, dtype=torch.int64, pin_memory=True)
        assert there.is_pinned() and not torch.empty(3).is_pinned()
        there.copy_(source, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        assert there.tolist() == [-1] * 3 and not copied.query()
        copied.synchronize()
        assert copied.query() and there.tolist() == [1, 2, 3]
        # To pageable memory, and wherever a value is wanted at once, it waits.
        assert torch.empty(3, dtype=torch.int64).copy_(source, non_blocking=True).tolist() == [1, 2, 3]
        assert source.tolist() == [1, 2, 3] and source[1].item() == 2 and source.nonzero().shape == (3, 1)
        torch.cuda.set_sync_debug_mode("error")
        for wait in (source.cpu, source[1].item, source.nonzero, lambda: torch.tensor([1], device=CUDA)):
            with pytest.raises(RuntimeError, match="synchronizing"):
                wait()


def test_a_copy_to_the_device_reads_page_locked_memory_when_it_runs_and_pageable_memory_at_once() -> None:
    for locked in (True, False):
        with pretend_cuda(Late()):
            host = torch.empty(2, dtype=torch.float32, pin_memory=locked)
            host.numpy()[:] = 1
            there = host.to(CUDA, non_blocking=True)
            host.numpy()[:] = 2
            assert there.tolist() == [2, 2] if locked else [1, 1]


@pytest.mark.parametrize("recorded", [True, False])
def test_freed_memory_is_its_streams_again(recorded: bool) -> None:
    """Another stream still reads it: without `record_stream` a race, and nonsense in some orders."""
    met = set()
    for order in ORDERS:
        with pretend_cuda(order()) as gpu:
            other = torch.cuda.Stream(CUDA)
            x = torch.ones(3, device=CUDA)
            other.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(other):
                y = x * 2
            if recorded:
                x.record_stream(other)
            del x
            torch.cuda.current_stream().synchronize()
            with torch.cuda.stream(other):
                met.add(tuple(y.nan_to_num(0).tolist()))
        assert gpu.machine.reports == (
            [] if recorded else ["race: reuse of freed memory writes what aten::mul.Tensor reads, streams 0 and 1"]
        )
    assert met == {(2.0,) * 3} if recorded else {(2.0,) * 3, (0.0,) * 3}


def test_a_graph_reads_its_tensors_anew_and_keeps_the_numbers_of_its_capture() -> None:
    with pretend_cuda(Late()) as gpu:
        x = torch.ones(2, device=CUDA)
        factor, graph = 3, torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = x * factor + torch.ones(2, device=CUDA)
            with pytest.raises(RuntimeError, match="capturing"):
                y.tolist()
            with pytest.raises(RuntimeError, match="pageable"):
                torch.ones(2).to(CUDA, non_blocking=True)
        factor = 5
        assert np.isnan(y.tolist()).all()
        for value in (1, 2):
            x.fill_(value)
            graph.replay()
            assert y.tolist() == [3 * value + 1] * 2
    assert gpu.machine.reports == []


def test_graphs_of_one_pool_must_not_run_side_by_side() -> None:
    def replayed(shared: bool) -> list[str]:
        with pretend_cuda(Late()) as gpu:
            x = torch.ones(2, device=CUDA)
            pool, kept = torch.cuda.graph_pool_handle(), []
            for _ in range(2):
                graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(CUDA)
                with torch.cuda.graph(graph, pool=pool if shared else None, stream=stream):
                    kept.append((graph, stream, x * 2 + 1))
            for graph, stream, _ in kept:
                with torch.cuda.stream(stream):
                    graph.replay()
        return gpu.machine.reports

    assert replayed(shared=False) == []
    assert any("reuse of graph memory" in report for report in replayed(shared=True))


def test_what_goes_wrong_in_a_kernel_is_reported() -> None:
    with pretend_cuda(Late()) as gpu:
        torch.ones(2, device=CUDA).index_select(0, torch.full((1,), 7, device=CUDA))
        torch.cuda.synchronize()
    (report,) = gpu.machine.reports
    assert report.startswith("fault: aten::index_select: IndexError")
