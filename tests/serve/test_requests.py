"""What cannot be had is refused with 4xx, in OpenAI's shape and naming the field; nothing of it reaches a lane."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from atts_engine import InputError
from atts_engine.serve import ServerSettings, read_keys
from atts_engine.serve.admission import Admission, Demand
from atts_engine.serve.errors import ApiError
from tests.serve.running import MODEL, QUESTION, Running, serving

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 4}
TEXT = {"model": MODEL, "prompt": "a = 3", "max_tokens": 4}
SCORE = {"model": MODEL, "prompt": "a = 3", "spans": ["; "]}
BAD = [
    ("/v1/chat/completions", CHAT, {"temperature": -1}, "temperature"),
    ("/v1/chat/completions", CHAT, {"temperature": "0"}, "temperature"),
    ("/v1/chat/completions", CHAT, {"top_p": 0}, "top_p"),
    ("/v1/chat/completions", CHAT, {"seed": 2**63}, "seed"),
    ("/v1/chat/completions", CHAT, {"n": 0}, "n"),
    ("/v1/chat/completions", CHAT, {"n": 65}, "n"),
    ("/v1/chat/completions", CHAT, {"max_tokens": 0}, "max_tokens"),
    ("/v1/chat/completions", CHAT, {"max_tokens": 512}, "max_tokens"),
    ("/v1/chat/completions", CHAT, {"stop": [""]}, "stop.list[constrained-str].0"),
    ("/v1/chat/completions", CHAT, {"messages": []}, "messages"),
    ("/v1/chat/completions", CHAT, {"messages": [{"role": "system", "content": "a"}]}, "messages"),
    ("/v1/chat/completions", CHAT, {"messages": [{"role": "robot", "content": "a"}]}, "messages.0.role"),
    ("/v1/chat/completions", CHAT, {"messages": [{"role": "user", "content": "é"}]}, None),
    ("/v1/chat/completions", CHAT, {"messages": [{"role": "user", "content": "a" * 600}]}, "prompt"),
    ("/v1/chat/completions", CHAT, {"top_logprobs": 5}, "top_logprobs"),
    ("/v1/chat/completions", CHAT, {"tools": [{"type": "function"}]}, "tools"),
    ("/v1/chat/completions", CHAT, {"response_format": {"type": "json_object"}}, "response_format.type"),
    ("/v1/chat/completions", CHAT, {"no_such_field": 1}, "no_such_field"),
    ("/v1/completions", TEXT, {"prompt": ""}, "prompt"),
    ("/v1/completions", TEXT, {"prompt": [48]}, "prompt"),
    ("/v1/completions", TEXT, {"echo": True}, "echo"),
    ("/v1/completions", TEXT, {"best_of": 3}, "best_of"),
    ("/v1/completions", TEXT, {"logit_bias": {"5": 1.0}}, "logit_bias"),
    ("/v1/score", SCORE, {"spans": []}, "spans"),
    ("/v1/score", SCORE, {"spans": [[]]}, None),
    ("/v1/score", SCORE, {"spans": ["a", ""]}, "spans.1"),
    ("/v1/score", SCORE, {"spans": [[1] * 512]}, "spans.0"),
    ("/v1/score", SCORE, {"prompt": None}, "prompt"),
    ("/tokenize", {"prompt": "a"}, {"messages": CHAT["messages"]}, "prompt"),
    ("/detokenize", {"tokens": [1]}, {"tokens": [-1]}, "tokens.0"),
    ("/detokenize", {"tokens": [1]}, {"tokens": [48]}, "tokens"),
]


@pytest.mark.parametrize(("path", "good", "change", "named"), BAD)
def test_bad_values_are_refused_by_name(
    server: Running, http: httpx.Client, path: str, good: dict[str, Any], change: dict[str, Any], named: str | None
) -> None:
    before = server.engine.stats()["target"]["computed_tokens"]
    response = http.post(path, json=good | change)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and error["message"]
    if named is not None and not named.startswith("stop"):
        assert error["param"] == named
    assert server.engine.stats()["target"]["computed_tokens"] == before


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"model": NaN}',
        b"[" * 100_000,
        b'{"model":"' + MODEL.encode() + b'","prompt":"\\ud800"}',
        b'{"model":"' + MODEL.encode() + b'","prompt":"a","temperature":NaN}',
        b'{"model":"' + MODEL.encode() + b'","prompt":"a","seed":1' + b"0" * 5000 + b"}",
        b"\xff\xfe",
    ],
)
def test_what_is_no_request_is_400(http: httpx.Client, body: bytes) -> None:
    response = http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_other_roads(http: httpx.Client) -> None:
    for method, path, status in (("GET", "/nowhere", 404), ("PUT", "/v1/models", 405), ("GET", "/v1/models/x", 404)):
        response = http.request(method, path)
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert http.post("/v1/completions", json=TEXT | {"model": "x"}).status_code == 404


def test_fields_that_clients_send_unasked_are_taken(http: httpx.Client) -> None:
    neutral = {
        "frequency_penalty": 0, "presence_penalty": 0.0, "repetition_penalty": 1.0, "logit_bias": {}, "user": "me",
        "n": 1, "stop": None, "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "store": False,
        "top_k": -1, "metadata": {"a": "b"}, "stream": False, "logprobs": False, "top_logprobs": 0,
        "service_tier": "auto",
    }  # fmt: skip
    assert http.post("/v1/chat/completions", json=CHAT | neutral).status_code == 200
    parts = [{"role": "user", "content": [{"type": "text", "text": "a = 85; "}, {"type": "text", "text": "a?"}]}]
    joined = [{"role": "user", "content": "a = 85; a?"}]
    found = [http.post("/tokenize", json={"messages": m}).json()["tokens"] for m in (parts, joined)]
    assert found[0] == found[1]


def test_a_request_ends_with_what_it_has_when_its_time_is_up(server: Running, http: httpx.Client) -> None:
    body = CHAT | {"max_tokens": 400, "ignore_eos": True, "timeout_s": 1e-4, "n": 2}
    reply = http.post("/v1/chat/completions", json=body).json()
    assert [(c["finish_reason"], c["stop_reason"]) for c in reply["choices"]] == [("length", "deadline")] * 2
    assert reply["usage"]["completion_tokens"] < 800
    reply = http.post("/v1/chat/completions", json=CHAT | {"max_tokens": None, "timeout_s": 1e-4, "atts": {}}).json()
    assert {c["finish"] for c in reply["atts"]["chains"]} == {"deadline"}
    assert reply["choices"][0]["stop_reason"] == "deadline"


def test_tokens_there_and_back(server: Running, http: httpx.Client) -> None:
    told = http.post("/tokenize", json={"model": MODEL, "prompt": QUESTION, "return_token_strs": True}).json()
    assert told["tokens"] == server.engine.target_model.tokenizer.encode(QUESTION)
    assert (told["count"], told["max_model_len"], "".join(told["token_strs"])) == (len(told["tokens"]), 512, QUESTION)
    assert http.post("/detokenize", json={"tokens": told["tokens"]}).json() == {"prompt": QUESTION}
    assert http.post("/tokenize", json={"prompt": ""}).json()["tokens"] == []


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text("# two\nsesame\n\n  tiger \n")
    with serving(max_body_bytes=2000, key_digests=read_keys(path), max_chains=4, max_queued_tokens=400) as running:
        yield running


class TestLimits:
    def test_every_key_opens_and_nothing_else(self, small: Running) -> None:
        for key in ("sesame", "tiger"):
            response = httpx.post(f"{small.url}/v1/completions", json=TEXT, headers={"authorization": f"Bearer {key}"})
            assert response.status_code == 200
        roads = (("GET", "/v1/models"), ("POST", "/v1/completions"), ("GET", "/metrics"), ("GET", "/openapi.json"))
        for header in ({}, {"authorization": "Bearer"}, {"authorization": "sesame"}, {"authorization": "Basic sesame"},
                       {"authorization": "Bearer sesame2"}, {"authorization": "Bearer # two"}):  # fmt: skip
            for method, path in roads:
                response = httpx.request(method, f"{small.url}{path}", headers=header)
                assert response.status_code == 401, (path, header)
                assert response.json()["error"]["code"] == "invalid_api_key"
                assert response.headers["www-authenticate"] == "Bearer"
        assert httpx.get(f"{small.url}/health").status_code == 200

    def test_a_body_too_large_is_not_read(self, small: Running) -> None:
        key = {"authorization": "Bearer tiger", "content-type": "application/json"}
        large = b'{"prompt": "' + b"a" * 3000 + b'"}'

        def unannounced() -> Iterator[bytes]:
            yield from (large[:1500], large[1500:])

        for content in (large, unannounced()):
            response = httpx.post(f"{small.url}/v1/completions", content=content, headers=key)
            assert response.status_code == 413
            assert response.json()["error"]["code"] == "request_too_large"

    def test_too_much_at_once_is_503_with_a_time_and_too_much_ever_is_400(self, small: Running) -> None:
        def post(**body: Any) -> httpx.Response:
            return httpx.post(
                f"{small.url}/v1/completions", json=TEXT | body, headers={"authorization": "Bearer tiger"}, timeout=60.0
            )

        for more in ({"n": 5}, {"max_tokens": 400}):
            assert post(**more).status_code == 400
        for held, asked in ((Demand(3, 10), {"n": 2}), (Demand(1, 380), {"max_tokens": 30})):
            with small.service.admission.admit({"target": held}):
                refused = post(**asked)
                assert refused.status_code == 503
                assert int(refused.headers["retry-after"]) >= 1
                assert refused.json()["error"]["code"] == "overloaded"
                streamed = post(stream=True, **asked)
                assert streamed.status_code == 503 and "retry-after" in streamed.headers
            assert post(**asked).status_code == 200


def test_admission_counts_lanes_apart_and_forgets_nothing() -> None:
    now = [0.0]
    admission = Admission(4, 100, clock=lambda: now[0])
    with admission.admit({"target": Demand(3, 60)}):
        with admission.admit({"draft": Demand(4, 100), "target": Demand(1, 40)}):
            with pytest.raises(ApiError) as full, admission.admit({"draft": Demand(1, 1)}):
                pass
            assert (full.value.status, full.value.retry_after_s) == (503, 1)
            now[0] = 100.0
        assert admission.loads["draft"].chains == 0
        with pytest.raises(ApiError) as full, admission.admit({"target": Demand(1, 41)}):
            pass
        # A fifth of the way from the first guess of one second to the hundred that the request took.
        assert full.value.retry_after_s == 21
        with pytest.raises(ZeroDivisionError), admission.admit({"target": Demand(1, 1)}):
            raise ZeroDivisionError
    assert all(load.chains == load.tokens == 0 for load in admission.loads.values()) and admission.requests == 0
    admission.draining = True
    with pytest.raises(ApiError) as full, admission.admit({"target": Demand(1, 1)}):
        pass
    assert full.value.body.code == "draining"


def test_settings_and_key_files_are_checked(tmp_path: Path) -> None:
    for bad in ({"max_chains": 0}, {"timeout_s": 0.0}, {"stream_tokens": 0}, {"model": ""}):
        with pytest.raises(InputError):
            ServerSettings(**({"model": "m"} | bad))  # type: ignore[arg-type]
    empty = tmp_path / "keys"
    empty.write_text("# none\n\n")
    with pytest.raises(InputError, match="no key"):
        read_keys(empty)
    empty.write_bytes(b"\xff\xff")
    with pytest.raises(InputError, match="UTF-8"):
        read_keys(empty)


def test_prompts_are_logged_only_when_asked(
    server: Running, http: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    secret = "a = 77; b = a+11; b?"
    body = CHAT | {"messages": [{"role": "user", "content": secret}]}
    http.post("/v1/chat/completions", json=body)
    http.post("/v1/score", json=SCORE | {"prompt": secret})
    http.post("/v1/completions", json=TEXT | {"prompt": secret + "é"})
    assert "chatcmpl-" in caplog.text and secret not in caplog.text
    with serving(log_prompts=True) as running:
        httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=60.0)
    assert secret in caplog.text
