"""What cannot be had is refused with 4xx, in OpenAI's shape and naming the field; nothing of it reaches a lane."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from atts_engine import InputError
from atts_engine.serve import ServerSettings, read_keys
from atts_engine.serve.admission import MEMORY, Admission, Demand
from atts_engine.serve.errors import ApiError
from tests.serve.running import MODEL, QUESTION, Running, serving

CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 4}
TEXT = {"model": MODEL, "prompt": "a = 3", "max_tokens": 4}
SCORE = {"model": MODEL, "prompt": "a = 3", "spans": ["; "]}
TOOL_CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {
    "name": "f", "arguments": "{}"}}]}  # fmt: skip
TOOL = {"role": "tool", "tool_call_id": "1", "content": "3"}
IMAGE = {"type": "image_url", "image_url": {"url": "https://a.example/b.png"}}
BAD: list[tuple[str, dict[str, Any], dict[str, Any], str | None]] = [
    ("/v1/chat/completions", CHAT, {"temperature": -1}, "temperature"),
    ("/v1/chat/completions", CHAT, {"temperature": "0"}, "temperature"),
    ("/v1/chat/completions", CHAT, {"top_p": 0}, "top_p"),
    ("/v1/chat/completions", CHAT, {"seed": 2**63}, "seed"),
    ("/v1/chat/completions", CHAT, {"n": 0}, "n"),
    ("/v1/chat/completions", CHAT, {"n": 65}, "n"),
    ("/v1/chat/completions", CHAT, {"max_tokens": 0}, "max_tokens"),
    ("/v1/chat/completions", CHAT, {"max_tokens": 512}, "max_tokens"),
    ("/v1/chat/completions", CHAT, {"stop": [""]}, "stop.0"),
    ("/v1/chat/completions", CHAT, {"messages": []}, "messages"),
    ("/v1/chat/completions", CHAT, {"messages": [{"role": "system", "content": "a"}]}, "messages"),
    ("/v1/chat/completions", CHAT, {"messages": [{"role": "robot", "content": "a"}]}, "messages.0.role"),
    ("/v1/chat/completions", CHAT, {"messages": [{"role": "user", "content": "é"}]}, "messages"),
    ("/v1/chat/completions", CHAT, {"messages": [{"role": "user", "content": "a" * 600}]}, "messages"),
    ("/v1/chat/completions", CHAT, {"max_completion_tokens": 512}, "max_completion_tokens"),
    ("/v1/chat/completions", CHAT, {"stop_token_ids": [48]}, "stop_token_ids"),
    ("/v1/chat/completions", CHAT, {"top_logprobs": 5}, "top_logprobs"),
    ("/v1/chat/completions", CHAT, {"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    ("/v1/chat/completions", CHAT, {"top_logprobs": 5, "logprobs": True, "atts": {}}, "logprobs"),
    ("/v1/completions", TEXT, {"logprobs": 6}, "logprobs"),
    ("/v1/chat/completions", CHAT, {"tools": [{"type": "function"}]}, "tools"),
    ("/v1/chat/completions", CHAT, {"tool_choice": "required"}, "tool_choice"),
    ("/v1/chat/completions", CHAT, {"audio": {"voice": "alloy"}}, "audio"),
    ("/v1/chat/completions", CHAT, {"store": True}, "store"),
    ("/v1/chat/completions", CHAT, {"messages": [{"role": "user", "content": None}]}, "messages.0"),
    ("/v1/chat/completions", CHAT, {"messages": [*CHAT["messages"], TOOL_CALL, TOOL]}, "messages"),
    ("/v1/chat/completions", CHAT, {"messages": [{"role": "tool", "content": "3"}]}, "messages.0"),
    ("/v1/chat/completions", CHAT, {"messages": [{"role": "user", "content": [IMAGE]}]}, "messages.0.content.0.type"),
    ("/v1/chat/completions", CHAT, {"response_format": {"type": "json_object"}}, "response_format"),
    ("/v1/chat/completions", CHAT, {"no_such_field": 1}, "no_such_field"),
    ("/v1/completions", TEXT, {"prompt": ""}, "prompt"),
    ("/v1/completions", TEXT, {"prompt": [48]}, "prompt"),
    ("/v1/completions", TEXT, {"echo": True}, "echo"),
    ("/v1/completions", TEXT, {"best_of": 3}, "best_of"),
    ("/v1/completions", TEXT, {"logit_bias": {"5": 1.0}}, "logit_bias"),
    ("/v1/score", SCORE, {"spans": []}, "spans"),
    ("/v1/score", SCORE, {"spans": [[]]}, "spans.0"),
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
    if named is not None:
        assert error["param"] == named
    assert server.engine.stats()["target"]["computed_tokens"] == before


CANNOT = "this server cannot do that; leave the field out"
SAID: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/chat/completions", {"stop": 5}, "stop: must be a text or a list, not 5"),
    ("/v1/chat/completions", {"stop": ["a", 5]}, "stop.1: must be a text, not 5"),
    ("/v1/chat/completions", {"stop": [""]}, "stop.0: must not be empty"),
    ("/v1/chat/completions", {"stop": ["a"] * 17}, "stop: must have 16 entries or fewer, not 17"),
    ("/v1/chat/completions", {"n": 0}, "n: must be 1 or more, not 0"),
    ("/v1/chat/completions", {"n": "2"}, 'n: must be an integer, not "2"'),
    ("/v1/chat/completions", {"seed": 1.5}, "seed: must be an integer, not 1.5"),
    ("/v1/chat/completions", {"seed": 2**63}, f"seed: must be less than {2**63}, not {2**63}"),
    ("/v1/chat/completions", {"temperature": 101}, "temperature: must be 100 or less, not 101"),
    ("/v1/chat/completions", {"stream": "yes"}, 'stream: must be true or false, not "yes"'),
    ("/v1/chat/completions", {"atts": True}, "atts: must be an object, not true"),
    ("/v1/chat/completions", {"maxtokens": 4}, "maxtokens: this field is not known here; is max_tokens meant?"),
    ("/v1/chat/completions", {"xyz": 4}, "xyz: this field is not known here; leave it out"),
    ("/v1/chat/completions", {"frequency_penalty": 0.5}, f"frequency_penalty: {CANNOT}"),
    ("/v1/chat/completions", {"tools": [{"type": "function"}]}, f"tools: {CANNOT}"),
    ("/v1/chat/completions", {"tool_choice": {"type": "function"}}, f"tool_choice: {CANNOT}"),
    ("/v1/chat/completions", {"response_format": {"type": "json_schema"}}, f"response_format: {CANNOT}"),
    ("/v1/chat/completions", {"modalities": ["text", "audio"]}, f"modalities: {CANNOT}"),
    ("/v1/chat/completions", {"audio": {"voice": "alloy"}}, f"audio: {CANNOT}"),
    ("/v1/chat/completions", {"top_logprobs": 3}, "top_logprobs are told beside logprobs: set logprobs to true"),
    ("/v1/chat/completions", {"messages": "hello"}, 'messages: must be a list, not "hello"'),
    ("/v1/chat/completions", {"messages": ["hello"]}, 'messages.0: must be an object, not "hello"'),
    ("/v1/chat/completions", {"messages": [{"content": "a"}]}, "messages.0.role: is missing"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [IMAGE]}]}, "no images, sound or files"),
    ("/v1/chat/completions", {"max_tokens": 510}, "ask for 488 or fewer, or shorten the prompt"),
    ("/v1/completions", {"prompt": 5}, "prompt: must be a text or a list, not 5"),
    ("/v1/completions", {"prompt": [1] * 600}, "the prompt has 600 tokens, and the target has room for 512"),
    ("/v1/completions", {"echo": True}, f"echo: {CANNOT}"),
    ("/v1/completions", {"model": "gpt-4o"}, f"no model 'gpt-4o' here; there is '{MODEL}'"),
]


def test_a_refusal_says_what_is_wrong_and_what_would_not_be(http: httpx.Client) -> None:
    for path, change, said in SAID:
        good = CHAT if "chat" in path else TEXT
        assert said in http.post(path, json=good | change).json()["error"]["message"], change
    headers = {"content-type": "application/json"}
    for body, said in (
        (b"", "the body is empty: send a JSON object"),
        (b"[]", "the body must be a JSON object"),
        (b'{"model": "x"', "the body is no JSON: Expecting ',' delimiter at character 13"),
    ):
        error = http.post("/v1/completions", content=body, headers=headers).json()["error"]
        assert (error["message"], error["param"]) == (said, None)
    for path, said in (
        ("/chat/completions", "is /v1/chat/completions meant?"),
        ("/v1/v1/completions", "is /v1/completions meant?"),
        ("/v1/embeddings", "/openapi.json tells what there is"),
    ):
        missing = http.post(path, json=CHAT)
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
        assert said in missing.json()["error"]["message"]
    wrong = http.get("/v1/completions")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert wrong.json()["error"]["message"] == "GET is not for /v1/completions; use POST"


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


def test_a_body_that_is_not_called_json_is_told_so(http: httpx.Client) -> None:
    for headers in ({}, {"content-type": "application/x-www-form-urlencoded"}):
        response = http.post("/v1/completions", content=b'{"prompt": "a"}', headers=headers)
        assert response.status_code == 400 and "content-type: application/json" in response.json()["error"]["message"]


def test_browsers_are_let_in_by_name(http: httpx.Client, small: Running) -> None:
    page = "https://chat.example"
    ask = {"origin": page, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    with httpx.Client(base_url=small.url) as named:
        before = named.options("/v1/chat/completions", headers=ask)
        assert (before.status_code, before.headers["access-control-allow-origin"]) == (200, page)
        refused = named.get("/v1/models", headers={"origin": page})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, page)
        assert named.options("/v1/chat/completions", headers=ask | {"origin": "https://b.example"}).status_code == 400
    assert http.options("/v1/chat/completions", headers=ask).status_code == 405
    assert "access-control-allow-origin" not in http.get("/v1/models", headers={"origin": page}).headers


def test_other_roads(http: httpx.Client) -> None:
    assert http.head("/health").status_code == http.get("/v1/models/").status_code == 200
    assert http.post("/v1/completions/", json=TEXT, follow_redirects=True).status_code == 200
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
        "service_tier": "auto", "reasoning_effort": "low", "safety_identifier": "me", "prompt_cache_key": "k",
        "parallel_tool_calls": True, "verbosity": "low", "prediction": {"type": "content", "content": "a"},
        "temperature": None, "seed": None, "priority": None, "ignore_eos": None, "audio": None, "functions": None,
        "stream_options": None, "chat_template_kwargs": {}, "length_penalty": 1.0, "bad_words": [], "model": None,
    }  # fmt: skip
    plain = http.post("/v1/chat/completions", json=CHAT | {"seed": 1}).json()
    more = http.post("/v1/chat/completions", json=CHAT | neutral | {"seed": 1, "max_completion_tokens": 4})
    assert more.status_code == 200, more.text
    assert more.json()["choices"] == plain["choices"]
    silent = [*CHAT["messages"], {"role": "assistant", "content": None, "tool_calls": []}, *CHAT["messages"]]
    assert http.post("/v1/chat/completions", json=CHAT | {"messages": silent}).status_code == 200
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
    with serving(
        max_body_bytes=2000,
        key_digests=read_keys(path),
        max_chains=4,
        max_queued_tokens=400,
        allowed_origins=("https://chat.example",),
    ) as running:
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
                error = response.json()["error"]
                assert (error["code"], error["type"]) == ("invalid_api_key", "invalid_request_error")
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


def test_a_request_without_a_limit_is_counted_at_the_length_of_others() -> None:
    body = {k: v for k, v in CHAT.items() if k != "max_tokens"}
    with serving(reserve_tokens=50, max_queued_tokens=450) as running:
        # Twice the context is more than there is, twice 50 tokens are not.
        assert httpx.post(f"{running.url}/v1/chat/completions", json=body | {"n": 2}, timeout=60.0).status_code == 200
        assert httpx.post(f"{running.url}/v1/chat/completions", json=body | {"n": 9}, timeout=60.0).status_code == 400
    with serving() as running:
        admission = running.service.admission
        firsts = [admission.answers.tokens(10**6), admission.chains.tokens(10**6)]
        assert admission.answers.tokens(17) == 17
        for more in ({"atts": {}, "temperature": 0.8}, {"max_tokens": 4}):
            httpx.post(f"{running.url}/v1/chat/completions", json=body | more, timeout=60.0)
        assert admission.answers.tokens(10**6) == firsts[0] and admission.chains.tokens(10**6) < firsts[1]
        reply = httpx.post(f"{running.url}/v1/chat/completions", json=body | {"n": 2, "seed": 1}, timeout=60.0).json()
        written = reply["usage"]["completion_tokens"] / 2
        assert admission.answers.tokens(10**6) == math.ceil(firsts[0] + MEMORY * (written - firsts[0]))


def test_admission_counts_lanes_apart_and_forgets_nothing() -> None:
    now = [0.0]
    admission = Admission(4, {"draft": 50, "target": 100}, clock=lambda: now[0])
    with pytest.raises(ApiError, match="draft lane allows 50") as never:
        admission.check({"draft": Demand(1, 51), "target": Demand(1, 51)})
    assert never.value.status == 400
    with admission.admit({"target": Demand(3, 60)}):
        with admission.admit({"draft": Demand(4, 50), "target": Demand(1, 40)}):
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
