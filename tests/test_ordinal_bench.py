"""The benchmark of early verdicts, on synthetic traces whose law is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atts_engine.conformal.ordinal import SET_METHODS
from atts_engine.errors import InputError
from bench.early_spans import Span, read_spans, rows_of, split, turn_groups
from bench.early_verdicts import figures, main, study, table


def write_traces(
    path: Path, problems: int, *, seed: int = 0, chains: int = 4, turns: int = 2, gold: bool = True, chunks: bool = True
) -> Path:
    """Spans of up to 64 tokens, whose per-token NLL mean is their own; a worse one makes a wrong answer likelier."""
    rng = np.random.default_rng(seed)
    with path.open("w", encoding="utf-8") as file:
        for problem in range(problems):
            hard = rng.normal(scale=0.3)
            for chain in range(chains):
                own = hard + rng.normal(scale=0.5, size=turns)
                wrong = bool(own.mean() + rng.normal(scale=0.5) > 0.4)
                record: dict[str, Any] = {"problem_id": f"p{problem}", "problem_index": problem, "chain": chain}
                record |= {"gold": "7" if gold else None, "final_answer": "8" if wrong else "7", "duration_s": 1.0}
                record["turns"] = [_turn(rng, turn, own[turn], chunks) for turn in range(turns)]
                file.write(json.dumps(record) + "\n")
    return path


def _turn(rng: np.random.Generator, turn: int, mean: float, chunks: bool) -> dict[str, Any]:
    length = int(rng.integers(40, 65))
    nll, draft = (np.exp(0.5 * mean + rng.normal(scale=s, size=length)) for s in (0.8, 1.5))
    ends = [*range(16, length, 16), length]
    running = [{"n": n, "score": float(nll[:n].mean()), "draft_score": float(draft[:n].mean())} for n in ends]
    record = {"turn": turn, "draft": "", "ppl": float(np.exp(nll.mean())), "percentile": None, "takeover": False}
    return record | {"target": None, "score": float(nll.mean())} | ({"chunks": running} if chunks else {})


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = write_traces(tmp_path_factory.mktemp("traces") / "chains.jsonl", 300)
    return study(read_spans([path]), alpha=0.4, miscoverage=0.1, bins=5, seed=0, sees="both")


def test_every_method_has_its_figures(record: dict[str, Any]) -> None:
    assert record["parts"] == {p: {"problems": 100, "spans": 800} for p in ("fitting", "calibration", "test")}
    assert record["turn_groups"] == 2
    for kind in ("score", "wrong"):
        cell = record["labels"][kind]
        assert cell["test_spans"] == 800 and abs(cell["takeover_share"] - 0.4) < 0.1
        for mode in ("spans", "prefix"):
            assert tuple(cell[mode]) == SET_METHODS
            for f in cell[mode].values():
                # 800 clustered spans; the exact laws are tested on the sets themselves.
                assert f["coverage"] > 0.83
                assert 1.0 <= f["mean_set_size"] <= cell["classes"]
                assert f["draft_tokens_not_written"] <= f["target_tokens_not_verified"]
        for f in cell["spans"].values():
            assert f["coverage_at_every_prefix"] > 0.83
    score = record["labels"]["score"]
    for f in score["spans"].values():
        # A settled verdict is wrong only if the label is outside of a set.
        assert f["verdicts_changed"] <= 1 - f["coverage_at_every_prefix"] + 1e-12
        assert f["settled_early"] > 0.1
    top = score["none"]["most-probable"]
    assert top["settled_early"] == 1.0 and top["mean_set_size"] == 1.0
    assert top["verdicts_changed"] > max(f["verdicts_changed"] for f in score["spans"].values())
    assert json.dumps(record, allow_nan=False)
    assert table(record).count("| eraps |") == 4


def test_no_problem_is_in_two_parts(tmp_path: Path) -> None:
    spans = read_spans([write_traces(tmp_path / "a.jsonl", 9), write_traces(tmp_path / "b.jsonl", 14, seed=1)])
    parts = split(spans, 3)
    names = [{span.problem for span in part} for part in parts]
    assert sum(map(len, names)) == 14 and set().union(*names) == {f"p{i}" for i in range(14)}
    assert sum(map(len, parts)) == len(spans)
    assert split(spans, 3) == parts and split(spans, 4) != parts


def test_thin_turns_are_put_together() -> None:
    def spans(*counts: int) -> list[Span]:
        return [Span("p", turn, (8,), (1.0,), (1.0,), None) for turn, n in enumerate(counts) for _ in range(n)]

    assert turn_groups([spans(150, 60, 70, 40), spans(150, 60, 70, 40, 3), spans(1, 1)]) == {
        0: 0,
        1: 1,
        2: 1,
        3: 1,
        4: 1,
    }
    assert turn_groups([spans(5), spans(5), spans(5)]) == {0: 0}


def test_tokens_are_counted_from_the_settling_prefix() -> None:
    spans = [
        Span("p", 0, (10, 20, 25), (1.0, 1.0, 1.0), (1.0, 1.0, 1.0), None),
        Span("q", 0, (10, 30), (1.0, 1.0), (1.0, 1.0), None),
        Span("q", 0, (12,), (1.0,), (1.0,), None),
    ]
    ends = np.array([0, 0, 3]), np.array([4, 2, 4])
    for sees, verified in (("both", 5 + 20), ("draft", 25 + 30)):
        rows = rows_of(spans, [1, 2, 0], {0: 0}, sees)
        assert rows.features.shape == (3, 2 if sees == "both" else 1)
        assert rows.features == pytest.approx(np.log(1.001))
        # Span 0 is kept at its second prefix, span 1 taken over at its first, which changes its verdict.
        f = figures(spans, rows, ends, 3, [False, False, True], sees)
        assert f["target_tokens_not_verified"] == verified and f["draft_tokens_not_written"] == 20
        assert f["settled_early"] == pytest.approx(2 / 3) and f["verdicts_changed"] == pytest.approx(1 / 3)
        assert f["verdicts_changed_of_settled"] == 0.5 and f["coverage"] == pytest.approx(2 / 3)
        assert f["coverage_at_every_prefix"] == pytest.approx(2 / 3) and f["mean_set_size"] == pytest.approx(10 / 3)
        assert f["target_tokens_not_verified_share"] == pytest.approx(verified / 67)


def test_the_draft_alone_saves_every_target_token_of_a_settled_span(tmp_path: Path) -> None:
    spans = read_spans([write_traces(tmp_path / "t.jsonl", 120, gold=False)])
    found = study(spans, alpha=0.4, miscoverage=0.3, bins=3, seed=1, sees="draft")
    assert list(found["labels"]) == ["score"]
    f = found["labels"]["score"]["none"]["most-probable"]
    assert f["target_tokens_not_verified_share"] == 1.0


def test_command_prints_tables_and_writes_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    traces, out = write_traces(tmp_path / "t.jsonl", 60, turns=1), tmp_path / "figures.json"
    assert main(["--traces", str(traces), "--json", str(out), "--bins", "3"]) == 0
    assert "| fixed-sequence |" in capsys.readouterr().out
    written = json.loads(out.read_text())
    assert written["settings"]["bins"] == 3 and written["provenance"]["command"].endswith("--bins 3")


def test_traces_that_cannot_serve_are_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = write_traces(tmp_path / "plain.jsonl", 5, chunks=False)
    two = write_traces(tmp_path / "two.jsonl", 2)
    good = write_traces(tmp_path / "good.jsonl", 30, turns=1, gold=False)
    for flags, message in [
        (["--traces", str(good), str(plain)], "no turn carries `chunks`"),
        (["--traces", str(two)], "3 problems or more"),
        (["--traces", str(tmp_path / "none.jsonl")], "no such file"),
        (["--traces", str(good), "--alpha", "1.5"], "alpha must lie strictly between 0 and 1"),
        (["--traces", str(good), "--miscoverage", "0"], "miscoverage must lie strictly between 0 and 1"),
        (["--traces", str(good), "--bins", "1"], "2 or more bins"),
        (["--traces", str(good), "--json", str(tmp_path / "no" / "f.json")], "no such folder"),
    ]:
        assert main(flags) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([{"n": 4, "score": 1.0, "draft_score": 1.0}, {"n": 4, "score": 1.0, "draft_score": 1.0}], "must be 1 or more"),
        ([{"n": 4, "score": None, "draft_score": 1.0}], "'score' is missing"),
        ([{"n": 4, "score": 1.0}], "'draft_score' is missing"),
        ([{"score": 1.0, "draft_score": 1.0}], "'n' must be an integer"),
        ([1.0], "must be a list of objects"),
    ],
)
def test_malformed_chunks_are_refused_with_their_line(tmp_path: Path, chunks: list[Any], message: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"problem_id": "p", "turns": [{"turn": 0, "chunks": chunks}]}) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=f"line 1, turns.*{message}"):
        read_spans([path])
