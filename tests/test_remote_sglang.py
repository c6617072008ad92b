"""SGLang as a server of a remote lane, against a fake that answers as the real one did."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch

from atts_engine import ops
from atts_engine.backends.remote.client import Client
from atts_engine.backends.remote.connect import connect
from atts_engine.backends.remote.lane import RemoteLane
from atts_engine.backends.remote.server import Written
from atts_engine.backends.remote.sglang import STREAM_INTERVAL, SGLangServer
from atts_engine.backends.remote.stats import RemoteStats
from atts_engine.errors import ChainError, InputError, LaneError, Refused, Unreachable
from atts_engine.models import load_model
from atts_engine.pipeline import complete
from atts_engine.runtime.likeliest import top_logprobs
from atts_engine.runtime.records import SamplingParams
from tests.fake_sglang import Abort, FakeSGLang, Local, serving

MODEL = load_model("tiny-target")
LOCAL = Local(MODEL)
ANSWERS = json.loads((Path(__file__).parent / "sglang_answers.json").read_text())
VOCAB = MODEL.config.vocab_size
PROMPT = MODEL.tokenizer.encode("<bos>Q: a = 85; b = a-43; c = b+11; c?\n\n")
STEP = MODEL.tokenizer.encode("b = a-43 = 85-43 = 42\n\n")
WRONG = MODEL.tokenizer.encode("c = b+11 = 42+11 = 57\n\n")
GREEDY = SamplingParams(temperature=0.0)
WARM = SamplingParams(temperature=0.8, seed=3)


def server_at(url: str) -> SGLangServer:
    return SGLangServer(Client(url, url, None, max_requests=8, silence_s=30.0, stats=RemoteStats()))


def asked(body: Callable[[SGLangServer, FakeSGLang], Awaitable[Any]], **flags: Any) -> Any:
    """What `body` gives on a server that talks to a fake with these flags."""

    async def run() -> Any:
        fake = FakeSGLang(LOCAL, **flags)
        async with serving(fake) as url:
            server = server_at(url)
            try:
                return await body(server, fake)
            finally:
                await server.close()
                assert not fake.dead

    return asyncio.run(run())


async def written(server: SGLangServer, tokens: Sequence[int], n: int, sampling: SamplingParams) -> list[Written]:
    async with aclosing(server.decode(tokens, n, sampling)) as pieces:
        return [piece async for piece in pieces]


def whole(pieces: Sequence[Written]) -> Written:
    """The pieces as one."""
    first, last = pieces[0], pieces[-1]
    assert all(piece.finish is None for piece in pieces[:-1])
    return Written(
        tuple(token for piece in pieces for token in piece.tokens),
        last.finish,
        tuple(value for piece in pieces for value in piece.logprobs),
        tuple(value for piece in pieces for value in piece.confidences),
        tuple(others for piece in pieces for others in piece.alternatives),
        first.prompt_tokens,
        first.cached_tokens,
    )


def logprobs_of(tokens: Sequence[int], start: int) -> list[float]:
    """Of tokens[start:] under the local model."""
    return ops.score_logits(LOCAL.rows(tokens)[start - 1 : -1], torch.tensor(tokens[start:])).tolist()


def greedy(tokens: Sequence[int], n: int) -> list[int]:
    text = list(tokens)
    for _ in range(n):
        text.append(int(LOCAL.rows(text)[-1].argmax()))
    return text[len(tokens) :]


async def told(url: str, case: dict[str, Any]) -> tuple[int, Any]:
    """Status and answer to a recorded request."""
    async with aiohttp.request(case["method"], url + case["path"], json=case["body"]) as response:
        if response.content_type != "text/event-stream":
            return response.status, await response.json()
        lines = [line[6:].strip() async for line in response.content if line.startswith(b"data: ")]
        return response.status, ["[DONE]" if line == b"[DONE]" else json.loads(line) for line in lines]


def check_alike(name: str, said: Any, recorded: Any) -> None:
    """`said` holds all that was recorded; numbers agree to 2e-3 nats."""
    if isinstance(recorded, dict):
        assert isinstance(said, dict) and recorded.keys() <= said.keys(), (name, said, recorded)
        for key in recorded.keys() - {"model_path", "tokenizer_path"}:
            check_alike(f"{name}, {key}", said[key], recorded[key])
    elif isinstance(recorded, list):
        assert isinstance(said, list) and len(said) == len(recorded), (name, said, recorded)
        for i, (one, other) in enumerate(zip(said, recorded, strict=True)):
            check_alike(f"{name}, {i}", one, other)
    elif isinstance(recorded, float):
        assert said == pytest.approx(recorded, abs=2e-3), name
    else:
        assert said == recorded, name


def joined(answer: Any) -> Any:
    """A stream as one answer: a server that is busy sends in one event what it else sends in several."""
    if not isinstance(answer, list):
        return answer
    events = [event for event in answer if event != "[DONE]"]
    last = events[-1]
    if "meta_info" not in last or len(last["output_ids"]) == last["meta_info"]["completion_tokens"]:
        return last

    def all_of(key: str) -> list[Any]:
        return [row for event in events for row in event["meta_info"][key]]

    told = {key: all_of(key) for key in ("output_token_logprobs", "output_top_logprobs") if key in last["meta_info"]}
    ids = [token for event in events for token in event["output_ids"]]
    return {"output_ids": ids, "meta_info": {**last["meta_info"], **told}}


async def check_answers(url: str, mode: str, view: Callable[[Any], Any]) -> None:
    for case in ANSWERS[mode]:
        status, answer = await told(url, case)
        assert status == case["status"], case["name"]
        check_alike(case["name"], view(answer), view(case["answer"]))


@pytest.mark.parametrize("view", [lambda answer: answer, joined], ids=["events", "joined"])
@pytest.mark.parametrize("mode", ["cumulative", "incremental"])
def test_fake_answers_as_the_real_one_did(mode: str, view: Callable[[Any], Any]) -> None:
    async def run() -> None:
        incremental = mode == "incremental"
        async with serving(FakeSGLang(LOCAL, incremental=incremental, original=incremental)) as url:
            await check_answers(url, mode, view)

    asyncio.run(run())


def test_describe_and_encode() -> None:
    async def run(server: SGLangServer, fake: FakeSGLang) -> None:
        served = await server.describe()
        # The real one reads 505 tokens of a context of 512 and refuses 506 (the recorded "too long").
        assert (served.name, served.context, served.version) == ("tiny", 505, "0.5.23")
        assert served.root == served.tokenizer == MODEL.name
        assert server.appends is fake.radix
        assert await server.encode("b = a-43\n\n") == MODEL.tokenizer.encode("b = a-43\n\n")

    asked(run)
    asked(run, radix=False)


def test_scores_are_the_models_own_from_the_first_token_on() -> None:
    async def run(server: SGLangServer, fake: FakeSGLang) -> None:
        text, distinct = list(PROMPT), len(PROMPT)
        for span in (STEP, WRONG, [VOCAB - 1]):  # the last id is told as 0
            start, text = len(text), text + list(span)
            distinct += len(span)
            scores = await server.score(text, start)
            assert scores.logprobs == pytest.approx(logprobs_of(text, start), abs=1e-4)
            assert (scores.prompt_tokens, scores.cached_tokens) == (len(text), start - 1 if start > len(PROMPT) else 0)
        for wrong in (WRONG[:-3], WRONG[:-2] + STEP):  # another chain of the problem
            scores = await server.score(PROMPT + wrong, len(PROMPT))
            assert scores.logprobs == pytest.approx(logprobs_of(PROMPT + wrong, len(PROMPT)), abs=1e-4)
            assert scores.cached_tokens == len(PROMPT) - 1
            distinct += len(wrong)
        assert (await server.score(PROMPT, 1)).logprobs == pytest.approx(logprobs_of(PROMPT, 1), abs=1e-4)
        # Every token once, the one before a span again, and all of the last request, whose scores begin at token 1.
        assert fake.computed <= distinct + len(fake.heard) + len(PROMPT)

    asked(run)


@pytest.mark.parametrize("incremental", [False, True])
def test_spans_keep_what_ended_them(incremental: bool) -> None:
    four, end = MODEL.tokenizer.encode("4")[0], MODEL.tokenizer.encode("<eos>")[0]
    line = greedy(PROMPT, 37)

    async def run(server: SGLangServer, fake: FakeSGLang) -> None:
        async def span(n: int = 60, **settings: Any) -> tuple[list[int], str | None]:
            said = whole(await written(server, PROMPT, n, replace(GREEDY, **settings)))
            assert said.prompt_tokens == len(PROMPT)
            assert said.cached_tokens in (0, len(PROMPT) - 1)
            return list(said.tokens), said.finish

        assert line[-1] == end
        assert await span() == (line, "stop")
        assert len(await written(server, PROMPT, 60, GREEDY)) == 4  # 1 token, then 16 at a time
        assert await span(20) == (line[:20], "length")
        assert await span(stop=("= 42",)) == (line[:15], "stop")
        assert await span(stop_token_ids=(four,)) == (line[: line.index(four) + 1], "stop")
        on = await span(40, ignore_eos=True)
        assert (on[0][:37], len(on[0]), on[1]) == (line, 40, "length")

    asked(run, incremental=incremental)


@pytest.mark.parametrize("incremental", [False, True])
def test_logprobs_and_confidences_are_the_models_own_or_none(incremental: bool) -> None:
    def check(said: Written, wanted: bool) -> None:
        text = PROMPT + list(said.tokens)
        assert said.logprobs == (pytest.approx(logprobs_of(text, len(PROMPT)), abs=1e-4) if wanted else ())

    async def run(server: SGLangServer, fake: FakeSGLang) -> None:
        for temperature, original in ((0.0, False), (1.0, False), (0.8, fake.original), (1.7, fake.original)):
            sampling = replace(WARM, temperature=temperature, logprobs=True)
            check(whole(await written(server, PROMPT, 30, sampling)), temperature in (0.0, 1.0) or original)
        assert len([body for body in fake.heard if body["sampling_params"]["temperature"] == 2.0]) == 1
        sure = replace(WARM, confidence=5)
        if not fake.original:
            with pytest.raises(ChainError, match="SGLANG_RETURN_ORIGINAL_LOGPROB"):
                await written(server, PROMPT, 30, sure)
            sure = replace(sure, temperature=1.0)
        said = whole(await written(server, PROMPT, 30, sure))
        logits = LOCAL.rows(PROMPT + list(said.tokens))[len(PROMPT) - 1 : -1]
        assert said.logprobs == ()
        assert said.confidences == pytest.approx(ops.token_confidence(logits, 5).tolist(), abs=1e-4)
        listed = replace(sure, confidence=2, alternatives=3)
        if not fake.original:
            with pytest.raises(Refused, match="own alternatives"):
                await written(server, PROMPT, 30, replace(WARM, alternatives=3))
        said = whole(await written(server, PROMPT, 30, listed))
        logits = LOCAL.rows(PROMPT + list(said.tokens))[len(PROMPT) - 1 : -1]
        assert said.confidences == pytest.approx(ops.token_confidence(logits, 2).tolist(), abs=1e-4)
        ids, values = top_logprobs(logits, 3)
        assert [[token for token, _ in others] for others in said.alternatives] == ids.tolist()
        assert [value for others in said.alternatives for _, value in others] == pytest.approx(
            values.flatten().tolist(), abs=1e-4
        )

    asked(run, incremental=incremental, original=False)
    asked(run, incremental=incremental, original=True)


def test_what_the_server_is_asked_for() -> None:
    full = SamplingParams(0.7, 9, 0.9, 0.05, seed=2**64 - 1, stop=("= 42",), stop_token_ids=(3,), ignore_eos=True)

    async def run(server: SGLangServer, fake: FakeSGLang) -> None:
        await written(server, PROMPT, 4, full)
        asked_for = fake.heard[-1]
        assert "return_logprob" not in asked_for
        assert asked_for["sampling_params"] == {
            "max_new_tokens": 4,
            "temperature": 0.7,
            "top_k": 9,
            "top_p": 0.9,
            "min_p": 0.05,
            "sampling_seed": -1,
            "stop": ["= 42"],
            "stop_token_ids": [3],
            "ignore_eos": True,
            "stream_interval": 16,
            "repetition_penalty": 1.0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "min_new_tokens": 0,
        }
        await written(server, PROMPT, 4, WARM)
        assert fake.heard[-1]["sampling_params"]["top_k"] == -1

    asked(run)


def test_one_seed_one_span_where_the_server_is_deterministic() -> None:
    async def run(server: SGLangServer, fake: FakeSGLang) -> None:
        spans = [
            whole(await written(server, PROMPT, 40, replace(WARM, temperature=3.0, seed=seed))).tokens
            for seed in (5, 6, 5)
        ]
        assert spans[0] == spans[2] != spans[1]

    asked(run, deterministic=True)


def test_ids_outside_the_vocabulary_do_not_reach_the_model() -> None:
    async def run(server: SGLangServer, fake: FakeSGLang) -> None:
        for tokens in ([1, VOCAB], [1, -1]):
            with pytest.raises(ChainError, match=f"token id {tokens[1]} made by another tokenizer"):
                await server.score(tokens, 1)
            with pytest.raises(ChainError, match="another tokenizer"):
                await written(server, tokens, 4, GREEDY)
        with pytest.raises(ChainError):
            await written(server, PROMPT, 4, replace(GREEDY, confidence=VOCAB + 1))
        fake.heard.clear()
        for _ in range(3):
            await server.score(PROMPT + [VOCAB - 1], len(PROMPT))
        assert len(fake.heard) == 4

    asked(run)


def with_meta(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda answer: {**answer, "meta_info": {**answer["meta_info"], **changes}}


def with_rows(change: Callable[[list[Any]], list[Any]]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda answer: with_meta(input_token_logprobs=change(answer["meta_info"]["input_token_logprobs"]))(answer)


NAN = {"type": "stop", "matched": "NaN happened"}
FULL = Abort("The request queue is full.", 503)
GONE = Abort("Aborted", None)
FAULTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a full queue": ({"fail": FULL}, Unreachable, "queue is full"),
    "ended from outside": ({"fail": GONE}, Unreachable, "Aborted"),
    "a request that cannot be": ({"fail": Abort("no such adapter")}, Refused, "no such adapter"),
    "NaN": ({"broken": with_meta(finish_reason=NAN)}, ChainError, "NaN"),
    "no meta_info": ({"broken": lambda answer: {}}, LaneError, "meta_info"),
    "a prompt that was cut": ({"broken": with_meta(prompt_tokens=7)}, ChainError, "allow-auto-truncate"),
}
SCORE_FAULTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no scores": ({"broken": with_meta(input_token_logprobs=None)}, LaneError, "no log-probabilities"),
    "too few": ({"broken": with_rows(lambda rows: rows[:-1])}, LaneError, "22 log-probabilities where 23"),
    "NaN in one": ({"broken": with_rows(lambda rows: [*rows[:-1], [None, *rows[-1][1:]]])}, ChainError, "no finite"),
    "of other tokens": ({"broken": with_rows(lambda rows: [rows[-1], *rows[:-1]])}, LaneError, "in place of"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_failures_of_a_span(fault: str) -> None:
    flags, error, words = FAULTS[fault]

    async def run(server: SGLangServer, fake: FakeSGLang) -> None:
        await server.score(PROMPT, 1)
        for name, value in flags.items():
            setattr(fake, name, value)
        with pytest.raises(error, match=words) as raised:
            await written(server, PROMPT, 20, GREEDY)
        assert raised.type is error
        assert whole(await written(server, PROMPT, 20, GREEDY)).finish == "length"

    asked(run)


@pytest.mark.parametrize("fault", [*FAULTS, *SCORE_FAULTS])
def test_failures_of_a_score(fault: str) -> None:
    flags, error, words = {**FAULTS, **SCORE_FAULTS}[fault]

    async def run(server: SGLangServer, fake: FakeSGLang) -> None:
        text = PROMPT + STEP[: 23 - 1]
        await server.score(text, 1)
        for name, value in flags.items():
            setattr(fake, name, value)
        with pytest.raises(error, match=words) as raised:
            await server.score(text, len(text) - 22)
        assert raised.type is error
        assert len((await server.score(text, len(text) - 22)).logprobs) == 22

    asked(run)


def test_a_span_that_the_server_does_not_finish() -> None:
    async def run(server: SGLangServer, fake: FakeSGLang) -> None:
        await server.score(PROMPT, 1)
        fake.broken = lambda answer: None
        with pytest.raises(LaneError, match="without a reason"):
            await written(server, PROMPT, 20, GREEDY)
        # Two tokens before the context is full: the recorded "longest write" has 10 of 12.
        with pytest.raises(ChainError, match="after 10 of 12"):
            await written(server, [5] * 500, 12, replace(GREEDY, ignore_eos=True))
        with pytest.raises(ChainError, match="exceeds"):
            await written(server, [5] * 500, 20, GREEDY)

    asked(run)


def test_who_stops_listening_ends_the_request() -> None:
    async def run(server: SGLangServer, fake: FakeSGLang) -> None:
        async def aborted(n: int) -> None:
            async with asyncio.timeout(5):
                while fake.running or fake.aborted != n:
                    await asyncio.sleep(0.001)

        await server.score(PROMPT, 1)
        fake.pace = 0.02
        async with aclosing(server.decode(PROMPT, 400, replace(GREEDY, ignore_eos=True))) as pieces:
            await anext(pieces)
            assert fake.running == 1
        await aborted(1)
        fake.pace = 10.0
        scoring = asyncio.ensure_future(server.score(PROMPT + STEP, len(PROMPT)))
        while not fake.running:
            await asyncio.sleep(0.001)
        scoring.cancel()
        await aborted(2)

    asked(run)


async def check_stop(lane: RemoteLane, text: Sequence[int]) -> None:
    """A stop id counts beside ignore_eos, which keeps SGLang from looking at any."""
    (end,) = greedy(text, 1)
    ignoring = replace(GREEDY, stop_token_ids=(end,), ignore_eos=True)
    chunks = [chunk async for chunk in lane.decode(await lane.open(text), 40, ignoring)]
    assert [(chunk.tokens, chunk.finish) for chunk in chunks] == [((end,), "stop")]


async def check_lane(url: str, fresh: Callable[[], int] = lambda: 0) -> None:
    """Chains of one problem on a lane: scores of spans that come in pieces, takeovers, forks, cuts. fresh: tokens that
    the server has computed."""
    lane = await connect(f"sglang{url.removeprefix('http')}/tiny", lane="target", tokenizer="tiny-target")
    try:
        assert lane.appends
        distinct, before = len(PROMPT), fresh()
        for chain in range(3):
            seq = await lane.open(PROMPT)
            span = STEP[: 12 + chain]
            for at in range(0, len(span), 5):
                await lane.append(seq, span[at : at + 5], score=True)
            result = await lane.verdict(seq, None)
            local = logprobs_of(PROMPT + span, len(PROMPT))
            assert (result.n_tokens, result.outcome) == (len(span), None)
            assert result.sum_logprob == pytest.approx(sum(local), abs=2e-2)
            assert result.logprobs == pytest.approx(local, abs=2e-3)
            (child,) = await lane.fork(seq, 1)
            taken = [token async for piece in lane.decode(child, 8, GREEDY) for token in piece.tokens]
            assert taken == greedy(PROMPT + span, 8)
            await check_stop(lane, PROMPT + span + taken)
            await lane.truncate(child, seq.length + 3)
            await lane.append(child, WRONG, score=True)
            await lane.append(child, STEP)
            local = logprobs_of(PROMPT + span + taken[:3] + WRONG, len(PROMPT + span) + 3)
            assert (await lane.verdict(child, None)).logprobs == pytest.approx(local, abs=2e-3)
            distinct += len(span) + len(taken) + STREAM_INTERVAL + len(WRONG)
        stats = lane.stats()
        # Of each request at the most the token before its own is computed again; the first ones ask about the model.
        assert fresh() - before <= distinct + stats["requests"]
        assert stats["score_cached_tokens"] >= stats["score_sent_tokens"] - distinct - stats["score_requests"]
    finally:
        await lane.aclose()


def test_a_lane_on_a_server() -> None:
    async def run() -> None:
        fake = FakeSGLang(LOCAL)
        async with serving(fake) as url:
            await check_lane(url, lambda: fake.computed)
            # A client that asked for them would be told of none: it is refused, and told what to do.
            lane = await connect(f"sglang{url.removeprefix('http')}/tiny", lane="target", tokenizer="tiny-target")
            wants = replace(WARM, logprobs=True)
            with pytest.raises(InputError, match="log-probabilities cannot be had at temperature 0.8"):
                await anext(complete(lane, MODEL.tokenizer, PROMPT, [wants], 9))
            assert len((await anext(complete(lane, MODEL.tokenizer, PROMPT, [GREEDY], 9))).tokens)
            await lane.aclose()

    asyncio.run(run())
