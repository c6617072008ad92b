"""Lanes on a vLLM server: against a fake that answers as the real one did."""

from __future__ import annotations

import asyncio
import sys
from contextlib import aclosing
from dataclasses import replace

import numpy as np
import pytest
import torch

from atts_engine import ops
from atts_engine.backends.remote import patience
from atts_engine.backends.remote.address import Address, is_address
from atts_engine.backends.remote.connect import connect
from atts_engine.backends.remote.lane import RemoteLane
from atts_engine.errors import ChainError, ContextFull, InputError, LaneError, Refused
from atts_engine.models import resolve
from atts_engine.runtime.likeliest import top_logprobs
from tests import fake_sglang
from tests.fake_vllm import BLOCK, FakeVllm, Fault, serving
from tests.remote_cases import (
    GREEDY,
    MODEL,
    PROMPT,
    STEP,
    WARM,
    WRONG,
    asked,
    greedy,
    logprobs_of,
    span,
    tokens_of,
    until,
)


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.005)
    monkeypatch.setattr(patience, "LONGEST_PAUSE_S", 0.05)


def test_addresses() -> None:
    assert Address.parse("vllm://box:81/org/model") == Address("vllm", "http://box:81", "org/model")
    assert Address.parse("sglang+https://box/m").base_url == "https://box:30000"
    assert Address.parse("vllm://[::1]/m").base_url == "http://[::1]:8000"
    assert is_address("vllm+https://box/m") and not is_address("https://box/m") and not is_address("vllm")
    for bad in ("vllm://box", "vllm://box:/m", "vllm://box:70000/m", "vllm:///m", "vllm://u@box/m", "vllm://box/ m",
                "vllm://box?a/m", "vllm://box#a/m", "vllm://[box]/m"):  # fmt: skip
        with pytest.raises(InputError, match="vllm://HOST:PORT/NAME"):
            Address.parse(bad)
    with pytest.raises(InputError) as refused:
        Address.parse("vllm://me:secret@box/m")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("rows", [False, True], ids=["whole", "rows"])
def test_sequences_are_lists_and_scores_are_the_models_own(rows: bool) -> None:
    async def body(lane: RemoteLane, fake: FakeVllm) -> None:
        assert lane.appends is rows
        seq = await lane.open(PROMPT)
        a, b = await lane.fork(seq, 2)
        held = {seq: list(PROMPT), a: list(PROMPT), b: list(PROMPT)}
        await lane.append(a, STEP, score=True)
        held[a] += STEP
        # The first token of the span is scored, and what only followed is not.
        first = await lane.verdict(a, None)
        assert first.logprobs == pytest.approx(logprobs_of(held[a], len(PROMPT)), abs=1e-5)
        score, total = ops.span_mean(torch.tensor(first.logprobs), torch.tensor([0, len(STEP)]))
        assert (first.sum_logprob, first.score, first.n_tokens) == (total.item(), score.item(), len(STEP))
        assert first.outcome is None and first.wait_s is None
        await lane.append(a, STEP)
        held[a] += STEP
        start = len(held[a])
        for token in WRONG:
            await lane.append(a, [token], score=True)
            held[a].append(token)
        assert (await lane.scored(a, wait=True)) == pytest.approx(logprobs_of(held[a], start), abs=1e-5)
        # Taken back half, and written otherwise: the sum is of what stands.
        await lane.truncate(a, start + 5)
        del held[a][start + 5 :]
        await lane.append(a, STEP, score=True)
        held[a] += STEP
        again = await lane.verdict(a, None)
        assert again.logprobs == pytest.approx(logprobs_of(held[a], start), abs=1e-5)
        with pytest.raises(InputError, match="nothing was scored"):
            await lane.verdict(a, None)
        written = tokens_of(await span(lane, b, 6, GREEDY))
        held[b] += written
        assert written == greedy(PROMPT, 6)
        assert [s.length for s in held] == [len(tokens) for tokens in held.values()]
        assert lane.stats()["scored_tokens"] >= 2 * len(STEP) + len(WRONG)
        for one in held:
            await lane.close(one)
            await lane.close(one)

    asked(body, scale_out=rows, v2=rows)


def test_opening_forking_and_appending_ask_nothing() -> None:
    async def body(lane: RemoteLane, fake: FakeVllm) -> None:
        seq = await lane.open(PROMPT)
        (child,) = await lane.fork(seq, 1)
        await lane.append(child, STEP, score=True)
        await lane.truncate(child, 3)
        await lane.close(child)
        assert not fake.heard
        with pytest.raises(InputError, match="outside the vocabulary of 48"):
            await lane.open([1, 48])
        with pytest.raises(InputError, match="empty"):
            await lane.open([])
        with pytest.raises(InputError, match="context is 512"):
            await lane.open([1] * 512)

    asked(body)


def test_scores_run_ahead_of_the_draft_and_cost_their_own_tokens() -> None:
    """Rows: each position is computed once, however spans and blocks lie to each other."""
    tokens = [MODEL.tokenizer.encode("a")[0]] * 7 + STEP * 6

    async def body(lane: RemoteLane, fake: FakeVllm) -> int:
        seq = await lane.open(PROMPT)
        fake.computed = 0
        for at in range(0, len(tokens), 9):
            await lane.append(seq, tokens[at : at + 9], score=True)
            await lane.scored(seq, wait=True)
            if at % 4 == 0:
                await lane.verdict(seq, None)
        stats = lane.stats()
        assert stats["cached_tokens"] == stats["score_cached_tokens"] > 0.6 * stats["told_tokens"]
        skipped = [b for _, b in fake.heard if b.get("sampling_params", {}).get("skip_reading_prefix_cache")]
        assert not skipped
        return fake.computed

    # A request computes the block that it begins in again.
    requests = -(-len(tokens) // 9)
    assert asked(body, scale_out=True, v2=True) <= len(PROMPT) + len(tokens) + 2 * BLOCK * requests

    async def many(lane: RemoteLane, fake: FakeVllm) -> None:
        seq = await lane.open(PROMPT)
        for token in tokens[:20]:
            await lane.append(seq, [token], score=True)
        # Nobody has let the first request leave yet; it takes all that has gathered, and one more what is left over.
        assert len(await lane.scored(seq, wait=True)) == 20
        assert len(fake.heard) <= 3

    asked(many, scale_out=True, v2=True)


def test_scores_that_the_cache_swallows_are_asked_for_again() -> None:
    async def body(lane: RemoteLane, fake: FakeVllm) -> None:
        one, other = await lane.fork(await lane.open(PROMPT), 2)
        for seq in (one, other):
            await lane.append(seq, STEP + WRONG, score=True)
        first, second = [(await lane.verdict(seq, None)).logprobs for seq in (one, other)]
        assert first == second == pytest.approx(logprobs_of(PROMPT + STEP + WRONG, len(PROMPT)), abs=1e-5)
        assert lane.stats()["score_sent_tokens"] > 2 * len(PROMPT + STEP + WRONG)

    asked(body, scale_out=True, v2=True)


@pytest.mark.parametrize("rows", [False, True], ids=["whole", "rows"])
def test_a_full_context(rows: bool) -> None:
    async def body(lane: RemoteLane, fake: FakeVllm) -> None:
        assert lane.max_length == fake.context == 50
        seq = await lane.open(PROMPT)
        await lane.append(seq, (STEP * 3)[: 50 - len(PROMPT)], score=True)
        found = await lane.verdict(seq, None)
        assert found.logprobs == pytest.approx(logprobs_of((PROMPT + STEP * 3)[:50], len(PROMPT)), abs=1e-5)
        with pytest.raises(ContextFull):
            await lane.append(seq, STEP)
        with pytest.raises(ContextFull):
            await span(lane, seq, 4, GREEDY)
        assert seq.length == 50
        await lane.truncate(seq, 47)
        assert (await span(lane, seq, 9, replace(GREEDY, ignore_eos=True)))[-1].finish == "length" and seq.length == 50

    asked(body, scale_out=rows, v2=rows, context=50)


def test_chunks_ends_and_what_the_server_is_asked() -> None:
    plain = greedy(PROMPT, 40)
    text = MODEL.tokenizer.decode(plain[:11])[-3:]

    async def body(lane: RemoteLane, fake: FakeVllm) -> None:
        chunks = await span(lane, await lane.open(PROMPT), 20, replace(GREEDY, logprobs=True, confidence=2))
        assert [len(c.tokens) for c in chunks] == [8, 8, 4] and [c.finish for c in chunks] == [None, None, "length"]
        assert tokens_of(chunks) == plain[:20]
        rows = fake.rows(PROMPT + plain)[len(PROMPT) - 1 : -1][:20]
        told = [value for chunk in chunks for value in chunk.logprobs]
        assert told == pytest.approx(logprobs_of(PROMPT + plain[:20], len(PROMPT)), abs=1e-5)
        sure = [value for chunk in chunks for value in chunk.confidences]
        assert sure == pytest.approx(ops.token_confidence(rows, 2).tolist(), abs=1e-5)
        listed = replace(WARM, confidence=1, alternatives=3, ignore_eos=True)
        chunks = await span(lane, await lane.open(PROMPT), 20, listed)
        # At this temperature the drawn token is often none of the three, and stands in the server's map beside them.
        ids, values = top_logprobs(fake.rows(PROMPT + tokens_of(chunks))[len(PROMPT) - 1 : -1], 3)
        others = [entry for chunk in chunks for entry in chunk.alternatives]
        assert [[token for token, _ in entry] for entry in others] == ids.tolist()
        assert [value for entry in others for _, value in entry] == pytest.approx(values.flatten().tolist(), abs=1e-5)
        assert any(token not in row for token, row in zip(tokens_of(chunks), ids.tolist(), strict=True))
        sure = [value for chunk in chunks for value in chunk.confidences]
        assert sure == pytest.approx((-values[:, 0]).tolist(), abs=1e-5)
        stopped = await span(lane, await lane.open(PROMPT), 40, replace(GREEDY, stop=(text,)))
        end = next(n for n in range(1, 41) if text in MODEL.tokenizer.decode(plain[:n]))
        assert tokens_of(stopped) == plain[:end] and stopped[-1].finish == "stop"
        by_id = await span(lane, await lane.open(PROMPT), 40, replace(GREEDY, stop_token_ids=(plain[4],)))
        assert tokens_of(by_id) == plain[: plain.index(plain[4]) + 1] and by_id[-1].finish == "stop"
        for name in ("confidence", "alternatives"):
            with pytest.raises(Refused, match="greater than max allowed: 20"):
                await span(lane, await lane.open(PROMPT), 4, replace(GREEDY, **{name: 30}))
        _, asked_for = fake.heard[0]
        # What a request leaves out is as the model's generation_config.json has it, so nothing is left out.
        assert asked_for["top_k"] == 0 and asked_for["min_p"] == 0.0 and asked_for["repetition_penalty"] == 1.0
        assert asked_for["stop_token_ids"] == list(MODEL.eos_token_ids)

    # The server's own idea of what ends a text is another.
    asked(body, end_ids=())


def test_noise_is_keyed_by_the_seed_and_the_length() -> None:
    async def body(lane: RemoteLane, fake: FakeVllm) -> list[list[int]]:
        found = []
        for sampling in (WARM, WARM, replace(WARM, seed=4)):
            seq = await lane.open(PROMPT)
            found.append(
                [*tokens_of(await span(lane, seq, 12, sampling)), *tokens_of(await span(lane, seq, 12, sampling))]
            )
        return found

    one, same, other = asked(body)
    assert one == same != other
    seeds = asked(lambda lane, fake: _seeds(lane, fake))
    assert len(set(seeds)) == 2


async def _seeds(lane: RemoteLane, fake: FakeVllm) -> list[int]:
    seq = await lane.open(PROMPT)
    for _ in range(2):
        await span(lane, seq, 5, replace(WARM, ignore_eos=True))
    return [body["seed"] for _, body in fake.heard]


@pytest.mark.parametrize("after", [0, 1, 10, 11])
def test_a_span_goes_on_where_the_server_broke_off(after: int) -> None:
    plain = greedy(PROMPT, 30)
    text = MODEL.tokenizer.decode(plain[:12])[-4:]
    end = next(n for n in range(1, 31) if text in MODEL.tokenizer.decode(plain[:n]))

    async def body(lane: RemoteLane, fake: FakeVllm) -> None:
        fake.faults.extend([Fault(after=after), Fault(after=0), None])
        seq = await lane.open(PROMPT)
        chunks = await span(lane, seq, 30, replace(GREEDY, stop=(text,)))
        # A stop string that began before the break ends the span as well.
        assert tokens_of(chunks) == plain[:end] and chunks[-1].finish == "stop"
        assert seq.length == len(PROMPT) + end
        assert lane.stats()["retries"] == 2 and lane.stats()["resumed_spans"] == (after > 0)

    asked(body)


@pytest.mark.parametrize(
    "fault",
    [Fault(status=503), Fault(status=429, retry_after="0.01"), Fault(status=500), Fault(status=520), Fault(after=0)],
    ids=["503", "429", "500", "520", "reset"],
)
@pytest.mark.parametrize("rows", [False, True], ids=["whole", "rows"])
def test_scores_are_had_in_the_end(fault: Fault, rows: bool) -> None:
    async def body(lane: RemoteLane, fake: FakeVllm) -> None:
        seq = await lane.open(PROMPT)
        fake.faults.extend([fault, fault])
        await lane.append(seq, STEP, score=True)
        found = await lane.verdict(seq, None)
        assert found.logprobs == pytest.approx(logprobs_of(PROMPT + STEP, len(PROMPT)), abs=1e-5)
        assert lane.stats()["retries"] == 2 and lane.stats()["failures"] == 0

    asked(body, scale_out=rows, v2=rows)


def test_answers_that_are_none() -> None:
    def without(name: str) -> Fault:
        return Fault(change=lambda choice: {**choice, name: None})

    def told(value: float | None) -> Fault:
        return Fault(change=lambda choice: {**choice, "logprobs": {**choice["logprobs"], "token_logprobs": [value]}})

    def row(value: float | None) -> Fault:
        rows = lambda choice: [*choice["prompt_logprobs"][:-1], {str(STEP[-1]): {"logprob": value}}]  # noqa: E731
        return Fault(change=lambda choice: {**choice, "prompt_logprobs": rows(choice)})

    async def body(lane: RemoteLane, fake: FakeVllm) -> None:
        sampling = replace(GREEDY, logprobs=True)
        for fault, error, said in (
            (without("logprobs"), LaneError, "0 log-probabilities for 1 tokens"),
            (told(None), ChainError, "not finite"),
            (told(-9999.0), ChainError, "not finite"),
            (Fault(body=b"<html>gateway\n</html>"), Exception, "broke off|no JSON"),
        ):
            fake.faults.append(fault)
            if fault.body is None:
                with pytest.raises(error, match=said):
                    await span(lane, await lane.open(PROMPT), 4, sampling)
        fake.faults.clear()
        for fault, error, said in (
            (without("prompt_logprobs"), LaneError, "without prompt_logprobs"),
            (row(None), ChainError, "NaN"),
            (row(-9999.0), ChainError, "NaN"),
            (Fault(body=b"<html>gateway\n</html>"), LaneError, "no JSON: '<html>gateway </html>'"),
        ):
            fake.faults.append(fault)
            seq = await lane.open(PROMPT)
            await lane.append(seq, STEP, score=True)
            with pytest.raises(error, match=said):
                await lane.verdict(seq, None)
        # A chain's end is nobody else's.
        seq = await lane.open(PROMPT)
        await lane.append(seq, STEP, score=True)
        assert np.isfinite((await lane.verdict(seq, None)).score)

    asked(body)


def test_who_stops_listening_ends_the_request() -> None:
    async def body(lane: RemoteLane, fake: FakeVllm) -> None:
        fake.pace = 0.01
        seq = await lane.open(PROMPT)
        async with aclosing(lane.decode(seq, 300, replace(GREEDY, ignore_eos=True), chunk_tokens=2)) as chunks:
            async for _ in chunks:
                break
        await until(lambda: fake.open == 0)
        waiting = asyncio.create_task(span(lane, await lane.open(PROMPT), 300, replace(GREEDY, ignore_eos=True)))
        await until(lambda: fake.open == 1)
        waiting.cancel()
        await until(lambda: fake.open == 0)
        fake.hang = True
        await lane.append(seq, STEP, score=True)
        verdict = asyncio.create_task(lane.verdict(seq, None))
        await until(lambda: fake.open == 1)
        verdict.cancel()
        await lane.close(seq)
        await until(lambda: fake.open == 0)
        fake.hang = False
        assert fake.aborted == 3

    asked(body)


def test_a_silent_server_is_asked_whether_it_lives() -> None:
    async def body(lane: RemoteLane, fake: FakeVllm) -> None:
        fake.hang = True
        seq = await lane.open(PROMPT)
        waiting = asyncio.create_task(span(lane, seq, 3, GREEDY))
        await asyncio.sleep(0.5)
        assert not waiting.done() and len(fake.heard) == 1  # a long queue is no fault
        fake.healthy = False
        with pytest.raises(
            LaneError, match=r"vllm://127.0.0.1:\d+/tiny has not answered for .* no word for 0.2 seconds"
        ):
            await waiting

    asked(body, patience_s=0.2)


def test_a_server_that_comes_back() -> None:
    async def run() -> None:
        fake = FakeVllm(MODEL, pace=0.02)
        async with serving(fake) as place:
            lane = await connect(f"vllm://{place}/tiny", lane="draft", tokenizer="tiny-target", patience_s=30)
            seqs = [await lane.open(PROMPT) for _ in range(12)]
            spans = [asyncio.create_task(span(lane, seq, 30, replace(GREEDY, ignore_eos=True))) for seq in seqs]
            await until(lambda: lane.stats()["sampled_tokens"] > 30)
        await asyncio.sleep(0.2)
        fake.most_open = 0
        async with serving(fake, int(place.rpartition(":")[2])):
            found = [tokens_of(chunks) for chunks in await asyncio.gather(*spans)]
            stats = lane.stats()
            await lane.aclose()
            with pytest.raises(LaneError, match="closed"):
                await span(lane, seqs[0], 3, GREEDY)
        one = FakeVllm(MODEL)
        expected = list(PROMPT)
        for _ in range(30):
            expected.append(int(one.rows(expected)[-1].argmax()))
        assert found == [expected[len(PROMPT) :]] * 12
        assert stats["resumed_spans"] > 0 and stats["breaker_opened"] == 1 and stats["waiting_s"] > 0

    asyncio.run(run())


def test_at_most_so_many_requests_at_a_time() -> None:
    async def run() -> None:
        fake = FakeVllm(MODEL, pace=0.002)
        async with serving(fake) as place:
            lane = await connect(f"vllm://{place}/tiny", lane="draft", tokenizer="tiny-target", max_requests=2)
            seqs = [await lane.open(PROMPT) for _ in range(7)]
            await asyncio.gather(*(span(lane, seq, 4, GREEDY) for seq in seqs))
            await lane.aclose()
            assert fake.most_open == 2

    asyncio.run(run())


def test_connecting() -> None:
    async def run() -> None:
        fake = FakeVllm(MODEL, root=str(resolve("tiny-target")), key="secret")
        async with serving(fake) as place:
            text = f"vllm://{place}/tiny"
            with pytest.raises(LaneError, match=r"401 .*ATTS_DRAFT_API_KEY"):
                await connect(text, lane="draft")
            # The files that the server names are here: the tokenizer and the fingerprint are theirs.
            lane = await connect(text, lane="draft", key="secret")
            assert lane.model.fingerprint == MODEL.fingerprint
            assert lane.model.eos_token_ids == MODEL.eos_token_ids and lane.model.vocab_size == MODEL.vocab_size
            assert lane.max_length == 512 and lane.pool_tokens is None and lane.name == "draft"
            await lane.aclose()
            with pytest.raises(LaneError, match="no model 'other'; it has tiny"):
                await connect(f"vllm://{place}/other", lane="draft", key="secret")
            fake.root = "org/elsewhere"
            with pytest.raises(InputError, match="not on this machine; name a folder"):
                await connect(text, lane="draft", key="secret")
            lane = await connect(text, lane="draft", key="secret", tokenizer="tiny-target")
            assert lane.model.fingerprint != MODEL.fingerprint
            await lane.aclose()
            with pytest.raises(InputError, match=r"tokenizer is another: .* is \[.*\] there and \[.*\] here"):
                await connect(text, lane="draft", key="secret", tokenizer="smollm2-135m")
        with pytest.raises(LaneError, match="has not answered"):
            await connect(text, lane="draft", patience_s=0.1)

    asyncio.run(run())


def test_the_same_lane_on_sglang() -> None:
    async def run() -> None:
        async with fake_sglang.serving(fake_sglang.FakeSGLang(fake_sglang.Local(MODEL))) as url:
            lane = await connect(f"sglang://{url.removeprefix('http://')}/tiny", lane="draft", tokenizer="tiny-target")
            assert lane.appends
            seq = await lane.open(PROMPT)
            assert tokens_of(await span(lane, seq, 12, GREEDY)) == greedy(PROMPT, 12)
            await lane.truncate(seq, len(PROMPT))
            for token in STEP:
                await lane.append(seq, [token], score=True)
            found = await lane.verdict(seq, None)
            assert found.logprobs == pytest.approx(logprobs_of(PROMPT + STEP, len(PROMPT)), abs=1e-5)
            await lane.aclose()

    asyncio.run(run())


def test_without_aiohttp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(InputError, match=r"pip install 'atts-engine\[remote\]'"):
        asyncio.run(connect("vllm://127.0.0.1/tiny", lane="draft"))
