"""Calibration on disk: the same to the bit, or refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atts_engine.conformal import (
    LEVEL_ONE,
    ONLINE_CALIBRATORS,
    Adaptive,
    Calibrator,
    ColdStart,
    Meta,
    Mondrian,
    Ruling,
    Split,
    StateError,
    load_calibrator,
    make_calibrator,
)
from atts_engine.conformal.state import load_state, save_state

META = Meta(draft="d0", target="t0", prompt="p0", draft_tokens=24, temperature=0.8)


def _filled(capacity: int = 8, n: int = 21) -> Mondrian:
    rng = np.random.default_rng(0)
    calibrator = Mondrian(0.4, keys=3, capacity=capacity, meta=META)
    for i, score in enumerate(rng.normal(size=n).tolist()):
        calibrator.observe(score, i % 2)
    return calibrator


def test_save_and_load_leave_everything_as_it_was(tmp_path: Path) -> None:
    calibrator = _filled()
    path = tmp_path / "state.npz"
    calibrator.save(path)
    loaded = Mondrian.load(path, META)
    assert loaded.store.same_as(calibrator.store)
    assert (loaded.alpha, loaded.alpha_level, loaded.frozen) == (0.4, calibrator.alpha_level, False)
    assert loaded.meta == Meta(**{**_fields(META), "alpha": 0.4, "keys": 3})
    assert [p.name for p in tmp_path.iterdir()] == ["state.npz"]
    for step, score in enumerate(np.random.default_rng(1).normal(size=50).tolist()):
        for key in range(3):
            assert loaded.p_value(score, key, step + 1) == calibrator.p_value(score, key, step + 1)
        loaded.observe(score, step % 3)
        calibrator.observe(score, step % 3)


def _fields(meta: Meta) -> dict[str, Any]:
    return {name: getattr(meta, name) for name in Meta.__slots__}


def test_frozen_and_kind_come_back(tmp_path: Path) -> None:
    path = tmp_path / "state.npz"
    Split(0.25).save(path)
    loaded = load_calibrator(path, frozen=True)
    assert isinstance(loaded, Split)
    assert loaded.frozen
    assert loaded.alpha == 0.25
    with pytest.raises(StateError, match="'split', not of 'mondrian'"):
        Mondrian.load(path)


@given(st.permutations([0.5, 0.25, 0.5, -1.0, 2.0, 0.125]), st.integers(1, LEVEL_ONE))
def test_order_within_the_window_does_not_matter(scores: list[float], u: int) -> None:
    calibrator, ordered = Mondrian(0.4, capacity=6), Mondrian(0.4, capacity=6)
    for score, other in zip(scores, sorted(scores), strict=True):
        calibrator.observe(score, 0)
        ordered.observe(other, 0)
    for score in (0.5, 0.3, 3.0):
        assert calibrator.p_value(score, 0, u) == ordered.p_value(score, 0, u)


def test_other_conditions_are_refused_and_each_named(tmp_path: Path) -> None:
    path = tmp_path / "state.npz"
    _filled().save(path)
    other = Meta(draft="d0", target="t1", prompt="p0", draft_tokens=500, temperature=0.8, alpha=0.3)
    with pytest.raises(StateError) as caught:
        load_calibrator(path, other)
    message = str(caught.value)
    assert "target: is 't0', expected 't1'" in message
    assert "draft_tokens: is 24, expected 500" in message
    assert "alpha: is 0.4, expected 0.3" in message
    assert "prompt" not in message
    assert "\n" not in message
    with pytest.raises(StateError, match="score: is 'mean-nll', expected 'per-byte'"):
        load_calibrator(path, Meta(score="per-byte"))


def test_missing_foreign_and_corrupt_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.npz"
    with pytest.raises(StateError, match="no calibration file at"):
        load_calibrator(path)
    with pytest.raises(StateError, match="not a calibration file"):
        load_calibrator(tmp_path)
    for content in (b"", b"hello", b"PK\x03\x04 broken"):
        path.write_bytes(content)
        with pytest.raises(StateError, match="not a calibration file"):
            load_calibrator(path)
    np.save(tmp_path / "array.npy", np.ones(3))
    with pytest.raises(StateError, match="not a calibration file"):
        load_calibrator(tmp_path / "array.npy")
    np.savez(path, ring=np.ones(3))
    with pytest.raises(StateError, match="it holds no meta"):
        load_calibrator(path)
    _filled().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StateError, match="not a calibration file"):
        load_calibrator(path)


def _forged(path: Path, **changes: np.ndarray) -> None:
    """The file with other arrays and a sha256 that fits them, as a foreign writer might make it."""
    state = load_state(path)
    save_state(path, state.calibrator, state.options, {**state.arrays, **changes}, state.meta)


def test_tampered_contents_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.npz"
    _filled().save(path)
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    record = json.loads(str(arrays["meta"]))
    changed = arrays["ring"].copy()
    changed[0, 0] += 1
    for name, array, reason in (
        ("ring", changed, "do not match their sha256"),
        ("size", np.array([3, 3, 3]), "do not match their sha256"),
        ("meta", np.array(json.dumps({**record, "draft": "another"})), "sha256"),
        ("meta", np.array(json.dumps({**record, "options": {}})), "sha256"),
        ("meta", np.array(json.dumps({**record, "options": 3})), "options"),
        ("meta", np.array(json.dumps({**record, "format": "atts-calibration/9"})), "format"),
    ):
        np.savez(path, **{**arrays, name: array})
        with pytest.raises(StateError, match=reason):
            load_calibrator(path)


def test_arrays_that_do_not_fit_are_refused_though_their_hash_does(tmp_path: Path) -> None:
    path = tmp_path / "state.npz"
    ring = _filled().arrays()["ring"]
    nan = ring.copy()
    nan[0, 0] = np.nan
    for name, array, reason in (
        ("ring", ring.astype(np.float64), "wrong shapes or types"),
        ("ring", ring[:, :5], "wrong shapes or types"),
        ("ring", nan, "not finite"),
        ("head", np.full(3, 8), "outside its ring"),
        ("size", np.array([9, 0, 0]), "outside its ring"),
        ("size", np.zeros(2, dtype=np.int64), "wrong shapes or types"),
    ):
        _filled().save(path)
        _forged(path, **{name: array})
        with pytest.raises(StateError, match=f"corrupt: .*{reason}"):
            load_calibrator(path)
    Adaptive(0.4, keys=3).save(path)
    for name, array, reason in (
        ("taken", np.full(3, 2), "more takeovers than decisions"),
        ("decided", np.zeros(4, dtype=np.int64), "wrong shapes or types"),
    ):
        Adaptive(0.4, keys=3).save(path)
        _forged(path, **{name: array})
        with pytest.raises(StateError, match=reason):
            load_calibrator(path)


@pytest.mark.parametrize("name", ONLINE_CALIBRATORS)
@pytest.mark.parametrize("cold", [None, ColdStart("accept", 3), ColdStart("coin", 5)])
def test_every_calibrator_goes_on_after_a_save_as_if_nothing_had_been(
    tmp_path: Path, name: str, cold: ColdStart | None
) -> None:
    path = tmp_path / "state.npz"
    rng = np.random.default_rng(3)
    whole = make_calibrator(name, 0.3, cold=cold, meta=META, capacity=16)

    def step(calibrator: Calibrator, score: float, turn: int, u: int, problem: str) -> Ruling:
        key = calibrator.key_of(turn)
        ruling = calibrator.decide(score, key, u, problem)
        calibrator.observe(score, key, ruling.takeover, problem, ruling.assessment.p_value)
        return ruling

    arrivals = [
        (float(rng.normal()), int(rng.integers(4)), int(rng.integers(1, LEVEL_ONE)), f"p{i // 8}") for i in range(160)
    ]
    for arrival in arrivals[:80]:
        step(whole, *arrival)
    whole.save(path)
    resumed = load_calibrator(path, META)
    assert type(resumed) is type(whole)
    assert resumed.options() == whole.options()
    for arrival in arrivals[80:]:
        assert step(resumed, *arrival) == step(whole, *arrival)
    frozen = load_calibrator(path, META, frozen=True)
    before = frozen.arrays()
    for arrival in arrivals[80:]:
        step(frozen, *arrival)
    assert all(np.array_equal(before[k], v, equal_nan=True) for k, v in frozen.arrays().items())


def test_pickled_contents_are_never_loaded(tmp_path: Path) -> None:
    path = tmp_path / "state.npz"
    np.savez(path, ring=np.array([{}]), size=np.zeros(1), head=np.zeros(1), meta=np.array("{}"))
    with pytest.raises(StateError, match="not a calibration file"):
        load_calibrator(path)
