"""Graphs of steps through a graph that repeats a Python function; blocks of bytes; what can be captured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from atts_engine import InputError, ops
from atts_engine.models import ForwardBatch, load_model
from atts_engine.runtime import graphs as graphs_module
from atts_engine.runtime.batch import SamplingRows, StepArrays
from atts_engine.runtime.graphs import Shape, StepGraphs, decode_shapes, span_shapes
from atts_engine.runtime.ranges import make_ranges, no_ranges
from atts_engine.runtime.records import SamplingParams
from atts_engine.runtime.runner import Runner
from atts_engine.runtime.transfer import HostCopy, Layout, take_rows, to_device
from tests.fakes import fake_model
from tests.late import fake_capture

CPU = torch.device("cpu")
NONE = np.zeros(0, dtype=np.int64)


def decode_step(rows: int, width: int, seed: int, futures: list[int] | None = None) -> StepArrays:
    rng = np.random.default_rng(seed)
    late = [] if futures is None else sorted(int(r) for r in rng.choice(rows, len(futures), replace=False))
    return StepArrays(
        ids=rng.integers(0, 9, rows),
        positions=rng.integers(0, 9, rows),
        block_table=rng.integers(1, 9, (rows, width), dtype=np.int32),
        cu_q=np.arange(rows + 1, dtype=np.int32),
        kv_len=rng.integers(1, 9, rows, dtype=np.int32),
        future_rows=np.array(late, dtype=np.int64),
        future_from=np.array(futures or [], dtype=np.int64),
        score_rows=NONE,
        score_ids=NONE,
        sample_rows=np.arange(rows),
        asked=NONE,
        sampling=SamplingRows.of([SamplingParams()] * rows, [1] * rows),
    )


class Recorder:
    """Stands for a decoder: remembers batches, and gives each row's id, position, length and pages as logits."""

    def __init__(self) -> None:
        self.batches: list[ForwardBatch] = []

    def __call__(self, batch: ForwardBatch) -> torch.Tensor:
        self.batches.append(batch)
        columns = (batch.ids, batch.positions, batch.kv_len)
        return torch.cat((torch.stack(columns, 1), batch.block_table), 1)


def test_shapes() -> None:
    for largest, sizes in ((1, (1,)), (8, (1, 2, 4, 8)), (11, (1, 2, 4, 8, 11))):
        assert decode_shapes(largest) == tuple((n, n) for n in sizes)
    assert span_shapes(15) == ()
    assert span_shapes(40) == ((16, 16), (32, 17), (32, 32))
    assert span_shapes(2048)[-1] == (512, 65)


def test_a_step_takes_the_smallest_graph_and_idle_rows_fill_it() -> None:
    decode = Recorder()
    sizes: list[int] = []

    def capture(work: Any) -> Any:
        replay, output = fake_capture(work)
        sizes.append(len(output))
        return replay, output

    graphs = StepGraphs(decode, CPU, decode_shapes(11), 5, 4, capture)
    assert sizes == [11, 8, 4, 2, 1]
    found = [graphs.shape_for(n, n) for n in (1, 2, 3, 4, 5, 8, 9, 11, 12)]
    assert found == [(1, 1), (2, 2), (4, 4), (4, 4), (8, 8), (8, 8), (11, 11), (11, 11), None]
    places = {t.data_ptr() for b in decode.batches for t in (b.ids, b.positions, b.kv_len, b.block_table)}
    assert len(places) == 4  # every size reads the same buffers
    for seed, (rows, width) in enumerate([(3, 5), (11, 2), (3, 1), (8, 4), (1, 3)]):
        step = decode_step(rows, width, seed)
        shape = graphs.shape_for(rows, rows)
        assert shape is not None
        found = graphs.run(shape, step, None)
        assert found.shape == (rows, 3 + 5)
        want = np.stack([step.ids, step.positions, step.kv_len], 1)
        assert np.array_equal(found[:, :3], want)
        assert np.array_equal(found[:, 3 : 3 + width], step.block_table)
        assert not found[:, 3 + width :].any()  # PAD_PAGE, whatever an earlier step left there
        batch = decode.batches[-1]
        assert len(batch.ids) == shape.rows
        assert batch.cu_q.tolist() == list(range(len(batch.ids) + 1))
        for idle, value in ((batch.ids, 0), (batch.positions, 0), (batch.kv_len, 1)):
            assert (idle[rows:] == value).all()
        assert not batch.block_table[rows:].any()


def test_ids_that_the_host_does_not_know_come_from_the_step_before() -> None:
    graphs = StepGraphs(Recorder(), CPU, decode_shapes(4), 2, 4, fake_capture)
    step = decode_step(4, 2, 0, futures=[2, 0])
    found = graphs.run(Shape(4, 4), step, torch.tensor([70, 71, -1]))
    want = step.ids.copy()
    want[step.future_rows] = [0, 70]  # -1 is no token: logits held NaN, and the row will be dropped
    assert np.array_equal(found[:, 0], want)


def test_a_step_of_spans_is_one_of_a_larger_graph_whose_idle_rows_lie_in_the_padding_page() -> None:
    batches: list[ForwardBatch] = []

    def work(batch: ForwardBatch) -> torch.Tensor:
        batches.append(batch)
        return torch.stack((batch.ids, batch.positions), 1)

    graphs = StepGraphs(work, CPU, [Shape(8, 3), Shape(8, 8), Shape(12, 4)], 2, 4, fake_capture)
    cases = [([5, 1], (8, 3)), ([2, 2, 2], (8, 8)), ([3, 3, 2], (8, 3)), ([1] * 5, (8, 8)), ([9, 1], (12, 4)),
             ([3] * 4, (12, 4)), ([10, 1, 1, 1], None), ([3, 3, 2, 1], None), ([1, 1, 1, 6], None)]  # fmt: skip
    rng = np.random.default_rng(0)
    for counts, wanted in cases:
        rows, sequences = sum(counts), len(counts)
        shape = graphs.shape_for(rows, sequences)
        assert shape == wanted
        if shape is None:
            continue
        lengths = [n + int(rng.integers(0, 5)) for n in counts]
        step = replace(
            decode_step(rows, 1, rows),
            block_table=rng.integers(1, 9, (sequences, 2), dtype=np.int32),
            cu_q=np.cumsum([0, *counts]).astype(np.int32),
            kv_len=np.array(lengths, dtype=np.int32),
        )
        found = graphs.run(shape, step, None)
        assert np.array_equal(found, np.stack([step.ids, step.positions], 1))
        batch = batches[-1]
        assert np.array_equal(batch.block_table[:sequences], step.block_table)
        assert (
            not batch.block_table[sequences:].any() and not batch.ids[rows:].any() and not batch.positions[rows:].any()
        )
        bounds = batch.cu_q.tolist()
        assert bounds[: sequences + 1] == step.cu_q.tolist() and bounds[-1] == shape.rows == len(batch.ids)
        # Idle sequences hold their own rows and nothing before them: every idle row sees what idle rows have written.
        assert batch.kv_len.tolist() == [*lengths, *np.diff(bounds)[sequences:]]
    # Idle rows that a sequence's row of the table could not hold.
    assert StepGraphs(work, CPU, [Shape(12, 2)], 2, 4, fake_capture).shape_for(3, 1) is None


@pytest.mark.parametrize("budget", [6, 40])
def test_a_runner_gives_the_same_with_graphs_of_spans(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs_module, "SPAN_ROWS", (3, 5, 8, 16, 40))
    monkeypatch.setattr(graphs_module, "SPAN_SEQUENCES", (2, 4, 9))
    model, rng = load_model("tiny-target"), np.random.default_rng(1)
    runners = [Runner(model.decoder, 60, 4, CPU, torch.float32) for _ in range(2)]
    runners[1].capture(fake_capture, budget)
    shapes = []
    monkeypatch.setattr(StepGraphs, "run", lambda *a, run=StepGraphs.run: (shapes.append(a[1]), run(*a))[1])
    pages, written = [[1 + 6 * s + i for i in range(6)] for s in range(8)], [0] * 8
    for _ in range(12):
        counts = {int(s): int(rng.integers(1, 6)) for s in rng.choice(8, int(rng.integers(1, 9)), replace=False)}
        counts = {s: n for s, n in counts.items() if written[s] + n <= 24}
        if not counts:
            continue
        rows = sum(counts.values())
        step = replace(
            decode_step(rows, 1, rows),
            ids=rng.integers(0, 48, rows),
            positions=np.concatenate([np.arange(written[s], written[s] + n) for s, n in counts.items()]),
            block_table=np.array([pages[s] for s in counts], dtype=np.int32),
            cu_q=np.cumsum([0, *counts.values()]).astype(np.int32),
            kv_len=np.array([written[s] + n for s, n in counts.items()], dtype=np.int32),
            score_rows=np.arange(rows - 1),
            score_ids=rng.integers(0, 48, rows - 1),
            sample_rows=np.array([rows - 1]),
        )
        for s, n in counts.items():
            written[s] += n
        (logits, scores), (wanted, exact) = (runner._forward(step, None) for runner in reversed(runners))
        assert torch.equal(logits, wanted) and (exact is None or torch.equal(scores, exact))
    assert len(set(shapes)) > (1 if budget == 6 else 5)
    assert torch.equal(runners[0].kv[:, :, 1:], runners[1].kv[:, :, 1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_are_taken_as_torch_takes_them(dtype: torch.dtype) -> None:
    x = torch.randn(9, 13).to(dtype)
    for rows in ([0], [2, 3, 8], [], list(range(8))):
        index = torch.tensor(rows, dtype=torch.int64)
        assert torch.equal(take_rows(x, index), x[index])
        assert torch.equal(take_rows(x[:, ::2], index), x[:, ::2][index])
    assert take_rows(x, torch.arange(9)) is x


def test_arrays_cross_in_one_block_and_come_out_as_they_were() -> None:
    rng = np.random.default_rng(0)
    arrays = [
        rng.integers(-(2**62), 2**62, 5),
        rng.integers(0, 9, (3, 7), dtype=np.int32),
        NONE,
        rng.random(3, dtype=np.float32),
        rng.integers(0, 9, (1, 1)),
    ]
    layout = Layout.of(arrays)
    block = torch.empty(layout.size, dtype=torch.uint8)
    layout.pack(arrays, block)
    for array, view in zip(arrays, layout.views(block), strict=True):
        assert view.data_ptr() % 16 == block.data_ptr() % 16 or not array.size
        assert np.array_equal(view.numpy(), array) and view.numpy().dtype == array.dtype
    for array, tensor in zip(arrays, to_device(arrays, CPU), strict=True):
        assert np.array_equal(tensor.numpy(), array)
    copy = HostCopy([torch.arange(3)])
    assert copy.ready() and copy.wait()[0].tolist() == [0, 1, 2]


def test_only_what_reads_nothing_on_the_host_can_be_captured() -> None:
    assert not any(ops.capturable(op, "cpu") for op in ("linear", "paged_attention"))
    assert ops.capturable("linear", "cuda") and not ops.capturable("kv_swap", "cuda")
    with ops.use("reference"):
        assert ops.capturable("score_tokens", "cuda")
        assert not any(ops.capturable(op, "cuda") for op in ("paged_attention", "sample", "gate", "span_mean"))
    with pytest.raises(InputError, match="no op"):
        ops.capturable("nothing", "cuda")


def test_on_the_cpu_warming_up_is_nothing_and_graphs_are_refused_by_name() -> None:
    model = fake_model()
    runner = Runner(model.decoder, 4, 4, CPU, torch.float32, graphs=None)
    runner.warm_up(64)
    assert model.decoder.rows == 0  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"CUDA graphs cannot be had on cpu: .*paged_attention"):
        Runner(model.decoder, 4, 4, CPU, torch.float32, graphs=True)


def test_warm_up_steps_touch_the_first_slot_of_the_padding_page_alone_and_leave_it_finite() -> None:
    from atts_engine.runtime.runner import _idle_arrays, _warm_shapes

    model = load_model("tiny-draft", "cpu", torch.float32)
    shapes = _warm_shapes(40, 4, 4)
    assert shapes == [(1, 1, 1), (1, 1, 4), (16, 1, 4), (40, 40, 1), (40, 40, 4)]
    for rows, sequences, pages in shapes:
        runner = Runner(model.decoder, 4, 4, CPU, torch.float32)
        arrays = _idle_arrays(rows, sequences, pages)
        logits, scores = runner._forward(arrays, None)
        assert logits is not None and scores is not None
        # Whatever a request may ask to be told of its samples is computed too.
        sampled, told = runner._sample(arrays, logits)
        assert [len(each) for each in (sampled, *told)] == [rows] * 5
        assert logits.shape == (rows, model.config.vocab_size) and scores.shape == (rows,)
        assert torch.isfinite(logits).all() and torch.isfinite(scores).all()
        assert runner.kv[:, :, 0, 0].any() and torch.isfinite(runner.kv).all()
        assert not runner.kv[:, :, 1:].any() and not runner.kv[:, :, 0, 1:].any()


def test_ranges_are_nothing_unless_profiling_on_a_gpu() -> None:
    assert make_ranges(True, CPU) is no_ranges
    assert make_ranges(False, torch.device("cuda:0")) is no_ranges
    assert make_ranges(True, torch.device("cuda:0")) is torch.cuda.nvtx.range
    with no_ranges("draft.decode"):
        pass
