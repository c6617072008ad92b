"""Meters: operations and bytes against sums by hand, times under a hand-moved clock, tokens computed once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from atts_engine import AsyncEngine, ATTSParams, Chain, EngineConfig, Problem
from atts_engine.evaluation.lanes import HOST, TIMED, Intensity, LaneUse, lane_figures, lane_rows, waiting
from atts_engine.evaluation.registers import heldout
from atts_engine.kv import OutOfPages, PagePool
from atts_engine.models import load_model
from atts_engine.runtime import LaneStats, Rates, probe
from atts_engine.runtime.commands import Append, Command, Decode, Fork, Reply, Truncate, Verdict
from atts_engine.runtime.lane import LaneCore
from atts_engine.runtime.meters import HostPasses, LaneMeter, LaneTotals, ModelCost, Standing, StepRows
from atts_engine.runtime.preemption import forward_flops
from atts_engine.runtime.records import SamplingParams, TokenChunk
from atts_engine.runtime.runner import Pending, Runner
from atts_engine.runtime.scheduler import Step
from tests.fakes import fake_model

# Two layers; 4 query heads of 8 share 2 key/value heads; hidden 24, MLP 40, vocabulary 100.
SHAPE = replace(
    fake_model().config,
    vocab_size=100,
    hidden_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=40,
)
COST = ModelCost.of(SHAPE, itemsize=2)
MATRICES = 2 * (24 * 32 + 2 * 24 * 16 + 32 * 24 + 3 * 24 * 40)


class HandClock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


def test_operations_and_bytes_of_a_decode_step() -> None:
    # Two sequences forward one token each, at positions 6 and 9, and sample.
    rows = StepRows(rows=2, attended=7 + 10, cached=7 + 10, scored=0, sampled=2)
    assert MATRICES == COST.weights == 2 * 5184
    assert COST.operations(rows) == 2 * MATRICES * 2 + 4 * 2 * (4 * 8) * 17 + 2 * 100 * 24 * 2
    kv = 2 * 2 * (2 * 8)  # elements a token: key and value, two layers, two heads of 8
    assert COST.bytes(rows) == 2 * (MATRICES + 2 * 24 + kv * 17 + kv * 2 + 100 * 24 + 2 * 2 * 100)


def test_operations_and_bytes_of_a_scoring_step() -> None:
    # Positions 3, 4, 5 of one sequence, all of which predict a scored token; nothing is sampled.
    rows = StepRows(rows=3, attended=4 + 5 + 6, cached=6, scored=3, sampled=0)
    assert COST.operations(rows) == 2 * MATRICES * 3 + 256 * 15 + 2 * 100 * 24 * 3
    assert COST.bytes(rows) == 2 * (MATRICES + 3 * 24 + 64 * 6 + 64 * 3 + 100 * 24)
    # The LM head is read once for each of the two that want it.
    assert COST.bytes(replace(rows, sampled=1)) - COST.bytes(rows) == 2 * (100 * 24 + 2 * 100)


def test_operations_agree_with_those_that_preemption_reckons_with() -> None:
    for first, end in ((0, 1), (0, 17), (5, 9)):
        attended = sum(p + 1 for p in range(first, end))
        assert COST.operations(StepRows(end - first, attended, end, 0, 0)) == forward_flops(SHAPE, first, end)


class TimedRunner(Runner):
    """Every pass takes a second of the clock."""

    clock: HandClock
    seen: list[StepRows]

    def launch(self, step: Step, before: Pending | None) -> Pending:
        self.seen.append(StepRows.of(step))
        self.clock.pass_by(1.0)
        return super().launch(step, before)


class Bench:
    """A lane on the fake model under a clock that only passes move, stepped by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kv_tokens: int = 400, budget: int = 64) -> None:
        self.clock = HandClock()
        self.seen: list[StepRows] = []
        monkeypatch.setattr("atts_engine.runtime.lane.Runner", TimedRunner)
        monkeypatch.setattr(TimedRunner, "clock", self.clock, raising=False)
        monkeypatch.setattr(TimedRunner, "seen", self.seen, raising=False)
        self.core = LaneCore(
            "fake", fake_model(), kv_tokens=kv_tokens, page_size=4, max_batch_tokens=budget, device=torch.device("cpu")
        )
        self.core.meter = LaneMeter(COST, HostPasses(), self.clock)

    @property
    def totals(self) -> LaneTotals:
        return self.core.meter.totals

    def step(self) -> bool:
        return self.core.step(lambda *_: None)

    def run(self) -> None:
        while self.step():
            pass

    def post(self, seq: int, make: Callable[[Reply], Command], asked_at: float | None = None) -> list[Any]:
        answers: list[Any] = []
        self.core.command(seq, make(lambda value, error: answers.append(error or value)), asked_at)
        return answers

    def decode(self, seq: int, n: int) -> list[TokenChunk]:
        chunks: list[TokenChunk] = []
        sampling = SamplingParams(temperature=0.0)
        self.post(seq, lambda reply: Decode(n, sampling, 64, chunks.append, reply))
        return chunks

    def append(self, seq: int, n: int, score: bool = True) -> None:
        self.post(seq, lambda reply: Append((1,) * n, score, reply))


def test_rows_of_steps_and_what_they_sum_up_to(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    bench.core.open(0, (1, 2, 3, 4, 5))
    bench.run()
    bench.decode(0, 2)
    bench.run()
    bench.append(0, 3)
    bench.run()
    assert bench.seen == [
        StepRows(4, 1 + 2 + 3 + 4, 4, 0, 0),
        StepRows(1, 5, 5, 0, 1),
        StepRows(1, 6, 6, 0, 1),
        # Forwards positions 6, 7, 8, which score 7, 8, 9; 9 is the token that stays behind.
        StepRows(3, 7 + 8 + 9, 9, 3, 0),
    ]
    assert bench.totals.operations == sum(COST.operations(rows) for rows in bench.seen)
    assert bench.totals.bytes == sum(COST.bytes(rows) for rows in bench.seen)
    assert bench.totals.pass_s == 4.0


def test_time_between_steps_is_idle_blocked_or_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    bench.clock.pass_by(64.0)  # no sequence is open
    bench.core.open(0, (1, 2, 3))
    bench.clock.pass_by(0.5)  # the prompt is there, the thread is elsewhere
    bench.run()
    assert (bench.totals.idle_s, bench.totals.blocked_s, bench.totals.pass_s) == (0.0, 0.5, 1.0)
    bench.clock.pass_by(8.0)  # nothing is asked
    bench.step()  # a look that finds nothing
    bench.clock.pass_by(2.0)
    # Asked a quarter of a second before the thread comes to it.
    asked = bench.clock.now - 0.25
    chunks: list[TokenChunk] = []
    bench.post(0, lambda reply: Decode(2, SamplingParams(temperature=0.0), 64, chunks.append, reply), asked)
    bench.step()
    assert (bench.totals.idle_s, bench.totals.blocked_s) == (9.75, 0.75)
    bench.clock.pass_by(4.0)  # there is a second token to write
    bench.run()
    assert (bench.totals.idle_s, bench.totals.blocked_s, bench.totals.pass_s) == (9.75, 4.75, 3.0)
    bench.clock.pass_by(16.0)
    bench.core.close(0)
    bench.clock.pass_by(32.0)
    bench.step()
    times = asdict(bench.totals)
    assert (times["idle_s"], times["blocked_s"]) == (25.75, 4.75)
    assert all(times[f"{name}_s"] == 0.0 for name in (*HOST, "collect"))
    # The decode waited from the question to its first step, and between its two.
    assert [chunk.wait_s for chunk in chunks] == [0.25 + 4.0]


def test_a_verdict_waits_for_the_step_that_scores_its_span(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    bench.core.open(0, (1, 2, 3))
    bench.run()
    bench.append(0, 4)
    bench.clock.pass_by(8.0)  # nobody asks for it yet
    answers = bench.post(0, lambda reply: Verdict(None, reply))
    bench.clock.pass_by(0.5)
    bench.run()
    assert [result.wait_s for result in answers] == [0.5]


def test_host_time_goes_to_what_took_it() -> None:
    clock = HandClock()
    meter = LaneMeter(COST, HostPasses(), clock)
    step = Step((), (), ())
    meter.arrived(clock.now)
    meter.begin()
    clock.pass_by(1.0)
    meter.scheduled(launching=True)
    clock.pass_by(2.0)
    meter.launched(step)
    clock.pass_by(4.0)
    meter.scheduled()
    clock.pass_by(8.0)
    meter.collected()
    clock.pass_by(16.0)
    meter.committed()
    clock.pass_by(32.0)
    meter.decided()
    clock.pass_by(64.0)
    meter.end(Standing.IDLE)
    clock.pass_by(128.0)
    began = clock.now
    clock.pass_by(256.0)
    meter.carried_out(began)
    found = meter.totals
    assert (found.schedule_s, found.pass_s, found.commit_s, found.gate_s) == (5.0, 10.0, 80.0, 32.0)
    assert (found.idle_s, found.command_s, found.launch_s, found.collect_s) == (128.0, 256.0, 0.0, 0.0)


class LateDevice:
    """A device that takes three seconds a pass and tells of it when it has passed."""

    asynchronous = True

    def __init__(self) -> None:
        self.started = self.stopped = self.told = 0
        self.over = False

    def start(self) -> None:
        self.started += 1

    def stop(self) -> None:
        self.stopped += 1

    def read(self) -> float:
        ready = self.stopped if self.over else 0
        seconds = 3.0 * max(0, ready - self.told)
        self.told = max(self.told, ready)
        return seconds


def test_passes_of_a_device_that_runs_on_are_read_when_they_are_over() -> None:
    clock, device = HandClock(), LateDevice()
    meter = LaneMeter(COST, device, clock)
    meter.begin()
    meter.scheduled(launching=True)
    clock.pass_by(0.5)
    meter.launched(Step((), (), ()))
    assert (meter.totals.pass_s, meter.totals.launch_s) == (0.0, 0.5)
    clock.pass_by(2.0)
    device.over = True
    meter.collected()
    assert (meter.totals.pass_s, meter.totals.collect_s) == (3.0, 2.0)
    assert (device.started, device.stopped) == (1, 1)


def test_tokens_that_a_truncate_takes_back_are_counted_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    stats = bench.core.stats
    bench.core.open(0, (1, 2, 3, 4, 5))
    bench.run()
    bench.append(0, 6)
    bench.run()
    assert (stats.computed_tokens, stats.distinct_tokens) == (10, 10)
    # Eleven tokens, ten of them computed; positions 7, 8 and 9 are taken back, and 6 is the last one now.
    bench.post(0, lambda reply: Truncate(7, reply))
    assert (stats.rolled_back_tokens, stats.repeated_tokens) == (3, 0)
    bench.append(0, 2)
    bench.run()
    assert (stats.computed_tokens, stats.distinct_tokens) == (12, 11)
    assert (stats.repeated_tokens, stats.recomputed_tokens, stats.rolled_back_tokens) == (1, 0, 3)


def test_a_truncate_while_preempted_hides_no_recomputation(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    stats = bench.core.stats
    bench.core.open(0, (1,) * 9)
    bench.run()
    seq = bench.core._sequences[0]
    seq.drop_kv()
    bench.post(0, lambda reply: Truncate(6, reply))
    bench.append(0, 1)
    bench.run()
    # Positions 0 to 4 since they were dropped, 5 since it became the last one.
    assert (stats.computed_tokens, stats.distinct_tokens, stats.recomputed_tokens) == (14, 8, 5)
    assert (stats.repeated_tokens, stats.rolled_back_tokens) == (1, 2)


def test_forks_share_what_was_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    bench.core.open(0, (1, 2, 3, 4, 5))
    bench.post(0, lambda reply: Fork((1, 2, 3), reply))
    bench.run()
    for seq in (1, 2, 3):
        bench.decode(seq, 4)
    bench.run()
    stats = bench.core.stats
    assert stats.distinct_tokens == stats.computed_tokens == 4 + 3 * 4


class RecordingRunner(Runner):
    """Remembers every token that was forwarded: (sequence, all tokens up to it)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.forwarded: list[tuple[int, tuple[int, ...]]] = []

    def launch(self, step: Step, before: Pending | None) -> Pending:
        for w in step.work:
            self.forwarded += [(w.seq.id, tuple(w.seq.tokens[: p + 1])) for p in range(w.start, w.start + w.count)]
        return super().launch(step, before)


async def solve_two(config: EngineConfig, params: ATTSParams) -> tuple[dict[str, dict[str, float]], Any, list[Chain]]:
    """The counters of either lane, their runners, and the chains of two problems side by side."""
    async with await AsyncEngine.create(config) as engine:
        drawn = [Problem(p.id, p.problem, p.answer, i) for i, p in enumerate(heldout(2, 5, (3, 5)))]
        solved = await asyncio.gather(*(engine.solve(p, params) for p in drawn))
        while any(lane["open_sequences"] for lane in engine.stats().values()):
            await asyncio.sleep(0.005)
        runners = {core.name: core._runner for core in (lane.core for lane in engine._lanes)}
        return engine.stats(), runners, [c for s in solved for c in s.chains]


TINY = EngineConfig("tiny-draft", "tiny-target", kv_tokens=16384)
RUN = ATTSParams(chains=4, turns=8, draft_tokens=24, target_tokens=24, seed=3)


@pytest.mark.parametrize("strategy", ["atts", "atts-sync"])
@pytest.mark.parametrize("takeover", ["continue", "replace"])
def test_each_lane_computes_each_distinct_token_once(
    monkeypatch: pytest.MonkeyPatch, strategy: str, takeover: str
) -> None:
    """Against a record of what was forwarded, made below the counters. A fork is a sequence of its own that begins with
    the prompt's last token, so the prompt counts once a problem and that token once a chain."""
    monkeypatch.setattr("atts_engine.runtime.lane.Runner", RecordingRunner)
    stats, runners, chains = asyncio.run(solve_two(TINY, replace(RUN, strategy=strategy, takeover=takeover)))
    truncates = sum(t.takeover for c in chains for t in c.turns)
    assert truncates > 0
    for name, lane in stats.items():
        forwarded = runners[name].forwarded
        assert lane["recomputed_tokens"] == 0
        assert lane["computed_tokens"] == len(forwarded)
        # Nothing is forwarded twice but the token that a truncate made the last one.
        assert len(forwarded) == lane["distinct_tokens"] + lane["repeated_tokens"]
        assert lane["repeated_tokens"] <= truncates
        if takeover == "continue":
            # A mark that ended the text is all that is ever taken back, and that was not forwarded yet.
            assert lane["rolled_back_tokens"] == 0
            assert lane["distinct_tokens"] == len(set(forwarded))
        else:
            # The author that takes over may write again some of what was taken back.
            assert lane["rolled_back_tokens"] > 0
            assert 0 <= lane["distinct_tokens"] - len(set(forwarded)) <= lane["rolled_back_tokens"]
    for chain in chains:
        assert chain.wait_s is not None and 0.0 <= chain.wait_s <= chain.duration_s


@pytest.mark.parametrize("takeover", ["continue", "replace"])
def test_steps_launched_ahead_compute_no_token_twice(takeover: str) -> None:
    stats, _, _ = asyncio.run(solve_two(replace(TINY, overlap=True), replace(RUN, takeover=takeover)))
    for lane in stats.values():
        assert lane["recomputed_tokens"] == 0
        assert lane["computed_tokens"] == lane["distinct_tokens"] + lane["repeated_tokens"]


NOTHING: dict[str, float] = asdict(LaneTotals()) | asdict(LaneStats())


def use(**counters: float) -> LaneUse:
    return LaneUse(NOTHING | counters, Rates(flop_s=1e9, bytes_s=1e6))


def test_intensity_by_hand() -> None:
    lane = use(operations=3e9, bytes=1e6, pass_s=5.0, idle_s=0.5, schedule_s=0.25, gate_s=0.5, collect_s=9.0)
    found = Intensity.of(lane)
    assert (found.compute, found.memory, found.sync, found.other) == (3.0, 1.0, 0.5, 0.75)
    assert found.ratio == 3.0 / 1.5
    assert found.explained == (3.0 / 5.0, 4.0 / 5.0)
    figures = lane_figures(lane)
    assert (figures["r"], figures["explained"]) == (2.0, {"overlapped": 0.6, "serial": 0.8})
    assert set(figures["time_s"]) == set(TIMED)


def test_a_lane_that_did_nothing_has_no_ratio_and_no_row() -> None:
    figures = lane_figures(use())
    assert figures["r"] is None and figures["explained"] == {"overlapped": None, "serial": None}
    assert lane_rows({"draft": figures}) == []


def test_use_is_what_rose_in_between() -> None:
    before = NOTHING | {"steps": 5}
    after = before | {"steps": 12, "pass_s": 2.5, "free_pages": 3}
    found = LaneUse.between(before, after, Rates(1.0, 1.0)).counters
    assert (found["steps"], found["pass_s"], found["distinct_tokens"]) == (7, 2.5, 0)
    assert "free_pages" not in found


def test_the_peak_of_a_pool_by_hand() -> None:
    pool = PagePool(9, 16)
    first = pool.allocate(3)
    pool.share(first)
    pool.release(pool.allocate(2))
    assert (pool.used, pool.peak) == (3, 5)
    with pytest.raises(OutOfPages):
        pool.allocate(6)
    pool.allocate(1)
    assert pool.peak == 5
    pool.restart_peak()
    assert pool.peak == 4


def test_the_kv_peak_of_a_lane_is_that_of_its_longest_chain() -> None:
    async def one_chain() -> tuple[dict[str, dict[str, float]], Chain, float]:
        async with await AsyncEngine.create(TINY) as engine:
            drawn = heldout(1, 5, (3, 3))[0]
            solved = await engine.solve(Problem(drawn.id, drawn.problem), replace(RUN, chains=1, strategy="target"))
            while any(lane["open_sequences"] for lane in engine.stats().values()):
                await asyncio.sleep(0.005)
            stats = engine.stats()
            engine.restart_peaks()
            return stats, solved.chains[0], engine.stats()["target"]["peak_kv_bytes"]

    stats, chain, restarted = asyncio.run(one_chain())
    config = load_model("tiny-target", torch.device("cpu"), torch.float32).config
    page = 16 * 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4
    # The prompt is under two pages; the chain copies its last one, and the step in flight may need one more.
    pages = stats["target"]["peak_kv_bytes"] / page
    assert chain.target_tokens / 16 <= pages <= chain.target_tokens / 16 + 5
    assert stats["draft"]["peak_kv_bytes"] == restarted == 0
    figures = lane_figures(LaneUse.between(NOTHING, stats["target"], Rates(1.0, 1.0)))
    assert figures["peak_kv_bytes"] == pages * page
    assert lane_rows({"target": figures})[0][-1] == f"{pages * page / 2**20:,.1f} MiB"
    assert lane_rows({"target": lane_figures(use(steps=1))})[0][-1] == "-"


def test_waiting_of_the_chains_that_tell() -> None:
    def chain(wait_s: float | None) -> Chain:
        return Chain("p", 0, 0, None, None, 4.0, (), wait_s=wait_s)

    assert waiting([chain(None)]) is None
    assert waiting([chain(1.0), chain(None), chain(2.0)]) == {"chains": 2, "mean_s": 1.5, "share": 3.0 / 8.0}


def test_probe_measures_something() -> None:
    rates = probe(torch.device("cpu"), torch.float32)
    assert rates.flop_s > 0 and rates.bytes_s > 0
