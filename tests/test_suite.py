"""The suite of strategies: frozen calibrations, matched levels, one table whatever the order of arrival."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atts_engine.cli.main import main as atts
from atts_engine.conformal import Calibrator, Meta
from atts_engine.errors import InputError
from atts_engine.evaluation.frozen import match_level, of_decisions, settle
from atts_engine.evaluation.job import JobResult
from atts_engine.evaluation.plan import blocks, stands_in
from atts_engine.evaluation.suite import REFERENCE, Block, Setting
from atts_engine.pipeline import STRATEGIES, ATTSParams, Chain, Decision, Problem, Turn, parse_strategy

PARAMS = ATTSParams(chains=2, alpha=0.4)
META = Meta(draft="d", target="t", prompt="p", draft_tokens=500, temperature=0.8)


def decision(number: int, score: float, key: int, verdict: str = "keep") -> Decision:
    return Decision(number, number, f"p{number % 3}", number, key, key, score, 0, 0, 0, 0, 0, 1, 0.5, verdict)


def test_a_calibration_does_not_depend_on_the_order_of_its_scores() -> None:
    decisions = [decision(i, (i * 7 % 11) / 4, i % 2) for i in range(40)]
    shuffled = random.Random(0).sample(decisions, len(decisions))
    one, other = (of_decisions(META, 0.3, d) for d in (decisions, shuffled))
    assert one.frozen and other.frozen and one.alpha == 0.3
    for key in (0, 1):
        own = [d.score for d in decisions if d.key == key]
        for score in (0.1, 1.0, 2.5):
            rulings = [c.decide(score, key, 2**31, "p").assessment for c in (one, other)]
            assert rulings[0] == rulings[1]
            assert (rulings[0].n, rulings[0].greater) == (len(own), sum(s > score for s in own))


def test_each_pass_is_judged_by_the_scores_of_the_one_before() -> None:
    seen: list[tuple[str, int]] = []

    async def run(params: ATTSParams, calibrator: Calibrator, name: str) -> JobResult:
        seen.append((name, calibrator.decide(0.0, 0, 1, "p").assessment.n))
        found = tuple(decision(i, i / 10, 0) for i in range(10 * len(seen)))
        return JobResult("atts", (), (), found, 1.0, 0)

    last = asyncio.run(settle(run, META, PARAMS, 3, "x"))
    assert seen == [("x-pass-0", 0), ("x-pass-1", 10), ("x-pass-2", 20)]
    assert len(last.decisions) == 30


def matched(reach: Callable[[float], float], wanted: float, **options: Any) -> tuple[float, list[float]]:
    """The level that was found from 0.4 on, and those that were tried."""
    tried: list[float] = []

    async def reached(level: float) -> float:
        tried.append(level)
        return reach(level)

    return asyncio.run(match_level(reached, 0.4, wanted, **options)), tried


@pytest.mark.parametrize(("slope", "wanted"), [(100.0, 40.0), (100.0, 70.0), (10.0, 2.0)])
def test_a_level_is_found_at_once_where_what_is_wanted_rises_in_proportion(slope: float, wanted: float) -> None:
    found, tried = matched(lambda level: slope * level, wanted)
    assert found == tried[-1] == pytest.approx(wanted / slope, abs=5e-4)
    assert tried[0] == 0.4 and len(tried) <= 2


def test_a_rate_is_found_between_its_known_ends() -> None:
    found, tried = matched(lambda level: level**0.5, 0.4, full=1.0, runs=6)
    assert found**0.5 == pytest.approx(0.4, rel=0.02)
    assert len(tried) <= 6 and all(0.0 < level < 1.0 for level in tried)


def test_a_search_leaves_a_stretch_of_levels_that_come_to_the_same() -> None:
    # Spans that are few and alike: from 0.33 to 0.35 no verdict changes, as `atts:span=step` came to in the suite.
    levels, rates = [0.0, 0.309, 0.33, 0.35, 0.366, 0.4, 1.0], [0.0, 0.347, 0.372, 0.372, 0.422, 0.518, 1.0]
    found, tried = matched(lambda level: float(np.interp(level, levels, rates)), 0.4, full=1.0)
    assert sum(0.33 <= level <= 0.35 for level in tried) == 2
    assert np.interp(found, levels, rates) == pytest.approx(0.4, rel=0.02)


def test_the_nearest_of_a_few_runs_counts() -> None:
    found, tried = matched(lambda level: 100.0 * level**3, 20.0, runs=2)
    assert len(tried) == 2
    assert found == min(tried, key=lambda level: abs(100.0 * level**3 - 20.0))
    assert matched(lambda level: level, 1e9)[0] == 0.995
    assert matched(lambda level: 0.0, 5.0) == (0.4, [0.4])


def test_every_strategy_is_in_the_table_and_the_reference_in_each_block() -> None:
    own, rate, tokens = blocks(checked=True)
    assert {parse_strategy(text)[0] for text in own.strategies} == set(STRATEGIES)
    for block in (own, rate, tokens):
        assert REFERENCE in block.strategies and len(set(block.strategies)) == len(block.strategies)
    assert {text for text in own.strategies if stands_in(text)} == {
        "lookahead:judge=task",
        "rsd",
        "spec-reason:judge=task",
        "best-of-n:score=reward",
    }
    assert not any(stands_in(text) for block in blocks(checked=False) for text in block.strategies)
    only = blocks(checked=True, only=("coin", "esc"))
    assert [b.strategies for b in only] == [
        ("atts", "atts:span=step", "coin", "esc"),
        ("atts", "atts:span=step", "coin:gate=conformal", "coin:gate=conformal:span=step"),
        ("atts", "atts:span=step", "coin:gate=conformal", "coin:gate=conformal:span=step", "esc"),
    ]


def test_what_cannot_be_held_to_equal_terms_is_refused() -> None:
    problems = tuple(Problem(f"p{i}", f"text {i}", "1", i) for i in range(4))

    def setting(**changes: Any) -> Setting:
        values: dict[str, Any] = {
            "models": ("d", "t", "float32"),
            "params": PARAMS,
            "problems": problems[:2],
            "pilot": problems[2:],
            "blocks": blocks(checked=True),
        }
        return Setting(**(values | changes))

    assert setting().of("esc:window=3").options == (("window", 3),)
    for changes, says in (
        ({"pilot": problems[1:]}, "1 problems would be calibrated with and counted"),
        ({"pilot": ()}, "--pilot-problems"),
        ({"passes": 0}, "1 pass or more"),
        ({"blocks": (Block("rate", ("target",), "rate"),)}, "target has no calibrated level"),
    ):
        with pytest.raises(InputError, match=says):
            setting(**changes)


FLAGS = [
    *("eval", "--suite", "--task", "registers", "--steps", "2-3", "--problems-count", "3", "--pilot-problems", "2"),
    *("--chains", "2", "--threads", "1", "--strategies", "coin,esc,target,draft", "--seed", "5"),
]


def _table(path: Path) -> list[Any]:
    """The figures of a suite but for what time decides."""
    timed = {"wall_s", "latency_s", "throughput", "tokens_per_s", "waiting", "lanes", "restored_chains"}
    found = json.loads(path.read_text())
    return [[{k: v for k, v in row.items() if k not in timed} for row in block["rows"]] for block in found["blocks"]]


def test_two_suites_with_one_seed_give_one_table_and_a_killed_one_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole"
    assert atts([*FLAGS, "--concurrency", "1", "--out", str(whole)]) == 0
    said = capsys.readouterr().out
    assert "at one takeover rate" in said and "coin:gate=conformal" in said and "report: " in said
    page = (whole / "report.html").read_text()
    assert "Every strategy at its own defaults" in page and "level 0." in page

    cut = tmp_path / "cut"
    monkeypatch.setattr("atts_engine.evaluation.suite.run_metered", _dying_after(4))
    with pytest.raises(RuntimeError, match="killed"):
        atts([*FLAGS, "--concurrency", "4", "--out", str(cut), "--traceback"])
    monkeypatch.undo()
    assert atts([*FLAGS, "--concurrency", "4", "--out", str(cut)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert atts([*FLAGS, "--concurrency", "4", "--out", str(cut), "--resume"]) == 0
    assert _table(cut / "suite.json") == _table(whole / "suite.json")
    assert atts([*FLAGS, "--alpha", "0.3", "--out", str(cut), "--resume"]) == 2
    assert "params.alpha: was 0.4, is 0.3" in capsys.readouterr().err


def _dying_after(jobs: int) -> Any:
    from atts_engine.evaluation.metered import run_metered

    left = [jobs]

    async def run(*args: Any, **options: Any) -> JobResult:
        if left[0] == 0:
            raise RuntimeError("killed")
        left[0] -= 1
        return await run_metered(*args, **options)

    return run


def test_target_tokens_are_those_of_a_problem() -> None:
    from atts_engine.evaluation.suite import target_tokens

    problems = (Problem("a", "a", "1", 0), Problem("b", "b", "1", 1))
    chains = [
        Chain(p.id, p.index, 0, "1", "1", 1.0, (Turn(0, "", 3, target_tokens=n),)) for p, n in zip(problems, (4, 8))
    ]
    assert target_tokens(JobResult("atts", problems, tuple(chains), (), 1.0, 0)) == 6.0
