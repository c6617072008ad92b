"""OpenAI's own client, unmodified, against the server; what it hears is what the engine says."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

import openai
import pytest

from atts_engine.runtime import SamplingParams
from tests.fake_vllm import FakeVllm
from tests.remote_cases import MODEL as LOCAL
from tests.serve.running import MODEL, QUESTION, Running, until

MESSAGES: list[Any] = [{"role": "user", "content": QUESTION}]
LONG: dict[str, Any] = {"extra_body": {"ignore_eos": True}, "max_tokens": 400}
"""Hundreds of tokens, whatever the model says."""


@pytest.fixture
def client(server: Running) -> Any:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60.0) as made:
        yield made


def greedy(server: Running, prompt: tuple[int, ...], n: int) -> tuple[str, list[int], list[float]]:
    """Text, tokens and log-probabilities, straight from the engine."""

    async def work() -> tuple[str, list[int], list[float]]:
        text, tokens, logprobs = "", [], []
        stream = server.engine.complete(prompt, [SamplingParams(temperature=0.0, logprobs=True)], n)
        async with aclosing(stream) as events:
            async for event in events:
                text += event.text
                tokens.extend(event.tokens)
                logprobs.extend(event.logprobs)
        return text, tokens, logprobs

    return server.call(work())


def test_a_chat_is_the_targets_greedy_text(server: Running, client: Any) -> None:
    prompt = server.engine.prompts(MESSAGES).target
    text, tokens, logprobs = greedy(server, prompt, 100)
    reply = client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0, logprobs=True, max_tokens=100)
    (choice,) = reply.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", text, "stop")
    assert text.endswith("\\boxed{53}")
    assert all(bytes(t.bytes) == t.token.encode() for t in choice.logprobs.content)
    assert [t.logprob for t in choice.logprobs.content] == logprobs
    assert "".join(t.token for t in choice.logprobs.content) == text + "<eos>"
    usage = (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens)
    assert usage == (len(prompt), len(tokens), len(prompt) + len(tokens))
    assert (reply.object, reply.model) == ("chat.completion", MODEL)


def test_a_stream_says_the_same_piece_by_piece(client: Any) -> None:
    asked: dict[str, Any] = {
        "model": MODEL,
        "messages": MESSAGES,
        "seed": 7,
        "n": 3,
        "temperature": 5.0,
        "logprobs": True,
    }
    whole = client.chat.completions.create(**asked, max_completion_tokens=30)
    stream = client.chat.completions.create(
        **asked, max_completion_tokens=30, stream=True, stream_options={"include_usage": True}
    )
    texts, finishes, logprobs = [""] * 3, [""] * 3, [[] for _ in range(3)]  # type: ignore[var-annotated]
    chunks = list(stream)
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        finishes[choice.index] = choice.finish_reason or finishes[choice.index]
        logprobs[choice.index] += [t.logprob for t in choice.logprobs.content]
    assert texts == [c.message.content for c in whole.choices]
    assert finishes == [c.finish_reason for c in whole.choices]
    assert logprobs == [[t.logprob for t in c.logprobs.content] for c in whole.choices]
    assert len(set(texts)) > 1
    assert len(chunks) > 10


def test_a_seed_is_a_text_and_no_seed_is_another_each_time(client: Any) -> None:
    def text(**more: Any) -> str:
        reply = client.completions.create(model=MODEL, prompt="a", max_tokens=40, temperature=5.0, **more)
        return reply.choices[0].text

    assert text(seed=1) == text(seed=1) != text(seed=2)
    assert len({text() for _ in range(4)}) > 1


def test_a_stop_string_ends_the_text_before_it(client: Any) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_tokens": 100}
    full = client.chat.completions.create(**asked).choices[0].message.content
    for stop, streamed in ((" = 42", False), (["zzz", "2\n\nc"], True)):
        met = stop if isinstance(stop, str) else stop[1]
        if streamed:
            chunks = list(client.chat.completions.create(**asked, stop=stop, stream=True))
            text = "".join(c.choices[0].delta.content or "" for c in chunks)
            last = chunks[-1].choices[0]
        else:
            last = client.chat.completions.create(**asked, stop=stop).choices[0]
            text = last.message.content
        assert text == full[: full.index(met)]
        assert (last.finish_reason, last.stop_reason) == ("stop", met)


def test_completions_take_texts_tokens_and_lists_of_them(server: Running, client: Any) -> None:
    texts = ["Q: a = 85; b = a-43; b?\n\n", "a = 3; "]
    ids = [server.engine.target_model.tokenizer.encode(text) for text in texts]
    alone = [
        client.completions.create(model=MODEL, prompt=text, temperature=0, max_tokens=9).choices[0] for text in texts
    ]
    for text, choice in zip(ids, alone, strict=True):
        assert choice.text == greedy(server, tuple(text), 9)[0]
    for prompt in (texts, ids):
        reply = client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=9, n=2, logprobs=1)
        assert [c.index for c in reply.choices] == [0, 1, 2, 3]
        assert [c.text for c in reply.choices] == [alone[0].text, alone[0].text, alone[1].text, alone[1].text]
        assert reply.usage.prompt_tokens == len(ids[0]) + len(ids[1])
        for choice in reply.choices:
            told = choice.logprobs
            assert [
                choice.text[at : at + len(t)] for at, t in zip(told.text_offset, told.tokens, strict=True)
            ] == told.tokens
    assert (
        len(client.completions.create(model=MODEL, prompt="a", extra_body={"ignore_eos": True}).choices[0].text) >= 16
    )


def likeliest(prompt: Sequence[int], tokens: Sequence[int], k: int) -> list[list[tuple[int, float]]]:
    """Of each place the k likeliest tokens, by the model's logits."""
    rows = FakeVllm(LOCAL).rows([*prompt, *tokens])[len(prompt) - 1 : -1]
    top = rows.double().log_softmax(1).topk(k, dim=1)
    return [list(zip(*place, strict=True)) for place in zip(top.indices.tolist(), top.values.tolist(), strict=True)]


def test_the_likeliest_tokens_of_a_chat(server: Running, client: Any) -> None:
    tokenizer = server.engine.target_model.tokenizer
    prompt = server.engine.prompts(MESSAGES).target
    asked: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "logprobs": True, "seed": 4, "max_tokens": 20}
    for temperature, k in ((0.0, 1), (5.0, 20)):
        asked |= {"temperature": temperature, "top_logprobs": k}
        told = client.chat.completions.create(**asked).choices[0].logprobs.content
        streamed = [c.choices[0].logprobs.content for c in client.chat.completions.create(**asked, stream=True)]
        assert [entry for piece in streamed for entry in piece] == told
        spelling = {tokenizer.bytes_of(i): i for i in range(48)}
        tokens = [spelling[bytes(entry.bytes)] for entry in told]
        for entry, wanted in zip(told, likeliest(prompt, tokens, k), strict=True):
            others = entry.top_logprobs
            assert all(other.token == bytes(other.bytes).decode() for other in others)
            assert [other.logprob for other in others] == pytest.approx([value for _, value in wanted], abs=1e-4)
            # Of two that are as likely either may come first.
            assert {bytes(other.bytes) for other in others} == {tokenizer.bytes_of(token) for token, _ in wanted}
            own = [other.logprob for other in others if other.token == entry.token]
            assert own == [pytest.approx(entry.logprob, rel=1e-6)] or (temperature and not own)
            assert temperature or own == [entry.logprob]


def test_the_likeliest_tokens_of_a_text(server: Running, client: Any) -> None:
    tokenizer = server.engine.target_model.tokenizer
    asked: dict[str, Any] = {"model": MODEL, "prompt": QUESTION, "temperature": 5.0, "seed": 1, "max_tokens": 20}
    reply = client.completions.create(**asked, logprobs=5).choices[0]
    told = reply.logprobs
    chunks = [chunk.choices[0].logprobs for chunk in client.completions.create(**asked, logprobs=5, stream=True)]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [value for chunk in chunks for value in getattr(chunk, name)] == getattr(told, name)
    prompt, tokens = tokenizer.encode(QUESTION), [t for text in told.tokens for t in tokenizer.encode(text)]
    for place, wanted in enumerate(likeliest(prompt, tokens, 5)):
        own, others = told.tokens[place], dict(told.top_logprobs[place])
        # The token itself is told among them, or as one more.
        assert others[own] == pytest.approx(told.token_logprobs[place], rel=1e-6) and len(others) in (5, 6)
        expected = {tokenizer.bytes_of(token).decode(): value for token, value in wanted}
        assert others == pytest.approx({own: told.token_logprobs[place]} | expected, abs=1e-4)
    assert any(len(place) == 6 for place in told.top_logprobs)
    none = client.completions.create(**asked, logprobs=0).choices[0].logprobs
    assert (none.token_logprobs, none.top_logprobs) == (told.token_logprobs, None)


def test_models(client: Any) -> None:
    (card,) = client.models.list().data
    assert (card.id, card.max_model_len, card.draft) == (MODEL, 512, "tiny-draft")
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another/one")


def test_errors_are_the_clients_own_kinds(client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="no model 'x'") as missing:
        client.chat.completions.create(model="x", messages=MESSAGES)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="frequency_penalty: this server cannot") as bad:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, frequency_penalty=1.0)
    assert (bad.value.type, bad.value.param) == ("invalid_request_error", "frequency_penalty")
    with pytest.raises(openai.BadRequestError, match="no token for 'é'"):
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "é"}], stream=True)


def test_leaving_a_stream_frees_its_pages(server: Running, client: Any) -> None:
    before = server.engine.stats()["target"]["sampled_tokens"]
    with client.chat.completions.create(model=MODEL, messages=MESSAGES, n=4, stream=True, **LONG) as stream:
        next(iter(stream))
        assert server.open_sequences()["target"] >= 1
    assert until(lambda: not any(server.open_sequences().values()))
    assert server.engine.stats()["target"]["sampled_tokens"] - before < 4 * 400


def test_the_async_client_many_at_a_time_and_some_that_give_up(server: Running) -> None:
    async def work() -> int:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def ask(seed: int, **more: Any) -> str:
                reply = await client.chat.completions.create(
                    model=MODEL, messages=MESSAGES, seed=seed, temperature=1.0, **more
                )
                return reply.choices[0].message.content or ""

            async def streamed(seed: int) -> str:
                stream = await client.chat.completions.create(
                    model=MODEL, messages=MESSAGES, seed=seed, temperature=1.0, max_tokens=60, stream=True
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            doomed = [asyncio.create_task(ask(i, n=2, **LONG)) for i in range(3)]
            whole, pieces = await asyncio.gather(
                asyncio.gather(*(ask(i, max_tokens=60) for i in range(4))),
                asyncio.gather(*(streamed(i) for i in range(4))),
            )
            assert whole == pieces
            for task in doomed:
                task.cancel()
            ended = await asyncio.gather(*doomed, return_exceptions=True)
            return sum(isinstance(e, asyncio.CancelledError) for e in ended)

    def aborted() -> float:
        value = server.service.metrics.registry.get_sample_value(
            "vllm:request_success_total", {"finished_reason": "abort", "model_name": MODEL}
        )
        assert value is not None
        return value

    before = aborted()
    cancelled = asyncio.run(work())
    assert cancelled > 0
    assert until(lambda: aborted() - before == cancelled)
    assert until(lambda: not any(server.open_sequences().values()))
