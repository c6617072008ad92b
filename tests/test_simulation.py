"""The simulation of both lanes: schedules worked by hand, conservation, monotonicity, costs against the meters' own."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from atts_engine.errors import InputError
from atts_engine.evaluation.simulation import (
    Efficiency,
    LaneModel,
    LinearCost,
    Machine,
    RooflineCost,
    Rules,
    Scope,
    TableCost,
    TurnWork,
    simulate,
)
from atts_engine.evaluation.simulation.catalogue import DEVICES, MODELS
from atts_engine.evaluation.simulation.lanes import Lane, LaneUse
from atts_engine.evaluation.simulation.work import Job, alone, cut, load_turns, recorded_turns, resample, tokens_of
from atts_engine.pipeline.records import Chain, Turn
from atts_engine.runtime.meters import ModelCost, StepRows

# Chain 0 drafts 2, is taken over for 3, drafts 1; chain 1 drafts 5, then 1. A draft step takes 1 s, a target step 2 s.
TWO_CHAINS = [[[TurnWork(2, 3), TurnWork(1)], [TurnWork(5), TurnWork(1)]]]
DRAFT, TARGET = LinearCost(1.0), LinearCost(2.0)


def pair(shared: bool = False, draft: LinearCost = DRAFT, target: LinearCost = TARGET) -> Machine:
    return Machine(LaneModel(draft), LaneModel(target), shared)


@pytest.mark.parametrize(
    ("barrier", "shared", "seconds", "barrier_s"),
    [
        # Chain 0 drafts until 2, is scored until 4. The target's steps: 4-6, and 6-8 with the score of chain 1, which
        # asked at 5, 8-10. Chain 1 drafts until 9 and is scored 10-12; chain 0 drafts until 11 and is scored 12-14.
        ("none", False, 14.0, 0.0),
        # Scores at 4 and, of chain 1, 5-7: both judged at 7, chain 0 waited 3. It writes until 13 and drafts until 14,
        # scored 14-16; chain 1 drafts until 8, is scored in the step 9-11 and waits until 16.
        ("problem", False, 16.0, 3.0 + 5.0),
    ],
)
def test_two_chains_by_hand(barrier: Scope, shared: bool, seconds: float, barrier_s: float) -> None:
    found = simulate(TWO_CHAINS, pair(shared), Rules(barrier, verification="step"))
    assert (found.seconds, found.barrier_s) == (seconds, barrier_s)
    assert found.chain_s == 14.0 + 12.0 if barrier == "none" else found.chain_s == 16.0 + 16.0


def test_a_shared_device_takes_turns_by_hand() -> None:
    # Alone: the chain drafts 2 s, is scored 2 s, is written for 3 x 2 s, drafts 1 s, is scored 2 s.
    one = [[TWO_CHAINS[0][0]]]
    assert simulate(one, pair(shared=True), Rules(verification="step")).seconds == 13.0
    # Chain 0 drafts until 2 and is scored 2-4. The draft's step comes next, 4-5, then the target's, in turns: 5-7,
    # 8-10, 11-13. Chain 1 has its last three tokens at 5, 8 and 11, and its score is a row of the step 11-13.
    job = [[[TurnWork(2, 3)], [TurnWork(5)]]]
    found = simulate(job, pair(shared=True), Rules(verification="step"))
    assert (found.seconds, found.draft.steps, found.target.steps if found.target else 0) == (13.0, 5, 4)


def test_chunks_are_scored_while_the_draft_writes_by_hand() -> None:
    # Chunks of 2 come at 2, 4 and 5; the target takes 1 s and 0.25 s a row: 2-3.5, 4-5.5, then the last one 5.5-6.75.
    found = simulate([[[TurnWork(5)]]], pair(target=LinearCost(1.0, 0.25)), Rules(chunk_tokens=2))
    assert (found.seconds, found.verify_s, found.queued_s) == (6.75, 1.75, 0.5)
    assert found.target is not None
    assert (found.target.scored, found.target.steps, found.target.peak_kv) == (5, 3, 5)


def test_the_draft_follows_the_target_and_begins_with_the_last_row_by_hand() -> None:
    # Draft 0-1, score 1-3, target 3 tokens 3-9, chunks of 2 at 7 and 9. The draft appends 2 rows 7-8, the last with the
    # row that gives its next token 9-10, one token more 10-11; score 11-13.
    found = simulate([[[TurnWork(1, 3), TurnWork(2)]]], pair(), Rules(chunk_tokens=2))
    assert (found.seconds, found.draft.steps, found.draft.computed) == (13.0, 4, 1 + 2 + 2 + 1)


def test_a_prompt_is_computed_once_a_copy_by_hand() -> None:
    # 10 rows at 8 a step, an eighth more than decode leaves: 0-1, 1-2; both chains draft a token 2-3, scored 3-5.
    rules = Rules(prompt_tokens=10, max_batch_tokens=8)
    found = simulate([[[TurnWork(1)], [TurnWork(1)]]], pair(), rules)
    assert (found.seconds, found.draft.computed, found.draft.peak_kv) == (6.0, 12, 12)


def test_slots_problems_in_flight_and_rows_by_hand() -> None:
    # One slot: spans of 2, 1 and 3 one after the other, the third problem starting when the first has ended, at 2.
    job = [[[TurnWork(2)]], [[TurnWork(1)]], [[TurnWork(3)]]]
    found = simulate(job, Machine(LaneModel(DRAFT, slots=1)), Rules(in_flight=2))
    assert (found.seconds, found.queued_s, found.latency_s) == (6.0, 2.0 + 1.0, (2.0, 3.0, 4.0))
    # A step of r rows takes 1 + r s: both until 1 token each, at 3; the rest of the first alone, 2 s a token.
    both = [[[TurnWork(2)], [TurnWork(1)]]]
    assert simulate(both, Machine(LaneModel(LinearCost(1.0, 1.0))), Rules()).seconds == 5.0


def test_kv_lets_in_as_many_problems_as_it_holds_by_hand() -> None:
    # 10 tokens hold one problem of 6 and not two, so three go one after the other; two copies hold two.
    job = [[[TurnWork(4)], [TurnWork(2)]]] * 3
    assert simulate(job, Machine(LaneModel(DRAFT, kv_tokens=10)), Rules()).seconds == 12.0
    two = simulate(job, Machine(LaneModel(DRAFT, replicas=2, kv_tokens=6)), Rules())
    assert (two.seconds, two.draft.peak_kv) == (8.0, 4)
    with pytest.raises(InputError, match="have 6 tokens, and the KV of a lane has room for 5"):
        simulate(job, Machine(LaneModel(DRAFT, kv_tokens=5)), Rules())


def test_a_barrier_over_all_problems_by_hand() -> None:
    # Scores take 0.5 s. Alone: chain 0 drafts until 1, is scored, and comes into the step that begins at 2: until 6,
    # scored 6.5. Chain 1: until 3, scored 3.5, comes in at 4.
    job = [[[TurnWork(1), TurnWork(4)]], [[TurnWork(3), TurnWork(1)]]]
    machine = pair(target=LinearCost(0.5))
    own = simulate(job, machine, Rules("problem", verification="step"))
    assert (own.seconds, own.barrier_s) == (6.5, 0.0)
    # Both are judged at 3.5, chain 0 waited 2; chain 1 is scored again at 5 and waits until 8.
    every = simulate(job, machine, Rules("all", verification="step"))
    assert (every.seconds, every.barrier_s) == (8.0, 2.0 + 3.0)


def test_idle_is_time_with_chains_open_and_nothing_asked_by_hand() -> None:
    # Draft 0-3, score 3-5: the target was idle for 3 s, the draft for 2 s.
    found = simulate([[[TurnWork(3)]]], pair(), Rules())
    assert found.target is not None
    assert (found.seconds, found.draft.idle_s, found.target.idle_s) == (5.0, 2.0, 3.0)
    assert (found.draft.busy_s, found.target.busy_s) == (3.0, 2.0)


works = st.builds(TurnWork, st.integers(1, 9), st.integers(0, 9))
jobs = st.lists(st.lists(st.lists(works, min_size=1, max_size=4), min_size=1, max_size=4), min_size=1, max_size=4)
rules_ = st.builds(
    Rules,
    barrier=st.sampled_from(["none", "problem", "all"]),
    in_flight=st.sampled_from([None, 1, 2]),
    prompt_tokens=st.sampled_from([0, 5]),
    chunk_tokens=st.integers(1, 5),
    max_batch_tokens=st.sampled_from([4, 64]),
    hop_s=st.sampled_from([0.0, 0.1]),
)


@given(jobs, rules_, st.booleans(), st.integers(1, 3), st.sampled_from([None, 1, 3]))
@settings(max_examples=200, deadline=None)
def test_every_token_is_written_and_scored_once(
    job: Job, rules: Rules, shared: bool, replicas: int, slots: int | None
) -> None:
    lanes = [LaneModel(cost, replicas, slots) for cost in (LinearCost(1.0, 0.1), LinearCost(2.0, 0.1))]
    found = simulate(job, Machine(lanes[0], lanes[1], shared), rules)
    draft, target = tokens_of(job)
    assert found.target is not None
    assert (found.draft.sampled, found.target.sampled, found.target.scored) == (draft, target, draft)
    # Every copy computes a problem's prompt once, and every token of a chain.
    copies = found.target.computed - draft - target
    assert copies % max(1, rules.prompt_tokens) == 0
    assert (copies == 0) is (rules.prompt_tokens == 0)
    assert found.draft.computed >= draft
    for use in (found.draft, found.target):
        assert use.busy_s + use.idle_s <= replicas * found.seconds + 1e-6
        assert use.busy_s >= use.steps * 1.0
    assert (found.barrier_s == 0.0) or rules.barrier != "none"
    assert max(found.latency_s) <= found.seconds + 1e-9
    assert found.chains == sum(map(len, job))


@given(jobs)
@settings(max_examples=50, deadline=None)
def test_with_a_device_and_a_row_for_everyone_a_barrier_never_helps(job: Job) -> None:
    chains = sum(map(len, job))
    machine = Machine(LaneModel(DRAFT, chains), LaneModel(TARGET, chains))
    seconds = [simulate(job, machine, Rules(scope)).seconds for scope in ("none", "problem", "all")]
    assert seconds == sorted(seconds)


def test_more_of_anything_takes_no_less_time() -> None:
    job = resample(load_turns().job, problems=4, chains=4, turns=3, seed=1)
    machine = pair(draft=LinearCost(0.01, 1e-4), target=LinearCost(0.04, 1e-4))
    base = simulate(job, machine, Rules()).seconds
    longer = [[[TurnWork(w.draft + 50, w.target) for w in chain] for chain in problem] for problem in job]
    assert simulate(longer, machine, Rules()).seconds > base
    assert simulate([*job, *job], machine, Rules()).seconds > base
    assert simulate(job, pair(draft=LinearCost(0.01, 1e-4), target=LinearCost(0.05, 1e-4)), Rules()).seconds > base
    copies = Machine(LaneModel(LinearCost(0.01, 1e-4), 4), LaneModel(LinearCost(0.04, 1e-4), 4))
    assert simulate(job, copies, Rules()).seconds < base


def test_skipping_quiet_steps_changes_nothing() -> None:
    # Chunks of one token leave no step in which nothing ends, so that every step is made by itself. Many at once are
    # taken at their middle, rounded to whole tokens.
    job = resample(load_turns().job, problems=2, chains=3, turns=2, seed=3)
    roofline = RooflineCost(ModelCost.of(MODELS["qwen2.5-1.5b"], 2), DEVICES["h100"], Efficiency())
    single = simulate(alone(job), Machine(LaneModel(roofline)), Rules(chunk_tokens=1))
    leaps = simulate(alone(job), Machine(LaneModel(roofline)), Rules(chunk_tokens=64))
    assert leaps.seconds == pytest.approx(single.seconds, rel=1e-6)
    assert (leaps.draft.steps, leaps.draft.sampled) == (single.draft.steps, single.draft.sampled)
    assert leaps.draft.memory_s == pytest.approx(single.draft.memory_s, rel=1e-6)


@pytest.mark.parametrize("job", [[], [[]], [[[]]]])
def test_an_empty_job_is_refused(job: Job) -> None:
    with pytest.raises(ValueError, match="a turn in each chain"):
        simulate(job, pair(), Rules())


def test_a_lane_alone_takes_nobody_over() -> None:
    with pytest.raises(ValueError, match="cannot be taken over"):
        simulate(TWO_CHAINS, Machine(LaneModel(DRAFT)), Rules())
    # 6 and 6 tokens at once, 1 s each.
    assert simulate(alone(TWO_CHAINS), Machine(LaneModel(DRAFT)), Rules()).seconds == 6.0


# Costs


def test_a_step_of_a_lane_counts_what_the_meter_counts() -> None:
    # Two sequences of 4 and 7 tokens decode; a third with 5 tokens has 3 appended and scored.
    use = LaneUse()
    lane = Lane(LaneModel(LinearCost(1.0)), 64, 2048, use)
    for key, length in ((0, 4), (1, 7), (2, 5)):
        lane.begin(key, length)
    lane.decode(0, 9, 0.0)
    lane.decode(1, 9, 0.0)
    lane.append(2, 3, 0.0, scored=True)
    assert lane.plan(0.0).rows == StepRows(
        rows=2 + 3, attended=5 + 8 + (6 + 7 + 8), cached=5 + 8 + 8, scored=3, sampled=2
    )


@pytest.mark.parametrize(
    "rows", [StepRows(1, 500, 500, 0, 1), StepRows(64, 64000, 64000, 0, 64), StepRows(2048, 900000, 9000, 1024, 8)]
)
def test_the_roofline_on_one_gpu_is_that_of_the_meters_counts(rows: StepRows) -> None:
    model, device = ModelCost.of(MODELS["qwen2.5-7b"], 2), DEVICES["h100"]
    found = RooflineCost(model, device, Efficiency(compute=0.5, memory=0.8, step_s=1e-3)).step(rows)
    assert found.compute_s == pytest.approx(model.operations(rows) / (0.5 * 989.4e12))
    assert found.memory_s == pytest.approx(model.bytes(rows) / (0.8 * 3.35e12))
    assert found.seconds == pytest.approx(max(found.compute_s, found.memory_s) + 1e-3)


def test_a_split_model_shares_weights_and_heads_and_pays_for_all_reduces() -> None:
    model, rows = ModelCost.of(MODELS["llama-3.1-70b"], 2), StepRows(32, 32000, 32000, 0, 32)
    e = Efficiency(link=0.5, step_s=0.0, all_reduce_s=1e-5)
    one, four = (RooflineCost(model, DEVICES["h100"], e, tp) for tp in (1, 4))
    assert one.step(rows).memory_s == pytest.approx(4 * four.step(rows).memory_s)
    assert four.kv_bytes_per_token == 2 * 80 * 2 * 128 * 2
    # 2 x 80 all-reduces; of 32 x 8192 x 2 bytes a ring sends 2 x 3/4.
    sent = 1.5 * 32 * 8192 * 2
    assert four.all_reduce_s(32) == pytest.approx(160 * (sent / (0.5 * 450e9) + 1e-5))
    assert one.all_reduce_s(32) == 0.0
    # 2 key/value heads on 4 GPUs: each of them is on two.
    small = RooflineCost(ModelCost.of(MODELS["qwen2.5-1.5b"], 2), DEVICES["h100"], e, 4)
    assert small.kv_bytes_per_token == 2 * 28 * 1 * 128 * 2
    with pytest.raises(InputError, match="12 attention heads cannot be split over 8 GPUs"):
        RooflineCost(small.model, DEVICES["h100"], e, 8)


def test_a_table_of_steps_is_linear_between_and_beyond() -> None:
    table = TableCost((1, 9, 17), (1.0, 2.0, 4.0))
    times = [table.step(StepRows(n, 0, 0, 0, n)).seconds for n in (1, 5, 9, 13, 17, 25)]
    assert times == [1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    for rows, seconds in (((1,), (1.0,)), ((2, 1), (1.0, 1.0)), ((1, 2), (1.0, 0.0)), ((1, 2), (1.0,))):
        with pytest.raises(InputError, match="two or more rising numbers of rows"):
            TableCost(rows, seconds)


def test_shapes_have_the_parameters_that_their_names_say() -> None:
    """Parameters in 10^9 as the model cards state them (norms and biases left out here)."""
    stated = {
        "qwen2.5-1.5b": 1.54, "qwen2.5-7b": 7.61, "qwen2.5-14b": 14.77, "qwen2.5-32b": 32.76, "qwen2.5-72b": 72.7,
        "llama-3.1-8b": 8.03, "llama-3.1-70b": 70.55, "qwq-32b": 32.76, "r1-distill-qwen-1.5b": 1.78,
        "r1-distill-qwen-7b": 7.61, "r1-distill-qwen-14b": 14.77, "r1-distill-qwen-32b": 32.76,
        "r1-distill-llama-8b": 8.03, "r1-distill-llama-70b": 70.55,
    }  # fmt: skip
    found = {
        name: RooflineCost(ModelCost.of(config, 1), DEVICES["h100"], Efficiency()).weight_bytes / 1e9
        for name, config in MODELS.items()
    }
    assert found == pytest.approx(stated, rel=0.003)


# Work


def _chain(problem: str, number: int, *turns: Turn, recorded: bool = True) -> Chain:
    extra = {} if recorded else {"tokens_recorded": False}
    return Chain(problem, 0, number, None, None, 1.0, turns, extra=extra)


def test_turns_of_a_trace_are_counted_or_estimated() -> None:
    counted = _chain("a", 0, Turn(0, "xy", 7, takeover=True, target="z", target_tokens=3), Turn(1, "", 0))
    texts = _chain("b", 0, Turn(0, "x" * 31, 0, takeover=True, target="y" * 4), recorded=False)
    exact = recorded_turns([counted])
    assert exact.job == [[[TurnWork(7, 3), TurnWork(1)]]]
    assert (exact.draft_tokens, exact.target_tokens, exact.takeover_rate, exact.estimated) == (8, 3, 0.5, False)
    both = recorded_turns([counted, texts], chars_per_token=4.0)
    assert (both.job[1], both.estimated) == ([[TurnWork(8, 1)]], True)
    with pytest.raises(InputError, match="no turn to simulate"):
        recorded_turns([_chain("a", 0)])


def test_a_job_is_drawn_by_seed_and_grows_at_its_ends() -> None:
    recorded = load_turns().job
    job = resample(recorded, problems=5, chains=6, turns=3, seed=7)
    assert job == resample(recorded, problems=5, chains=6, turns=3, seed=7)
    assert job != resample(recorded, problems=5, chains=6, turns=3, seed=8)
    wider = resample(recorded, problems=9, chains=8, turns=4, seed=7)
    assert cut(wider, problems=5, chains=6, turns=3) == [[list(c) for c in p] for p in job]
    # All chains of a problem come from one recorded problem.
    for problem in job:
        assert any(all(any(c[:3] == chain for c in source) for chain in problem) for source in recorded)


def test_the_chains_of_a_job_come_from_everywhere() -> None:
    recorded = [[[TurnWork(n + 1)]] for n in range(8)]
    drawn = Counter(p[0][0].draft for p in resample(recorded, problems=400, chains=1, turns=1, seed=0))
    assert drawn.total() == 400
    # Of 400 draws each comes 50 times on average, and fewer than 20 times in one case of a million.
    assert 8 * binom.cdf(20, 400, 1 / 8) < 1e-5
    assert min(drawn[n + 1] for n in range(8)) > 20
