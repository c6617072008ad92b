"""Lanes on a GPU: launching ahead, graphs and two streams change no token.

Float32 and the built-in pair. Batches differ between the ways of running, so logits may differ in their last bits;
tokens of a trained model at these seeds do not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from atts_engine import AsyncEngine, Chain, EngineConfig, InputError, ops
from atts_engine.models import ForwardBatch, Model, load_model, resolve_device
from atts_engine.runtime.commands import Append, Decode, Verdict
from atts_engine.runtime.graphs import CudaCapture, StepGraphs, decode_shapes
from atts_engine.runtime.lane import LaneCore
from atts_engine.runtime.ranges import make_ranges
from atts_engine.runtime.records import SamplingParams
from atts_engine.runtime.runner import GRAPH_OPS
from atts_engine.runtime.transfer import HostCopy, to_device
from tests.test_engine import CONFIG, PARAMS, frozen_calibrator, problems, with_engine
from tests.test_graphs import decode_step

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model("tiny-draft", "cuda:0")


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Raises where the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def written(model: Model, **options: Any) -> tuple[list[list[int]], list[float], LaneCore]:
    """What twelve sequences write, greedy and sampled, some to a stop string; then the score of a span in each."""
    core = LaneCore("gpu", model, kv_tokens=8192, page_size=16, max_batch_tokens=256, device=CUDA, **options)
    core.warm_up()
    texts: list[list[int]] = [[] for _ in range(12)]
    scores: list[float] = []
    errors: list[BaseException | None] = []

    def done(value: Any, error: BaseException | None) -> None:
        errors.append(error)

    def scored(value: Any, error: BaseException | None) -> None:
        errors.append(error)
        scores.append(value.score)

    for i, problem in enumerate(problems(12)):
        prompt = model.tokenizer.chat_prompt([{"role": "user", "content": problem.problem}])
        sampling = SamplingParams(
            temperature=0.8 if i % 2 else 0.0, seed=i, stop=("\n",) if i % 3 == 0 else (), logprobs=i % 4 == 0
        )
        core.open(i, tuple(prompt))
        core.command(i, Decode(40 + i, sampling, 8, lambda chunk, text=texts[i]: text.extend(chunk.tokens), done))  # type: ignore[misc]
        core.command(i, Append(tuple(prompt[:10]), True, done))
        core.command(i, Verdict(None, scored))
    while core.step(lambda request, result: None):
        pass
    assert errors == [None] * 36
    assert not core.in_flight
    for i in range(12):
        core.close(i)
    assert core.pool.used == 0
    return texts, scores, core


def test_launching_ahead_changes_no_token(model: Model) -> None:
    plain, plain_scores, _ = written(model, overlap=False, graphs=False)
    ahead, ahead_scores, core = written(model, overlap=True, graphs=False)
    assert all(plain)
    assert ahead == plain
    assert ahead_scores == pytest.approx(plain_scores, abs=1e-4)
    assert core.stats.discarded_rows > 0


def test_a_gpu_lane_writes_what_a_cpu_lane_writes(model: Model) -> None:
    """Greedy, for the first tokens: beyond, the last bits of two machines may part."""
    prompt = tuple(model.tokenizer.chat_prompt([{"role": "user", "content": problems(1)[0].problem}]))
    found = []
    for place, held in ((CUDA, model), (torch.device("cpu"), load_model("tiny-draft"))):
        core = LaneCore("lane", held, kv_tokens=1024, page_size=16, max_batch_tokens=64, device=place)
        text: list[int] = []
        core.open(0, prompt)
        command = Decode(16, SamplingParams(temperature=0.0), 64, lambda c, out=text: out.extend(c.tokens), _nothing)  # type: ignore[misc]
        core.command(0, command)
        while core.step(lambda request, result: None):
            pass
        found.append(text)
    assert found[0] == found[1]


@pytest.mark.parametrize("overlap", [False, True])
def test_graphs_change_no_token(model: Model, overlap: bool) -> None:
    missing = [op for op in GRAPH_OPS if not ops.capturable(op, CUDA)]
    if missing:
        pytest.skip(f"{', '.join(missing)}: no implementation here that a graph can hold")
    eager, eager_scores, _ = written(model, overlap=overlap, graphs=False)
    graphs, graph_scores, core = written(model, overlap=overlap, graphs=True)
    assert core._runner._decodes is not None and core._runner._spans is not None
    assert graphs == eager
    assert graph_scores == pytest.approx(eager_scores, abs=1e-4)


def test_a_captured_graph_reads_its_buffers_anew_each_time() -> None:
    """The machinery of graphs on a decoder that any machine can capture."""
    generator = torch.Generator().manual_seed(0)
    embed, head = torch.randn(2, 80, 32, generator=generator).to(CUDA)

    def decode(batch: ForwardBatch) -> torch.Tensor:
        mixed = embed[batch.ids] + batch.positions[:, None] * batch.kv_len[:, None]
        mixed = mixed + embed[batch.block_table.long()].sum(1) + batch.cu_q[:-1, None]
        return torch.tanh(mixed) @ head.T

    stream = torch.cuda.Stream(CUDA)
    sampled = torch.tensor([11, 12, -1], device=CUDA)
    with torch.inference_mode(), torch.cuda.stream(stream):
        graphs = StepGraphs(decode, CUDA, decode_shapes(11), 5, 4, CudaCapture(stream))
        for seed, rows in enumerate([3, 11, 2, 1, 9, 5]):
            step = decode_step(rows, 4, seed, futures=[2, 0][: rows - 1])
            shape = graphs.shape_for(rows, rows)
            assert shape is not None
            found = graphs.run(shape, step, sampled).clone()
            ids = step.ids.copy()
            ids[step.future_rows] = np.array([0, 11])[: len(step.future_rows)]
            table = np.zeros((rows, 5), dtype=np.int32)
            table[:, :4] = step.block_table
            arrays = [ids, step.positions, table, step.cu_q, step.kv_len]
            want = decode(ForwardBatch(*to_device(arrays, CUDA)))
            torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-4)
        stream.synchronize()


def test_copies_do_not_wait_and_arrive(no_waiting: None) -> None:
    arrays = [np.arange(5), np.arange(7, dtype=np.int32), np.linspace(0, 1, 3, dtype=np.float32)]
    stream = torch.cuda.Stream(CUDA)
    with torch.cuda.stream(stream):
        there = to_device(arrays, CUDA)
        back = HostCopy([t * 2 for t in there])
    torch.cuda.set_sync_debug_mode("default")
    for array, tensor in zip(arrays, back.wait(), strict=True):
        assert tensor.is_pinned() and np.array_equal(tensor.numpy(), array * 2)
    assert back.ready()


def test_a_step_is_launched_without_waiting(model: Model, no_waiting: None) -> None:
    """From the host's arrays to the event behind the last copy."""
    torch.cuda.set_sync_debug_mode("default")
    missing = [op for op in (*GRAPH_OPS, "sample", "score_logits") if not ops.capturable(op, CUDA)]
    if missing:
        pytest.skip(f"{', '.join(missing)}: reads tensors on the host")
    core = LaneCore("gpu", model, kv_tokens=1024, page_size=16, max_batch_tokens=64, device=CUDA, overlap=True)
    core.warm_up()
    core.open(0, tuple(range(1, 9)))
    core.command(0, Decode(20, SamplingParams(temperature=0.8, logprobs=True), 64, _nothing, _nothing))
    for _ in range(3):
        core.step(lambda request, result: None)
    torch.cuda.set_sync_debug_mode("error")
    assert core._launch()


def test_two_lanes_on_one_gpu_write_what_they_write_one_after_the_other() -> None:
    def chains(config: EngineConfig) -> list[Chain]:
        async def work(engine: AsyncEngine) -> list[Chain]:
            calibrator = frozen_calibrator()
            solutions = await asyncio.gather(*(engine.solve(p, PARAMS, calibrator=calibrator) for p in problems(4)))
            return [c for s in solutions for c in s.chains]

        found: list[Chain] = with_engine(work, config)
        return found

    config = replace(CONFIG, draft_device="cuda:0", target_device="cuda:0")
    plain = chains(replace(config, overlap=False))
    assert any(t.takeover for c in plain for t in c.turns)
    for threads in ("one", "each"):
        found = chains(replace(config, overlap=True, lane_threads=threads))
        for a, b in zip(plain, found, strict=True):
            assert [(t.draft, t.target, t.takeover) for t in a.turns] == [
                (t.draft, t.target, t.takeover) for t in b.turns
            ]


def test_devices_have_numbers_and_a_missing_one_is_named() -> None:
    assert resolve_device("cuda").index is not None
    with pytest.raises(InputError, match=r"no device 'cuda:99': there are cpu, cuda:0 \("):
        resolve_device("cuda:99")


def test_ranges_are_written_on_a_gpu() -> None:
    with make_ranges(True, CUDA)("draft.decode"):
        pass


def _nothing(*_: object) -> None:
    return None
