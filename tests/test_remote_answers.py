"""What a vLLM server may answer that a lane must not take for what it is not."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from atts_engine.backends.remote import client, patience
from atts_engine.backends.remote.connect import connect
from atts_engine.backends.remote.lane import RemoteLane
from atts_engine.backends.remote.stats import RemoteStats
from atts_engine.errors import ChainError, InputError, LaneError
from atts_engine.models import resolve
from tests.fake_vllm import FakeVllm, Fault, serving
from tests.remote_cases import GREEDY, MODEL, PROMPT, STEP, asked, greedy, logprobs_of, span, tokens_of, until


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.005)
    monkeypatch.setattr(patience, "LONGEST_PAUSE_S", 0.05)


def test_confidences_that_are_none() -> None:
    def others(value: Any) -> Fault:
        return Fault(change=lambda choice: {**choice, "logprobs": {**choice["logprobs"], "top_logprobs": value}})

    async def body(lane: RemoteLane, fake: FakeVllm) -> None:
        sampling = replace(GREEDY, confidence=2)
        for value, error, said in (
            (None, LaneError, "likeliest tokens are not told"),
            ([{}], LaneError, "likeliest tokens are not told"),
            ([{"token_id:5": -0.1, "token_id:6": -9999.0}], ChainError, "not finite"),
            ([{"token_id:5": -0.1, "token_id:6": None}], ChainError, "not finite"),
        ):
            fake.faults.append(others(value))
            with pytest.raises(error, match=said):
                await span(lane, await lane.open(PROMPT), 4, sampling)
        # The drawn token beside the k likeliest is not one of them.
        fake.faults.append(others([{"token_id:4": -9999.0, "token_id:5": -1.0, "token_id:6": -2.0}]))
        assert (await span(lane, await lane.open(PROMPT), 1, sampling))[0].confidences == (1.5,)

    asked(body)


def test_a_server_that_breaks_off_before_a_token_each_time_is_away() -> None:
    async def body(lane: RemoteLane, fake: FakeVllm) -> None:
        fake.faults.extend(Fault(after=1, change=lambda choice: {**choice, "token_ids": []}) for _ in range(1000))
        async with asyncio.timeout(10):
            with pytest.raises(LaneError, match="has not answered"):
                await span(lane, await lane.open(PROMPT), 4, GREEDY)
        fake.faults.clear()
        assert tokens_of(await span(lane, await lane.open(PROMPT), 4, GREEDY)) == greedy(PROMPT, 4)

    asked(body, patience_s=0.3)


def test_a_request_that_is_lost_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server lives, and answers others."""
    monkeypatch.setattr(client, "LOST", 3)
    monkeypatch.setattr(client, "LOST_S", 0.0)

    async def body(lane: RemoteLane, fake: FakeVllm) -> None:
        seq, other = await lane.open(PROMPT), await lane.open(PROMPT)
        for lost, resumed in ((0, 0), (3, 1)):
            fake.heard.clear()
            fake.faults.append(Fault(lost=lost))
            asking = asyncio.create_task(span(lane, seq, 8, GREEDY))
            await until(lambda: len(fake.heard) == 1)
            assert tokens_of(await span(lane, other, 8, GREEDY)) == greedy(PROMPT, 8)
            assert tokens_of(await asking) == greedy(PROMPT, 8)
            assert fake.heard[-1][1]["prompt"] == PROMPT + greedy(PROMPT, 8)[:lost]
            assert lane.stats()["resumed_spans"] == resumed
            for one in (seq, other):
                await lane.truncate(one, len(PROMPT))
        for lost in (0, 1):
            fake.faults.append(Fault(lost=lost))
            await lane.append(seq, STEP, score=True)
            scored = (await lane.verdict(seq, None)).logprobs
            assert scored == pytest.approx(logprobs_of(PROMPT + STEP * (lost + 1), seq.length - len(STEP)), abs=1e-5)
        stats = lane.stats()
        assert (stats["lost_requests"], stats["retries"], stats["failures"]) == (4, 4, 0)
        # Each was ended before it was made again.
        await until(lambda: fake.aborted == 4)
        # What is silent for shorter than that, however often, is slow.
        fake.pace = 0.12
        assert tokens_of(await span(lane, other, 6, GREEDY)) == greedy(PROMPT, 6)
        assert lane.stats()["lost_requests"] == 4

    asked(body, patience_s=0.2)


def test_a_server_that_loses_every_request_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "LOST", 3)
    monkeypatch.setattr(client, "LOST_S", 0.0)

    async def body(lane: RemoteLane, fake: FakeVllm) -> None:
        fake.hang = True
        with pytest.raises(LaneError, match=r"no word of a request for 0.3 seconds, while /health answers.*--patience"):
            await span(lane, await lane.open(PROMPT), 4, GREEDY)
        assert lane.stats()["lost_requests"] == 2

    asked(body, patience_s=0.1)


@given(st.lists(st.binary(max_size=6)), st.booleans())
def test_lines_are_what_is_between_line_ends_however_they_arrive(blocks: list[bytes], ends: bool) -> None:
    blocks = [block.replace(b"\x00", b"\n") for block in blocks if block] + [b"\n"] * ends

    async def run() -> list[bytes]:
        http = client.Client("box", "http://box", None, max_requests=1, silence_s=60.0, stats=RemoteStats())
        coming = iter(blocks)

        async def readany() -> bytes:
            return next(coming, b"")

        answer: Any = SimpleNamespace(content=SimpleNamespace(readany=readany))
        found = [line async for line in http._lines(answer)]
        await http.close()
        return found

    assert asyncio.run(run()) == b"".join(blocks).split(b"\n")[:-1]


def test_a_long_answer_is_parsed_where_it_gives_way_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """On another thread, and by Python calls: the parser by itself holds the interpreter's lock from end to end."""
    rows = [{str(i): {"logprob": -i / 7, "rank": 1, "decoded_token": "a"}} for i in range(1000)]
    text = json.dumps(rows).encode()
    parsed, threads, calls = client._parsed_aside, list[threading.Thread](), 0

    def watched(text: bytes) -> Any:
        def count(frame: Any, event: str, arg: Any) -> None:
            nonlocal calls
            calls += event == "call"

        threads.append(threading.current_thread())
        sys.setprofile(count)
        try:
            return parsed(text)
        finally:
            sys.setprofile(None)

    monkeypatch.setattr(client, "_parsed_aside", watched)
    monkeypatch.setattr(client, "ASIDE", len(text))

    async def run() -> None:
        http = client.Client("box", "http://box", None, max_requests=1, silence_s=60.0, stats=RemoteStats())
        assert await http._json(text) == rows
        assert calls >= len(rows) and threads[0] is not threading.current_thread()
        with pytest.raises(LaneError, match="the answer is no JSON"):
            await http._json(text[:-1] + b"!")
        await http.close()

    asyncio.run(run())


def test_an_adapter_beside_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM tells no length of a LoRA adapter."""

    async def run() -> None:
        fake = FakeVllm(MODEL, root=str(resolve("tiny-target")))
        cards = [
            {"id": "tiny", "root": fake.root, "parent": None, "max_model_len": 512},
            {"id": "adapter", "root": "/adapters/a", "parent": "tiny", "max_model_len": None},
        ]

        async def models(self: FakeVllm, request: Any) -> web.Response:
            return web.json_response({"object": "list", "data": cards})

        monkeypatch.setattr(FakeVllm, "models", models)
        async with serving(fake) as place:
            lane = await connect(f"vllm://{place}/adapter", lane="draft")
            assert lane.max_length == 512 and lane.model.fingerprint != MODEL.fingerprint
            await lane.aclose()

    asyncio.run(run())


def test_a_key_with_a_line_break() -> None:
    with pytest.raises(InputError, match="ATTS_DRAFT_API_KEY holds a line break") as caught:
        asyncio.run(connect("vllm://127.0.0.1/tiny", lane="draft", key="secret\r"))
    assert "secret" not in str(caught.value)


def test_a_server_without_tls_is_no_server_that_is_away() -> None:
    async def run() -> None:
        async with serving(FakeVllm(MODEL)) as place:
            with pytest.raises(LaneError, match="is the address right"):
                await connect(f"vllm+https://{place}/tiny", lane="draft", tokenizer="tiny-target", patience_s=60)

    asyncio.run(run())


def test_closing_ends_all_who_wait_for_a_server_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 100.0)
    monkeypatch.setattr(patience, "LONGEST_PAUSE_S", 100.0)

    async def body(lane: RemoteLane, fake: FakeVllm) -> None:
        fake.faults.extend(Fault(status=503) for _ in range(100))
        seqs = [await lane.open(PROMPT) for _ in range(8)]
        spans = [asyncio.create_task(span(lane, seq, 4, GREEDY)) for seq in seqs]
        await until(lambda: lane.stats()["breaker_opened"] > 0)
        await lane.aclose()
        async with asyncio.timeout(10):
            found = await asyncio.gather(*spans, return_exceptions=True)
        assert all(isinstance(error, LaneError) and "closed" in str(error) for error in found)

    asked(body, patience_s=1000.0)


@pytest.mark.parametrize("end", ["late", "cut"])
def test_a_stream_that_has_said_all_is_not_asked_for_again(monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    monkeypatch.setattr(client, "END_S", 0.05 if end == "late" else 10.0)
    asked = 0

    async def stream(request: web.Request) -> web.StreamResponse:
        nonlocal asked
        asked += 1
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b'data: {"choices": []}\n\ndata: [DONE]\n\n')
        if end == "late":
            await asyncio.sleep(5)
        else:
            # By then the client has read what was said.
            await asyncio.sleep(0.2)
            assert request.transport is not None
            request.transport.close()
        return response

    async def run() -> None:
        app = web.Application()
        app.router.add_post("/stream", stream)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = "http://{}:{}".format(*runner.addresses[0][:2])
        http = client.Client("box", url, None, max_requests=1, silence_s=60.0, stats=RemoteStats())
        async with asyncio.timeout(4):
            assert [event async for event in http.stream("/stream", {})] == [{"choices": []}]
        await http.close()
        await runner.cleanup()

    asyncio.run(run())
    assert asked == 1
