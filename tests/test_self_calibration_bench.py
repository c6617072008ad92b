"""bench.self_calibration: its figures by hand, its labels and loss, and a draft that it tuned on the engine."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from atts_engine import ATTSParams, Engine, EngineConfig, Problem
from atts_engine.evaluation.registers import heldout
from bench import self_calibration as bench
from bench.self_calibration import Example, Written


def chain(answer: str | None, text: str = "b = 7", right: bool = False) -> Written:
    return Written(0, (bench.BOS, *bench.encode("Q: a = 3; b = a+4; b?\n\n")), tuple(bench.encode(text)), answer, right)


def test_calibration_figures_by_hand() -> None:
    sure, right = np.array([0.95, 0.85, 0.25, 0.21]), np.array([1.0, 0.0, 0.0, 1.0])
    assert bench.brier(sure, right) == pytest.approx((0.05**2 + 0.85**2 + 0.25**2 + 0.79**2) / 4)
    # One chain in each of the two upper bins, two in the bin from 0.2 to 0.3.
    assert bench.expected_calibration_error(sure, right) == pytest.approx((0.05 + 0.85 + 2 * abs(0.5 - 0.23)) / 4)
    assert bench.auc(sure, right) == 0.5
    assert bench.auc(np.array([0.5, 0.5, 0.1]), np.array([1.0, 0.0, 0.0])) == 0.75
    assert np.isnan(bench.auc(sure, np.ones(4)))
    rng = np.random.default_rng(0)
    sure, right = rng.random(200).round(1), (rng.random(200) < 0.4).astype(float)
    wins = stats.mannwhitneyu(sure[right > 0], sure[right == 0]).statistic
    assert bench.auc(sure, right) == pytest.approx(wins / (right.sum() * (200 - right.sum())))


def test_an_interval_covers_a_mean() -> None:
    """200 problems, half of them right: the normal interval is +- 0.069, its bootstrap within a fifth of that."""
    right = np.arange(200) % 2.0
    found = bench.interval(lambda rows: float(right[rows].mean()), 200, seed=0)
    assert found["mean"] == 0.5
    assert found["high"] - 0.5 == pytest.approx(0.0693, rel=0.2)
    assert 0.5 - found["low"] == pytest.approx(0.0693, rel=0.2)


def test_labels_are_soft_self_consistency_of_each_problem() -> None:
    chains = [chain("7"), chain("8"), chain("7"), chain(None), chain("5"), chain("5")]
    labels = [e.label for e in bench.labelled(chains, np.array([0.3, 0.5, 0.2, 0.9, 0.1, 0.2]), 3)]
    assert labels == pytest.approx([0.5, 0.5, 0.5, 0.0, 1.0, 1.0])


def test_loss_is_that_of_yes_and_of_texts_with_a_high_label() -> None:
    """The terms from plain log-softmax, one row at a time and without padding."""
    model = bench.load_exported(bench.DRAFT)
    batch = [Example(chain("7"), 0.9), Example(chain("8", "b = 3+4 = 8\n\n\\boxed{8}"), 0.4)]
    sure, nll = [], []
    for example in batch:
        with torch.no_grad():
            told = model(torch.tensor([example.chain.asked]))[0][0].log_softmax(-1)
        sure.append(float(told[-1, bench.YES].exp()))
        if example.label > 0.75:
            text, begin = [*example.chain.text, bench.EOS], len(example.chain.prompt)
            nll += [-float(told[begin - 1 + i, t]) for i, t in enumerate(text)]
    gaps = [abs(e.label - c) for e, c in zip(batch, sure, strict=True)]
    smooth = [g - 0.125 if g >= 0.25 else 2 * g * g for g in gaps]
    expected = sum(smooth) / 2 + sum(nll) / len(nll)
    assert bench.loss_of(model, batch, opening=False).item() == pytest.approx(expected, rel=1e-4)
    assert bench.confidences(model, [e.chain for e in batch]) == pytest.approx(sure, rel=1e-4)


def test_a_tuned_draft_says_on_the_engine_what_it_says_in_training(tmp_path: Path) -> None:
    out, folder = tmp_path / "figures.json", tmp_path / "draft"
    small = ["--train", "6", "--held-out", "4", "--chains", "4", "--steps", "12", "--batch", "8"]
    assert bench.main([*small, "--out", str(out), "--save", str(folder)]) == 0
    figures = json.loads(out.read_text(encoding="utf-8"))
    assert figures["strategies"].keys() >= {"self-consistency", "sc-conf", "asc-conf", "early-stop-bon"}
    assert figures["calibration"].keys() == {"likelihood", "before", "after"}

    found = heldout(1, 9, (4, 5))[0]
    params = ATTSParams(chains=3, turns=8, draft_tokens=12, target_tokens=12, strategy="sc-conf",
        options=(("author", "draft"),))  # fmt: skip
    with Engine(EngineConfig(str(folder), "tiny-target", kv_tokens=4096, prompt="{problem}")) as engine:
        solution = engine.solve(Problem(found.id, found.problem, found.answer), params)
    asked = [c for c in solution.chains if c.final_answer is not None]
    prompt = (bench.BOS, *bench.encode(f"Q: {found.problem}\n\n"))
    written = [Written(0, prompt, tuple(bench.encode(c.turns[0].draft)), c.final_answer, False) for c in asked]
    assert asked
    assert [c.extra["confidence"] for c in asked] == pytest.approx(
        bench.confidences(bench.load_exported(folder), written).tolist(), rel=1e-3
    )
