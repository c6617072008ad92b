"""Strategies in which the draft writes and the target takes over: on the built-in pair, and word by word."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Hashable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atts_engine import AsyncEngine, ATTSParams, Chain, ChainEvent, Decision, Problem, TokensEvent, VerdictEvent
from atts_engine.conformal import Meta, Mondrian
from atts_engine.errors import ChainError
from atts_engine.evaluation.decisions import check_log
from atts_engine.evaluation.jsonl import Line
from atts_engine.evaluation.measures import takeover_rates, tokens_by_author
from atts_engine.evaluation.register_task import RegisterTask
from atts_engine.evaluation.traces import chain_from_line, chain_to_json
from atts_engine.pipeline import Pair, Prompts, Tongues, Words, parse_strategy, run_problem
from atts_engine.pipeline.settings import SpeculativeThinking
from atts_engine.pipeline.strategies.speculative_thinking import RECAP, sentiment
from atts_engine.pipeline.uncalibrated import ThresholdGate
from atts_engine.runtime.records import SamplingParams, SpanResult, TokenChunk
from tests.test_engine import content, problems, with_engine
from tests.test_two_tokenizers import ListLane, ListSeq, byte_level, said

PARAMS = ATTSParams(chains=3, turns=12, draft_tokens=24, target_tokens=24, seed=3)
TASK = RegisterTask()
LOOPS = (
    "atts:span=step",
    "coin",
    "lookahead:judge=exact",
    "lookahead:judge=task:depth=2",
    "rsd",
    "rsd:gate=conformal",
    "span-length",
    "spec-reason:judge=task",
    "speculative-thinking",
    "turn-number",
)


async def all_of(stream: AsyncGenerator[Any, None]) -> list[Any]:
    return [event async for event in stream]


def of(text: str, params: ATTSParams = PARAMS) -> ATTSParams:
    name, options = parse_strategy(text)
    return replace(params, strategy=name, options=options)


def text_of(chain: Chain) -> str:
    """What the chain's turns left, where the target's span takes the draft's place."""
    return "".join(turn.target or "" if turn.takeover else turn.draft for turn in chain.turns)


def frozen(params: ATTSParams) -> Mondrian:
    calibrator = Mondrian(params.alpha, meta=Meta(score=params.settings.score))
    rng = np.random.default_rng(0)
    for key in range(12):
        for score in rng.choice([0.0, 0.5, 1.0, 4.5, 9.0, 18.0], 40):
            calibrator.observe(float(score), key)
    calibrator.frozen = True
    return calibrator


# On the built-in pair ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs() -> dict[str, tuple[list[Chain], list[Decision], list[Any]]]:
    """Chains, decisions and events of every strategy over two problems, by a fresh calibrator of the engine's."""

    async def work(engine: AsyncEngine) -> dict[str, Any]:
        found = {}
        for text in LOOPS:
            log: list[Decision] = []
            stop = engine.add_decision_listener(log.append)
            params, events = of(text), list[Any]()
            calibrator = Mondrian(params.alpha, meta=engine.calibration_meta(params))

            streams = [engine.generate(p, params, calibrator=calibrator, task=TASK) for p in problems(2)]
            events += [event for told in await asyncio.gather(*map(all_of, streams)) for event in told]
            stop()
            found[text] = [e.chain for e in events if isinstance(e, ChainEvent)], log, events
        return found

    return with_engine(work)  # type: ignore[no-any-return]


@pytest.mark.parametrize("text", LOOPS)
def test_every_loop_answers_and_its_figures_add_up(text: str, runs: Any) -> None:
    chains, log, events = runs[text]
    params = of(text)
    assert len(chains) == 6 and all(chain.error is None and chain.strategy == params.strategy for chain in chains)
    assert sum(chain.final_answer is not None for chain in chains) >= 5
    verdicts = sum(turn.judged for chain in chains for turn in chain.turns)
    assert takeover_rates(chains)["decisions"] == verdicts > 0
    assert len(log) == (verdicts if params.settings.calibrated else 0)
    assert check_log(log, Mondrian(params.alpha)) is None
    tested = sorted((e.problem_id, e.chain, e.turn, e.score) for e in events if isinstance(e, VerdictEvent))
    kept = [(c, t, t.score if t.tested is None else t.tested) for c in chains for t in c.turns if t.judged]
    assert tested == sorted((c.problem_id, c.chain, t.turn, pytest.approx(score)) for c, t, score in kept)
    for chain in chains:
        # Texts as they were told are those on record.
        for turn in chain.turns:
            mine = [e for e in events if isinstance(e, TokensEvent) and e.problem_id == chain.problem_id]
            mine = [e for e in mine if (e.chain, e.turn) == (chain.chain, turn.turn)]
            for author, text_told in (("draft", turn.draft), ("target", turn.target or "")):
                assert "".join(e.text for e in mine if e.author == author) == text_told
        back = chain_from_line(Line(chain_to_json(chain), "x"))
        assert back == chain
        assert (back.draft_tokens, back.target_tokens) == (chain.draft_tokens, chain.target_tokens)


@pytest.mark.parametrize("text", ["rsd", "spec-reason:judge=task"])
def test_takeovers_by_a_threshold_are_the_steps_that_the_judge_finds_wanting(text: str, runs: Any) -> None:
    chains, _, _ = runs[text]
    given = {p.id: p for p in problems(2)}
    scale, least = (1.0, 0.7) if text == "rsd" else (9.0, 7.0)
    taken = 0
    for chain in chains:
        before = ""
        for turn in chain.turns:
            reward = TASK.reward(given[chain.problem_id], before, turn.draft)
            assert turn.tested == scale - scale * reward
            assert turn.takeover is (scale * reward < least)
            assert turn.score is not None and turn.ppl is not None
            taken += turn.takeover
            before += turn.target or "" if turn.takeover else turn.draft
        # A chain that has every wrong step replaced by a target that makes none is right.
        assert chain.final_answer == chain.gold
    assert taken > 0


def test_a_step_ends_at_a_blank_line(runs: Any) -> None:
    for text in ("atts:span=step", "rsd", "lookahead:judge=exact", "span-length"):
        for chain in runs[text][0]:
            written = [turn.draft for turn in chain.turns]
            written += [turn.target for turn in chain.turns if turn.target is not None]
            assert all("\n\n" not in step[:-2] for step in written)
            assert sum(step.endswith("\n\n") for step in written) >= len(written) - 3
            assert all(turn.draft_tokens <= 24 and turn.target_tokens <= 24 for turn in chain.turns)


def test_lookahead_with_an_exact_judge_writes_the_target_s_own_text(runs: Any) -> None:
    async def work(engine: AsyncEngine) -> dict[tuple[str, int], str]:
        solved = [await engine.solve(p, of("target"), task=TASK) for p in problems(2)]
        return {(c.problem_id, c.chain): c.turns[0].target or "" for s in solved for c in s.chains}

    alone = with_engine(work)
    chains = runs["lookahead:judge=exact"][0]
    for chain in chains:
        assert text_of(chain) == alone[chain.problem_id, chain.chain]
        kept = sum(turn.draft_tokens for turn in chain.turns if not turn.takeover)
        # Behind every step of the draft the target wrote one of its own; those that match count as thrown away.
        assert chain.target_tokens >= chain.extra["discarded_target_tokens"] >= kept
        assert chain.draft_tokens == sum(t.draft_tokens for t in chain.turns) + chain.extra.get(
            "discarded_draft_tokens", 0
        )
    assert any(turn.takeover for chain in chains for turn in chain.turns)
    assert tokens_by_author(chains) == {
        "draft": sum(c.draft_tokens for c in chains),
        "target": sum(c.target_tokens for c in chains),
    }


@pytest.mark.parametrize("text", ["rsd:gate=conformal", "lookahead:judge=task", "speculative-thinking"])
def test_same_chains_alone_and_side_by_side(text: str) -> None:
    params = replace(of(text), chains=2)

    def run(in_flight: int) -> list[Chain]:
        async def work(engine: AsyncEngine) -> list[Chain]:
            slots, calibrator = asyncio.Semaphore(in_flight), frozen(params)

            async def one(problem: Problem) -> list[Chain]:
                async with slots:
                    solution = await engine.solve(problem, params, calibrator=calibrator, task=TASK)
                return [content(chain) for chain in solution.chains]

            return [c for chains in await asyncio.gather(*map(one, problems(3))) for c in chains]

        return with_engine(work)  # type: ignore[no-any-return]

    assert run(1) == run(3)


@pytest.mark.parametrize("text", ["rsd", "lookahead:judge=exact", "speculative-thinking"])
def test_leaving_gives_all_pages_back(text: str) -> None:
    async def work(engine: AsyncEngine) -> None:
        for stop_after in (1, 5):
            stream = engine.generate(problems(1)[0], of(text), task=TASK)
            for _ in range(stop_after):
                await anext(stream)
            await stream.aclose()

    with_engine(work)


def test_a_deadline_leaves_what_was_verified() -> None:
    async def work(engine: AsyncEngine) -> list[Chain]:
        slow = replace(of("lookahead:judge=exact"), chains=4)
        found: list[Chain] = []
        for deadline in (0.02, 0.1, 0.2):
            found += (await engine.solve(problems(1)[0], slow, deadline_s=deadline, task=TASK)).chains
        whole = await engine.solve(problems(1)[0], slow, task=TASK)
        texts = {chain.chain: text_of(chain) for chain in whole.chains}
        for chain in found:
            assert texts[chain.chain].startswith(text_of(chain))
            assert chain.final_answer is None or chain.final_answer in text_of(chain)
        return found

    assert any(chain.finish == "deadline" for chain in with_engine(work))


# Word by word ------------------------------------------------------------------------------------------------------


class Letters:
    """A token is a character; 0 ends a text."""

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return "".join(chr(i) for i in ids if i)

    def detokenizer(self, skip_special: bool = True) -> LetterStream:
        return LetterStream()


class LetterStream:
    settled = True

    def push(self, ids: Sequence[int]) -> str:
        return Letters().decode(ids)

    def settle(self) -> str:
        return ""

    def copy(self) -> LetterStream:
        return self


class Script:
    """A lane that says what it was given to say, span after span; `asked` holds the most tokens of each."""

    def __init__(self, *spans: str) -> None:
        self.spans = list(spans)
        self.asked: list[int] = []

    async def open(self, prompt: Sequence[int], *, group: Hashable = None, priority: int = 0) -> ListSeq:
        return ListSeq(prompt)

    async def fork(self, seq: Any, n: int) -> list[Any]:
        return [ListSeq(seq.ids) for _ in range(n)]

    async def close(self, seq: Any) -> None: ...

    async def decode(self, seq: Any, max_tokens: int, sampling: SamplingParams) -> AsyncGenerator[TokenChunk, None]:
        self.asked.append(max_tokens)
        ids = [0 if c == "$" else ord(c) for c in self.spans.pop(0)][:max_tokens]
        seq.ids += ids
        yield TokenChunk(tuple(ids), "length" if len(ids) == max_tokens and ids[-1] else "stop")

    async def append(self, seq: Any, tokens: Sequence[int], *, score: bool = False) -> None:
        seq.ids += tokens

    async def truncate(self, seq: Any, length: int) -> None:
        del seq.ids[length:]

    async def verdict(self, seq: Any, gate: Any) -> SpanResult:
        raise AssertionError("no likelihood is asked for")


def write(text: str, draft: Script, target: Script, turns: int = 100) -> Chain:
    words = Words(Letters(), frozenset({0}), 0)
    params = of(text, replace(PARAMS, chains=1, turns=turns, draft_tokens=50, target_tokens=50))
    solution = asyncio.run(
        run_problem(
            Pair(draft, target, Tongues(words, words)),  # type: ignore[arg-type]
            Prompts((1,), (1,)),
            Problem("p", "?"),
            params,
            ThresholdGate(0.0),
            lambda event: None,
        )
    )
    return solution.chains[0]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("So we add both sides", "neutral"),
        ("Wait, that cannot be", "reflect"),
        ("WAIT", "reflect"),
        ("Let me verify this, wait", "verify"),
        ("Yes, this makes sense", "affirm"),
        ("I was right but wrong", "reflect"),
        ("awaiting the checkers", "neutral"),
        ("", "neutral"),
    ],
)
def test_sentiment_goes_by_whole_words_and_verification_comes_first(text: str, kind: str) -> None:
    assert sentiment(text) == kind


def test_speculative_thinking_by_hand() -> None:
    draft = Script(
        "One.\n\n", "so it goes on and on", " on.\n\n", "Wait, no", "More.\n\n", "let me check", "\\boxed{1}$"
    )
    target = Script("Target thinks. ", "Target checks. ")
    chain = write("speculative-thinking", draft, target)
    assert [(t.draft, t.target, t.takeover, t.tested) for t in chain.turns] == [
        ("One.\n\nso it goes on and on", None, False, 0.0),
        (" on.\n\n", "Target thinks. ", True, 1.0),
        ("More.\n\n", "Target checks. ", True, 1.0),
        ("\\boxed{1}", None, False, None),
    ]
    assert (chain.finish, chain.final_answer, chain.error) == ("answer", "1", None)
    # 20 tokens are looked at and replaced, 125 more where the draft wants to verify.
    assert draft.asked[1::2] == [20, 20, 20]
    assert target.asked == [20, 145]
    assert chain.extra == {"discarded_draft_tokens": len("Wait, no") + len("let me check")}
    assert chain.draft_tokens == sum(
        map(len, ("One.\n\nso it goes on and on", " on.\n\n", "Wait, no", "More.\n\n"))
    ) + len("let me check") + len("\\boxed{1}$")


def test_after_so_many_reflections_the_target_recapitulates() -> None:
    rounds = 15
    draft = Script(*["A.\n\n", "Wait"] * rounds * 2, "\\boxed{2}$")
    target = Script(*[*["B. "] * rounds, "Recap. "] * 2)
    chain = write("speculative-thinking", draft, target)
    assert target.asked == [*[20] * rounds, 125, *[20] * rounds, 150]
    assert chain.turns[rounds - 1].target == "B. " + RECAP + "Recap. "
    # The prompt is nobody's token.
    assert chain.turns[rounds - 1].target_tokens == len("B. Recap. ")
    assert chain.final_answer == "2"
    assert SpeculativeThinking().reflections == rounds


def test_lookahead_by_hand() -> None:
    """Four steps ahead: two match, the third does not and is replaced, the fourth is thrown away."""
    draft = Script("1\n\n", "2\n\n", "3\n\n", "4\n\n", "5$")
    target = Script("1\n\n", "2\n\n", "three\n\n", "four\n\n", "5$")
    chain = write("lookahead:judge=exact", draft, target)
    assert [(t.draft, t.target, t.takeover) for t in chain.turns] == [
        ("1\n\n", None, False),
        ("2\n\n", None, False),
        ("3\n\n", "three\n\n", True),
        ("5", None, False),
    ]
    assert chain.finish == "stop"
    own = len("1\n\n") + len("2\n\n") + len("four\n\n") + len("5$")
    assert chain.extra == {"discarded_draft_tokens": len("4\n\n"), "discarded_target_tokens": own}


def test_a_text_that_only_one_of_them_ends_is_no_match() -> None:
    chain = write("lookahead:judge=exact:depth=1", Script("1", "2$"), Script("1$"))
    assert [(t.draft, t.target, t.takeover) for t in chain.turns] == [("1", "1", True)]
    assert chain.finish == "stop"


def test_an_unverified_step_is_no_part_of_a_chain_that_fails() -> None:
    class Failing(Script):
        async def decode(self, seq: Any, most: int, sampling: SamplingParams) -> AsyncGenerator[TokenChunk, None]:
            if not self.spans:
                raise ChainError("nothing to say")
            async for chunk in super().decode(seq, most, sampling):
                yield chunk

    chain = write("lookahead:judge=exact:depth=2", Failing("1\n\n", "\\boxed{9}\n\n"), Failing("1\n\n"))
    assert (chain.error, chain.final_answer, chain.turns) == ("nothing to say", None, ())
    assert chain.extra == {"discarded_draft_tokens": 14, "discarded_target_tokens": 3}


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    text=st.sampled_from(["lookahead:judge=exact:depth=3", "speculative-thinking:propose=5:reflections=0"]),
    span=st.integers(1, 12),
    sizes=st.sampled_from([(290, 330), (330, 290), (300, 300)]),
)
def test_both_lanes_hold_one_text(seed: int, text: str, span: int, sizes: tuple[int, int]) -> None:
    """Whatever tokens come, with one tokenizer or two: what the draft's lane holds is what the turns say."""
    rng = random.Random(seed)
    codecs = byte_level(sizes[0]), byte_level(sizes[1])
    opened: list[ListSeq] = []

    class Lane(ListLane):
        async def fork(self, seq: Any, n: int) -> list[Any]:
            forks = await super().fork(seq, n)
            opened.extend(forks)
            return forks

        async def close(self, seq: Any) -> None:
            seq.closed = True

    lanes = [Lane(codec, rng, lambda: None, "x") for codec in codecs]
    words = [Words(codec, frozenset({0}), 0) for codec in codecs]
    tongues = Tongues(words[0], words[1], codecs if sizes[0] != sizes[1] else None)
    params = of(text, replace(PARAMS, chains=1, turns=4, draft_tokens=span, target_tokens=span))
    pair = Pair(lanes[0], lanes[1], tongues)  # type: ignore[arg-type]
    run = run_problem(pair, Prompts((5,), (5,)), Problem("p", "x"), params, ThresholdGate(0.0), lambda e: None)
    chain = asyncio.run(run).chains[0]
    assert chain.error is None
    assert all(getattr(seq, "closed", False) for seq in opened)
    prompt = codecs[0].decode([5])
    parts = [t.draft + (t.target or "") for t in chain.turns] if "thinking" in text else [text_of(chain)]
    whole = prompt + "".join(parts).replace("\ufffd", "")
    assert whole.startswith(said(codecs[0], opened[0]))
