"""Calibration on disk: the same to the bit, or refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atts_engine.conformal import LEVEL_ONE, Meta, MondrianSmoothed, Split, StateError, load_calibrator

META = Meta(draft="d0", target="t0", prompt="p0", draft_tokens=24, temperature=0.8)


def _filled(capacity: int = 8, n: int = 21) -> MondrianSmoothed:
    rng = np.random.default_rng(0)
    calibrator = MondrianSmoothed(0.4, keys=3, capacity=capacity, meta=META)
    for i, score in enumerate(rng.normal(size=n).tolist()):
        calibrator.observe(score, i % 2)
    return calibrator


def test_save_and_load_leave_everything_as_it_was(tmp_path: Path) -> None:
    calibrator = _filled()
    path = tmp_path / "state.npz"
    calibrator.save(path)
    loaded = MondrianSmoothed.load(path, META)
    assert loaded.store.same_as(calibrator.store)
    assert (loaded.alpha, loaded.level, loaded.frozen) == (0.4, calibrator.level, False)
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
        MondrianSmoothed.load(path)


@given(st.permutations([0.5, 0.25, 0.5, -1.0, 2.0, 0.125]), st.integers(1, LEVEL_ONE))
def test_order_within_the_window_does_not_matter(scores: list[float], u: int) -> None:
    calibrator, ordered = MondrianSmoothed(0.4, capacity=6), MondrianSmoothed(0.4, capacity=6)
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
    with pytest.raises(StateError, match="it holds no size, head, meta"):
        load_calibrator(path)
    _filled().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StateError, match="not a calibration file"):
        load_calibrator(path)


def _tampered(path: Path, **changes: np.ndarray) -> None:
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    np.savez(path, **{**arrays, **changes})


def test_tampered_contents_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.npz"
    calibrator = _filled()
    store = calibrator.store
    changed = store.ring.copy()
    changed[0, 0] += 1
    wide = store.ring.astype(np.float64)
    nan = store.ring.copy()
    nan[0, 0] = np.nan
    for name, array, reason in (
        ("ring", changed, "do not match their sha256"),
        ("ring", wide, "wrong shapes or types"),
        ("ring", nan, "not finite"),
        ("head", np.full(3, 8), "outside its ring"),
        ("size", np.array([9, 0, 0]), "outside its ring"),
        ("size", np.zeros(2, dtype=np.int64), "wrong shapes or types"),
    ):
        calibrator.save(path)
        _tampered(path, **{name: array})
        with pytest.raises(StateError, match=reason):
            load_calibrator(path)
    calibrator.save(path)
    with np.load(path) as file:
        record = json.loads(str(file["meta"]))
    _tampered(path, meta=np.array(json.dumps({**record, "draft": "another"})))
    with pytest.raises(StateError, match="sha256"):
        load_calibrator(path)
    _tampered(path, meta=np.array(json.dumps({**record, "format": "atts-calibration/9"})))
    with pytest.raises(StateError, match="format"):
        load_calibrator(path)


def test_pickled_contents_are_never_loaded(tmp_path: Path) -> None:
    path = tmp_path / "state.npz"
    np.savez(path, ring=np.array([{}]), size=np.zeros(1), head=np.zeros(1), meta=np.array("{}"))
    with pytest.raises(StateError, match="not a calibration file"):
        load_calibrator(path)
