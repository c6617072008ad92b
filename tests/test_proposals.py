"""Proposed tokens on a lane: whatever is proposed, the span is the one that the lane writes alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from atts_engine import ops
from atts_engine.errors import ChainError, ContextFull
from atts_engine.runtime.commands import Append, Decode, Propose, Verdict
from atts_engine.runtime.lane import LaneCore
from atts_engine.runtime.records import Proposal, SamplingParams, TokenChunk
from tests.fakes import EOS, VOCAB, FakeDecoder, greedy, log_probability
from tests.test_lane import GREEDY, Bench
from tests.test_overlap import SAMPLING, TOKENS, check_pages, lane, late_lane

SIDE_BY_SIDE = 4


def span_alone(prompt: tuple[int, ...], n: int, sampling: SamplingParams) -> tuple[list[int], str | None, list[float]]:
    """What a lane that is asked for nothing else writes: tokens, how they end, log-probabilities."""
    bench = Bench()
    bench.core.open(0, prompt)
    chunks = bench.decode(0, n, sampling)
    return [t for c in chunks for t in c.tokens], chunks[-1].finish, [p for c in chunks for p in c.logprobs]


def guesses(rng: random.Random, coming: list[int]) -> tuple[int, ...]:
    """A proposal: what is coming, mostly, then perhaps something else, which may be no token at all."""
    right = coming[: rng.randint(0, len(coming))][: rng.choice([0, 2, 4, 9])]
    wrong = [rng.randrange(-1, VOCAB + 1) for _ in range(rng.choice([0, 0, 1, 3, 8]))]
    return (*right, *wrong)


def propose(
    core: LaneCore, seq: int, tokens: tuple[int, ...], left: int, sampling: SamplingParams, written: int = 0
) -> list[Any]:
    heard: list[Any] = []
    command = Propose(tokens, left, sampling, written, lambda value, error: heard.append((value, error)))
    core.command(seq, command)
    return heard


def ask(bench: Bench, seq: int, tokens: tuple[int, ...], left: int = 99, sampling: SamplingParams = GREEDY) -> Proposal:
    result = bench.ask(seq, lambda reply: Propose(tokens, left, sampling, 0, reply))
    assert isinstance(result, Proposal)
    return result


def run(core: LaneCore) -> None:
    idle = 0
    while idle < 2:
        idle = 0 if core.step(lambda request, result: None) else idle + 1
        check_pages(core)


def write_by_proposals(
    core: LaneCore, prompts: list[tuple[int, ...]], n: int, samplings: list[SamplingParams], rng: random.Random
) -> list[tuple[list[int], str | None, list[float]]]:
    """All sequences propose in rounds, side by side, until each span has ended."""
    spans = [span_alone(p, n, s) for p, s in zip(prompts, samplings, strict=True)]
    found: list[tuple[list[int], str | None, list[float]]] = [([], None, []) for _ in prompts]
    for seq, prompt in enumerate(prompts):
        core.open(seq, prompt)
    while open_ones := [i for i, (_, finish, _) in enumerate(found) if finish is None]:
        heard = {}
        for i in open_ones:
            written = found[i][0]
            heard[i] = propose(
                core, i, guesses(rng, spans[i][0][len(written) :]), n - len(written), samplings[i], len(written)
            )
        run(core)
        for i in open_ones:
            ((result, error),) = heard[i]
            assert error is None
            tokens, _, logprobs = found[i]
            assert result.accepted in (len(result.tokens) - 1, len(result.tokens))
            assert result.accepted < len(result.tokens) or result.finish is not None
            found[i] = (tokens + list(result.tokens), result.finish, logprobs + list(result.logprobs))
    return found


@settings(max_examples=200)
@given(
    prompts=st.lists(TOKENS, min_size=1, max_size=SIDE_BY_SIDE),
    samplings=st.lists(SAMPLING, min_size=SIDE_BY_SIDE, max_size=SIDE_BY_SIDE),
    n=st.integers(1, 20),
    late=st.booleans(),
    pressed=st.booleans(),
    swap=st.booleans(),
    budget=st.sampled_from([1, 3, 6, 40]),
    seed=st.integers(0, 1 << 30),
)
def test_any_proposals_give_the_span_that_the_lane_writes_alone(
    prompts: Any, samplings: Any, n: int, late: bool, pressed: bool, swap: bool, budget: int, seed: int
) -> None:
    """Tokens, log-probabilities and the reason for the end, with blocks longer than the budget, pools that force
    preemption in their midst, and a device behind its host."""
    options: dict[str, Any] = {"budget": budget, "kv_tokens": 36 if pressed else 4000, "swap": swap}
    core = late_lane(**options) if late else lane(overlap=False, **options)
    samplings = samplings[: len(prompts)]
    found = write_by_proposals(core, prompts, n, samplings, random.Random(seed))
    assert found == [span_alone(p, n, s) for p, s in zip(prompts, samplings, strict=True)]
    for i, (prompt, (tokens, _, _)) in enumerate(zip(prompts, found, strict=True)):
        held = core._sequences[i]
        assert held.tokens == [*prompt, *tokens]
        assert held.computed <= held.total - 1 and (pressed or held.computed == held.total - 1)
        assert len(held.table.pages) + len(held.table.parked) == -(-held.computed // 4)
        core.close(i)
    assert core.pool.used == core.host_pool.used == 0
    assert core.stats.discarded_rows == 0
    s = core.stats
    assert s.computed_tokens == s.distinct_tokens + s.recomputed_tokens + s.repeated_tokens


def test_what_a_proposal_costs() -> None:
    """One pass for all of it; rejected rows are counted, and the sequence is one token behind afterwards."""
    bench = Bench()
    bench.core.open(0, (1, 2, 3))
    bench.append(0, [], score=False)
    bench.run()
    before = bench.core.stats.computed_tokens
    coming = greedy([1, 2, 3], 9)
    wrong = (coming[2] + 1) % EOS
    result = ask(bench, 0, (*coming[:2], wrong, *coming[3:5]))
    assert result == Proposal(tuple(coming[:3]), 2)
    stats = bench.core.stats
    assert (stats.steps, stats.computed_tokens - before) == (2, 6)
    assert (stats.proposed_tokens, stats.accepted_tokens, stats.rejected_rows, stats.sampled_tokens) == (5, 2, 3, 3)
    assert bench.core._sequences[0].computed == bench.core._sequences[0].total - 1 == 5
    assert ask(bench, 0, tuple(coming[3:7])) == Proposal(tuple(coming[3:8]), 4)
    assert ask(bench, 0, ()) == Proposal((coming[8],), 0)
    assert stats.steps == 4
    decoder = bench.core.model.decoder
    assert isinstance(decoder, FakeDecoder)
    assert decoder.rows == stats.computed_tokens == stats.distinct_tokens == 2 + 6 + 5 + 1


def test_a_block_that_the_budget_cuts_ends_where_it_is_refused() -> None:
    bench = Bench(budget=3)
    bench.core.open(0, (1, 2))
    bench.run()
    coming = greedy([1, 2], 12)
    assert ask(bench, 0, tuple(coming[:10])) == Proposal(tuple(coming[:11]), 10)
    assert bench.core.stats.steps == 1 + 4
    # The second part holds the first wrong token: the third and fourth are never forwarded.
    at = greedy([1, 2], 16)[11:]
    wrong = [(t + 1) % EOS for t in at]
    assert ask(bench, 0, (*at[:4], *wrong, *wrong)) == Proposal(tuple(at[:5]), 4)
    assert bench.core.stats.rejected_rows == 1
    assert bench.core.stats.steps == 1 + 4 + 2


def test_ends_within_what_is_accepted() -> None:
    """Stop ids, stop strings that begin in the span before, EOS, max_tokens and the end of the context."""
    prompt, coming = [1, 2], greedy([1, 2], 20)
    text = "".join(chr(97 + t) for t in coming)
    for sampling, end in (
        (SamplingParams(temperature=0.0, stop_token_ids=(coming[4],)), coming.index(coming[4]) + 1),
        (SamplingParams(temperature=0.0, stop=(text[1:5],)), text.index(text[1:5]) + 4),
    ):
        bench = Bench()
        bench.core.open(0, tuple(prompt))
        assert ask(bench, 0, tuple(coming[:9]), sampling=sampling) == Proposal(tuple(coming[:end]), end, "stop")
        assert bench.core._sequences[0].tokens == prompt + coming[:end]
        assert list(bench.decode(0, 3)[0].tokens) == coming[end : end + 3]
    bench = Bench()
    bench.core.open(0, tuple(prompt))
    stop = SamplingParams(temperature=0.0, stop=(text[1:5],))
    assert ask(bench, 0, tuple(coming[:3]), sampling=stop).finish is None
    heard = propose(bench.core, 0, tuple(coming[4:9]), 99, stop, written=4)
    bench.run()
    assert heard == [(Proposal((coming[4],), 1, "stop"), None)]
    bench = Bench(max_positions=10)
    bench.core.open(0, tuple(prompt))
    assert ask(bench, 0, tuple(coming[:9]), left=4) == Proposal(tuple(coming[:4]), 3, "length")
    assert ask(bench, 0, tuple(coming[4:13])) == Proposal(tuple(coming[4:8]), 3, "length")
    with pytest.raises(ContextFull, match="context of 10"):
        ask(bench, 0, ())


def test_a_proposed_token_that_gives_nan_harms_nobody_and_one_of_the_lanes_own_ends_the_chain() -> None:
    bench = Bench(kv_tokens=16, budget=4, poison=EOS)  # favoured() never gives EOS
    bench.core.open(0, (1, 2, 3))
    bench.run()
    coming = greedy([1, 2, 3], 13)
    # All rows of a step may read the NaN that one of them writes: they are forwarded again without what was proposed.
    assert ask(bench, 0, (coming[0], EOS, 4)) == Proposal((coming[0],), 0)
    assert ask(bench, 0, (*coming[1:5], EOS, 7)) == Proposal(tuple(coming[1:6]), 4)
    assert bench.core.stats.rejected_rows == 4 + 3
    assert ask(bench, 0, tuple(coming[6:8])) == Proposal(tuple(coming[6:9]), 2)
    bench.core.close(0)
    bench.core.open(1, (1, 2, 3))
    assert list(bench.decode(1, 13)[0].tokens) == coming
    poison = greedy([5, 3], 2)[1]
    bench = Bench(poison=poison)
    bench.core.open(0, (5, 3))
    with pytest.raises(ChainError, match="NaN"):
        for _ in range(3):
            ask(bench, 0, tuple(greedy([5, 3], 4)))
    assert bench.core.pool.used == len(bench.core.pool.quarantined)


def test_a_pool_that_holds_the_chain_but_not_the_proposal_is_no_reason_to_fail() -> None:
    bench = Bench(kv_tokens=8)
    bench.core.open(0, (1, 2, 3))
    coming = greedy([1, 2, 3], 9)
    assert ask(bench, 0, tuple(coming[:9])) == Proposal(tuple(coming[:6]), 5)
    with pytest.raises(ChainError, match="kv_tokens"):
        ask(bench, 0, ())


def test_preempted_in_the_midst_of_a_proposal() -> None:
    """Verified so far stays verified: what was dropped is computed again, and drawn no second time."""
    for swap in (False, True):
        core = lane(overlap=False, budget=4, swap=swap)
        core.open(0, (1, 2, 3, 4, 5, 6))
        coming = greedy([1, 2, 3, 4, 5, 6], 12)
        run(core)
        heard = propose(core, 0, tuple(coming[:11]), 99, GREEDY)
        core.step(lambda request, result: None)
        assert core._sequences[0].decode is not None and core._sequences[0].decode.accepted == 4
        core._sequences[0].drop_kv()
        run(core)
        assert heard == [(Proposal(tuple(coming[:12]), 11), None)]
        assert core.stats.sampled_tokens == 12
        assert core.stats.recomputed_tokens == 9


@pytest.mark.parametrize("late", [False, True])
def test_closed_in_the_midst_of_a_proposal_gives_every_page_back(late: bool) -> None:
    core = late_lane(budget=3) if late else lane(overlap=False, budget=3)
    core.open(0, (1, 2))
    run(core)
    heard = propose(core, 0, tuple(greedy([1, 2], 9)), 99, GREEDY)
    core.step(lambda request, result: None)
    core.close(0)
    assert isinstance(heard[0][1], ChainError)
    run(core)
    assert (core.open_sequences, core.pool.used) == (0, 0)
    assert core.stats.discarded_rows == (3 if late else 0)
    s = core.stats
    assert s.computed_tokens == s.distinct_tokens + s.recomputed_tokens + s.repeated_tokens


def test_scored_before_and_after_a_proposal() -> None:
    bench = Bench(budget=5)
    history = [2, 7]
    bench.core.open(0, tuple(history))
    bench.post(0, lambda reply: Append((4, 1, 3), True, reply))
    history += [4, 1, 3]
    coming = greedy(history, 5)
    assert ask(bench, 0, (*coming[:3], (coming[3] + 1) % EOS)) == Proposal(tuple(coming[:4]), 3)
    bench.append(0, [5])
    verdict = bench.ask(0, lambda reply: Verdict(None, reply))
    after = history + coming[:4]
    wanted = [log_probability(history[:p], history[p]) for p in (2, 3, 4)] + [log_probability(after, 5)]
    assert verdict.logprobs == pytest.approx(wanted, abs=1e-6)


def test_proposals_are_served_as_decoding_beside_a_long_prompt() -> None:
    """In one step, and the prompt keeps its share of the rows."""
    bench = Bench(budget=16)
    bench.core.open(0, (1, 2))
    bench.run()
    bench.core.open(1, tuple(i % EOS for i in range(60)))
    coming = greedy([1, 2], 40)
    for at in range(0, 30, 10):
        heard = propose(bench.core, 0, tuple(coming[at : at + 9]), 99, GREEDY)
        rows = bench.core._sequences[1].computed
        bench.core.step(lambda request, result: None)
        assert heard == [(Proposal(tuple(coming[at : at + 10]), 9), None)]
        assert bench.core._sequences[1].computed == rows + 6
    many = Bench(budget=16)
    for i in range(4):
        many.core.open(i, (i, 1))
    many.run()
    many.core.open(9, tuple(i % EOS for i in range(60)))
    for _ in range(8):
        for i in range(4):
            propose(many.core, i, (1,) * 20, 99, GREEDY)
        many.core.step(lambda request, result: None)
    assert many.core._sequences[9].computed >= 8 * 16 // 8 - 2


def test_decoding_goes_on_as_if_nothing_had_been_proposed() -> None:
    bench = Bench()
    bench.core.open(0, (1, 2, 3))
    coming = greedy([1, 2, 3], 10)
    chunks: list[TokenChunk] = []
    ask(bench, 0, (coming[0], (coming[1] + 1) % EOS, 3, 4, 5, 6))
    bench.ask(0, lambda reply: Decode(8, GREEDY, 64, chunks.append, reply))
    assert list(chunks[0].tokens) == coming[2:]


# How often a proposal is accepted ----------------------------------------------------------------------------------


def gumbel_agreement(p: torch.Tensor, q: torch.Tensor) -> float:
    """P(argmax(log p + g) = argmax(log q + g)) for common standard Gumbel noise g. With E = exp(-g), exponential, token
    i wins both where E_j >= E_i max(p_j / p_i, q_j / q_i) for every j; integrating over E_i gives the sum."""
    p, q = p.double(), q.double()
    return sum(float(1 / torch.maximum(p / p[i], q / q[i]).sum()) for i in range(len(p)) if p[i] > 0 and q[i] > 0)


def assert_binomial(hits: int, trials: int, chance: float) -> None:
    low, high = stats.binom.interval(1 - 1e-6, trials, chance)
    assert low <= hits <= high


@pytest.mark.parametrize("case", range(4))
def test_common_noise_draws_the_same_token_as_often_as_the_formula_says(case: int) -> None:
    generator = torch.Generator().manual_seed(case)
    logits = torch.randn(2, 6, generator=generator) * 1.5
    if case == 3:
        logits[0, :2], logits[1, 2:4] = float("-inf"), float("-inf")
    p, q = logits.softmax(1)
    trials = 20000
    one = torch.ones(trials)
    settings_ = one, one.long() * 0, one, one * 0, torch.arange(trials), torch.full((trials,), 17)
    drawn = [ops.sample(row.expand(trials, -1).contiguous(), *settings_) for row in logits]
    chance = gumbel_agreement(p, q)
    distance = float((p - q).abs().sum() / 2)
    assert (1 - distance) / (1 + distance) - 1e-6 <= chance <= 1 - distance + 1e-6
    assert_binomial(int((drawn[0] == drawn[1]).sum()), trials, chance)
    for row, probabilities in zip(drawn, (p, q), strict=True):
        for token in range(6):
            assert_binomial(int((row == token).sum()), trials, float(probabilities[token]))


def test_lanes_with_one_stream_accept_as_often_as_the_formula_says() -> None:
    """The draft draws from a flatter distribution than the target, with the target's stream key."""
    at, count, block = (1.5, 3.0), 400, 3
    logits = torch.zeros(VOCAB)
    logits[0] = 4.0
    chance = gumbel_agreement((logits / at[0]).softmax(0), (logits / at[1]).softmax(0))
    draft, target = (lane(overlap=False, budget=4096, kv_tokens=40_000) for _ in range(2))
    heard, proposals = [], []
    for i in range(count):
        prompt = (i % EOS, i // EOS % EOS, i // EOS // EOS)
        written: list[TokenChunk] = []
        draft.open(i, prompt)
        hot = SamplingParams(temperature=at[1], seed=i, ignore_eos=True)
        draft.command(i, Decode(block, hot, 64, written.append, lambda value, error: None))
        proposals.append(written)
    run(draft)
    for i, written in enumerate(proposals):
        target.open(i, (i % EOS, i // EOS % EOS, i // EOS // EOS))
        sampling = SamplingParams(temperature=at[0], seed=i, ignore_eos=True)
        heard.append(propose(target, i, written[0].tokens, 99, sampling))
    run(target)
    accepted = [result.accepted for ((result, _),) in heard]
    for n in range(1, block + 1):
        assert_binomial(sum(a >= n for a in accepted), count, chance**n)
    assert target.stats.accepted_tokens == sum(accepted)
