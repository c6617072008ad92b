"""The agent and its client, against a server that plays the model."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from atts_engine.errors import InputError
from atts_engine.evaluation.tuning import Choice, Sizes, StudyFolder, Trial, Unit, best, run_study
from atts_engine.evaluation.tuning.agent import Agent, json_object
from atts_engine.evaluation.tuning.chat import ChatEndpoint, EndpointError
from tests.chat_server import HANG, Model, serving
from tests.fake_tuning import BUDGET, FakeEvaluator, smooth, space

SIZES = {"d:t": Sizes(500_000, 1_000_000), "d:big": Sizes(500_000, 9_000_000)}
GOOD = {
    "pair": "d:t", "chains": 4, "turns": 4, "draft_tokens": 24, "target_tokens": 16, "alpha": 0.5,
    "takeover": "continue",
}  # fmt: skip


def agent(model: Model, **changed: object) -> Agent:
    pauses: list[float] = []
    settings = {"model": "m", "timeout_s": 5.0, "sleep": pauses.append} | changed
    return Agent(ChatEndpoint(model.url, **settings), space(), BUDGET, SIZES, Unit(500_000))


def first(**changed: object) -> str:
    return json.dumps({"insights": ["small first"], "reason": "a start", "configuration": GOOD | changed})


def then(**changed: object) -> str:
    return json.dumps({"reason": "because", "configuration": GOOD | changed})


def learnt(*lines: str) -> str:
    return json.dumps({"insights": list(lines)})


def test_a_study_with_an_agent_keeps_its_insights_and_tells_it_the_results(tmp_path: Path) -> None:
    evaluator = FakeEvaluator()
    replies = (
        first(),
        learnt("replace next"), then(takeover="replace"),
        learnt("more chains"), then(takeover="replace", chains=16, alpha=0.9),
        learnt("that was too dear"), then(takeover="replace", chains=8, alpha=0.62),
    )  # fmt: skip
    with serving(*replies) as model, StudyFolder.open(tmp_path, {}, space(), resume=False) as folder:
        run_study(folder, BUDGET, agent(model), evaluator, trials=4)
        trials = list(folder.trials)
    assert [t.state for t in trials] == ["measured", "measured", "infeasible", "measured"]
    assert [t.insights for t in trials] == [
        ("small first",), ("replace next",), ("more chains",), ("that was too dear",)
    ]  # fmt: skip
    assert [t.reason for t in trials] == ["a start", "because", "because", "because"]
    assert best(trials, BUDGET)[0].number == 4 and len(model.requests) == 7
    opening, last = model.said(0), model.said(6)
    for said in ("d:big: draft 500,000 parameters, target 9,000,000", "chains: ", "a whole number in 1-16",
                 "budget: 400 target tokens a problem", "Nothing has been run"):  # fmt: skip
        assert said in opening
    assert f"accuracy {smooth(evaluator.ran[0]):.3f}" in last
    assert "3. d:t, 16 chains, 4 turns, K 24/16, alpha 0.9, replace: not run, planned cost 921.6" in last
    assert "- that was too dear" in last and "Best within the budget: 2." in last
    path, headers, body = model.requests[0]
    assert path == "/v1/chat/completions" and "Authorization" not in headers
    assert set(body) == {"model", "messages"} and body["model"] == "m"


def test_a_resumed_agent_is_told_what_it_would_have_been_told(tmp_path: Path) -> None:
    replies = [first(), learnt("a"), then(alpha=0.3), learnt("b"), then(alpha=0.7)]
    asked = []
    for cut in (False, True):
        evaluator, path = FakeEvaluator(dies_after=1 if cut else None), tmp_path / str(cut)
        with serving(*replies) as model:
            if cut:
                with StudyFolder.open(path, {}, space(), resume=True) as folder, pytest.raises(KeyboardInterrupt):
                    run_study(folder, BUDGET, agent(model), evaluator, trials=3)
                # Of the trial that was lost the model is asked again.
                model.replies = replies[1:]
                del model.requests[1:]
            with StudyFolder.open(path, {}, space(), resume=True) as folder:
                run_study(folder, BUDGET, agent(model), FakeEvaluator(), trials=3)
            asked.append([body for _, _, body in model.requests])
    assert asked[0] == asked[1]
    assert (tmp_path / "True" / "trials.jsonl").read_text() == (tmp_path / "False" / "trials.jsonl").read_text()


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ("I would rather not.", "the answer holds no JSON object"),
        ('{"configuration": {"chains": 4', "the answer holds no JSON object"),
        (first(chains=99), "chains must be a whole number from 1 to 16, not 99"),
        (first(alpha="high"), "alpha must be a number from 0.1 to 0.9, not 'high'"),
        (first(pair="d:gpt"), "pair must be one of d:t, d:big, not 'd:gpt'"),
        (first(depth=2), "'depth' is no setting"),
        ('{"insights": ["x"], "configuration": 3}', '"configuration" must be an object'),
        ('{"insights": "x", "configuration": {}}', '"insights" must be a list of sentences'),
    ],
)
def test_what_cannot_be_used_is_told_back_once(bad: str, told: str) -> None:
    with serving(bad, first()) as model:
        proposal = agent(model).propose([])
    assert proposal.configuration == space().configuration(GOOD)
    assert len(proposal.complaints) == 1 and told in proposal.complaints[0]
    assert model.requests[1][2]["messages"][2] == {"role": "assistant", "content": bad}
    assert told in model.said(1)


def test_a_model_that_does_not_listen_costs_a_trial_and_no_more(tmp_path: Path) -> None:
    evaluator = FakeEvaluator()
    replies = (first(chains=0), first(chains=-1), learnt("obey"), then())
    with serving(*replies) as model, StudyFolder.open(tmp_path, {}, space(), resume=False) as folder:
        run_study(folder, BUDGET, agent(model), evaluator, trials=2)
        trials = list(folder.trials)
    assert [t.state for t in trials] == ["refused", "measured"]
    assert len(trials[0].complaints) == 2 and evaluator.ran == [space().configuration(GOOD)]
    assert "1. refused: chains must be a whole number from 1 to 16, not 0; chains must be" in model.said(2)


def test_insights_that_cannot_be_read_leave_those_before_them(tmp_path: Path) -> None:
    past = [Trial(1, "refused", None, insights=("old",))]
    with serving("no", "no", then()) as model:
        proposal = agent(model).propose(past)
    assert proposal.insights == ("old",) and proposal.configuration is not None
    assert "- old" in model.said(2)


def test_insights_are_bounded_and_plain() -> None:
    lines = ["\x1b[31mred", *["x" * 1000] * 50]
    with serving(json.dumps({"insights": lines, "configuration": GOOD})) as model:
        proposal = agent(model).propose([])
    assert len(proposal.insights) == 6 and max(map(len, proposal.insights)) == 400
    assert proposal.insights[0] == "[31mred"


def test_json_is_found_among_thoughts_and_fences() -> None:
    assert json_object('<think>{"a": 1}</think>Sure:\n```json\n{"b": {"c": 2}}\n```\nThat is {all}.') == {"b": {"c": 2}}
    assert json_object('First {"a": 1}, better: {"a": 2}') == {"a": 2}
    for text in ("", "[1, 2]", "{" * 5000, '{"a": ' * 5000):
        with pytest.raises(InputError, match="no JSON object"):
            json_object(text)


# The client


def endpoint(model: Model, pauses: list[float], **changed: object) -> ChatEndpoint:
    return ChatEndpoint(model.url, **({"model": "m", "timeout_s": 5.0, "sleep": pauses.append} | changed))


def test_failures_that_may_pass_are_tried_again_with_longer_pauses() -> None:
    pauses: list[float] = []
    with serving(500, b"<html>", 429, "there") as model:
        assert endpoint(model, pauses).complete([{"role": "user", "content": "?"}]) == "there"
    assert pauses == [1.0, 2.0, 4.0] and len(model.requests) == 4


def test_a_server_that_hangs_is_given_up() -> None:
    pauses: list[float] = []
    with (
        serving(HANG, HANG) as model,
        pytest.raises(EndpointError, match=r"did not answer in 2 attempts \(timed out\)"),
    ):
        endpoint(model, pauses, timeout_s=0.2, attempts=2).complete([])
    assert pauses == [1.0]


def test_an_answer_without_text_is_given_up() -> None:
    pauses: list[float] = []
    replies = [b'{"choices": []}', b'{"choices": [{"message": {"content": null}}]}', b"[]"]
    with serving(*replies) as model, pytest.raises(EndpointError, match=r"no chat completion: \[\]"):
        endpoint(model, pauses, attempts=3).complete([])


@pytest.mark.parametrize("status", [400, 401, 404, 307])
def test_a_refusal_is_final(status: int) -> None:
    pauses: list[float] = []
    with serving(status) as model, pytest.raises(EndpointError, match=f"refused the request \\(HTTP {status}: "):
        endpoint(model, pauses, key="secret").complete([])
    assert pauses == [] and len(model.requests) == 1


def test_nobody_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with pytest.raises(EndpointError, match="is the server running and --agent-url right") as failure:
            ChatEndpoint(url, "m", attempts=2, sleep=lambda s: None).complete([])
    assert "refused" in str(failure.value)


def test_the_key_is_sent_and_never_shown() -> None:
    with serving("yes") as model:
        there = endpoint(model, [], key="secret")
        there.complete([])
    assert model.requests[0][1]["Authorization"] == "Bearer secret"
    assert "secret" not in repr(there)
    with pytest.raises(InputError, match="printable ASCII") as refusal:
        ChatEndpoint("http://h/v1", "m", "sec\nret")
    assert "sec" not in str(refusal.value)


@pytest.mark.parametrize(
    "url",
    ["localhost:8000", "ftp://h/v1", "http://", "file:///etc/passwd", "http://h:x/v1", "http://[h/v1", "http://é/v1"],
)
def test_an_url_that_is_none(url: str) -> None:
    with pytest.raises(InputError, match="the agent's URL must be"):
        ChatEndpoint(url, "m")


def test_the_space_is_told_as_it_is() -> None:
    from atts_engine.evaluation.tuning.prompts import task

    text = task(space(chains=Choice((4, 8))), BUDGET, SIZES, Unit(500_000))
    assert "- chains: independent solutions of a problem, whose answers are voted on; one of 4, 8" in text
    assert "- alpha: share of draft spans that the target takes over; in 0.1-0.9" in text
    assert "parameters / 500000" in text
