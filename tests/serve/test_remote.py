"""`atts serve` in front of a target on another server."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import httpx
import openai
import pytest

from tests import fake_vllm
from tests.fake_vllm import FakeVllm
from tests.remote_cases import MODEL as LOCAL
from tests.remote_site import site
from tests.serve.running import CONFIG, MODEL, QUESTION, serving, until

ENCODE = LOCAL.tokenizer.encode
PLAIN = {"model": MODEL, "prompt": ENCODE(QUESTION), "max_tokens": 12, "temperature": 0}


def greedy(tokens: list[int], n: int) -> str:
    fake, found = FakeVllm(LOCAL), list(tokens)
    while len(found) < len(tokens) + n and found[-1] not in LOCAL.eos_token_ids:
        found.append(int(fake.rows(found)[-1].argmax()))
    return LOCAL.tokenizer.decode(found[len(tokens) :])


def test_a_target_on_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    with site("tiny-target") as target:
        config = replace(CONFIG, target=target.address, patience_s=0.3)
        with serving(config=config, model=MODEL) as running, httpx.Client(base_url=running.url, timeout=60) as http:
            assert http.get("/health").json()["status"] == "ok"
            reply = http.post("/v1/completions", json=PLAIN)
            assert reply.status_code == 200, reply.text
            assert reply.json()["choices"][0]["text"] == greedy(ENCODE(QUESTION), 12)
            listed = http.post("/v1/completions", json=PLAIN | {"logprobs": 3}).json()["choices"][0]["logprobs"]
            for place, own in zip(listed["top_logprobs"], listed["token_logprobs"], strict=True):
                assert len(place) == 3 and max(place.values()) == own
            with monkeypatch.context() as patch:
                # --max-logprobs 2, which a server tells of nowhere else.
                patch.setattr(fake_vllm, "MAX_LOGPROBS", 2)
                refused = http.post("/v1/completions", json=PLAIN | {"logprobs": 3})
                assert refused.status_code == 400
                assert "logprobs of 3, which is greater than max allowed: 2" in refused.json()["error"]["message"]
            chat = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}], "atts": {"turns": 2}}
            found = http.post("/v1/chat/completions", json=chat)
            assert found.status_code == 200, found.text
            span = {"model": MODEL, "prompt": QUESTION, "spans": ["b = a-43 = 85-43 = 42\n\n"]}
            for _ in range(2):
                entry = http.post("/v1/score", json=span).json()["data"][0]
                # The server computes the prefix again, and nothing is held to say otherwise.
                assert entry["cached_tokens"] == 0
            rows = FakeVllm(LOCAL).rows(ENCODE(QUESTION) + ENCODE(span["spans"][0]))
            own = rows.log_softmax(1)[len(ENCODE(QUESTION)) - 1 : -1]
            wanted = sum(own[i, t].item() for i, t in enumerate(ENCODE(span["spans"][0])))
            assert entry["sum_logprob"] == pytest.approx(wanted, abs=1e-3)
            text = http.get("/metrics").text
            asked = re.search(r'^atts:server_score_sent_tokens_total\{.*lane="target".*\} ([0-9.]+)$', text, re.M)
            assert asked is not None and float(asked[1]) > 0
            assert re.search(r'^vllm:kv_cache_usage_perc\{.*lane="draft"', text, re.M)
            assert not re.search(r'^vllm:kv_cache_usage_perc\{.*lane="target"', text, re.M)

            target.kill()
            running.service._checked_at = -1e9
            health = http.get("/health")
            assert health.status_code == 503
            assert health.json()["lanes"]["target"]["error"] == "its server does not answer; the log has the details"
            asked_for = (
                ("/v1/completions", PLAIN),
                ("/v1/completions", PLAIN | {"n": 3, "stream": True}),
                ("/v1/chat/completions", chat),
                ("/v1/score", span | {"spans": span["spans"] * 3}),
            )
            for path, body in asked_for:
                gone = http.post(path, json=body)
                error = gone.json()["error"]
                assert (gone.status_code, error["type"], error["code"]) == (503, "server_error", "server_unreachable")
                assert int(gone.headers["retry-after"]) >= 1
                assert target.address in error["message"] and "see that it runs" in error["message"]
            # Its draft, which is here, has written by then.
            *_, event, done = http.post("/v1/chat/completions", json=chat | {"stream": True}).text.strip().split("\n\n")
            assert json.loads(event.removeprefix("data: "))["error"]["code"] == "server_unreachable"
            assert done == "data: [DONE]"
            with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
                with pytest.raises(openai.InternalServerError, match="has not answered") as caught:
                    client.completions.create(**PLAIN)
                assert caught.value.status_code == 503
            target.start()
            running.service._checked_at = -1e9
            assert http.get("/health").status_code == 200
            assert http.post("/v1/completions", json=PLAIN).json()["choices"] == reply.json()["choices"]
            assert until(lambda: not target.fake.open)
