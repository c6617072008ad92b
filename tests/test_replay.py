"""Replay of recorded chains: the published run to the bit, and the figures against plain loops."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atts_engine.cli.main import main
from atts_engine.conformal import LEVEL_ONE, Meta, Mondrian, Split, level_of
from atts_engine.errors import InputError
from atts_engine.evaluation.jsonl import JsonlWriter
from atts_engine.evaluation.replay import (
    Replay,
    Scored,
    figures,
    mid_ranks,
    replay,
    replay_online,
    scored_spans,
    uniform_of,
)
from atts_engine.evaluation.traces import chain_to_json, read_chains
from atts_engine.pipeline.records import Chain, Turn

TRACES = "data/traces/math100_r1-distill-llama-8b_qwq-32b.jsonl.gz"
CALIBRATION = "data/calibration/math100_turn0_ppl.npy"


def _chains(problems: int = 6, chains: int = 4, seed: int = 0) -> list[Chain]:
    rng = np.random.default_rng(seed)
    made = []
    for problem in range(problems):
        for chain in range(chains):
            scores = rng.normal(1.0, 0.3, int(rng.integers(1, 5))).round(1).tolist()
            turns = [Turn(t, "x", 1, s, math.exp(s), takeover=bool(s > 1)) for t, s in enumerate(scores)]
            turns.append(Turn(len(scores), "end", 1))
            made.append(Chain(f"p{problem}", problem, chain, "1", "1", 0.0, tuple(turns)))
    return made


@pytest.fixture()
def traces(tmp_path: Path) -> Path:
    path = tmp_path / "traces.jsonl"
    with JsonlWriter(path) as writer:
        for chain in reversed(_chains()):
            writer.write(chain_to_json(chain))
    return path


def test_arrival_order_is_by_problem_then_turn_then_chain() -> None:
    spans = scored_spans(reversed(_chains()))
    places = [(s.problem_index, s.turn, s.chain) for s in spans]
    assert places == sorted(places)
    assert len(spans) == sum(t.score is not None for c in _chains() for t in c.turns)


def test_shuffle_is_a_permutation_of_its_seed() -> None:
    spans = scored_spans(_chains())
    shuffled = scored_spans(_chains(), "shuffle", 3)
    assert shuffled != spans
    assert sorted(shuffled, key=repr) == sorted(spans, key=repr)
    assert shuffled == scored_spans(_chains(), "shuffle", 3)
    assert shuffled != scored_spans(_chains(), "shuffle", 4)


def test_uniforms_belong_to_the_span_not_to_its_place() -> None:
    uniforms = {s: uniform_of(s, 0) for s in scored_spans(_chains())}
    assert all(1 <= u <= LEVEL_ONE for u in uniforms.values())
    assert len(set(uniforms.values())) == len(uniforms)
    assert {s: uniform_of(s, 0) for s in scored_spans(_chains(), "shuffle", 5)} == uniforms
    assert {s: uniform_of(s, 1) for s in uniforms} != uniforms


@pytest.mark.parametrize("outstanding", [1, 2, 5, 1000])
@pytest.mark.parametrize("make", [Mondrian, Split])
def test_online_replay_is_the_plain_loop(outstanding: int, make: Callable[[float], Mondrian]) -> None:
    spans = scored_spans(_chains(), "shuffle", 1)
    found = replay_online(spans, make(0.4), outstanding=outstanding, seed=2)
    for i, span in enumerate(spans):
        seen = spans[: max(0, i - outstanding + 1)]
        if make is Mondrian:
            seen = [s for s in seen if s.turn == span.turn]
        u = uniform_of(span, 2) if make is Mondrian else LEVEL_ONE
        scores, score = [np.float32(s.score) for s in seen], np.float32(span.score)
        greater, ties = sum(s > score for s in scores), sum(s == score for s in scores)
        exact = (int(greater) * LEVEL_ONE + u * (1 + int(ties)), level_of(0.4) * (len(seen) + 1))
        assert bool(found.takeovers[i]) == (exact[0] <= exact[1])
        assert found.values[i] == pytest.approx(exact[0] / LEVEL_ONE / (len(seen) + 1), rel=1e-12)


def test_all_scores_are_learnt_in_the_end() -> None:
    spans = scored_spans(_chains())
    one, many = Mondrian(0.4), Mondrian(0.4)
    replay_online(spans, one)
    replay_online(spans, many, outstanding=7)
    assert one.store.same_as(many.store)
    assert one.store.size.sum() == len(spans)


def test_mid_ranks_lie_symmetrically_with_ties() -> None:
    spans = [
        Scored("p", 0, i, turn, score, None, None, False)
        for i, (turn, score) in enumerate([(0, 1.0), (0, 2.0), (0, 2.0), (0, 3.0), (1, 5.0)])
    ]
    assert mid_ranks(spans).tolist() == [1 / 8, 1 / 2, 1 / 2, 7 / 8, 1 / 2]
    spans = scored_spans(_chains(20))
    ranks = mid_ranks(spans)
    for turn in range(4):
        members = [r for r, s in zip(ranks, spans, strict=True) if s.turn == turn]
        assert np.mean(members) == pytest.approx(0.5)


def test_figures_are_those_of_a_hand_count() -> None:
    spans = tuple(Scored(f"p{i % 2}", i % 2, i, int(i >= 60), float(i), None, None, False) for i in range(100))
    takeovers = np.array([i % 5 == 0 for i in range(60)] + [True] * 40)
    found = figures(Replay(spans, takeovers, np.zeros(100)), 0.4)
    assert found["n"] == 100
    assert found["rate"] == 0.52
    assert found["by_turn"] == {"0": {"n": 60, "rate": 0.2}, "1": {"n": 40, "rate": 1.0}}
    assert found["by_problem"] == {"p0": {"n": 50, "rate": 0.52}, "p1": {"n": 50, "rate": 0.52}}
    assert found["max_abs_dev_by_turn"] == pytest.approx(0.2)
    of_first = np.mean([(i + 0.5) / 60 for i in range(0, 60, 5)])
    assert found["selection_power"] == pytest.approx((12 * of_first + 40 * 0.5) / 52)
    nothing = figures(Replay((), np.zeros(0, dtype=bool), np.zeros(0)), 0.4)
    assert (nothing["n"], nothing["rate"], nothing["selection_power"]) == (0, None, None)
    assert nothing["max_abs_dev_by_turn"] is None


def test_selection_power_of_the_best_share_in_hindsight_and_of_a_coin() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=5000)
    spans = tuple(Scored("p", 0, i, 0, float(s), None, None, False) for i, s in enumerate(scores))
    best = scores >= np.quantile(scores, 0.6)
    assert figures(Replay(spans, best, scores), 0.4)["selection_power"] == pytest.approx(0.8, abs=1e-3)
    coin = rng.random(5000) < 0.4
    # Five sigma of a mean of about 2,000 uniforms.
    assert abs(figures(Replay(spans, coin, scores), 0.4)["selection_power"] - 0.5) <= 5 * 0.289 / math.sqrt(1900)


def test_a_saved_calibration_starts_a_replay(tmp_path: Path) -> None:
    spans = scored_spans(_chains())
    path = tmp_path / "state.npz"
    calibrator = Mondrian(0.4, keys=8, meta=Meta(draft="d"))
    replay_online(scored_spans(_chains(seed=9)), calibrator)
    calibrator.save(path)
    warm = replay(spans, "mondrian", 0.4, calibration=path)
    assert warm.values.tolist() == replay_online(spans, calibrator).values.tolist()
    frozen = replay(spans, "mondrian", 0.4, calibration=path, frozen=True, outstanding=1)
    late = replay(spans, "mondrian", 0.4, calibration=path, frozen=True, outstanding=9)
    assert frozen.values.tolist() == late.values.tolist()
    with pytest.raises(InputError, match="alpha: is 0.4, expected 0.3"):
        replay(spans, "mondrian", 0.3, calibration=path)
    with pytest.raises(InputError, match="calibration of 'mondrian', not of 'split'"):
        replay(spans, "split", 0.4, calibration=path)


def test_an_array_of_perplexities_starts_split(tmp_path: Path) -> None:
    spans = scored_spans(_chains())
    path = tmp_path / "ppl.npy"
    ppl = np.exp(np.random.default_rng(0).normal(1, 0.3, (5, 4)))
    np.save(path, ppl)
    found = replay(spans, "split", 0.4, calibration=path, frozen=True)
    held = np.log(ppl).astype(np.float32)
    expected = [(1 + int((held >= np.float32(s.score)).sum())) / 21 for s in spans]
    assert found.values.tolist() == expected
    with pytest.raises(InputError, match="names no turns"):
        replay(spans, "mondrian", 0.4, calibration=path)
    for bad in (np.ones(0), np.array([1.0, np.nan]), np.array([1.0, 0.0]), np.array(["a"])):
        np.save(path, bad)
        with pytest.raises(InputError, match="perplexities"):
            replay(spans, "reference", 0.4, calibration=path)


def _json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["replay", *words, "--json", "-"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_command_prints_json_alone_on_stdout(traces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = _json(capsys, "--traces", str(traces), "--alpha", "0.4", "--order", "shuffle", "--seed", "3")
    names = {"n", "rate", "selection_power", "by_turn", "by_problem", "max_abs_dev_by_turn", "calibrator", "alpha"}
    assert names <= found.keys()
    assert found["n"] == len(scored_spans(_chains()))
    again = _json(capsys, "--traces", str(traces), "--alpha", "0.4", "--order", "shuffle", "--seed", "3")
    assert again == found


def test_command_prints_a_plain_table_elsewhere(traces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "--traces", str(traces)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("adaptive at alpha 0.4, arrival order\n")
    assert "turn 0" in text
    assert "selection power" in text
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (
            ["--calibrator", "best"],
            "no calibrator 'best'; there are: reference, adaptive, aci, mondrian, window, weighted, hierarchical",
        ),
        (["--policy", "greedy"], "no policy 'greedy'; there are: threshold, exact-count"),
        (["--compare", "mondrian,best"], "no calibrator 'best'"),
        (["--compare", "tracker+exact-count"], "the tracker has no p-value"),
        (["--calibrator", "reference", "--policy", "top-b"], "takes no policy but threshold"),
        (["--cold-start", "accept"], "must be RULE:N"),
        (["--cold-start", "guess:3"], "no cold start 'guess'"),
        (["--plot", "rates.txt"], "must end in .svg, .png, .pdf"),
        (["--plot", "no-such-folder/rates.svg"], "no such folder"),
        (["--calibrator", "reference"], "reference calibrator needs --calibration FILE.npy"),
        (["--alpha", "1.5"], "alpha must lie strictly between 0 and 1"),
        (["--alpha", "0"], "alpha must lie strictly between 0 and 1"),
        (["--outstanding", "0"], "outstanding decisions must be 1 or more"),
        (["--order", "backwards"], "no order 'backwards'; there are arrival, shuffle"),
        (["--frozen"], "needs --calibration"),
        (["--calibration", "none.npz"], "no calibration file at none.npz"),
        (["--traces", "none.jsonl"], "no such file: none.jsonl"),
        (["--json", "no-such-folder/out.json"], "no-such-folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    traces: Path, capsys: pytest.CaptureFixture[str], words: list[str], reason: str
) -> None:
    assert main(["replay", "--traces", str(traces), *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert reason in captured.err


def test_published_percentiles_and_takeovers_are_reproduced(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--traces", str(shared / TRACES), "--alpha", "0.4", "--calibrator", "reference"]
    found = _json(capsys, *words, "--calibration", str(shared / CALIBRATION))
    assert found["n"] == 6065
    assert found["percentiles_recorded"] == found["percentiles_reproduced"] == 6065
    assert found["verdicts_reproduced"] == 6065
    assert round(found["rate"], 3) == 0.413
    assert [round(found["by_turn"][t]["rate"], 3) for t in ("0", "1", "14")] == [0.403, 0.301, 0.608]
    rates = [cell["rate"] for cell in found["by_problem"].values()]
    assert (len(rates), min(rates), max(rates)) == (100, 0.0, 1.0)


def test_shuffled_recording_holds_alpha_online(shared: Path) -> None:
    """Shuffled scores of a turn are exchangeable, so the online smoothed p-values are independent uniforms."""
    chains = read_chains(shared / TRACES)
    spans = scored_spans(chains, "shuffle", 0)
    found = figures(replay(spans, "mondrian", 0.4, seed=0), 0.4)
    assert abs(found["rate"] - 0.4) <= 5 * math.sqrt(0.24 / 6065)
    for cell in found["by_turn"].values():
        assert abs(cell["rate"] - 0.4) <= 5 * math.sqrt(0.24 / cell["n"])
    assert found["selection_power"] > 0.75


@pytest.mark.parametrize(("order", "seed"), [("arrival", 0), ("arrival", 1), ("shuffle", 0), ("shuffle", 3)])
def test_the_default_holds_every_turn_of_the_recording_and_still_selects(shared: Path, order: str, seed: int) -> None:
    """Bounds of the band, which hold for any scores (docs/calibration.md); the power is a measurement of this file."""
    spans = scored_spans(read_chains(shared / TRACES), order, seed)
    found = figures(replay(spans, "adaptive", 0.4, seed=seed), 0.4)
    assert abs(found["rate"] - 0.4) <= 0.005
    assert found["max_abs_dev_by_turn"] <= 0.02
    assert found["selection_power"] >= 0.75


def test_the_default_holds_with_decisions_in_flight(shared: Path) -> None:
    spans = scored_spans(read_chains(shared / TRACES))
    for outstanding in (16, 128):
        found = figures(replay(spans, "adaptive", 0.4, outstanding=outstanding), 0.4)
        assert abs(found["rate"] - 0.4) <= 0.005
        for cell in found["by_turn"].values():
            assert abs(cell["rate"] - 0.4) * cell["n"] <= max(1, 0.02 * cell["n"]) + 2 * (outstanding - 1)
        assert found["selection_power"] >= 0.75


def test_exact_count_keeps_every_problem_within_one_chain_at_every_turn(shared: Path) -> None:
    spans = scored_spans(read_chains(shared / TRACES))
    power = {}
    for policy in ("exact-count", "top-b"):
        result = replay(spans, "adaptive", 0.4, policy)
        power[policy] = figures(result, 0.4)["selection_power"]
        excess: dict[str, float] = {}
        for i, (span, taken) in enumerate(zip(result.spans, result.takeovers, strict=True)):
            excess[span.problem_id] = excess.get(span.problem_id, 0.0) + float(taken) - 0.4
            last = i + 1 == len(spans) or (spans[i + 1].problem_id, spans[i + 1].turn) != (span.problem_id, span.turn)
            if last:
                assert abs(excess[span.problem_id]) <= 0.5 + 1e-9
    assert 0.5 < power["exact-count"] < power["top-b"]


def test_out_of_order_the_count_stays_within_one_chain_of_a_problem(shared: Path) -> None:
    spans = scored_spans(read_chains(shared / TRACES), "shuffle", 0)
    found = figures(replay(spans, "adaptive", 0.4, "exact-count"), 0.4)
    for cell in found["by_problem"].values():
        assert abs(cell["rate"] - 0.4) * cell["n"] <= 1 + 1e-9


def test_command_sets_calibrators_side_by_side_and_draws_them(
    traces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "rates.svg"
    names = "mondrian,tracker,adaptive+exact-count,adaptive+top-b"
    found = _json(capsys, "--traces", str(traces), "--compare", names, "--plot", str(plot))
    assert list(found["compared"]) == names.split(",")
    for name, cell in found["compared"].items():
        calibrator, _, policy = name.partition("+")
        alone = _json(capsys, "--traces", str(traces), "--calibrator", calibrator, "--policy", policy or "threshold")
        assert alone == cell
    text = plot.read_text(encoding="utf-8")
    assert all(name in text for name in ["adaptive", *names.split(",")])
    assert main(["replay", "--traces", str(traces), "--compare", names]) == 0
    assert "side by side" in capsys.readouterr().out


def test_sets_are_those_of_a_hand_count() -> None:
    spans = tuple(
        Scored(problem, 0, chain, 0, score, None, None, False)
        for problem, scores in (("a", [0.1, 0.9, 0.5]), ("b", [0.3, 0.2]))
        for chain, score in enumerate(scores)
    )
    found = figures(Replay(spans, np.array([True, True, False, False, True]), np.zeros(5)), 0.4)
    assert (found["coverage"], found["set_size"]) == (0.5, 1.5)
    assert found["problem_off"] == pytest.approx((abs(2 / 3 - 0.4) + 0.1) / 2)
