"""Requests with `atts`: the chains are the engine's own, and an ordinary client can read the answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from atts_engine import ATTSParams, Problem, Solution
from atts_engine.conformal import Adaptive, Meta
from atts_engine.pipeline import find_answer
from atts_engine.serve.generation import chain_text
from tests.serve.running import MODEL, PARAMS, QUESTION, Running, serving, until
from tests.test_engine import frozen_calibrator

MESSAGES = [{"role": "user", "content": "a = 23; b = a*9; c = b-88; d = c+171; e = d-90; e?"}]


@pytest.fixture(scope="module")
def frozen() -> Iterator[Running]:
    """Verdicts of a frozen calibration do not depend on who asked before."""
    with serving(calibrator=frozen_calibrator) as running:
        yield running
        assert until(lambda: not any(running.used_pages().values()))


def solved(server: Running, params: ATTSParams, problem_id: str = "any") -> Solution:
    prompts = server.engine.prompts(MESSAGES)
    problem = Problem(problem_id, "", stream="serve")
    return server.call(server.engine.solve(problem, params, prompts=prompts, calibrator=server.service.calibrator))


def post(server: Running, path: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json={"model": MODEL} | body, timeout=60.0)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def with_seed(seed: int, **more: Any) -> ATTSParams:
    return replace(PARAMS, seed=seed, **more)


def test_the_answer_is_the_vote_of_the_engines_chains(frozen: Running) -> None:
    wanted = solved(frozen, with_seed(3, chains=4, turns=5))
    reply = post(frozen, messages=MESSAGES, seed=3, atts={"chains": 4, "turns": 5, "verdicts": True}).json()
    vote = reply["atts"]
    assert (vote["answer"], vote["votes"]) == (wanted.answer, wanted.votes)
    (choice,) = reply["choices"]
    spoken = wanted.chains[vote["chain"]]
    assert choice["message"]["content"] == chain_text(spoken, False)
    assert find_answer(choice["message"]["content"]) == wanted.answer
    assert [(c["answer"], c["draft_tokens"], c["target_tokens"], c["finish"]) for c in vote["chains"]] == [
        (c.final_answer, c.draft_tokens, c.target_tokens, c.finish) for c in wanted.chains
    ]
    told = [(v["chain"], v["turn"], v["score"], v["p_value"], v["takeover"]) for v in vote["verdicts"]]
    assert told == [(c.chain, t.turn, t.score, t.p_value, t.takeover) for c in wanted.chains for t in c.turns]
    usage = reply["usage"]
    details = usage["completion_tokens_details"]
    assert details["draft_tokens"] == sum(c.draft_tokens for c in wanted.chains)
    assert details["target_tokens"] == sum(c.target_tokens for c in wanted.chains)
    assert usage["completion_tokens"] == sum(details.values())


@pytest.mark.parametrize("seed", range(6))
def test_a_stream_is_the_leading_chain_and_ends_with_the_vote(frozen: Running, seed: int) -> None:
    wanted = solved(frozen, with_seed(seed))
    response = post(frozen, messages=MESSAGES, seed=seed, stream=True, stream_options={"include_usage": True}, atts={})
    *chunks, usage = events(response)
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] > 0
    lead = wanted.chains[0]
    written = [c for c in chunks if c.get("atts", {}).get("piece", {}).get("author") != "vote"]
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in written)
    assert text == chain_text(lead, False)
    whole = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
    assert find_answer(whole) == wanted.answer
    assert (whole == text) == (lead.final_answer == wanted.answer)
    verdicts = [c["atts"]["verdict"] for c in chunks if "verdict" in c.get("atts", {})]
    assert [(v["chain"], v["turn"], v["takeover"]) for v in verdicts] == [(0, t.turn, t.takeover) for t in lead.turns]
    vote = chunks[-1]["atts"]["vote"]
    assert (vote["answer"], vote["votes"]) == (wanted.answer, wanted.votes)
    assert ("text" in vote) == (vote["chain"] != 0)
    assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"][0]["finish_reason"] == ("stop" if lead.finish in ("answer", "stop") else "length")


def test_two_requests_of_one_seed_at_once_are_alike(frozen: Running) -> None:
    """Each has an id of its own in the gate, and the same random streams."""
    body = {"model": MODEL, "messages": MESSAGES, "seed": 5, "atts": {"policy": "exact-count", "verdicts": True}}

    async def both() -> list[dict[str, Any]]:
        async with httpx.AsyncClient(base_url=frozen.url, timeout=60.0) as client:
            replies = await asyncio.gather(*(client.post("/v1/chat/completions", json=body) for _ in range(2)))
        return [r.json() for r in replies]

    first, second = asyncio.run(both())
    assert first["id"] != second["id"]
    assert len(first["atts"]["chains"]) == len(second["atts"]["chains"]) == PARAMS.chains
    body["atts"] = {"verdicts": True}
    first, second = asyncio.run(both())
    assert first["choices"] == second["choices"] and first["atts"] == second["atts"]


def test_a_text_may_be_completed_by_chains_too(frozen: Running) -> None:
    reply = post(frozen, "/v1/completions", prompt=f"Q: {QUESTION}\n\n", seed=1, atts={"chains": 2}).json()
    assert reply["atts"]["votes"] and "\\boxed{" in reply["choices"][0]["text"]


def test_the_limit_on_tokens_is_kept_by_every_chain(frozen: Running) -> None:
    reply = post(frozen, messages=MESSAGES, seed=1, max_completion_tokens=100, atts={"verdicts": True}).json()
    assert all(c["draft_tokens"] + c["target_tokens"] <= 100 and c["turns"] <= 2 for c in reply["atts"]["chains"])
    short = post(frozen, messages=MESSAGES, max_completion_tokens=40, atts={})
    assert short.status_code == 400 and "one turn" in short.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"stop_token_ids": [5]}, "stop_token_ids"),
        ({"stop": "x"}, "stop"),
        ({"ignore_eos": True}, "ignore_eos"),
        ({"atts": {"chains": 0}}, "atts.chains"),
        ({"atts": {"alpha": 1.0}}, "atts.alpha"),
        ({"atts": {"policy": "top-b"}}, "atts.policy"),
        ({"atts": {"color": 1}}, "atts.color"),
        ({"atts": {"alpha": 0.2}}, "atts"),
        ({"atts": {"chains": 257}}, None),
    ],
)
def test_what_does_not_go_with_chains_is_refused_by_name(frozen: Running, body: dict[str, Any], named: str) -> None:
    response = post(frozen, **({"messages": MESSAGES, "atts": {}} | body))
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == named


def test_a_calibration_is_held_to_its_conditions() -> None:
    def made() -> Adaptive:
        calibrator = Adaptive(0.4, meta=Meta(draft_tokens=24, temperature=0.8))
        calibrator.frozen = True
        return calibrator

    with serving(calibrator=made) as running:
        response = post(running, messages=MESSAGES, atts={"draft_tokens": 12, "chains": 1})
        assert response.status_code == 400
        assert "draft_tokens: is 12, expected 24" in response.json()["error"]["message"]


def test_replaced_spans_are_never_streamed() -> None:
    with serving(calibrator=frozen_calibrator, params=replace(PARAMS, takeover="replace")) as running:
        params = with_seed(4, takeover="replace", chains=2)
        wanted = solved(running, params)
        assert any(t.takeover for t in wanted.chains[0].turns)
        chunks = events(post(running, messages=MESSAGES, seed=4, stream=True, atts={"chains": 2}))
        pieces = [c for c in chunks if c.get("atts", {}).get("piece", {}).get("author") in ("draft", "target")]
        text = "".join(c["choices"][0]["delta"].get("content", "") for c in pieces)
        assert text == chain_text(wanted.chains[0], True)


def test_leaving_a_stream_of_chains_frees_both_lanes(frozen: Running) -> None:
    body = {"model": MODEL, "messages": MESSAGES, "stream": True, "atts": {"chains": 8}}
    for _ in range(3):
        with httpx.stream("POST", f"{frozen.url}/v1/chat/completions", json=body, timeout=60.0) as response:
            next(response.iter_lines())
        assert until(lambda: not any(frozen.open_sequences().values()))
        assert until(lambda: frozen.service.admission.requests == 0)
    assert all(load.chains == load.tokens == 0 for load in frozen.service.admission.loads.values())
