"""The fake vLLM against what the real one said, and a lane on the real one against the local model."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from atts_engine import ops
from atts_engine.backends.remote.connect import connect
from atts_engine.models import resolve
from tests.fake_vllm import FakeVllm, serving
from tests.remote_cases import GREEDY, MODEL, PROMPT, STEP, WARM, WRONG, logprobs_of, span, tokens_of

ANSWERS = json.loads((Path(__file__).parent / "vllm_answers.json").read_text())


async def told(url: str, case: dict[str, Any]) -> tuple[int, Any]:
    """Status and answer to a recorded request."""
    async with aiohttp.request(case["method"], url + case["path"], json=case["body"]) as response:
        if response.content_type != "text/event-stream":
            return response.status, await response.json()
        lines = [line[6:].strip() async for line in response.content if line.startswith(b"data: ")]
        return response.status, ["[DONE]" if line == b"[DONE]" else json.loads(line) for line in lines]


def check_alike(name: str, said: Any, recorded: Any) -> None:
    """All of `said` was recorded; numbers agree to 2e-3 nats."""
    if isinstance(said, dict):
        assert isinstance(recorded, dict) and said.keys() <= recorded.keys(), (name, said, recorded)
        for key in said.keys():
            check_alike(f"{name}, {key}", said[key], recorded[key])
    elif isinstance(said, list):
        assert isinstance(recorded, list) and len(said) == len(recorded), (name, said, recorded)
        for i, (one, other) in enumerate(zip(said, recorded, strict=True)):
            check_alike(f"{name}, {i}", one, other)
    elif isinstance(said, float):
        assert said == pytest.approx(recorded, abs=2e-3), name
    else:
        assert said == recorded, name


def test_fake_answers_as_the_real_one_did() -> None:
    async def run() -> None:
        async with serving(FakeVllm(MODEL, scale_out=True, details=False)) as place:
            for case in ANSWERS:
                status, answer = await told(f"http://{place}", case)
                assert status == case["status"], case["name"]
                check_alike(case["name"], answer, case["answer"])

    asyncio.run(run())


@pytest.fixture
def real_vllm(tmp_path: Path) -> Iterator[str]:
    """HOST:PORT of a vLLM that serves tiny-target on the CPU, by the Python that ATTS_VLLM_PYTHON names."""
    python = os.environ.get("ATTS_VLLM_PYTHON")
    if python is None:
        pytest.skip("ATTS_VLLM_PYTHON names no Python that has vLLM")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(resolve("tiny-target"))]
    command += ["--served-model-name", "tiny", "--port", port, "--host", "127.0.0.1", "--dtype", "float32"]
    command += ["--enforce-eager", "--enable-scale-out", "--enable-prompt-tokens-details"]
    cpu = {
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    ours = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with (tmp_path / "vllm.log").open("w") as log:
        server = subprocess.Popen(command, env=ours | cpu, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)


@pytest.mark.long
def test_the_real_one(real_vllm: str) -> None:
    """Tokens and scores beside the local model's, fp32; a server that still starts is waited for."""

    async def run() -> None:
        lane = await connect(f"vllm://{real_vllm}/tiny", lane="target", patience_s=300)
        for case in ANSWERS[1:]:  # the first names where the model lay
            status, answer = await told(f"http://{real_vllm}", case)
            assert status == case["status"], case["name"]
            check_alike(case["name"], case["answer"], answer)
        # A CPU build has no V2 model runner, which rows need.
        assert lane.model.fingerprint == MODEL.fingerprint and not lane.appends
        seq = await lane.open(PROMPT)
        chunks = await span(lane, seq, 60, replace(GREEDY, logprobs=True, confidence=3, ignore_eos=True))
        written = tokens_of(chunks)
        rows = FakeVllm(MODEL).rows(PROMPT + written)[len(PROMPT) - 1 : -1]
        assert written == rows.argmax(1).tolist()
        assert [v for c in chunks for v in c.logprobs] == pytest.approx(
            logprobs_of(PROMPT + written, len(PROMPT)), abs=1e-3
        )
        assert [v for c in chunks for v in c.confidences] == pytest.approx(
            ops.token_confidence(rows, 3).tolist(), abs=1e-3
        )
        await lane.truncate(seq, len(PROMPT))
        await lane.append(seq, STEP + WRONG, score=True)
        found = await lane.verdict(seq, None)
        assert found.logprobs == pytest.approx(logprobs_of(PROMPT + STEP + WRONG, len(PROMPT)), abs=1e-3)
        filling = (STEP * 40)[: lane.max_length - seq.length]
        await lane.append(seq, filling, score=True)
        found = await lane.verdict(seq, None)
        held = PROMPT + STEP + WRONG
        assert found.logprobs == pytest.approx(logprobs_of(held + filling, len(held)), abs=1e-3)
        # One key of the noise, one span, however many are in company.
        warm = replace(WARM, temperature=1.5, ignore_eos=True)  # vLLM takes up to 2
        spans = [await span(lane, await lane.open(PROMPT), 20, warm)]
        spans += await asyncio.gather(*[span(lane, await lane.open(PROMPT), 20, warm) for _ in range(4)])
        assert len({tuple(tokens_of(chunks)) for chunks in spans}) == 1
        stopped = await span(lane, await lane.open(PROMPT), 30, replace(GREEDY, stop=("a-",)))
        assert stopped[-1].finish == "stop" and MODEL.tokenizer.decode(tokens_of(stopped)).endswith("a-")
        stats = lane.stats()
        assert stats["told_tokens"] == stats["sent_tokens"] and stats["cached_tokens"] > 0
        assert stats["retries"] >= 0 and stats["failures"] == 0
        await lane.aclose()

    asyncio.run(run())
