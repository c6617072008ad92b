"""What a span is worth, and the two gates that test it: rules by hand, rates by exact bounds, logs that replay."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom

from atts_engine import AsyncEngine, Decision, InputError, Problem
from atts_engine.conformal import Adaptive, Meta, Mondrian, StateError, load_calibrator
from atts_engine.errors import ChainError
from atts_engine.evaluation.decisions import check_log
from atts_engine.evaluation.register_task import RegisterTask
from atts_engine.evaluation.replay import scored_spans
from atts_engine.evaluation.traces import read_chains
from atts_engine.pipeline.asking import Question
from atts_engine.pipeline.gate import Appraisal, ConformalGate, Place
from atts_engine.pipeline.scorers import (
    Coin,
    Drafted,
    Scorer,
    SpanLength,
    TargetRating,
    TaskReward,
    TurnNumber,
    expected_rating,
    likeliest_rating,
)
from atts_engine.pipeline.settings import CoinToss, LongestSpans, RewardGuided, SpecReason
from atts_engine.pipeline.task import PlainTask
from atts_engine.pipeline.uncalibrated import RankingGate, ThresholdGate
from atts_engine.runtime.records import SpanResult
from tests.test_engine import CONFIG, PARAMS, problems, with_engine

RESULT = SpanResult(-6.0, 4, 1.5)


class Rewards(PlainTask):
    def __init__(self, reward: float) -> None:
        self.value = reward

    def reward(self, problem: Problem, before: str, span: str) -> float:
        return self.value


class OneResult:
    async def verdict(self, seq: Any, gate: Any) -> SpanResult:
        assert gate is None
        return RESULT


def drafted(chain: int = 0, turn: int = 0, n_tokens: int = 5, seed: int = 0) -> Drafted:
    return Drafted(Problem("p", "?"), Place("p", chain, turn), seed, "", "", n_tokens)


def value(scorer: Scorer, span: Drafted) -> float:
    return asyncio.run(scorer.score(span, None, None, RESULT)).value  # type: ignore[arg-type]


def appraisal(score: float, by_turn: bool = True) -> Appraisal:
    async def given(result: SpanResult) -> float:
        assert result is RESULT
        return score

    return Appraisal(given, by_turn)


PLACE = Place("p", 0, 0)


def ask(gate: Any, score: float, place: Place = PLACE, by_turn: bool = True) -> Any:
    return asyncio.run(gate.ask(OneResult(), None, place, 0, appraisal=appraisal(score, by_turn)))


# Rules -------------------------------------------------------------------------------------------------------------


def test_spec_reason_keeps_a_rating_of_seven_and_takes_over_what_is_below() -> None:
    gate = ThresholdGate(SpecReason().worst(0.4))
    below = float(np.nextafter(7.0, 0.0))
    for rating, taken in ((9.0, False), (7.0, False), (below, True), (6.0, True), (0.0, True)):
        judged = ask(gate, 9.0 - rating)
        assert judged.takeover is taken
        # The record keeps the likelihood beside what was tested.
        assert (judged.score, judged.tested, judged.p_value) == (1.5, 9.0 - rating, None)


def test_reward_guided_keeps_a_reward_of_seven_tenths() -> None:
    gate = ThresholdGate(RewardGuided().worst(0.4))
    for reward, taken in ((1.0, False), (0.7, False), (float(np.nextafter(0.7, 0.0)), True), (0.5, True), (0.0, True)):
        assert ask(gate, value(TaskReward(Rewards(reward)), drafted())).takeover is taken
    # A judge of steps on the scale of 0 to 9: 7/9 is a rating of 7.
    gate = ThresholdGate(SpecReason(judge="task").worst(0.4))
    for reward, taken in ((7 / 9, False), (0.77, True)):
        assert ask(gate, value(TaskReward(Rewards(reward), 9.0), drafted())).takeover is taken


def test_a_threshold_of_its_own_where_there_is_one() -> None:
    assert SpecReason(threshold=4).worst(0.4) == 5.0
    assert CoinToss().worst(0.4) == 0.6
    with pytest.raises(InputError, match="LongestSpans has no threshold"):
        LongestSpans().worst(0.4)


def test_ratings_by_hand() -> None:
    even = [math.log(0.1)] * 10
    assert likeliest_rating(even) == 0
    assert expected_rating(even) == pytest.approx(4.5)
    # 3 with weight 1 and 8 with weight 3, however little of the probability digits have at all.
    sharp = [-math.inf] * 10
    sharp[3], sharp[8] = math.log(1e-9), math.log(3e-9)
    assert likeliest_rating(sharp) == 8
    assert expected_rating(sharp) == pytest.approx(0.25 * 3 + 0.75 * 8)


def test_controls_see_what_they_say() -> None:
    assert value(SpanLength(), drafted(n_tokens=7)) == 7.0
    assert value(TurnNumber(), drafted(turn=3)) == 3.0
    assert not TurnNumber.by_turn
    # The same lot whoever runs beside, another one for another chain, turn or seed.
    assert value(Coin(), drafted(1, 2)) == value(Coin(), drafted(1, 2, n_tokens=9))
    lots = {value(Coin(), drafted(chain, turn, seed=seed)) for chain in (0, 1) for turn in (0, 1) for seed in (0, 1)}
    assert len(lots) == 8


def test_the_coin_takes_over_alpha_of_the_spans() -> None:
    n, alpha = 4000, 0.4
    gate = ThresholdGate(CoinToss().worst(alpha))
    taken = sum(ask(gate, value(Coin(), drafted(i % 40, i // 40))).takeover for i in range(n))
    assert binom.ppf(5e-7, n, alpha) <= taken <= binom.ppf(1 - 5e-7, n, alpha)


def test_a_score_that_is_no_number_is_an_error_of_its_chain() -> None:
    for gate in (ThresholdGate(1.0), ConformalGate(Mondrian(0.4)), RankingGate([0], 0.4)):
        with pytest.raises(ChainError, match="score is nan"):
            ask(gate, math.nan)


def test_ranks_are_those_of_the_score_that_is_given() -> None:
    async def work() -> list[bool]:
        gate = RankingGate(range(3), 1 / 3)
        asked = [
            gate.ask(OneResult(), None, Place("p", i, 0), 0, appraisal=appraisal(score))  # type: ignore[arg-type]
            for i, score in enumerate((1.0, 3.0, 2.0))
        ]
        return [judged.takeover for judged in await asyncio.gather(*asked)]

    assert asyncio.run(work()) == [False, True, False]


# The conformal gate with other scores ------------------------------------------------------------------------------


@pytest.mark.parametrize("by_turn", [True, False])
def test_the_score_that_is_tested_is_logged_and_learnt_and_its_log_replays(by_turn: bool) -> None:
    log: list[Decision] = []
    calibrator = Adaptive(0.4)
    gate = ConformalGate(calibrator, log.append)
    rng = np.random.default_rng(0)
    given = [float(rng.integers(0, 10)) / 3 for _ in range(300)]
    for i, score in enumerate(given):
        judged = ask(gate, score, Place(f"p{i // 30}", i % 5, i // 5 % 6), by_turn)
        assert (judged.score, judged.tested) == (1.5, float(np.float32(score)))
    assert [d.score for d in log] == [float(np.float32(score)) for score in given]
    assert {d.key for d in log} == (set(range(6)) if by_turn else {0})
    assert sum(calibrator.arrays()["size"]) == len(log)
    assert check_log(log, Adaptive(0.4)) is None
    assert check_log([*log[:-1], replace(log[-1], score=log[-1].score + 1)], Adaptive(0.4)) is not None


def test_later_turns_of_recorded_chains_are_taken_over_at_alpha(shared: Path) -> None:
    """The control `turn-number` on the turns of a recording: alpha of all, and the late ones rather than the early."""
    spans = scored_spans(read_chains(min((shared / "data" / "traces").glob("*.jsonl*"))))
    gate, taken = ConformalGate(Adaptive(0.4)), []
    for span in spans:
        place = Place(span.problem_id, span.chain, span.turn)
        taken.append(ask(gate, float(span.turn), place, by_turn=False).takeover)
        assert abs(sum(taken) - 0.4 * len(taken)) <= max(1.0, 0.02 * len(taken)) + 1e-9
    turns = np.array([span.turn for span in spans])
    assert turns[np.array(taken)].mean() > turns[~np.array(taken)].mean()


def test_a_calibration_of_another_score_is_refused_by_name(tmp_path: Path) -> None:
    params = replace(PARAMS, strategy="rsd", options=(("gate", "conformal"),))

    async def work(engine: AsyncEngine) -> None:
        meta = engine.calibration_meta(params)
        assert meta.score == "task-reward of steps"
        with pytest.raises(InputError, match="scores of mean-nll, but the strategy rsd tests task-reward of steps"):
            await engine.solve(problems(1)[0], params, calibrator=Mondrian(0.4), task=RegisterTask())
        Mondrian(0.4, meta=engine.calibration_meta(PARAMS)).save(tmp_path / "nll.npz")
        with pytest.raises(StateError, match="score: is 'mean-nll', expected 'task-reward of steps'"):
            load_calibrator(tmp_path / "nll.npz", meta)
        own = Mondrian(0.4, meta=Meta(score="task-reward of steps"))
        solution = await engine.solve(problems(1)[0], params, calibrator=own, task=RegisterTask())
        assert sum(int(n) for n in own.store.size) == sum(len(c.turns) for c in solution.chains)

    with_engine(work)


# The target as a judge ---------------------------------------------------------------------------------------------

ASKED = "\n\n\\boxed{"
"""A question that the built-in vocabulary can spell: which digit comes next."""


def test_the_rating_is_read_off_the_ten_digits_alone() -> None:
    transformers = pytest.importorskip("transformers", reason="the oracle of this test is transformers (extra: dev)")
    from atts_engine.models.load import resolve

    async def work(engine: AsyncEngine) -> None:
        lane, codec = engine._pair.target, engine.target_model.tokenizer
        prompt = engine._prompts(problems(1)[0]).target
        oracle = transformers.LlamaForCausalLM.from_pretrained(resolve("tiny-target"), dtype=torch.float32).eval()
        digits = [codec.encode(str(digit))[0] for digit in range(10)]
        eos = codec.eos_token_ids[0]
        for ended in (False, True):
            seq = await lane.open((*prompt, *((eos,) if ended else ())))
            span = replace(drafted(), end_ids=int(ended), waiting=tuple(codec.encode("b = ")))
            held = [*prompt, *span.waiting, *codec.encode(ASKED)]
            with torch.no_grad():
                logprobs = oracle(torch.tensor([held])).logits[0, -1].double().log_softmax(-1)[digits]
            found = await Question(codec, ASKED, [str(i) for i in range(10)]).ask(
                lane, seq, end_ids=span.end_ids, waiting=span.waiting
            )
            assert found.logprobs == pytest.approx(logprobs.tolist(), abs=1e-4)
            assert found.read == len(span.waiting) + len(codec.encode(ASKED)) + len(digits)
            likeliest = await TargetRating(codec, prompt=ASKED).score(span, lane, seq, RESULT)
            assert likeliest == (9.0 - int(logprobs.argmax()), 1, found.read)
            mean = await TargetRating(codec, prompt=ASKED, expected=True).score(span, lane, seq, RESULT)
            expected = float((torch.arange(10) * logprobs.softmax(-1)).sum())
            assert mean.value == pytest.approx(9.0 - expected, abs=1e-4)
            # The chain's own sequence is where it was.
            assert seq.length == len(prompt) + ended
            await lane.close(seq)

    with_engine(work, CONFIG)


def test_a_question_that_cannot_be_put_is_refused() -> None:
    async def work(engine: AsyncEngine) -> None:
        for strategy, mend in (("spec-reason", "choose another judge"), ("lookahead", "set judge=task")):
            with pytest.raises(InputError, match=f"no token for 'H'.*{mend}"):
                await engine.solve(problems(1)[0], replace(PARAMS, strategy=strategy), task=RegisterTask())
        for strategy in ("rsd", "lookahead"):
            options = (("judge", "task"),) if strategy == "lookahead" else ()
            with pytest.raises(InputError, match="the problems' task has none: use --task registers"):
                await engine.solve(problems(1)[0], replace(PARAMS, strategy=strategy, options=options))

    with_engine(work)
    with pytest.raises(InputError, match="not told apart"):
        from atts_engine.models import load_model

        Question(load_model("tiny-target", "cpu", torch.float32).tokenizer, "1", ["2", "2"])


# The register task -------------------------------------------------------------------------------------------------

PROBLEM = Problem("r", "a = 85; b = a-43; c = b+11; c?", "53")


@pytest.mark.parametrize(
    ("before", "span", "reward"),
    [
        ("", "b = a-43 = 85-43 = 42\n\n", 1.0),
        ("", "b = a-43 = 85-43 = 41\n\n", 0.0),
        ("", "b = a-43 = 85-43 = 42\n\nc = b+11 = 42+11 = 54\n\n", 0.5),
        # A step that the span leaves unfinished is right as far as it goes.
        ("", "b = a-43 = 85-4", 1.0),
        ("", "b = a-43 = 85-5", 0.0),
        ("b = a-43 = 85-4", "3 = 42\n\n", 1.0),
        ("b = a-43 = 85-4", "3 = 43\n\n", 0.0),
        # Steps of before do not count, wrong as they may be.
        ("b = a-43 = 85-43 = 41\n\n", "c = b+11 = 42+11 = 53", 1.0),
        ("b = a-43 = 85-43 = 41", "\n\nWait, b = a-43 = 85-43 = 42\n\n", 1.0),
        # Nothing stated, nothing wrong.
        ("b = a-43 = 85-43 = 42", "\n\n", 1.0),
        ("", "", 1.0),
        ("", "Wait, ", 1.0),
        ("c = b+11 = 42+11 = 53\n\n", "\\boxed{53}", 1.0),
        ("c = b+11 = 42+11 = 53\n\n", "\\boxed{54}", 0.0),
        ("c = b+11 = 42+11 = 53\n\n\\boxed{5", "4}", 0.0),
        ("c = b+11 = 42+11 = 53\n\n", "\\boxed{5", 1.0),
        ("", "c = b+11 = 42+11 = 53\n\n\\boxed{54}", 0.5),
    ],
)
def test_the_register_task_checks_what_a_span_states(before: str, span: str, reward: float) -> None:
    assert RegisterTask().reward(PROBLEM, before, span) == reward


def test_answers_of_the_register_task_are_graded_and_other_problems_refused() -> None:
    assert RegisterTask().equal("53", "53.0") and not RegisterTask().equal("53", "54")
    with pytest.raises(InputError, match="not a register problem"):
        RegisterTask().reward(Problem("x", "What is 2+2?"), "", "4")
