"""The job runner and its folder: everything is saved, a killed run goes on as if it had not been killed."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest

from atts_engine.conformal import Mondrian
from atts_engine.errors import InputError
from atts_engine.evaluation.decisions import check_log
from atts_engine.evaluation.folder import RunFolder, differences
from atts_engine.evaluation.job import JobResult, job_settings, run_job
from atts_engine.evaluation.run_log import log_figures
from atts_engine.evaluation.solutions import Ballot, read_solutions
from atts_engine.evaluation.summary import comparison, figures
from atts_engine.pipeline import ATTSParams, Decision, tally, winner
from tests.fake_engine import Died, FakeEngine, Silent, some_problems

PARAMS = ATTSParams(chains=4, alpha=0.4, seed=3)
PROBLEMS = some_problems(6)


COLD = {"calibrator": "mondrian", "cold_start": None, "frozen": False, "start_sha256": None}


def settings_of(params: ATTSParams = PARAMS) -> dict[str, object]:
    return job_settings("d", "t", "float32", params, COLD, PROBLEMS)


def frozen() -> Mondrian:
    calibrator = Mondrian(0.4)
    for turn in range(3):
        for i in range(20):
            calibrator.observe(i / 8, turn)
    calibrator.frozen = True
    return calibrator


def run(
    path: Path,
    *,
    engine: FakeEngine | None = None,
    params: ATTSParams = PARAMS,
    calibrator: Mondrian | None = None,
    concurrency: int = 3,
    resume: bool = False,
    observer: Silent | None = None,
) -> JobResult:
    folder = RunFolder.open(path, settings_of(params), resume=resume)
    try:
        work = run_job(
            engine or FakeEngine(),
            PROBLEMS,
            params,
            observer or Silent(),
            calibrator=calibrator or Mondrian(0.4),
            folder=folder,
            concurrency=concurrency,
        )
        return asyncio.run(work)
    finally:
        folder.close()


def test_every_chain_and_decision_is_saved(tmp_path: Path) -> None:
    result = run(tmp_path / "r")
    assert [(c.problem_id, c.chain) for c in result.chains] == [(p.id, c) for p in PROBLEMS for c in range(4)]
    lines = [json.loads(line) for line in (tmp_path / "r" / "chains.jsonl").read_text().splitlines()]
    assert len(lines) == 24
    assert len(result.decisions) == sum(len(c.turns) for c in result.chains)
    assert [d.decision_seq for d in result.decisions] == list(range(len(result.decisions)))
    assert check_log(result.decisions, Mondrian(0.4)) is None


@pytest.mark.parametrize("concurrency", [1, 2, 5])
def test_concurrency_is_bounded_and_changes_nothing_when_frozen(tmp_path: Path, concurrency: int) -> None:
    engine = FakeEngine()
    result = run(tmp_path / "a", engine=engine, calibrator=frozen(), concurrency=concurrency)
    assert engine.most_in_flight == concurrency
    assert result.chains == run(tmp_path / "b", calibrator=frozen(), concurrency=3).chains


@pytest.mark.parametrize("after", [0, 1, 5, 12, 23])
@pytest.mark.parametrize("torn", [b"", b'{"problem_id": "p', b'{"gold": "\xc3'])
def test_a_killed_run_goes_on(tmp_path: Path, after: int, torn: bytes) -> None:
    whole = run(tmp_path / "whole", calibrator=frozen())
    with pytest.raises(Died):
        run(tmp_path / "cut", engine=FakeEngine(dies_after=after), calibrator=frozen())
    for name in ("chains.jsonl", "decisions.jsonl"):
        with (tmp_path / "cut" / name).open("ab") as file:
            file.write(torn)
    engine = FakeEngine()
    again = run(tmp_path / "cut", engine=engine, calibrator=frozen(), resume=True)
    assert again.chains == whole.chains
    assert again.restored == after
    assert len(engine.written) == 24 - after


@pytest.mark.parametrize("kills", [(0,), (1, 1, 1), (3, 0, 8), (7, 5)])
def test_online_calibration_survives_kills(tmp_path: Path, kills: tuple[int, ...]) -> None:
    for after in kills:
        with pytest.raises(Died):
            run(tmp_path, engine=FakeEngine(dies_after=after), resume=True)
    calibrator = Mondrian(0.4)
    result = run(tmp_path, calibrator=calibrator, resume=True)
    assert len(result.chains) == 24
    log = result.decisions
    assert [d.decision_seq for d in log] == list(range(len(log)))
    assert check_log(log, Mondrian(0.4)) is None
    # Each span on record was decided once, whatever was decided of it before a kill.
    spans = {(c.problem_id, c.chain, t.turn): (t.score, t.p_value, t.takeover) for c in result.chains for t in c.turns}
    told = [((d.problem, d.chain, d.turn), (d.score, d.p_value, d.verdict == "takeover")) for d in result.in_force()]
    assert len(told) == len(spans) and dict(told) == spans
    assert calibrator.store.size.sum() == len(spans) < len(log)
    # Each decision was counted against those before it in its key that were in force, and no others.
    held: dict[int, Decision] = {}
    for decision in log:
        for seq in decision.discards:
            del held[seq]
        same = [d.score for d in held.values() if d.key == decision.key]
        assert (decision.n, decision.count) == (len(same), sum(score >= decision.score for score in same))
        held[decision.decision_seq] = decision
    found = figures(result, PARAMS)
    assert found["decisions"] == found["takeovers"]["decisions"] == len(spans)
    assert found["discarded_decisions"] == len(log) - len(spans)
    again = log_figures(tmp_path)
    assert again["difference"] is None
    assert (again["decisions"], again["in_force"]) == (len(log), len(spans))


def test_a_problem_of_the_synchronous_strategy_is_begun_anew(tmp_path: Path) -> None:
    params = replace(PARAMS, strategy="atts-sync")
    with pytest.raises(Died):
        run(tmp_path, engine=FakeEngine(dies_after=2), params=params, concurrency=1)
    engine = FakeEngine()
    result = run(tmp_path, engine=engine, params=params, resume=True, concurrency=1)
    assert [c for p, c in engine.written if p == "p0"] == [0, 1, 2, 3]
    assert len(result.chains) == 24
    assert len((tmp_path / "chains.jsonl").read_text().splitlines()) == 24


def test_answers_are_saved_and_restored(tmp_path: Path) -> None:
    first = run(tmp_path)
    saved = read_solutions(tmp_path / "solutions.jsonl")
    assert {s.problem_id: s.ballot for s in saved} == dict(first.ballots)
    assert all(s.chains == (0, 1, 2, 3) for s in saved)
    for problem in PROBLEMS:
        votes = tally(first.of_problem(problem.id), "majority")
        assert first.ballots[problem.id] == Ballot(winner(votes), votes)
    assert run(tmp_path, engine=FakeEngine(dies_after=0), resume=True).ballots == first.ballots


def test_an_answer_that_a_kill_left_out_is_saved_later(tmp_path: Path) -> None:
    first = run(tmp_path)
    path = tmp_path / "solutions.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    engine = FakeEngine()
    assert run(tmp_path, engine=engine, resume=True).ballots == first.ballots
    assert engine.written == []
    assert {s.problem_id for s in read_solutions(path)} == {p.id for p in PROBLEMS}


def test_an_answer_whose_chains_are_not_all_there_does_not_count(tmp_path: Path) -> None:
    params = replace(PARAMS, strategy="atts-sync")
    run(tmp_path, params=params)
    lines = (tmp_path / "chains.jsonl").read_text().splitlines(keepends=True)
    gone = json.loads(lines[-1])
    (tmp_path / "chains.jsonl").write_text("".join(lines[:-1]))
    engine = FakeEngine()
    assert len(run(tmp_path, engine=engine, params=params, resume=True).chains) == 24
    assert engine.written == [(gone["problem_id"], number) for number in range(4)]


def test_a_finished_run_is_only_read(tmp_path: Path) -> None:
    first = run(tmp_path)
    engine, observer = FakeEngine(), Silent()
    second = run(tmp_path, engine=engine, observer=observer, resume=True)
    assert engine.written == []
    assert second.chains == first.chains
    assert all(restored for _, restored in observer.ended)


def test_a_used_folder_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(InputError, match="--resume"):
        run(tmp_path)
    with pytest.raises(InputError, match=r"params\.alpha: was 0\.4, is 0\.3.*params\.seed: was 3, is 4"):
        RunFolder.open(tmp_path, settings_of(replace(PARAMS, alpha=0.3, seed=4)), resume=True)


def test_a_log_that_does_not_follow_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Died):
        run(tmp_path, engine=FakeEngine(dies_after=8))
    log = tmp_path / "decisions.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[1:]))
    with pytest.raises(InputError, match="decision"):
        run(tmp_path, resume=True)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to"):
        RunFolder.open(tmp_path / "file" / "run", settings_of(), resume=False)


def test_differences_name_what_differs() -> None:
    assert differences({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 2}}) == []
    assert differences({"a": 1, "b": {"c": 2}}, {"b": {"c": 3}}) == ["a: was 1, is null", "b.c: was 2, is 3"]


def test_figures_of_a_run(tmp_path: Path) -> None:
    result = run(tmp_path)
    found = figures(result, PARAMS)
    turns = [t for c in result.chains for t in c.turns]
    assert found["chains"] == 24
    assert found["takeovers"]["decisions"] == len(turns)
    assert found["takeovers"]["rate"] == sum(t.takeover for t in turns) / len(turns)
    assert found["tokens"] == {"draft": 3 * len(turns), "target": 2 * sum(t.takeover for t in turns)}
    right = [found["answers"][p.id]["right"] for p in PROBLEMS]
    assert found["majority"]["mean"] == pytest.approx(sum(right) / 6)
    json.dumps(found, allow_nan=False)


def test_comparison_is_paired_with_the_target(tmp_path: Path) -> None:
    params = {name: replace(PARAMS, strategy=name) for name in ("target", "atts")}
    results = {name: run(tmp_path / name, params=params[name]) for name in params}
    found = comparison(results, params, str.__eq__)
    assert set(found["strategies"]) == {"target", "atts"}
    assert set(found["against"]) == {"atts"}
    assert found["against"]["atts"]["problems"] == 6
    assert comparison({"atts": results["atts"]}, params, str.__eq__)["against"] == {}
