"""The decision log, replayed against an implementation with lists and fractions."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from atts_engine.conformal import LEVEL_ONE, Mondrian, RingStore, level_of
from atts_engine.errors import InputError
from atts_engine.evaluation.decisions import Difference, check_log, decision_to_json, in_force, read_decisions, restore
from atts_engine.evaluation.jsonl import JsonlWriter
from atts_engine.pipeline.records import Decision

KEYS, CAPACITY = 3, 7


def _cold(frozen: bool = False) -> Mondrian:
    return Mondrian(0.4, keys=KEYS, capacity=CAPACITY, frozen=frozen)


def _log(n: int = 60, seed: int = 0, insert: bool = True) -> list[Decision]:
    rng = np.random.default_rng(seed)
    level = level_of(0.4)
    rings = [deque[float](maxlen=CAPACITY) for _ in range(KEYS)]
    decisions: list[Decision] = []
    while len(decisions) < n:
        batch = 0 if not decisions else decisions[-1].batch + 1
        spans = [
            (int(rng.integers(KEYS)), float(np.float32(round(rng.normal(), 1)))) for _ in range(rng.integers(1, 6))
        ]
        for key, score in spans:
            held, u = rings[key], int(rng.integers(1, LEVEL_ONE + 1))
            count, ties = sum(v >= score for v in held), sum(v == score for v in held)
            p = (count - ties + Fraction(u, LEVEL_ONE) * (1 + ties)) / (len(held) + 1)
            taken = p <= Fraction(level, LEVEL_ONE)
            decisions.append(
                Decision(
                    decision_seq=len(decisions),
                    batch=batch,
                    problem=f"p{len(decisions) % 4}",
                    chain=len(decisions) % 5,
                    turn=key,
                    key=key,
                    score=score,
                    n=len(held),
                    count=count,
                    ties=ties,
                    k=level * (len(held) + 1),
                    level=level,
                    u=u,
                    p_value=((count - ties) + (u / LEVEL_ONE) * (1 + ties)) / (len(held) + 1),
                    verdict="takeover" if taken else "keep",
                )
            )
        for key, score in spans if insert else ():
            rings[key].append(score)
    return decisions


@pytest.mark.parametrize("insert", [True, False])
def test_a_log_is_reproduced_to_the_bit_through_its_file(tmp_path: Path, insert: bool) -> None:
    log = _log(insert=insert)
    path = tmp_path / "decisions.jsonl"
    with JsonlWriter(path) as writer:
        for decision in log:
            writer.write(decision_to_json(decision))
    assert read_decisions(path) == log
    initial = _cold(frozen=not insert)
    shuffled = [log[i] for i in np.random.default_rng(1).permutation(len(log))]
    assert check_log(shuffled, initial) is None
    assert initial.store.size.sum() == 0


@pytest.mark.parametrize("field", ["n", "count", "ties", "k", "p_value", "verdict"])
def test_the_first_difference_is_found(field: str) -> None:
    log = _log()
    for at in (31, 44):
        old = getattr(log[at], field)
        new = {"keep": "takeover", "takeover": "keep"}[old] if field == "verdict" else np.nextafter(old, 9.0)
        log[at] = replace(log[at], **{field: new if field in ("p_value", "verdict") else old + 1})
    found = check_log(log, _cold())
    assert isinstance(found, Difference)
    assert (found.decision_seq, found.field, found.recorded) == (31, field, getattr(log[31], field))
    assert str(found).startswith(f"decision 31: {field} was recorded as")


def test_batches_are_counted_before_they_are_inserted() -> None:
    log = _log()
    one_by_one = [replace(d, batch=d.decision_seq) for d in log]
    assert check_log(one_by_one, _cold()) is not None


def test_a_log_from_another_start_differs() -> None:
    warm = _cold()
    warm.observe(0.0, 0)
    assert check_log(_log(), warm) is not None


def test_what_is_no_log_is_refused(tmp_path: Path) -> None:
    log = _log()
    with pytest.raises(InputError, match="decision_seq 5 twice"):
        check_log([*log, log[5]], _cold())
    with pytest.raises(InputError, match="goes back to batch 0"):
        check_log([*log, replace(log[5], decision_seq=999, batch=0)], _cold())
    with pytest.raises(InputError, match="unknown calibration key 2"):
        check_log(log, Mondrian(0.4, keys=2, capacity=CAPACITY))
    path = tmp_path / "decisions.jsonl"
    for name, value, reason in (
        ("verdict", "maybe", "takeover or keep"),
        ("n", None, "'n' must be an integer"),
        ("score", "high", "'score' must be a number"),
    ):
        with JsonlWriter(path) as writer:
            writer.write(decision_to_json(log[0]))
            writer.write({**decision_to_json(log[1]), name: value})
        with pytest.raises(InputError, match=f"line 2: .*{reason}"):
            read_decisions(path)


def test_discarded_decisions_leave_the_calibration(tmp_path: Path) -> None:
    level, u, scores = level_of(0.4), 2**31, [0.5, 0.9, 0.2, 0.7, 0.3, 0.6]
    # What each was counted against: 3 discards 1 and 2, 5 discards 0.
    against = [[], [0.5], [0.5, 0.9], [0.5], [0.5, 0.7], [0.7, 0.3]]
    discards = {3: (1, 2), 5: (0,)}
    log = []
    for i, (score, held) in enumerate(zip(scores, against, strict=True)):
        n, count = len(held), sum(v >= score for v in held)
        p = (count + 0.5) / (n + 1)
        verdict = "takeover" if p <= 0.4 else "keep"
        log.append(
            Decision(
                i, i, "p", i, 0, 0, score, n, count, 0, level * (n + 1), level, u, p, verdict, None, discards.get(i, ())
            )
        )
    path = tmp_path / "decisions.jsonl"
    with JsonlWriter(path) as writer:
        for decision in log:
            writer.write(decision_to_json(decision))
    assert read_decisions(path) == log
    big = Mondrian(0.4)
    assert check_log(log, big) is None
    assert [d.decision_seq for d in in_force(log)] == [3, 4, 5]
    restore(big, log, discards=[4])
    assert big.store.size[0] == 2 and set(big.store.ring[0, :2].tolist()) == {np.float32(0.7), np.float32(0.6)}
    unmarked = [replace(d, discards=()) for d in log]
    assert check_log(unmarked, Mondrian(0.4)) == Difference(3, "n", 1, 3)
    with pytest.raises(InputError, match="decision 5 discards decision 1, which is not in force"):
        check_log([*log[:5], replace(log[5], discards=(0, 1))], Mondrian(0.4))


def test_restore_brings_a_calibrator_to_where_the_run_stood() -> None:
    log = _log()
    calibrator = Mondrian(0.4, keys=KEYS, capacity=CAPACITY)
    restore(calibrator, log[:30])
    oracle = RingStore(KEYS, CAPACITY)
    for decision in log[:30]:
        oracle.insert(decision.score, decision.key)
    assert calibrator.store.same_as(oracle)
    restore(calibrator, [])
    assert calibrator.store.same_as(oracle)


def test_restore_refuses_a_log_of_another_calibration_and_learns_nothing() -> None:
    log = _log()
    log[3] = replace(log[3], count=log[3].count + 1)
    calibrator = Mondrian(0.4, keys=KEYS, capacity=CAPACITY)
    with pytest.raises(InputError, match="does not follow from this calibration .decision 3: count"):
        restore(calibrator, log)
    assert calibrator.store.size.sum() == 0


def test_restoring_a_frozen_calibrator_checks_the_log_only() -> None:
    calibrator = Mondrian(0.4, keys=KEYS, capacity=CAPACITY, frozen=True)
    restore(calibrator, _log(insert=False))
    assert calibrator.store.size.sum() == 0
