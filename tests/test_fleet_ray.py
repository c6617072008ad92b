"""One job on the workers of a Ray cluster, with the tiny pair."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from atts_engine.config import EngineConfig
from atts_engine.conformal import Adaptive, Calibrator, Meta, Mondrian
from atts_engine.errors import InputError
from atts_engine.evaluation.datasets import from_registers
from atts_engine.evaluation.decisions import check_log
from atts_engine.evaluation.fleet import Fleet, on_ray
from atts_engine.evaluation.folder import RunFolder
from atts_engine.evaluation.job import JobResult, job_settings
from atts_engine.evaluation.metered import run_metered
from atts_engine.pipeline import ATTSParams
from atts_engine.pipeline.events import ChainEvent, TokensEvent, VerdictEvent
from tests.fake_engine import Silent
from tests.test_engine import content

ray: Any = pytest.importorskip("ray", reason="needs ray: pip install 'atts-engine[ray]'")

pytestmark = pytest.mark.long  # every worker imports torch anew

PARAMS = ATTSParams(chains=2, turns=2, draft_tokens=16, target_tokens=16, alpha=0.4, seed=3)
CONFIG = EngineConfig("tiny-draft", "tiny-target", threads=1, kv_tokens=4096)
PROBLEMS = from_registers(5, 32, (1, 2)).problems


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init("local", num_cpus=2, object_store_memory=100_000_000, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def frozen(meta: Meta) -> Mondrian:
    calibrator = Mondrian(0.4, meta=meta)
    for turn in range(2):
        for i in range(60):
            calibrator.observe((i / 60) ** 2, turn)
    calibrator.frozen = True
    return calibrator


class Killer(Silent):
    """Kills a worker when so many chains have ended."""

    def __init__(self, workers: list[on_ray.RayWorker], after: int) -> None:
        super().__init__()
        self._workers = workers
        self._left = after

    def event(self, event: TokensEvent | VerdictEvent | ChainEvent) -> None:  # type: ignore[override]
        if isinstance(event, ChainEvent):
            self._left -= 1
            if self._left == 0:
                ray.kill(self._workers[0]._actor)


def run(
    path: Path, workers: int, calibrator: Callable[[Meta], Calibrator], kill_after: int | None = None
) -> tuple[JobResult, int]:
    """The result, and how many actors it took."""
    need = on_ray.demand(CONFIG)
    made: list[on_ray.RayWorker] = []
    launch = on_ray.launcher(need)

    def launched() -> on_ray.RayWorker:
        made.append(launch())
        return made[-1]

    folder = RunFolder.open(path, job_settings("d", "t", "float32", PARAMS, {}, PROBLEMS), resume=False)

    async def main() -> JobResult:
        async with await Fleet.create(launched, on_ray.worker_count(workers, need), CONFIG, PARAMS) as fleet:
            watch = Silent() if kill_after is None else Killer(made, kill_after)
            start = calibrator(fleet.calibration_meta(PARAMS))
            return await run_metered(fleet, PROBLEMS, PARAMS, watch, calibrator=start, folder=folder, concurrency=8)

    try:
        return asyncio.run(main()), len(made)
    finally:
        folder.close()


def test_one_and_two_workers_give_the_same_chains_and_so_do_two_of_which_one_dies(tmp_path: Path) -> None:
    one, _ = run(tmp_path / "1", 1, frozen)
    two, _ = run(tmp_path / "2", 2, frozen)
    cut, actors = run(tmp_path / "cut", 2, frozen, kill_after=9)
    wanted = [content(chain) for chain in one.chains]
    assert len(wanted) == 64 and all(chain.error is None for chain in wanted)
    assert any(turn.takeover for chain in wanted for turn in chain.turns)
    assert [content(chain) for chain in two.chains] == wanted
    assert [content(chain) for chain in cut.chains] == wanted and actors == 3
    assert len((tmp_path / "cut" / "chains.jsonl").read_text(encoding="utf-8").splitlines()) == 64
    assert one.ballots == two.ballots == cut.ballots
    assert all(two.lanes[name].counters["steps"] > 0 for name in ("draft 0", "target 0", "draft 1", "target 1"))


def test_a_calibration_that_learns_has_one_log_that_replays(tmp_path: Path) -> None:
    result, _ = run(tmp_path / "r", 2, lambda meta: Adaptive(0.4, meta=meta))
    assert check_log(result.decisions, Adaptive(0.4)) is None
    told = {(d.problem, d.chain, d.turn): d.verdict == "takeover" for d in result.decisions}
    assert told == {(c.problem_id, c.chain, t.turn): t.takeover for c in result.chains for t in c.turns if t.judged}
    assert len(told) == len(result.decisions) > 64
    assert [d.n for d in result.decisions if d.key == 0] == list(range(64))


def test_a_cluster_without_room_is_refused() -> None:
    with pytest.raises(
        InputError, match="has 2 CPU in all, and each worker needs 1 CPU on one host: there is room for 2"
    ):
        on_ray.worker_count(3, {"CPU": 1.0})
    with pytest.raises(InputError, match="0 GPU"):
        on_ray.worker_count(None, {"CPU": 1.0, "GPU": 1.0})


def test_room_that_others_have_taken_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    need = {"CPU": 1.0}
    other = on_ray.launcher(need)()
    monkeypatch.setattr(on_ray, "FREE_S", 0.0)
    while ray.available_resources().get("CPU", 0.0) != 1.0:
        time.sleep(0.05)
    try:
        assert on_ray.worker_count(None, need) == on_ray.worker_count(1, need) == 1
        with pytest.raises(InputError, match="others use the Ray cluster: of 2 workers 1 have room now, 2 are"):
            on_ray.worker_count(2, need)
    finally:
        asyncio.run(other.close())
    monkeypatch.undo()
    assert on_ray.worker_count(2, need) == 2


def test_errors_of_a_worker_arrive_as_they_were() -> None:
    async def main() -> None:
        need = on_ray.demand(CONFIG)
        broken = EngineConfig("/nowhere", "tiny-target", threads=1)
        await Fleet.create(on_ray.launcher(need), 1, broken, PARAMS)

    with pytest.raises(InputError, match="/nowhere") as caught:
        asyncio.run(main())
    assert "\n" not in str(caught.value)
