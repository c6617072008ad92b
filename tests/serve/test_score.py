"""The scoring endpoint: log-probabilities of `transformers`, and a prefix that is computed once."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
import torch

from atts_engine import InputError
from atts_engine.models.load import resolve
from tests.serve.running import MODEL, QUESTION, Running, until

PREFIX = f"Q: {QUESTION}\n\n"
SPANS = ["b = a-43 = 85-43 = 42", "b = a-43 = 85-43 = 47", "c"]


def computed(server: Running) -> float:
    return server.engine.stats()["target"]["computed_tokens"]


def score(http: httpx.Client, **body: Any) -> dict[str, Any]:
    response = http.post("/v1/score", json={"model": MODEL} | body)
    assert response.status_code == 200, response.text
    return response.json()


def test_scores_are_those_of_transformers(server: Running, http: httpx.Client) -> None:
    transformers = pytest.importorskip("transformers", reason="the oracle of this test is transformers (extra: dev)")
    oracle = transformers.LlamaForCausalLM.from_pretrained(resolve("tiny-target"), dtype=torch.float32).eval()
    encode = server.engine.target_model.tokenizer.encode
    found = score(http, prompt=PREFIX, spans=SPANS, logprobs=True)
    assert [entry["index"] for entry in found["data"]] == [0, 1, 2]
    for text, entry in zip(SPANS, found["data"], strict=True):
        prefix, span = encode(PREFIX), encode(text)
        with torch.no_grad():
            logprobs = oracle(torch.tensor([prefix + span])).logits[0].double().log_softmax(-1)
        wanted = [float(logprobs[len(prefix) + i - 1, token]) for i, token in enumerate(span)]
        assert entry["logprobs"] == pytest.approx(wanted, abs=1e-4)
        assert entry["n_tokens"] == len(span)
        assert entry["sum_logprob"] == pytest.approx(sum(wanted), abs=1e-3)
        assert entry["mean_logprob"] == pytest.approx(sum(wanted) / len(wanted), abs=1e-4)
    assert found["data"][0]["mean_logprob"] > found["data"][1]["mean_logprob"]
    assert found["usage"]["prompt_tokens"] == len(encode(PREFIX)) + sum(len(encode(s)) for s in SPANS)


def test_a_prefix_is_computed_once(server: Running, http: httpx.Client) -> None:
    server.call(server.engine.forget_prefixes())
    encode = server.engine.target_model.tokenizer.encode
    prefix, span = encode(PREFIX), encode(SPANS[0])
    start = computed(server)
    first = score(http, prompt=prefix, spans=[span])
    # All of the prefix, and of the span all but its last token, which nothing follows.
    assert computed(server) - start == len(prefix) + len(span) - 1
    assert first["data"][0]["cached_tokens"] == 0
    start = computed(server)
    again = score(http, prompt=PREFIX, spans=SPANS[:2])
    # The last token of the prefix is forwarded with each span: it is what the span's first token is scored from.
    assert computed(server) - start == len(span) + len(encode(SPANS[1]))
    assert [entry["cached_tokens"] for entry in again["data"]] == [len(prefix)] * 2
    assert again["data"][0]["sum_logprob"] == first["data"][0]["sum_logprob"]
    start = computed(server)
    longer = score(http, prompt=prefix + span, spans=["\n\n"])
    assert longer["data"][0]["cached_tokens"] == len(prefix)
    assert computed(server) - start == len(span) + 1


def test_messages_go_through_the_template(server: Running, http: httpx.Client) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    ids = list(server.engine.prompts(messages).target)
    chat, text = (score(http, spans=SPANS[:1], **p)["data"][0] for p in ({"messages": messages}, {"prompt": ids}))
    assert chat["sum_logprob"] == text["sum_logprob"]


def test_prefixes_keep_to_their_room_and_give_it_back(server: Running) -> None:
    engine = server.engine
    room = engine.config.score_cache_tokens or engine.pool_tokens["target"] // 8
    length = 300

    async def many() -> None:
        # More at a time than there is room for: those in use stay, the others go as they end.
        jobs = (engine.score([5 + i // 36, 5 + i % 36] * (length // 2), [9]) for i in range(2 * room // length))
        await asyncio.gather(*jobs)

    server.call(many())
    assert 0 < engine.prefix_stats()["held"] <= room
    server.call(engine.forget_prefixes())
    assert engine.prefix_stats()["held"] == 0
    assert until(lambda: server.open_sequences()["target"] == 0)
    assert until(lambda: server.used_pages()["target"] == 0)


def test_a_score_that_takes_too_long_or_that_nobody_waits_for_is_cancelled(server: Running, http: httpx.Client) -> None:
    server.call(server.engine.forget_prefixes())
    prefix, spans = [5, 6] * 100, [[5 + i // 36, 5 + i % 36] * 100 for i in range(64)]
    body = {"model": MODEL, "prompt": prefix, "spans": spans}
    late = http.post("/v1/score", json=body | {"timeout_s": 1e-3})
    assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline")
    assert until(lambda: server.open_sequences()["target"] <= 1)
    aborted = 'vllm:request_success_total{finished_reason="abort",model_name="tiny-pair"}'

    def aborts() -> float:
        return next(float(li.split()[-1]) for li in http.get("/metrics").text.splitlines() if li.startswith(aborted))

    before, start = aborts(), computed(server)

    async def leave() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=60.0) as client:
            asked = asyncio.create_task(client.post("/v1/score", json=body))
            while not server.service.admission.requests:
                await asyncio.sleep(0)
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)

    asyncio.run(leave())
    assert until(lambda: aborts() == before + 1)
    assert until(lambda: server.open_sequences()["target"] <= 1)
    assert computed(server) - start < 64 * 200


def test_what_the_engine_refuses(server: Running) -> None:
    for prefix, span, said in (
        ([1], [], "empty"),
        ([], [1], "empty"),
        ([1], [99], "vocabulary"),
        ([1] * 511, [1, 1], "room"),
    ):
        with pytest.raises(InputError, match=said):
            server.call(server.engine.score(prefix, span))
