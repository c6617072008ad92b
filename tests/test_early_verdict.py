"""Early verdicts: the rule is sound, the engine acts on it and on nothing else, and its log replays."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atts_engine import AsyncEngine, ATTSParams, Chain, Decision, EngineConfig, InputError, Problem, VerdictEvent, ops
from atts_engine.cli import main as cli
from atts_engine.conformal import (
    Calibrator,
    ColdStart,
    Mondrian,
    Monitored,
    Split,
    Weighted,
    lowest_score,
    make_calibrator,
)
from atts_engine.conformal.settled import ROUNDING
from atts_engine.errors import ChainError
from atts_engine.evaluation.decisions import check_log
from atts_engine.evaluation.jsonl import read_lines
from atts_engine.evaluation.measures import takeover_rates
from atts_engine.evaluation.replay import scored_spans
from atts_engine.evaluation.traces import chain_from_line, chain_to_json
from atts_engine.pipeline.chain import run_chain
from atts_engine.pipeline.gate import ConformalGate, Judged, Place
from atts_engine.pipeline.records import Turn
from atts_engine.pipeline.streams import gate_uniform
from atts_engine.pipeline.translation import Tongues, Words
from atts_engine.pipeline.writer import ChainSpec, Prompts
from atts_engine.runtime.commands import Append, Scored, Verdict
from tests.fakes import log_probability
from tests.test_cli import PAIR, SMALL, fails, problems, run_words  # noqa: F401  (a fixture)
from tests.test_engine import CONFIG, PARAMS, content, with_engine
from tests.test_engine import problems as register_problems
from tests.test_lane import Bench
from tests.test_two_tokenizers import ListLane, ListSeq, byte_level, said

# The rule ----------------------------------------------------------------------------------------------------------

PLACE = Place("p", 0, 0)
MAKERS: dict[str, Any] = {
    **{name: lambda name=name: make_calibrator(name, 0.4) for name in ("adaptive", "aci", "mondrian", "window")},
    "split": lambda: Split(0.4),
    "split-pac": lambda: Split(0.4, pac=0.2),
    "weighted": lambda: Weighted(0.4, rho=0.7),
    **{name: lambda name=name: make_calibrator(name, 0.4) for name in ("hierarchical", "tracker")},
    **{
        f"mondrian-{rule}": lambda rule=rule: Mondrian(0.4, cold=ColdStart(rule, 12))
        for rule in ("coin", "accept", "takeover", "borrow")
    },
}
HAIR = float(np.float32(ROUNDING / 2))
# Coarse values make ties with the calibration scores; a hair above 0 is what rounding may give.
LOGPROBS = st.one_of(
    st.integers(0, 24).map(lambda n: -n / 8),
    st.floats(-60.0, 0.0, width=32),
    st.floats(0.0, HAIR, width=32),
)
SCORES = st.one_of(st.integers(0, 24).map(lambda n: n / 8), st.floats(0.0, 30.0, width=32))


def mean_score(logprobs: Sequence[float]) -> float:
    values = torch.tensor(logprobs, dtype=torch.float32)
    return float(ops.span_mean(values, torch.tensor([0, len(logprobs)]))[0])


@settings(max_examples=500)
@given(
    name=st.sampled_from(sorted(MAKERS)),
    stored=st.lists(st.tuples(SCORES, st.sampled_from(["p", "q", "r"])), max_size=30),
    seed=st.integers(0, 2**32),
    span=st.lists(LOGPROBS, min_size=1, max_size=24),
    other=st.lists(LOGPROBS, max_size=24),
    room=st.integers(0, 8),
    turn=st.integers(0, 1),
)
def test_what_is_settled_is_taken_over_whatever_follows(
    name: str,
    stored: list[tuple[float, str]],
    seed: int,
    span: list[float],
    other: list[float],
    room: int,
    turn: int,
) -> None:
    calibrator: Calibrator = MAKERS[name]()
    for i, (score, problem) in enumerate(stored):
        calibrator.observe(score, 0, bool(i % 2), problem)
    calibrator.frozen = True
    gate, most, place = ConformalGate(calibrator), len(span) + room, Place("p", 0, turn)
    span, other = [float(np.float32(x)) for x in span], [float(np.float32(x)) for x in other]
    key, u = calibrator.key_of(turn), gate_uniform(seed, "p", 0, turn)

    def taken(score: float) -> bool:
        return calibrator.decide(score, key, u, "p").takeover

    n = gate.settled(place, seed, span, most)
    if n is None:
        # Whether it was settled does not depend on how much of the span was seen.
        assert all(gate.settled(place, seed, span[:m], most) is None for m in range(len(span)))
        assert not taken(lowest_score(sum(span), len(span), most))
        return
    for m in range(len(span) + 1):
        assert gate.settled(place, seed, span[:m], most) == (n if m >= n else None)
    seen = 0.0
    for value in span[:n]:
        seen += value
    bound = lowest_score(seen, n, most)
    assert taken(bound)
    for rest in (span[n:], other[: most - n], [HAIR] * (most - n), [0.0] * (most - n)):
        for end in range(len(rest) + 1):
            whole = mean_score(span[:n] + rest[:end])
            assert whole >= bound
            assert taken(whole)


@given(span=st.lists(LOGPROBS, min_size=1, max_size=40), room=st.integers(0, 9))
def test_the_bound_rises_to_the_score(span: list[float], room: int) -> None:
    span = [float(np.float32(x)) for x in span]
    sums = [0.0]
    for value in span:
        sums.append(sums[-1] + value)
    bounds = [lowest_score(total, n, len(span) + room) for n, total in enumerate(sums)]
    assert all(before <= after for before, after in pairwise(bounds))
    assert lowest_score(sums[-1], len(span), len(span)) == mean_score(span)


@pytest.mark.parametrize("scale", [1.0, 30.0, 100.0])
def test_a_computed_log_probability_hardly_rises_above_0(scale: float) -> None:
    """What `ROUNDING` allows for, on logits that leave one token almost all of the probability."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(600, 64, generator=generator)
    hidden = torch.nn.functional.normalize(weight[:256], dim=1) * scale
    ids = torch.arange(256)
    for logprob in (ops.score_tokens(hidden, weight, ids), ops.score_logits(hidden @ weight.T, ids)):
        assert float(logprob.max()) <= HAIR


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_no_rounding_lets_a_p_value_rise_with_the_score(name: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        calibrator: Calibrator = MAKERS[name]()
        for score in rng.integers(0, 20, size=rng.integers(5, 200)):
            calibrator.observe(float(score) / 8, 0, False, str(rng.integers(6)))
        u = int(rng.choice([1 << 32, rng.integers(1, 1 << 32)]))
        found = [calibrator.p_value(score / 16, 0, u, "0") for score in range(-2, 44)]
        assert all(before >= after for before, after in pairwise(found))


def test_nothing_is_settled_by_no_tokens() -> None:
    always = Mondrian(0.4, cold=ColdStart("takeover", 5), frozen=True)
    gate = ConformalGate(always)
    assert gate.settled(PLACE, 0, (), 24) is None
    assert gate.settled(PLACE, 0, (0.0, -1.0), 24) == 1


# The lane ----------------------------------------------------------------------------------------------------------


def test_a_lane_tells_what_it_has_scored_and_waits_only_if_asked_to() -> None:
    bench = Bench(budget=4)
    bench.core.open(0, (1, 2, 3))
    bench.run()
    tokens = [4, 5, 6, 7, 8, 9]
    expected = [log_probability([1, 2, 3, *tokens[:i]], token) for i, token in enumerate(tokens)]
    bench.post(0, lambda reply: Append(tuple(tokens), True, reply))
    assert bench.post(0, lambda reply: Scored(False, reply)) == [((), None)]
    bench.core.step(lambda request, result: None)
    ((some, _),) = bench.post(0, lambda reply: Scored(False, reply))
    assert some == pytest.approx(expected[:4], abs=1e-6)
    waiting = bench.post(0, lambda reply: Scored(True, reply))
    assert not waiting
    bench.run()
    ((whole, _),) = waiting
    assert whole == pytest.approx(expected, abs=1e-6)
    assert bench.verdict(0).logprobs == whole
    assert bench.ask(0, lambda reply: Scored(True, reply)) == ()


@pytest.mark.parametrize("wait", [False, True])
def test_scores_that_are_not_finite_end_the_chain_that_asks(wait: bool) -> None:
    bench = Bench(poison=5)
    bench.core.open(0, (1, 2, 3))
    bench.run()
    bench.append(0, [4, 5, 6, 7])
    queued = bench.post(0, lambda reply: Scored(wait, reply))
    ((_, error),) = queued
    assert isinstance(error, ChainError) and "NaN or infinity" in str(error)
    with pytest.raises(ChainError, match="closed"):
        bench.ask(0, lambda reply: Verdict(None, reply))
    assert bench.core.open_sequences == 0


# The chain ---------------------------------------------------------------------------------------------------------


class Settling:
    """A gate that finds spans settled at random places, some before they are whole, some after."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.at: dict[Place, int] = {}
        self.cuts = 0

    async def ask(self, lane: Any, seq: Any, place: Place, seed: int, most: int | None = None, **_: Any) -> Judged:
        result = await lane.verdict(seq, None)
        self.cuts += most is not None
        return Judged(result.score, most is not None or self.rng.random() < 0.3, sum_logprob=result.sum_logprob)

    def settled(self, place: Place, seed: int, logprobs: Sequence[float], most: int) -> int | None:
        at = self.at.setdefault(place, self.rng.randint(1, most + 3))
        return at if at <= len(logprobs) else None

    def begin(self, problem_id: str, chains: Sequence[int]) -> None: ...

    def enter(self, place: Place) -> None: ...

    def leave(self, place: Place) -> None: ...

    def end(self, problem_id: str) -> None: ...


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32), takeover=st.sampled_from(["continue", "replace"]), span=st.integers(1, 12))
def test_both_lanes_and_the_text_are_cut_in_one_place(seed: int, takeover: str, span: int) -> None:
    """Tokens are bytes as often as words, so that spans are cut inside characters too."""
    rng = random.Random(seed)
    codec = byte_level(300)
    d, t = ListSeq(), ListSeq()

    def in_step() -> None:
        assert d.ids == t.ids

    lanes = ListLane(codec, rng, in_step), ListLane(codec, rng, in_step)
    words = Words(codec, frozenset({0}), 0)
    params = ATTSParams(chains=1, turns=6, draft_tokens=span, target_tokens=span, takeover=takeover, early_verdict=True)
    events: list[Any] = []
    spec = ChainSpec(Problem("p", "x"), 0, params, Tongues(words, words), Prompts((), ()), events.append)
    gate = Settling(rng)
    chain = asyncio.run(run_chain(spec, lanes[0], d, lanes[1], t, gate))
    assert chain.error is None
    assert sum(turn.early for turn in chain.turns) == gate.cuts
    for turn in chain.turns:
        if turn.early:
            assert turn.takeover and turn.draft_tokens == gate.at[Place("p", 0, turn.turn)]
            assert turn.score_per_byte is None
    told = [e.draft for e in events if isinstance(e, VerdictEvent)]
    for turn, text in zip(chain.turns, told, strict=True):
        assert (text is not None) == turn.early
    if takeover == "continue":
        kept = "".join(turn.draft + (turn.target or "") for turn in chain.turns)
        # A character that one span begins and the next one ends shows in neither span's own text.
        assert said(codec, d).replace("\ufffd", "").startswith(kept.split("\ufffd")[0])


# The engine --------------------------------------------------------------------------------------------------------

EARLY = replace(PARAMS, early_verdict=True)
SHORT = replace(CONFIG, chunk_tokens=3)


def frozen(calibrator: Calibrator | None = None) -> Calibrator:
    """Scores such as the pair's own are, so that spans are kept and taken over."""
    made = Mondrian(0.4) if calibrator is None else calibrator
    generator = np.random.default_rng(0)
    for key in range(10):
        for score in generator.gamma(0.6, 0.15, size=60):
            made.observe(float(score), key, False)
    made.frozen = True
    return made


class Run:
    """Chains of one run by (problem, chain), its decisions, and what the draft's lane wrote."""

    def __init__(
        self, params: ATTSParams, config: EngineConfig = SHORT, calibrator: Calibrator | None = None, in_flight: int = 3
    ) -> None:
        self.log: list[Decision] = []

        async def work(engine: AsyncEngine) -> list[Chain]:
            engine.add_decision_listener(self.log.append)
            slots, used = asyncio.Semaphore(in_flight), frozen(calibrator)

            async def one(problem: Problem) -> list[Chain]:
                async with slots:
                    return list((await engine.solve(problem, params, calibrator=used)).chains)

            solved = await asyncio.gather(*map(one, register_problems(3)))
            self.sampled = engine.stats()["draft"]["sampled_tokens"]
            return [content(c, chunks=False) for chains in solved for c in chains]

        found: list[Chain] = with_engine(work, config)
        self.chains = {(c.problem_id, c.chain): c for c in found}
        self.waits = [c.wait_s for c in found]


@pytest.fixture(scope="module")
def whole_replaced() -> Run:
    return Run(replace(PARAMS, takeover="replace"))


@pytest.fixture(scope="module")
def early_replaced() -> Run:
    return Run(replace(EARLY, takeover="replace"))


@pytest.fixture(scope="module")
def early_continued() -> Run:
    return Run(EARLY)


def test_replaced_spans_leave_the_same_text_for_fewer_draft_tokens(whole_replaced: Run, early_replaced: Run) -> None:
    cut = 0
    for name, whole in whole_replaced.chains.items():
        early = early_replaced.chains[name]
        assert (early.final_answer, early.finish, early.error) == (whole.final_answer, whole.finish, None)
        assert len(early.turns) == len(whole.turns)
        for ours, theirs in zip(early.turns, whole.turns, strict=True):
            assert (ours.takeover, ours.target) == (theirs.takeover, theirs.target)
            if not ours.early:
                assert replace(ours, early=False) == theirs
                continue
            cut += 1
            assert ours.takeover and ours.draft_tokens < theirs.draft_tokens
            assert theirs.draft.startswith(ours.draft)
            assert ours.score is not None and theirs.score is not None and ours.score <= theirs.score
            assert ours.p_value is not None and theirs.p_value is not None and ours.p_value >= theirs.p_value
    assert cut > 5
    assert early_replaced.sampled < whole_replaced.sampled
    written = sum(c.draft_tokens for c in early_replaced.chains.values())
    assert written < sum(c.draft_tokens for c in whole_replaced.chains.values())
    assert takeover_rates(early_replaced.chains.values())["early"] == cut
    assert takeover_rates(whole_replaced.chains.values())["early"] == 0
    assert all(wait is not None for wait in early_replaced.waits)


def test_continued_chains_have_the_same_verdicts_until_a_span_is_cut(early_continued: Run) -> None:
    whole, early = Run(PARAMS), early_continued
    cuts = 0
    for name, chain in whole.chains.items():
        for ours, theirs in zip(early.chains[name].turns, chain.turns):
            assert ours.takeover == theirs.takeover
            if ours.early:
                cuts += 1
                # From here on the target wrote behind another text.
                break
            assert replace(ours, early=False) == theirs
    assert cuts > 5


@pytest.mark.parametrize(
    ("config", "in_flight"),
    [
        (replace(SHORT, chunk_tokens=1), 1),
        (replace(SHORT, chunk_tokens=24, overlap=True, lane_threads="each"), 3),
        (replace(SHORT, chunk_tokens=5, max_batch_tokens=9, page_size=8, kv_tokens=900), 3),
    ],
)
def test_where_spans_end_depends_neither_on_chunks_nor_on_time(
    early_continued: Run, config: EngineConfig, in_flight: int
) -> None:
    assert any(t.early for c in early_continued.chains.values() for t in c.turns)
    assert Run(EARLY, config, in_flight=in_flight).chains == early_continued.chains


@pytest.mark.parametrize("name", ["mondrian", "weighted"])
def test_the_decision_log_replays(early_replaced: Run, name: str) -> None:
    """Counted in the lane, and on the host."""
    run = early_replaced
    if name != "mondrian":
        run = Run(replace(EARLY, takeover="replace"), calibrator=make_calibrator(name, 0.4))
    assert check_log(run.log, frozen(make_calibrator(name, 0.4))) is None
    turns = {(c.problem_id, c.chain, t.turn): t for c in run.chains.values() for t in c.turns}
    assert [d.decision_seq for d in run.log] == list(range(len(run.log)))
    assert len(turns) == len(run.log)
    for decision in run.log:
        turn = turns[decision.problem, decision.chain, decision.turn]
        assert (decision.score, decision.p_value) == (turn.score, turn.p_value)
        assert (decision.verdict == "takeover") == turn.takeover
    early = [d for d in run.log if turns[d.problem, d.chain, d.turn].early]
    assert early and all(d.verdict == "takeover" for d in early)
    forged = [replace(d, score=d.score / 2) if d is early[0] else d for d in run.log]
    assert check_log(forged, frozen(make_calibrator(name, 0.4))) is not None


def test_a_calibration_that_changes_under_way_is_an_error_of_that_chain() -> None:
    class Fickle(Settling):
        async def ask(self, lane: Any, seq: Any, place: Place, seed: int, most: int | None = None) -> Judged:
            return replace(await super().ask(lane, seq, place, seed, most), takeover=False)

    codec, rng = byte_level(300), random.Random(1)
    words = Words(codec, frozenset({0}), 0)
    params = ATTSParams(chains=1, turns=6, draft_tokens=20, target_tokens=5, early_verdict=True)
    lanes = ListLane(codec, rng, lambda: None), ListLane(codec, rng, lambda: None)
    spec = ChainSpec(Problem("p", "x"), 0, params, Tongues(words, words), Prompts((), ()), lambda event: None)
    chain = asyncio.run(run_chain(spec, lanes[0], ListSeq(), lanes[1], ListSeq(), Fickle(rng)))
    assert chain.finish == "error" and chain.error is not None and "did the calibration change" in chain.error


# What cannot be had ------------------------------------------------------------------------------------------------


def test_what_early_verdicts_cannot_go_with_is_refused() -> None:
    for bad, said_of in (({"strategy": "atts-sync"}, "strategy atts"), ({"policy": "exact-count"}, "threshold")):
        with pytest.raises(InputError, match=said_of):
            replace(EARLY, **bad)  # type: ignore[arg-type]

    async def work(engine: AsyncEngine) -> None:
        problem = register_problems(1)[0]
        with pytest.raises(InputError, match="needs a frozen calibration"):
            await engine.solve(problem, EARLY)
        with pytest.raises(InputError, match="monitor"):
            await engine.solve(problem, EARLY, calibrator=Monitored(frozen()))
        engine._pair = replace(engine._pair, tongues=replace(engine._pair.tongues, codecs=(None, None)))  # type: ignore[arg-type]
        with pytest.raises(InputError, match="shares a tokenizer"):
            await engine.solve(problem, EARLY, calibrator=frozen())

    with_engine(work)


@pytest.mark.parametrize(
    ("flags", "said_of"),
    [
        ([], "--early-verdict needs --calibration FILE --frozen"),
        (["--calibration", "STATE", "--frozen", "--monitor"], "--monitor"),
        (["--calibration", "STATE", "--frozen", "--policy", "exact-count"], "no policy but threshold"),
        (["--calibration", "STATE", "--frozen", "--mode", "sync"], "strategy atts, not to atts-sync"),
    ],
)
def test_the_command_line_refuses_before_any_work(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    problems: Path,  # noqa: F811
    flags: list[str],
    said_of: str,
) -> None:
    state = tmp_path / "state.npz"
    frozen(make_calibrator("adaptive", 0.4)).save(state)
    words = [str(state) if word == "STATE" else word for word in flags]
    assert said_of in fails(capsys, run_words(problems, tmp_path / "out", "--early-verdict", *words))
    assert not (tmp_path / "out").exists()


def test_eval_and_calibrate_say_what_they_cannot_do(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["eval", "--task", "registers", "--strategies", "draft,target", "--out", str(tmp_path / "out")]
    assert "leaves out" in fails(capsys, [*words, "--early-verdict"])
    words = ["calibrate", "--task", "registers", "--out", str(tmp_path / "x.npz"), "--early-verdict"]
    assert "unrecognized arguments: --early-verdict" in fails(capsys, words)


# Files -------------------------------------------------------------------------------------------------------------


def test_a_run_with_early_verdicts_is_told_apart(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    problems: Path,  # noqa: F811
) -> None:
    state, out = tmp_path / "state.npz", tmp_path / "out"
    words = ["calibrate", *PAIR, "--problems", str(problems), "--out", str(state), *SMALL]
    assert cli.main(words) == 0
    capsys.readouterr()
    flags = ["--calibration", str(state), "--frozen", "--early-verdict", "--alpha", "0.4", "--chunk-tokens", "1"]
    assert cli.main(run_words(problems, out, *flags, "--json", "-")) == 0
    found = json.loads(capsys.readouterr().out)
    chains = [chain_from_line(line) for line in read_lines(out / "chains.jsonl")]
    assert found["takeovers"]["early"] == sum(t.early for c in chains for t in c.turns)
    assert found["settings"]["params"]["early_verdict"] is True


def test_traces_keep_what_was_settled_early_and_a_replay_refuses_them(tmp_path: Path) -> None:
    turns = (Turn(0, "x", 3, 0.5, early=True, takeover=True, target="y"), Turn(1, "z", 3, 0.25))
    chain = Chain("p", 0, 0, None, None, 1.0, turns)
    path = tmp_path / "chains.jsonl"
    path.write_text(json.dumps(chain_to_json(chain)) + "\n")
    (back,) = [chain_from_line(line) for line in read_lines(path)]
    assert [t.early for t in back.turns] == [True, False]
    assert "early" not in chain_to_json(chain)["turns"][1]
    with pytest.raises(InputError, match=r"problem p, chain 0 holds early verdicts.*--early-verdict"):
        scored_spans([back])
    path.write_text(path.read_text().replace('"early": true', '"early": 1'))
    with pytest.raises(InputError, match="'early' must be true or false"):
        [chain_from_line(line) for line in read_lines(path)]
