"""`atts simulate`: figures, sweeps, seeds, fits, and one line for bad input."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from atts_engine.cli.main import main
from atts_engine.evaluation.lanes import COUNTED, TIMED
from atts_engine.evaluation.simulation import LaneModel, LinearCost, Machine, Rules, TurnWork, simulate
from atts_engine.evaluation.simulation.catalogue import DEVICES, MODELS, device_named
from atts_engine.evaluation.simulation.cost import Efficiency
from atts_engine.evaluation.simulation.figures import dominated_at, figures
from atts_engine.evaluation.simulation.placement import Half, place_shared, place_split
from atts_engine.evaluation.simulation.work import alone, load_turns, tokens_of
from bench import simulate_pair

SMALL = [
    "simulate",
    "--draft",
    "qwen2.5-1.5b",
    "--target",
    "qwen2.5-14b",
    "--problems",
    "2",
    "--chains",
    "2",
    "--turns",
    "2",
]


def told(capsys: pytest.CaptureFixture[str], *more: str, base: Sequence[str] = SMALL) -> dict[str, Any]:
    assert main([*base, *more, "--json", "-"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def fails(capsys: pytest.CaptureFixture[str], argv: Sequence[str]) -> str:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_figures_of_every_strategy(capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, "--gpus", "2", "--price-per-hour", "3.6")
    assert found["simulated"] is True
    assert found["device"]["source"] == DEVICES["h100"].source
    (point,) = found["points"]
    cells = point["strategies"]
    assert list(cells) == ["atts", "atts-sync", "target", "draft"]
    for name, cell in cells.items():
        assert sum(cell["tokens"].values()) == point["tokens"]
        assert cell["tokens_per_s"]["all"] == pytest.approx(point["tokens"] / cell["wall_s"])
        assert cell["latency_s"]["p50"] <= cell["latency_s"]["p99"] <= cell["wall_s"] + 1e-9
        assert cell["cost"] == pytest.approx(2 * cell["wall_s"] / 1000)
        time = cell["chain_time"]
        assert time["draft"] + time["verify"] + time["barrier"] + time["target"] == pytest.approx(1.0)
        assert (time["barrier"] > 0) is (name == "atts-sync")
        for lane in cell["lanes"].values():
            assert lane["r"] == pytest.approx(lane["T_c"] / (lane["T_m"] + lane["T_s"]))
            assert 0 < lane["busy_share"] <= 1
            assert lane["peak_kv_tokens"] <= lane["kv_room_tokens"]
    assert set(cells["draft"]["lanes"]) == {"draft"}
    assert cells["draft"]["tokens"]["target"] == 0


def test_without_a_price_there_is_no_cost(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--gpus", "2"]) == 0
    assert "cost" not in capsys.readouterr().out
    assert told(capsys, "--gpus", "2")["points"][0]["strategies"]["atts"]["cost"] is None


def test_the_seed_decides(capsys: pytest.CaptureFixture[str]) -> None:
    one, same, other = (told(capsys, "--seed", seed) for seed in ("1", "1", "2"))
    assert one == same
    assert one["points"] != other["points"]


def test_a_sweep_marks_what_does_not_fit_and_draws(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = told(capsys, "--target", "llama-3.1-70b", "--gpus", "2,4,8", "--out", str(tmp_path / "out"))
    by_gpus = {point["gpus"]: point["strategies"] for point in found["points"]}
    assert "needs 4 GPUs" in by_gpus[2]["target"]["does_not_fit"]
    assert "wall_s" in by_gpus[2]["draft"]
    assert by_gpus[4]["atts"]["placement"]["shared"] is True
    assert by_gpus[8]["atts"]["placement"]["shared"] is False
    saved = json.loads((tmp_path / "out" / "simulate.json").read_text())
    assert saved == found
    assert (tmp_path / "out" / "simulate.png").read_bytes().startswith(b"\x89PNG")


def test_chains_sweep_and_no_less_work_with_more_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, "--chains", "1,2,4", "--gpus", "2")
    assert found["axis"] == "chains"
    times = [point["strategies"]["atts"]["wall_s"] for point in found["points"]]
    assert times == sorted(times)
    alone_ = found["points"][0]["strategies"]
    assert alone_["atts"]["wall_s"] == alone_["atts-sync"]["wall_s"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--gpus", "0"], "--gpus must be a number of 1 or more"),
        (["--gpus", "8,x"], "--gpus must be a number of 1 or more"),
        (["--gpus", "8,16", "--chains", "1,2"], "one sweep at a time: --gpus and --chains"),
        (["--draft", "qwen3"], "no model 'qwen3'"),
        (["--device", "tpu"], "no device 'tpu'"),
        (["--device", "nowhere.json"], "nowhere.json is missing"),
        (["--strategies", "best"], "no strategy 'best'"),
        (["--problems", "0"], "--problems must be 1 or more"),
        (["--concurrency", "0"], "--concurrency must be 1 or more"),
        (["--price-per-hour", "0"], "--price-per-hour must be above 0"),
        (["--compute-efficiency", "1.5"], "the compute efficiency must be in (0, 1]"),
        (["--memory-fraction", "0"], "the share of the memory must be in (0, 1]"),
        (["--hop-us", "-1"], "--hop-us and --prompt-tokens must be 0 or more"),
        (["--target-tp", "16"], "split over 8 GPUs at most"),
        (["--target-tp", "3"], "40 attention heads cannot be split over 3 GPUs"),
        (
            ["--gpus", "4", "--draft-gpus", "4", "--target-gpus", "4", "--strategies", "atts"],
            "4 GPUs for qwen2.5-1.5b and 4 for qwen2.5-14b: of 4, they need 1 and 1",
        ),
        (["--target", "llama-3.1-70b", "--gpus", "1", "--strategies", "atts"], "need 4 GPUs or more, not 1"),
        (
            ["--target", "qwen2.5-72b", "--device", "l40s", "--target-tp", "1", "--strategies", "target"],
            "the weights of qwen2.5-72b leave no memory for KV on 1 GPUs of l40s",
        ),
        (["--traces", "nowhere.jsonl"], "no such file"),
        (["--fit", "nowhere", "nowhere"], "summary.json is missing"),
        (["--lanes", "nowhere.json"], "nowhere.json is missing"),
    ],
)
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], flags: list[str], said: str) -> None:
    assert said in fails(capsys, [*SMALL, *flags])


def test_a_model_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--target is missing" in fails(capsys, ["simulate", "--draft", "qwen2.5-7b"])


def test_devices_and_models_from_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    device = {"name": "x", "flop_s": 1e15, "bytes_s": 4e12, "memory_bytes": 9e10, "link_bytes_s": 1e11}
    file = tmp_path / "x.json"
    file.write_text(json.dumps(device))
    assert (device_named(str(file)).bytes_s, device_named(str(file)).source) == (4e12, str(file))
    file.write_text(json.dumps(device | {"bytes_s": "fast"}))
    assert "bytes_s must be a number above 0, not 'fast'" in fails(capsys, [*SMALL, "--device", str(file)])
    tiny = Path(__file__).parent.parent / "atts_engine" / "models" / "builtin" / "tiny_draft"
    assert told(capsys, "--draft", str(tiny))["pair"]["draft"] == str(tiny)


def trace(path: Path, *, tokens: bool) -> Path:
    turn: dict[str, Any] = {
        "turn": 0,
        "draft": "x" * 60,
        "ppl": 1.5,
        "percentile": None,
        "takeover": True,
        "target": "y" * 30,
    }
    if tokens:
        turn |= {"draft_tokens": 7, "target_tokens": 5}
    chain = {"problem_id": "p", "problem_index": 0, "chain": 0, "gold": None, "final_answer": None, "duration_s": 1.0}
    path.write_text(json.dumps(chain | {"turns": [turn]}) + "\n")
    return path


@pytest.mark.parametrize(("tokens", "drafted", "written"), [(True, 7, 5), (False, 20, 10)])
def test_a_trace_is_simulated_as_it_was_recorded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tokens: bool, drafted: int, written: int
) -> None:
    pair = ["simulate", "--draft", "qwen2.5-1.5b", "--target", "qwen2.5-14b", "--strategies", "atts"]
    found = told(capsys, "--traces", str(trace(tmp_path / "t.jsonl", tokens=tokens)), base=pair)
    assert found["tokens_estimated"] is not tokens
    (point,) = found["points"]
    assert (point["problems"], point["chains"]) == (1, 1)
    assert point["strategies"]["atts"]["tokens"] == {"draft": drafted, "target": written}
    said = fails(capsys, [*pair, "--traces", str(tmp_path / "t.jsonl"), "--chains", "2"])
    assert "a problem of the recording has 1 chains, not 2: add --problems" in said


def run_folder(path: Path, chains: int, costs: dict[str, LinearCost]) -> Path:
    """A folder as `atts run` leaves it, of lanes whose steps take what `costs` says."""
    path.mkdir()
    job = [[[TurnWork(24, 24 * (c % 2)), TurnWork(8 + c)] for c in range(chains)] for _ in range(3)]
    machine = Machine(LaneModel(costs["draft"]), LaneModel(costs["target"]), shared=True)
    outcome = simulate(job, machine, Rules(in_flight=1, prompt_tokens=40, hop_s=200e-6))
    assert outcome.target is not None
    lanes = {}
    for name, use in (("draft", outcome.draft), ("target", outcome.target)):
        zero = dict.fromkeys((*COUNTED, *TIMED), 0.0)
        counts = zero | {"steps": use.steps, "computed_tokens": use.computed, "distinct_tokens": use.computed}
        lanes[name] = counts | {"time_s": zero | {"pass": 0.9 * use.busy_s, "commit": 0.1 * use.busy_s}}
    summary = {"strategy": "atts", "chains_per_problem": chains, "wall_s": outcome.seconds, "restored_chains": 0}
    (path / "summary.json").write_text(json.dumps(summary | {"lanes": lanes}))
    with (path / "chains.jsonl").open("w") as file:
        for p, problem in enumerate(job):
            for c, turns in enumerate(problem):
                record = {"problem_id": f"p{p}", "problem_index": p, "chain": c, "gold": None, "final_answer": None}
                spans = [
                    {"turn": i, "draft": "d", "ppl": 1.1, "percentile": None, "takeover": w.target > 0,
                     "target": "t" if w.target else None, "draft_tokens": w.draft, "target_tokens": w.target}
                    for i, w in enumerate(turns)
                ]  # fmt: skip
                file.write(json.dumps(record | {"duration_s": 1.0, "turns": spans}) + "\n")
    return path


COSTS = {"draft": LinearCost(3e-3, 1e-4), "target": LinearCost(5e-3, 2e-4)}


def test_a_fit_finds_the_lanes_that_made_the_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    runs = [run_folder(tmp_path / f"run{n}", n, COSTS) for n in (4, 16, 8)]
    words = ["simulate", "--fit", str(runs[0]), str(runs[1]), "--concurrency", "1", "--strategies", "atts"]
    found = told(capsys, "--traces", str(runs[2] / "chains.jsonl"), base=words)
    for name, cost in COSTS.items():
        lane = found["fit"]["lanes"][name]
        assert (lane["base_s"], lane["row_s"]) == pytest.approx((cost.base_s, cost.row_s))
    assert found["fit"]["prompt_tokens"] == 40
    assert [run["chains"] for run in found["runs"]] == [4, 16]
    assert all(abs(run["error"]) < 1e-9 for run in found["runs"])
    measured = json.loads((runs[2] / "summary.json").read_text())["wall_s"]
    assert found["points"][0]["strategies"]["atts"]["wall_s"] == pytest.approx(measured)
    # What --json wrote is a file for --lanes.
    (tmp_path / "fit.json").write_text(json.dumps(found))
    again = told(
        capsys,
        *("--traces", str(runs[2] / "chains.jsonl"), "--concurrency", "1", "--strategies", "atts"),
        base=["simulate", "--lanes", str(tmp_path / "fit.json")],
    )
    assert again["points"] == found["points"]


def test_runs_that_cannot_be_fitted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    four = run_folder(tmp_path / "run", 4, COSTS)
    assert "two runs or more" in fails(capsys, ["simulate", "--fit", str(four)])
    assert "the same rows a step" in fails(capsys, ["simulate", "--fit", str(four), str(four)])
    assert "leave --lanes, --draft and --target out" in fails(capsys, [*SMALL, "--fit", str(four), str(four)])
    summary = json.loads((four / "summary.json").read_text())
    for change, said in (
        ({"strategy": "draft"}, "is a run of 'draft'"),
        ({"restored_chains": 3}, "was resumed"),
        ({"lanes": {}}, "does not hold the lanes"),
        ({"wall_s": 0.6 * summary["wall_s"]}, "worked side by side"),
    ):
        (four / "summary.json").write_text(json.dumps(summary | change))
        assert said in fails(capsys, ["simulate", "--fit", str(four), str(four)])


def test_measured_steps_take_the_place_of_computed_ones(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "steps.json"

    def write(**lanes: Any) -> None:
        file.write_text(json.dumps({"format": "atts-lanes/1", "lanes": lanes}))

    flags = (
        "--lanes",
        str(file),
        "--strategies",
        "target",
        "--gpus",
        "1",
        "--concurrency",
        "1",
        "--chains",
        "1",
        "--hop-us",
        "0",
    )
    write(target={"rows": [1, 1000], "seconds": [0.5, 0.5]})
    found = told(capsys, *flags)["points"][0]
    # One step for every token and one for each of the two prompts.
    assert found["strategies"]["target"]["wall_s"] == pytest.approx(0.5 * (found["tokens"] + 2))
    for lane, said in (
        ({"rows": [1], "seconds": [0.5]}, "two or more rising numbers of rows"),
        ({"base_s": -1}, "is no number of 0 or more"),
        ({"rows": [1, 2]}, "must have base_s and row_s, or rows and seconds"),
        ({"base_s": 1}, "needs rows and seconds, not a fitted line"),
    ):
        write(target=lane)
        assert said in fails(capsys, [*SMALL, *flags])
    write(judge={"base_s": 1})
    assert "no lane 'judge'" in fails(capsys, [*SMALL, *flags])
    file.write_text("{}")
    assert "holds no lanes" in fails(capsys, [*SMALL, *flags])
    write(draft={"base_s": 1}, target={"base_s": 1})
    assert "--gpus needs --draft and --target" in fails(capsys, ["simulate", "--lanes", str(file), "--gpus", "2"])


def half(name: str, tp: int | None = None) -> Half:
    return Half.of(name, MODELS[name], DEVICES["h100"], Efficiency(), tp=tp)


def test_where_lanes_are_placed() -> None:
    draft, target = half("qwen2.5-1.5b"), half("llama-3.1-70b")
    # 141 GB of weights: 2 GPUs of 72 usable GB are full, 4 are half full.
    assert (draft.tp, target.tp) == (1, 4)
    weights = 2 * 70.55e9 / 4
    lane = target.lane(13, 2048)
    assert lane.replicas == 3
    assert lane.kv_tokens == pytest.approx((72e9 - weights) / (2 * 80 * 2 * 128 * 2), rel=1e-3)
    job = load_turns().job
    split = place_split(draft, target, 16, 2048, job, None, draft_gpus=3)
    assert (split.draft_gpus, split.target_gpus, split.unused) == (3, 12, 1)
    shared = place_shared(draft, target, 9, 2048)
    assert (shared.machine.shared, shared.draft_gpus, shared.unused) == (True, 8, 1)
    assert shared.machine.target is not None
    assert shared.machine.draft.kv_tokens == pytest.approx(shared.machine.target.kv_tokens, abs=1)
    # The chosen split is no worse than its neighbours by the rule that chose it, and that is what more GPUs are for.
    chosen = [place_split(draft, target, n, 2048, job, None) for n in (8, 64)]
    assert chosen[1].target_gpus > chosen[0].target_gpus


def test_where_synchronisation_dominates_by_hand() -> None:
    # Two chains, one of which is taken over for 40 steps of 1 s and then drafts 1 token, as the other does: that one
    # waits about as long as it computes twenty times over.
    job = [[[TurnWork(1, 40), TurnWork(1)], [TurnWork(1), TurnWork(1)]]]
    machine = Machine(LaneModel(LinearCost(0.1)), LaneModel(LinearCost(1.0)))
    cells = {}
    for name, scope in (("atts", "none"), ("atts-sync", "problem")):
        outcome = simulate(job, machine, Rules(scope))  # type: ignore[arg-type]
        cells[name] = figures(outcome, name, machine, None, None)
    assert cells["atts"]["synchronisation_dominates"] == {"chains": False, "draft": None, "target": None}
    # Of chain 1's 44.2 s, some 41 are at the barrier; chain 0 computes all the time.
    assert 0.4 < cells["atts-sync"]["chain_time"]["barrier"] < 0.5
    long = [[[TurnWork(1, 40), TurnWork(1)], *[[TurnWork(1), TurnWork(1)]] * 3]]
    outcome = simulate(long, machine, Rules("problem"))
    wide = figures(outcome, "atts-sync", machine, None, None)
    assert wide["synchronisation_dominates"]["chains"] is True
    points = [
        {"chains": 4, "strategies": {"atts-sync": wide}},
        {"chains": 2, "strategies": {"atts-sync": cells["atts-sync"]}},
    ]
    assert dominated_at(points, "chains") == {"atts-sync": {"chains": [4], "draft": [], "target": []}}
    assert tokens_of(alone(job)) == (sum(tokens_of(job)), 0)


def test_the_page_says_what_the_file_says() -> None:
    record = json.loads(simulate_pair.OUT.read_text(encoding="utf-8"))
    page = simulate_pair.PAGE.read_text(encoding="utf-8")
    assert simulate_pair.written(page, record) == page
