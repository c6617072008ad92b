"""The wrapper that watches p-values: same verdicts, alarms where scores drift."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest

from atts_engine.conformal import (
    LEVEL_ONE,
    ONLINE_CALIBRATORS,
    Alarm,
    CalibrationError,
    Calibrator,
    Mondrian,
    Monitored,
    Ruling,
    load_calibrator,
    make_calibrator,
)


def _stream(calibrator: Calibrator, scores: np.ndarray, seed: int = 0) -> list[Ruling]:
    rng = np.random.default_rng(seed)
    rulings = []
    for i, score in enumerate(scores.tolist()):
        ruling = calibrator.decide(score, 0, int(rng.integers(1, LEVEL_ONE)), f"p{i // 4}")
        calibrator.observe(score, 0, ruling.takeover, f"p{i // 4}", ruling.assessment.p_value)
        rulings.append(ruling)
    return rulings


@pytest.mark.parametrize("name", ONLINE_CALIBRATORS)
def test_verdicts_and_file_are_those_of_the_calibrator_inside(name: str, tmp_path: Path) -> None:
    scores = np.random.default_rng(1).normal(size=120)
    plain, watched = make_calibrator(name, 0.4), Monitored(make_calibrator(name, 0.4))
    assert _stream(watched, scores) == _stream(plain, scores)
    watched.save(tmp_path / "state.npz")
    loaded = load_calibrator(tmp_path / "state.npz")
    assert type(loaded) is type(plain)
    assert watched.name == name
    assert watched.on_device == plain.on_device
    assert watched.p_values([0.1, 0.2], [0, 0]).tolist() == plain.p_values([0.1, 0.2], [0, 0]).tolist()
    with pytest.raises(CalibrationError, match="wrap it anew"):
        watched.restore(watched.arrays())


def test_a_shift_raises_an_alarm_and_steady_scores_do_not() -> None:
    rng = np.random.default_rng(2)
    heard: list[Alarm] = []
    watched = Monitored(Mondrian(0.4), on_alarm=heard.append)
    _stream(watched, rng.normal(size=1500))
    assert heard == []
    _stream(watched, rng.normal(1.0, size=400))
    assert heard
    assert heard == watched.alarms
    assert 1500 < heard[0].decision <= 1900
    assert heard[0].log10_martingale >= 2.0
    assert "scores drift: at decision" in str(heard[0])


def test_a_frozen_calibration_is_watched_too() -> None:
    rng = np.random.default_rng(3)
    calibrator = Mondrian(0.4)
    for score in rng.normal(size=4000).tolist():
        calibrator.observe(score, 0)
    calibrator.frozen = True
    watched = Monitored(calibrator)
    _stream(watched, rng.normal(0.7, size=300))
    assert watched.alarms
    assert calibrator.filled(0) == 4000


def test_a_copy_for_replaying_a_log_raises_no_alarm() -> None:
    heard: list[Alarm] = []
    watched = Monitored(Mondrian(0.4), on_alarm=heard.append)
    _stream(watched, np.random.default_rng(4).normal(size=50))
    twin = deepcopy(watched)
    assert isinstance(twin, Mondrian)
    _stream(twin, np.arange(500.0))
    assert heard == []
    assert watched.filled(0) == 50
