"""One job on many workers: the driver's side, and what a worker says, without Ray and without models."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from atts_engine.config import EngineConfig
from atts_engine.conformal import Adaptive, Calibrator, Mondrian, Monitored
from atts_engine.errors import InputError, LaneError
from atts_engine.evaluation.decisions import check_log, learn_again
from atts_engine.evaluation.fleet import Snapshot
from atts_engine.evaluation.fleet.on_ray import check_listening, demand
from atts_engine.evaluation.folder import RunFolder
from atts_engine.evaluation.job import JobResult, job_settings
from atts_engine.evaluation.metered import run_metered
from atts_engine.pipeline import ATTSParams, tally, winner
from tests.fake_engine import Silent, some_problems
from tests.fake_fleet import META, FakeWorker, fleet_of

PARAMS = ATTSParams(chains=4, alpha=0.4, seed=3)
PROBLEMS = some_problems(8)


def frozen() -> Mondrian:
    calibrator = Mondrian(0.4, meta=META)
    for turn in range(4):
        for i in range(20):
            calibrator.observe(i / 8, turn)
    calibrator.frozen = True
    return calibrator


def run(
    path: Path,
    workers: Sequence[FakeWorker],
    calibrator: Calibrator,
    *,
    at_first: int | None = None,
    params: ATTSParams = PARAMS,
    concurrency: int = 4,
    resume: bool = False,
) -> JobResult:
    folder = RunFolder.open(path, job_settings("d", "t", "float32", params, {}, PROBLEMS), resume=resume)

    async def main() -> JobResult:
        async with await fleet_of(workers, at_first or len(workers), params) as fleet:
            return await run_metered(
                fleet, PROBLEMS, params, Silent(), calibrator=calibrator, folder=folder, concurrency=concurrency
            )

    try:
        return asyncio.run(main())
    finally:
        folder.close()


def written(path: Path) -> Counter[tuple[str, int]]:
    lines = (path / "chains.jsonl").read_text(encoding="utf-8").splitlines()
    return Counter((c["problem_id"], c["chain"]) for c in map(json.loads, lines))


def test_a_frozen_calibration_gives_the_same_chains_on_any_number_of_workers(tmp_path: Path) -> None:
    one = run(tmp_path / "1", [FakeWorker()], frozen())
    workers = [FakeWorker() for _ in range(3)]
    three = run(tmp_path / "3", workers, frozen())
    assert [(c.problem_id, c.chain) for c in one.chains] == [(p.id, n) for p in PROBLEMS for n in range(4)]
    assert one.chains == three.chains and one.ballots == three.ballots
    assert any(t.takeover for c in one.chains for t in c.turns)
    assert all(worker.orders and len(worker.snapshots) == 1 and worker.closed for worker in workers)
    assert len({worker.snapshots[0].sha256 for worker in workers}) == 1
    assert check_log(three.decisions, frozen()) is None
    steps = sum(lane.counters["steps"] for lane in three.lanes.values())
    assert set(three.lanes) == {"draft 0", "draft 1", "draft 2"} and steps == len(three.decisions)


@pytest.mark.parametrize("policy", ["threshold", "exact-count"])
def test_a_calibration_that_learns_has_one_log_that_replays(tmp_path: Path, policy: str) -> None:
    calibrator = Adaptive(0.4, meta=META)
    workers = [FakeWorker() for _ in range(3)]
    result = run(tmp_path / "r", workers, calibrator, params=replace(PARAMS, policy=policy))
    assert [d.decision_seq for d in result.decisions] == list(range(len(result.decisions)))
    assert check_log(result.decisions, Adaptive(0.4, meta=META)) is None
    # Each decision saw all before it: none was taken against a copy.
    assert [d.n for d in result.decisions if d.key == 0] == list(range(32))
    told = {(d.problem, d.chain, d.turn): d.verdict == "takeover" for d in result.decisions}
    assert told == {(c.problem_id, c.chain, t.turn): t.takeover for c in result.chains for t in c.turns}
    assert not any(worker.snapshots for worker in workers)
    if policy == "exact-count":
        for problem in PROBLEMS:
            own = [d.verdict == "takeover" for d in result.decisions if d.problem == problem.id]
            assert abs(sum(own) - 0.4 * len(own)) <= 1


@pytest.mark.parametrize("dies_after", [1, 4, 9])
@pytest.mark.parametrize("kind", ["frozen", "learning"])
def test_a_worker_that_dies_loses_nothing_and_no_chain_counts_twice(tmp_path: Path, kind: str, dies_after: int) -> None:
    calibrator = frozen() if kind == "frozen" else Adaptive(0.4, meta=META)
    dying, spare = FakeWorker(dies_after, again=True), FakeWorker(again=True)
    result = run(tmp_path / "r", [dying, FakeWorker(again=True), spare], calibrator, at_first=2)
    everything = {(p.id, n) for p in PROBLEMS for n in range(4)}
    assert written(tmp_path / "r") == Counter(everything)
    assert len(result.chains) == 32 and all(chain.error is None for chain in result.chains)
    assert spare.orders and dying.closed
    # A verdict on a chain that was lost with the worker does not count: one is left for each span on record.
    spans = [(c.problem_id, c.chain, t.turn) for c in result.chains for t in c.turns]
    assert Counter((d.problem, d.chain, d.turn) for d in result.in_force()) == Counter(spans)
    for problem in PROBLEMS:
        votes = tally(result.of_problem(problem.id), "majority")
        assert (result.ballots[problem.id].votes, result.ballots[problem.id].answer) == (votes, winner(votes))
    if kind == "frozen":
        assert result.chains == run(tmp_path / "whole", [FakeWorker()], frozen()).chains
        assert spare.snapshots
    else:
        assert check_log(result.decisions, Adaptive(0.4, meta=META)) is None
        held = Adaptive(0.4, meta=META)
        learn_again(held, held, result.in_force())
        assert calibrator.store.same_as(held.store)


def test_only_the_chains_that_had_not_ended_are_written_again(tmp_path: Path) -> None:
    dying, heir = FakeWorker(6), FakeWorker()
    run(tmp_path / "r", [dying, heir], frozen(), at_first=1)
    again = {
        order.problem.id: order.chains for order in heir.orders if order.problem in {o.problem for o in dying.orders}
    }
    assert any(0 < len(chains) < 4 for chains in again.values() if chains is not None)


def test_a_problem_that_kills_every_worker_fails_alone(tmp_path: Path) -> None:
    workers = [FakeWorker(poison="p2") for _ in range(4)]
    result = run(tmp_path / "r", workers, frozen(), at_first=1, concurrency=1)
    failed = [chain for chain in result.chains if chain.error is not None]
    assert [(c.problem_id, c.chain, c.finish) for c in failed] == [("p2", n, "error") for n in range(4)]
    assert {c.error for c in failed} == {
        "3 workers were lost with this problem, the last one worker 0: its host is gone"
    }
    assert written(tmp_path / "r") == Counter((p.id, n) for p in PROBLEMS for n in range(4))


def test_when_no_worker_is_left_the_run_ends_and_can_be_resumed(tmp_path: Path) -> None:
    calibrator = Adaptive(0.4, meta=META)
    with pytest.raises(LaneError, match="all workers were lost, the last one: it never came up"):
        run(tmp_path / "r", [FakeWorker(30)], calibrator)
    saved = written(tmp_path / "r")
    assert 0 < len(saved) < 32
    result = run(tmp_path / "r", [FakeWorker(), FakeWorker()], Adaptive(0.4, meta=META), resume=True)
    assert result.restored == len(saved) and all(chain.error is None for chain in result.chains)
    assert written(tmp_path / "r") == Counter((p.id, n) for p in PROBLEMS for n in range(4))
    assert check_log(result.decisions, Adaptive(0.4, meta=META)) is None


def test_a_worker_that_is_lost_while_it_starts_is_named() -> None:
    with pytest.raises(LaneError, match="worker 1 was lost while it started: it never came up"):
        asyncio.run(fleet_of([FakeWorker(), FakeWorker(0)], 2, PARAMS))


def test_a_monitor_hears_the_verdicts_of_frozen_workers(tmp_path: Path) -> None:
    watched = Monitored(frozen())
    result = run(tmp_path / "r", [FakeWorker(), FakeWorker()], watched)
    assert watched.monitor.steps == len(result.decisions)


def test_workers_that_differ_are_refused_with_the_difference() -> None:
    odd = FakeWorker(meta=replace(META, target="u"))
    workers = [FakeWorker(), odd]
    with pytest.raises(InputError, match="worker 1 differs from the others \\(target: is 'u', expected 't'\\)"):
        asyncio.run(fleet_of(workers, 2, PARAMS))
    assert all(worker.closed for worker in workers)


def test_a_snapshot_arrives_whole_or_is_refused() -> None:
    calibrator = frozen()
    snapshot = Snapshot.of(calibrator)
    arrived = snapshot.load(META)
    assert arrived.frozen and arrived.p_value(1.0, 0) == calibrator.p_value(1.0, 0)
    with pytest.raises(InputError, match="was sent"):
        replace(snapshot, data=snapshot.data[:-1] + b"x").load(META)
    with pytest.raises(ValueError, match="target: is 't', expected 'u'"):
        snapshot.load(replace(META, target="u"))


def test_a_worker_is_given_a_cpu_a_thread_and_the_gpus_that_its_devices_name() -> None:
    pair = ("tiny-draft", "tiny-target")
    assert demand(EngineConfig(*pair, threads=4)) == {"CPU": 4.0}
    assert demand(EngineConfig(*pair, "cuda", "cuda:0")) == {"CPU": 1.0, "GPU": 1.0}
    assert demand(EngineConfig(*pair, "cuda:0", "cuda:1")) == {"CPU": 1.0, "GPU": 2.0}
    with pytest.raises(InputError, match="numbered from 0"):
        demand(EngineConfig(*pair, "cuda:2", "cuda:3"))


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:port"])
def test_nobody_listening_is_said_at_once(address: str) -> None:
    with pytest.raises(InputError, match="no Ray cluster at"):
        check_listening(address)
