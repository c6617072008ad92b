"""The target alone: text cut at stop strings, samples that depend on their seed alone, and what is kept between
requests."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atts_engine import AsyncEngine, InputError, QueueFull
from atts_engine import engine as engine_module
from atts_engine.pipeline.completion import StopText
from atts_engine.runtime import SamplingParams
from tests.test_engine import CONFIG, PARAMS, problems, with_engine


class Letters:
    """A codec whose token n is the n-th letter."""

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return "".join(chr(97 + i) for i in ids)

    def detokenizer(self, skip_special: bool = True) -> Any:
        return self

    def push(self, ids: Sequence[int]) -> str:
        return self.decode(ids)

    def flush(self) -> str:
        return ""


@given(
    st.lists(st.lists(st.integers(0, 1), max_size=4), max_size=8),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_text_ends_at_the_first_stop_string_however_it_arrives(pieces: list[list[int]], stops: list[str]) -> None:
    said = StopText(Letters(), stops)
    told = []
    for piece in pieces:
        told.append(said.push(piece))
        if said.met is not None:
            break
    told.append(said.end())
    # Tokens that arrive together are looked at together: the whole text up to the piece that held a stop string.
    whole, found = "", None
    for piece in pieces:
        whole += Letters().decode(piece)
        if places := [(whole.find(s), s) for s in stops if s in whole]:
            found = min(places)
            break
    assert said.met == (None if found is None else found[1])
    assert "".join(told) == (whole if found is None else whole[: found[0]])
    # Nothing is told that could yet be the beginning of a stop string.
    for i in range(len(told) - 1):
        so_far = "".join(told[: i + 1])
        assert all(s not in so_far for s in stops)


def samples(engine: AsyncEngine, n: int, seeds: Sequence[int], prompt: Sequence[int] | None = None, **more: Any) -> Any:
    prompt = engine.prompts([{"role": "user", "content": problems(1)[0].problem}]).target if prompt is None else prompt
    wanted = [SamplingParams(temperature=4.0, seed=seed, ignore_eos=True, logprobs=True) for seed in seeds]

    async def work() -> list[tuple[str, list[int], list[float]]]:
        found: list[tuple[str, list[int], list[float]]] = [("", [], []) for _ in seeds]
        async with aclosing(engine.complete(prompt, wanted, n, **more)) as events:
            async for event in events:
                text, tokens, logprobs = found[event.index]
                found[event.index] = (text + event.text, tokens + list(event.tokens), logprobs + list(event.logprobs))
        return found

    return work()


def test_a_sample_is_the_same_alone_and_in_a_pool_that_preempts() -> None:
    seeds = list(range(6))

    async def alone(engine: AsyncEngine) -> Any:
        return [(await samples(engine, 120, [seed]))[0] for seed in seeds]

    async def together(engine: AsyncEngine) -> Any:
        found = await samples(engine, 120, seeds, chunk_tokens=3)
        return found, sum(lane["preemptions"] for lane in engine.stats().values())

    wanted = with_engine(alone)
    assert len({text for text, _, _ in wanted}) == len(seeds)
    assert all(len(tokens) == len(logprobs) == 120 for _, tokens, logprobs in wanted)
    found, preempted = with_engine(together, replace(CONFIG, kv_tokens=500))
    assert preempted > 0
    assert found == wanted


def test_a_score_is_the_sum_of_what_was_sampled() -> None:
    async def work(engine: AsyncEngine) -> None:
        prompt = engine.prompts([{"role": "user", "content": problems(1)[0].problem}]).target
        ((_, tokens, logprobs),) = await samples(engine, 40, [1], prompt)
        found = await engine.score(prompt, tokens)
        assert found.logprobs == pytest.approx(logprobs, abs=1e-4)
        assert found.score == pytest.approx(-sum(logprobs) / 40, abs=1e-4)
        await engine.forget_prefixes()

    with_engine(work)


def test_refusals_and_the_bound_on_chains() -> None:
    async def work(engine: AsyncEngine) -> None:
        with pytest.raises(InputError, match="max_sequences"):
            await samples(engine, 5, range(4))
        for prompt, said in (([], "empty"), ([99], "vocabulary"), ([1] * 512, "context")):
            with pytest.raises(InputError, match=said):
                await samples(engine, 5, [0], prompt)
        async with aclosing(engine.complete([5], [SamplingParams(seed=s) for s in range(3)], 400)) as events:
            await anext(events)
            with pytest.raises(QueueFull):
                await samples(engine, 5, [0])
        assert (await samples(engine, 5, [0, 1, 2]))[0][1]

    with_engine(work, replace(CONFIG, max_sequences=3))


def test_settings_that_nobody_uses_any_more_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "MAX_DEFAULT_CALIBRATORS", 3)

    async def work(engine: AsyncEngine) -> None:
        problem = problems(1)[0]
        for alpha in (0.1, 0.2, 0.3, 0.1, 0.4, 0.5):
            await engine.solve(problem, replace(PARAMS, chains=1, turns=1, alpha=alpha))
        assert [c.alpha for c in engine._defaults.values()] == [0.1, 0.4, 0.5]
        assert [g.calibrator for g in engine._gates.values()] == list(engine._defaults.values())
        assert all(sum(int(n) for n in c.store.size) for c in engine._defaults.values())

    with_engine(work)


def test_prompts_are_both_models_own() -> None:
    async def work(engine: AsyncEngine) -> None:
        messages = [{"role": "user", "content": "a = 3; a?"}]
        made = engine.prompts(messages)
        assert made.draft == tuple(engine.draft_model.tokenizer.chat_prompt(messages))
        assert engine.prompts("a = 3").target == tuple(engine.target_model.tokenizer.encode("a = 3"))
        # One model alone each: verdicts would depend on the order in which chains arrive.
        for strategy in ("draft", "target"):
            params = replace(PARAMS, strategy=strategy)
            wanted = await engine.solve(replace(problems(1)[0], problem="a = 3; a?"), params)
            given = await engine.solve(replace(problems(1)[0], problem=""), params, prompts=made)
            assert [c.final_answer for c in given.chains] == [c.final_answer for c in wanted.chains]

    with_engine(work)
