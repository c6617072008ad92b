"""The lanes' CUDA path on a pretended device whose streams run in any legal order: tokens and scores are to the bit
those of a lane on the CPU, nothing races, and no launch waits. Then whatever orders the path is taken away, piece by
piece, and missed each time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import fields, replace
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atts_engine import AsyncEngine, Chain, ChainError, EngineConfig, LaneError, ops
from atts_engine.errors import AttsError
from atts_engine.models import ForwardBatch, load_model
from atts_engine.ops import cuda as csrc
from atts_engine.ops import dispatch
from atts_engine.runtime import graphs as graphs_module
from atts_engine.runtime import runner as runner_module
from atts_engine.runtime import transfer
from atts_engine.runtime.gating import DeviceGate
from atts_engine.runtime.graphs import Shape, StepGraphs
from atts_engine.runtime.lane import LaneCore
from atts_engine.runtime.records import SamplingParams
from atts_engine.runtime.runner import Runner
from atts_engine.runtime.transfer import HostCopy
from tests.cuda_streams import Ahead, Early, Late, Order, Pool, Shuffled
from tests.cuda_tensors import CUDA, Gpu, pretend_cuda
from tests.fakes import EOS, VOCAB, FakeDecoder, fake_model
from tests.gpu import test_lanes_gpu as on_a_gpu
from tests.test_engine import CONFIG, PARAMS, content, frozen_calibrator, problems, with_engine
from tests.test_overlap import APPENDS, DECODE, PAGE, PROPOSE, ROOMY, TRUNCATE, VERDICT, play, scripts
from tests.test_overlap import Order as Command
from tests.test_overlap import lane as plain_lane

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: tests/gpu runs on it")

ORDERS: dict[str, Callable[[], Order]] = {"late": Late, "early": Early, "ahead": Ahead}
ORDER = st.one_of(st.sampled_from(sorted(ORDERS)), st.integers(0, 2**32).map(str))


def order_of(name: str) -> Order:
    return ORDERS[name]() if name in ORDERS else Shuffled(int(name))


@pytest.fixture(scope="module", autouse=True)
def small_graphs_of_spans() -> Iterator[None]:
    """Sizes that steps of these lanes have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs_module, "SPAN_ROWS", (2, 4, 6))
        patch.setattr(graphs_module, "SPAN_SEQUENCES", (2, 7))
        yield


class QueuedDecoder(FakeDecoder):
    """The fake decoder as one kernel."""

    def __init__(self, gpu: Gpu, plain: FakeDecoder) -> None:
        super().__init__(plain.config, plain.poison)
        # Made by the default stream, without waiting.
        self.lm_head = torch.eye(VOCAB, device=CUDA)
        self._gpu = gpu

    def forward(self, batch: ForwardBatch, kv: torch.Tensor) -> torch.Tensor:
        out = self._gpu.empty((len(batch.ids), VOCAB), torch.float32)
        inputs = [getattr(batch, field.name) for field in fields(batch)]
        held = [t.held for t in (*inputs, kv, out)]
        forward = super().forward

        def run() -> None:
            *parts, cache, hidden = held
            hidden.copy_(forward(ForwardBatch(*parts), cache))

        self._gpu.queue("forward", run, inputs, [kv, out])
        return out


def lane(
    gpu: Gpu,
    *,
    overlap: bool,
    graphs: bool = False,
    kv_tokens: int = ROOMY,
    swap: bool = False,
    poison: int | None = None,
) -> LaneCore:
    model = fake_model(poison=poison)
    core = LaneCore(
        "fake",
        replace(model, decoder=QueuedDecoder(gpu, model.decoder)),  # type: ignore[arg-type]
        kv_tokens=kv_tokens,
        page_size=PAGE,
        max_batch_tokens=6,
        device=CUDA,
        overlap=overlap,
        graphs=graphs,
        host_kv_tokens=64 if swap else 0,
        preemption="swap" if swap else "recompute",
    )
    core.warm_up()
    return core


def forbid_waiting_launches(patch: pytest.MonkeyPatch, gpu: Gpu) -> None:
    """Whatever a lane puts on its stream raises where it waits for the device."""

    def strict(method: Callable[..., Any]) -> Callable[..., Any]:
        def launch(*args: Any) -> Any:
            with gpu.machine.no_waiting():
                return method(*args)

        return launch

    for name in ("launch", "move", "wipe"):
        patch.setattr(Runner, name, strict(getattr(Runner, name)))


def heard_on(order: str, script: Any, *, wait: bool = True, **options: Any) -> tuple[dict[int, list[Any]], list[str]]:
    """What the lane's callers hear when its device runs in that order, and what the device reports."""
    with pretend_cuda(order_of(order)) as gpu, pytest.MonkeyPatch.context() as patch:
        core = lane(gpu, **options)
        forbid_waiting_launches(patch, gpu)
        heard = play(core, script, wait=wait)
    return heard, gpu.machine.reports


@settings(max_examples=40)
@given(
    script=scripts(*APPENDS, DECODE, DECODE, PROPOSE, VERDICT),
    order=ORDER,
    wait=st.booleans(),
    overlap=st.booleans(),
    graphs=st.booleans(),
)
def test_any_order_gives_the_chunks_and_scores_of_the_cpu(script: Any, order: str, wait: bool, **how: bool) -> None:
    assert heard_on(order, script, wait=wait, **how) == (play(plain_lane(overlap=False), script), [])


@settings(max_examples=40)
@given(
    script=scripts(*APPENDS, DECODE, DECODE, PROPOSE, TRUNCATE, VERDICT),
    order=ORDER,
    swap=st.booleans(),
    overlap=st.booleans(),
    graphs=st.booleans(),
)
def test_the_same_with_a_pool_that_forces_preemption(script: Any, order: str, swap: bool, **how: bool) -> None:
    want = play(plain_lane(overlap=False, kv_tokens=36, swap=swap), script)
    assert heard_on(order, script, kv_tokens=36, swap=swap, **how) == (want, [])


@settings(max_examples=20)
@given(script=scripts(DECODE, DECODE, PROPOSE, TRUNCATE), order=ORDER, graphs=st.booleans())
def test_pages_with_nan_are_wiped_in_time(script: Any, order: str, graphs: bool) -> None:
    want = play(plain_lane(overlap=False, poison=EOS), script)
    assert heard_on(order, script, poison=EOS, overlap=True, graphs=graphs) == (want, [])


TWO_LANES = replace(CONFIG, draft_device="cuda:0", target_device="cuda:0", kv_tokens=4096, max_batch_tokens=32)


def chains(config: EngineConfig) -> list[Chain]:
    async def work(engine: AsyncEngine) -> list[Chain]:
        calibrator, params = frozen_calibrator(), replace(PARAMS, turns=2)
        solutions = await asyncio.gather(*(engine.solve(p, params, calibrator=calibrator) for p in problems(2)))
        return [content(chain) for solution in solutions for chain in solution.chains]

    found: list[Chain] = with_engine(work, config)
    return found


@pytest.mark.parametrize(
    ("order", "threads", "kernels", "target"),
    [
        ("late", "one", "triton", "cuda:0"),
        ("ahead", "each", "triton", "cuda:0"),
        ("1", "each", "csrc", "cuda:0"),
        ("2", "one", "triton", "cuda:1"),
    ],
)
def test_two_lanes_with_graphs_write_the_chains_of_the_cpu(order: str, threads: str, kernels: str, target: str) -> None:
    """The whole engine on the built-in pair: both lanes launch ahead, and verdicts fall on streams of their own."""
    config = replace(TWO_LANES, lane_threads=threads, target_device=target)
    with pretend_cuda(order_of(order), 2) as gpu, csrc_where_it_can() if kernels == "csrc" else nullcontext():
        found = chains(config)
    assert gpu.machine.reports == []
    assert found == cpu_chains()
    assert {turn.takeover for chain in found for turn in chain.turns} == {True, False}


@pytest.mark.parametrize("name", ["on_stream", "aside"])
def test_a_launch_with_another_device_current_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A kernel goes to the current device, which a stream's context makes that of the stream."""
    config = replace(TWO_LANES, target_device="cuda:1", graphs=False)
    monkeypatch.setattr(Runner, name, lambda self: nullcontext())
    with pretend_cuda(Late(), 2), pytest.raises((ChainError, LaneError, RuntimeError), match=r"is launched on cuda:0"):
        chains(config)


@contextmanager
def csrc_where_it_can() -> Iterator[None]:
    """What a tuning table would say that prefers csrc/ for every op on a GPU."""
    dispatch.prefer(dict.fromkeys(dispatch.CUDA_OPS, dispatch.CUDA))
    try:
        yield
    finally:
        dispatch.prefer({})


@cache
def cpu_chains() -> list[Chain]:
    return chains(CONFIG)


def test_two_lanes_that_share_the_memory_of_their_graphs_race() -> None:
    pool = Pool()
    # The lanes may well fail over what they read.
    failing = suppress(AssertionError, AttsError)
    with pretend_cuda(Late()) as gpu, mock.patch.object(torch.cuda, "graph_pool_handle", lambda: pool), failing:
        chains(TWO_LANES)
    assert any("reuse of graph memory" in report for report in gpu.machine.reports)


def test_the_host_waits_for_what_it_wants_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """`collect` not for the step behind it, a verdict not for the step in flight."""
    left: dict[str, list[tuple[int, bool]]] = {"wait": [], "decide": []}
    with pretend_cuda(Late()) as gpu:
        core = lane(gpu, overlap=True, graphs=True)
        stream = core._runner._stream

        def watched(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
            def both(self: Any, *args: Any) -> Any:
                ran = stream.ran
                found = method(self, *args)
                wanted = max(ran, self._event.mark.count) if name == "wait" else ran
                left[name].append((stream.ran - wanted, any(work.name == "forward" for work in stream.queue)))
                return found

            return both

        for owner, name in ((HostCopy, "wait"), (DeviceGate, "decide")):
            monkeypatch.setattr(owner, name, watched(name, getattr(owner, name)))
        play(core, SCRIPT)
    for name, found in left.items():
        assert all(more == 0 for more, _ in found), name
        assert any(in_flight for _, in_flight in found), name


def test_a_workspace_belongs_to_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    def scored() -> list[str]:
        with pretend_cuda(Late()) as gpu, csrc_where_it_can():
            logits, ids = torch.eye(VOCAB, device=CUDA), torch.arange(VOCAB, device=CUDA)
            torch.cuda.synchronize()
            for rows in (3, 3, VOCAB):
                for stream in (torch.cuda.current_stream(), torch.cuda.Stream(CUDA)):
                    with torch.cuda.stream(stream):
                        ops.score_logits(logits[:rows], ids[:rows])
        return gpu.machine.reports

    assert scored() == []
    shared: dict[str, torch.Tensor] = {}

    def one_for_all(op: str, like: torch.Tensor, size: int) -> torch.Tensor:
        return shared.setdefault(op, torch.zeros(1 << 10, dtype=torch.uint8, device=CUDA))

    monkeypatch.setattr(csrc._Workspaces, "of", one_for_all)
    assert any("csrc score_logits touches what csrc score_logits writes" in report for report in scored())


@pytest.mark.parametrize(
    "test",
    [
        on_a_gpu.test_launching_ahead_changes_no_token,
        on_a_gpu.test_a_gpu_lane_writes_what_a_cpu_lane_writes,
        lambda model: on_a_gpu.test_graphs_change_no_token(model, overlap=True),
        lambda model: on_a_gpu.test_a_captured_graph_reads_its_buffers_anew_each_time(),
        lambda model: on_a_gpu.test_copies_do_not_wait_and_arrive(None),
        lambda model: on_a_gpu.test_a_step_is_launched_without_waiting(model, None),
        lambda model: on_a_gpu.test_devices_have_numbers_and_a_missing_one_is_named(),
        pytest.param(
            lambda model: on_a_gpu.test_two_lanes_on_one_gpu_write_what_they_write_one_after_the_other(),
            marks=pytest.mark.long,
        ),
    ],
    ids=["ahead", "cpu", "graphs", "buffers", "copies", "launch", "devices", "lanes"],
)
def test_the_tests_for_a_gpu_pass(test: Callable[[Any], None]) -> None:
    with pretend_cuda(Late()) as gpu:
        test(load_model("tiny-draft", "cuda:0"))
    assert gpu.machine.reports == []


# What orders the path, taken away.

GREEDY = SamplingParams(temperature=0.0, logprobs=True)
SCRIPT = [
    *(
        (
            (3, 1 + i, 5),
            [
                Command("decode", n=7, sampling=replace(GREEDY, stop_token_ids=(i,))),
                Command("score", (2, 4, i)),
                Command("verdict"),
                Command("propose", (1, i), 5, GREEDY),
                Command("decode", n=6, sampling=GREEDY),
            ],
            [Command("truncate", n=4), Command("decode", n=5, sampling=GREEDY)],
        )
        for i in range(5)
    ),
    ((4, EOS), [Command("decode", n=3, sampling=GREEDY)], []),
]
TIGHT = {"kv_tokens": 44, "swap": True, "poison": EOS}
Broken = Callable[[pytest.MonkeyPatch, Gpu], None]


def played(broken: Broken, order: str = "late") -> tuple[dict[int, list[Any]] | None, list[str]]:
    """What is heard of `SCRIPT`, None where a lane's bookkeeping fell over, and what the device reports."""
    with pretend_cuda(order_of(order)) as gpu, pytest.MonkeyPatch.context() as patch:
        broken(patch, gpu)
        core = lane(gpu, overlap=True, graphs=True, **TIGHT)  # type: ignore[arg-type]
        forbid_waiting_launches(patch, gpu)
        try:
            heard = play(core, SCRIPT)
        except AssertionError:
            heard = None
    return heard, gpu.machine.reports


@pytest.fixture(scope="module")
def want() -> dict[int, list[Any]]:
    heard: dict[int, list[Any]] = play(plain_lane(overlap=False, **TIGHT), SCRIPT)
    return heard


def test_the_script_meets_all_that_is_taken_away_below(want: dict[int, list[Any]]) -> None:
    met: list[str] = []
    places = (
        (StepGraphs, "run"),
        (LaneCore, "_discard"),
        (Runner, "_sample"),
        (Runner, "wipe"),
        (ops, "kv_swap"),
    )

    def noted(patch: pytest.MonkeyPatch, gpu: Gpu) -> None:
        for owner, name in places:
            patch.setattr(owner, name, note(name, getattr(owner, name)))

    def note(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def both(*args: Any) -> Any:
            met.append(f"{name} {args[-1]}" if name == "kv_swap" else name)
            return method(*args)

        return both

    assert played(noted) == (want, [])
    assert set(met) == {"run", "_discard", "_sample", "wipe", "kv_swap True", "kv_swap False"}


def results_unawaited(patch: pytest.MonkeyPatch, gpu: Gpu) -> None:
    patch.setattr(HostCopy, "wait", lambda self: self._tensors)


def weights_unawaited(patch: pytest.MonkeyPatch, gpu: Gpu) -> None:
    patch.setattr(torch.cuda, "synchronize", lambda device: None)


def aside(name: str) -> Broken:
    """That method of the runner on its side stream."""

    def broken(patch: pytest.MonkeyPatch, gpu: Gpu) -> None:
        method = getattr(Runner, name)

        def moved(self: Runner, *args: Any) -> Any:
            with mock.patch.object(self, "on_stream", self.aside), self.aside():
                return method(self, *args)

        patch.setattr(Runner, name, moved)

    return broken


def steps_on_two_streams(patch: pytest.MonkeyPatch, gpu: Gpu) -> None:
    execute = Runner.execute

    def alternating(self: Runner, *args: Any) -> Any:
        self._stream, self._side = self._side, self._stream
        return execute(self, *args)

    patch.setattr(Runner, "execute", alternating)


def inputs_in_one_buffer(patch: pytest.MonkeyPatch, gpu: Gpu) -> None:
    """The next step's are packed while the last one's may not have been copied."""
    patch.setattr(transfer, "pinned", cache(transfer.pinned))


def graph_inputs_in_one_buffer(patch: pytest.MonkeyPatch, gpu: Gpu) -> None:
    patch.setattr(graphs_module, "pinned", cache(transfer.pinned))


def lengths_of_the_capture(patch: pytest.MonkeyPatch, gpu: Gpu) -> None:
    run = StepGraphs._run

    def baked(self: StepGraphs, shape: Shape) -> torch.Tensor:
        with mock.patch.object(self, "_kv_len", torch.ones(shape.sequences, dtype=torch.int32, device=CUDA)):
            return run(self, shape)

    patch.setattr(StepGraphs, "_run", baked)


def results_copied_aside(*, waits: bool, recorded: bool) -> Broken:
    """Results go to the host on a stream of their own. waits: that one waits for them; recorded: their memory is kept
    until it has read them."""

    class CopiedAside(HostCopy):
        def __init__(self, tensors: Any) -> None:
            stream = torch.cuda.Stream(CUDA)
            if waits:
                stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                super().__init__(tensors)
            for tensor in tensors if recorded else ():
                tensor.record_stream(stream)

    def broken(patch: pytest.MonkeyPatch, gpu: Gpu) -> None:
        patch.setattr(runner_module, "HostCopy", CopiedAside)

    return broken


@pytest.mark.parametrize(
    ("broken", "race"),
    [
        (weights_unawaited, "score_tokens touches what aten::eye writes"),
        (aside("move"), "kv_gather touches what forward writes"),
        (aside("wipe"), "index_fill_.int_Scalar touches what forward writes"),
        (aside("_sample"), "sample touches what forward writes"),
        (steps_on_two_streams, "index_select touches what atts::sample writes"),
        (results_copied_aside(waits=False, recorded=True), "copy to the host touches what atts::sample writes"),
        (results_copied_aside(waits=True, recorded=False), "reuse of freed memory writes what copy to the host reads"),
    ],
    ids=["weights", "move", "wipe", "sample", "steps", "copies", "freed"],
)
def test_two_streams_in_no_order_are_a_race_in_any_order(broken: Broken, race: str) -> None:
    _, reports = played(broken)
    assert any(race in report for report in reports), reports
    # Here no result is wrong, but where the host has seen one, it was before all that the host did next.
    assert played(broken, "early")[1]


@pytest.mark.parametrize(
    "broken",
    [
        results_unawaited,
        inputs_in_one_buffer,
        graph_inputs_in_one_buffer,
        lengths_of_the_capture,
        steps_on_two_streams,
        results_copied_aside(waits=False, recorded=True),
        results_copied_aside(waits=True, recorded=False),
    ],
    ids=["results", "inputs", "graph inputs", "capture", "steps", "copies", "freed"],
)
def test_what_runs_too_late_or_is_overwritten_too_early_changes_what_is_heard(
    broken: Broken, want: dict[int, list[Any]]
) -> None:
    assert any(played(broken, order)[0] != want for order in ("late", "ahead"))


def test_a_third_stream_in_order_changes_nothing(want: dict[int, list[Any]]) -> None:
    for order in ("late", "ahead", "2"):
        assert played(results_copied_aside(waits=True, recorded=True), order) == (want, [])
