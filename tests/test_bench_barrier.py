"""The model that predicts what a barrier costs, against cases worked by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.e2e.simulate import LaneModel, Scope, TurnWork, simulate

# Chain 0 drafts 2, is taken over for 3, drafts 1; chain 1 drafts 5, then 1. A draft step takes 1 s, a target step 2 s.
TWO_CHAINS = [[[TurnWork(2, 3), TurnWork(1)], [TurnWork(5), TurnWork(1)]]]
DRAFT, TARGET = LaneModel(1.0), LaneModel(2.0)


@pytest.mark.parametrize(
    ("barrier", "one_device", "seconds", "barrier_s"),
    [
        # Chain 0: 2, 2 + 6 = 8, 9. Chain 1: 5, 6.
        ("none", False, 9.0, 0.0),
        # Both are judged at 5: chain 0 waited 3, writes until 11 and drafts until 12; chain 1 asks at 6 and waits 6.
        ("problem", False, 12.0, 9.0),
        # Until 2 both draft. Three rounds of 1 + 2 s end chain 0's target span and chain 1's first draft at 11; both
        # draft once more.
        ("none", True, 12.0, 0.0),
        # Judged at 5; one round of 1 + 2 s ends chain 1's draft at 8, which then waits for chain 0: two steps of 2 s
        # alone until 12, and a draft step.
        ("problem", True, 13.0, 3.0 + 5.0),
    ],
)
def test_two_chains_by_hand(barrier: Scope, one_device: bool, seconds: float, barrier_s: float) -> None:
    found = simulate(TWO_CHAINS, DRAFT, TARGET, in_flight=1, barrier=barrier, one_device=one_device)
    assert (found.seconds, found.barrier_s, found.slot_s) == (seconds, barrier_s, 0.0)


def test_slots_problems_in_flight_and_rows_by_hand() -> None:
    # One slot: spans of 2, 1 and 3 one after the other, the third problem starting when the first has ended, at 2.
    job = [[[TurnWork(2)]], [[TurnWork(1)]], [[TurnWork(3)]]]
    found = simulate(job, LaneModel(1.0, slots=1), TARGET, in_flight=2, barrier="none", one_device=False)
    assert (found.seconds, found.slot_s, found.chain_s) == (6.0, 2.0 + 1.0, 2.0 + 3.0 + 4.0)
    # A step of r rows takes 1 + r s: both until 1 token each, at 3; the rest of the first alone, 2 s a token.
    pair = [[[TurnWork(2)], [TurnWork(1)]]]
    assert simulate(pair, LaneModel(1.0, 1.0), TARGET, in_flight=1, barrier="none", one_device=False).seconds == 5.0


def test_the_step_that_scores_a_span_by_hand() -> None:
    # 2 + a target step of 2 s + 3 * 2; then 1 + 2. With a device for each lane nothing of it delays the other chain.
    found = simulate(TWO_CHAINS, DRAFT, TARGET, in_flight=1, barrier="none", one_device=False, score_steps=1)
    assert (found.seconds, found.chain_s) == (13.0, 13.0 + (5.0 + 2.0 + 1.0 + 2.0))


def test_a_barrier_over_all_problems_by_hand() -> None:
    job = [[[TurnWork(1), TurnWork(4)]], [[TurnWork(3), TurnWork(1)]]]
    alone = simulate(job, DRAFT, TARGET, in_flight=2, barrier="problem", one_device=False)
    assert (alone.seconds, alone.barrier_s) == (5.0, 0.0)
    # Judged at 3 and at 7: the first waited 2, the second 3.
    every = simulate(job, DRAFT, TARGET, in_flight=2, barrier="all", one_device=False)
    assert (every.seconds, every.barrier_s) == (7.0, 5.0)


works = st.builds(TurnWork, st.integers(1, 9), st.integers(0, 9))
jobs = st.lists(st.lists(st.lists(works, min_size=1, max_size=4), min_size=1, max_size=4), min_size=1, max_size=4)


@given(jobs, st.integers(1, 4), st.sampled_from(["none", "problem", "all"]), st.booleans())
def test_every_token_is_written_and_none_for_nothing(job: list, in_flight: int, barrier: Scope, one: bool) -> None:
    found = simulate(job, DRAFT, TARGET, in_flight=in_flight, barrier=barrier, one_device=one)
    alone = [sum(w.draft * 1.0 + w.target * 2.0 for w in turns) for chains in job for turns in chains]
    assert found.seconds >= max(alone) - 1e-9
    assert found.seconds <= sum(alone) + 1e-9
    if not one:
        assert found.chain_s - found.barrier_s == pytest.approx(sum(alone))


@given(jobs)
def test_without_interference_a_barrier_never_helps(job: list) -> None:
    every = len(job)
    seconds = [
        simulate(job, DRAFT, TARGET, in_flight=every, barrier=b, one_device=False).seconds for b in ("none", "all")
    ]
    assert seconds[0] <= seconds[1] + 1e-9


def test_an_empty_job_is_refused() -> None:
    with pytest.raises(ValueError, match="a turn in each chain"):
        simulate([[[]]], DRAFT, TARGET, in_flight=1, barrier="none", one_device=False)
