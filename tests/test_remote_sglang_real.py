"""SGLang as a server of a remote lane, against the real one."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from atts_engine.errors import ChainError
from atts_engine.models import resolve
from tests.test_remote_sglang import (
    GREEDY,
    MODEL,
    PROMPT,
    STEP,
    VOCAB,
    WARM,
    WRONG,
    check_answers,
    check_lane,
    greedy,
    joined,
    logprobs_of,
    server_at,
    whole,
    written,
)


@contextmanager
def real_server(*flags: str, **environment: str) -> Iterator[str]:
    """SGLang on the CPU, with tiny-target; its address."""
    python = os.environ.get("ATTS_SGLANG_PYTHON")
    if not python:
        pytest.skip("ATTS_SGLANG_PYTHON does not name a Python that has SGLang")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = (
        f"-m sglang.launch_server --model-path {resolve('tiny-target')} --served-model-name tiny --host 127.0.0.1 "
        f"--port {port} --device cpu --attention-backend torch_native --dtype float32 --max-total-tokens 20000 "
        "--mem-fraction-static 0.1 --chunked-prefill-size 64 --disable-cuda-graph --skip-server-warmup --sleep-on-idle"
    ).split()
    settings = {**os.environ, "SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1", **environment}
    with subprocess.Popen([python, *words, *flags], env=settings, start_new_session=True) as process:
        try:
            end = time.monotonic() + 300
            while not _answers(port):
                assert process.poll() is None and time.monotonic() < end, "SGLang does not start"
                time.sleep(1)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/model_info", timeout=5):
            return True
    except OSError:
        return False


@pytest.mark.long
@pytest.mark.parametrize("mode", ["cumulative", "incremental"])
def test_the_real_one(mode: str) -> None:
    """It still answers as recorded, and a `Server` on it scores and writes as the local model does."""
    text = PROMPT + STEP + WRONG

    async def run(url: str) -> None:
        await check_answers(url, mode, joined)
        server = server_at(url)
        try:
            assert (await server.describe()).context == 505
            assert await server.encode("b = a-43\n\n") == MODEL.tokenizer.encode("b = a-43\n\n")
            start = len(PROMPT) + len(STEP)
            await server.score(text[:start], len(PROMPT))
            scores = await server.score(text, start)
            assert scores.logprobs == pytest.approx(logprobs_of(text, start), abs=2e-3)
            assert scores.cached_tokens == start - 1
            with pytest.raises(ChainError, match="another tokenizer"):
                await server.score([1, VOCAB], 1)
            said = whole(await written(server, PROMPT, 60, GREEDY))
            assert list(said.tokens) == greedy(PROMPT, 37)
            for temperature in (0.0, 0.8, 1.0):
                said = whole(await written(server, PROMPT, 60, replace(WARM, temperature=temperature, logprobs=True)))
                own = temperature != 0.8 or mode == "incremental"
                drawn = PROMPT + list(said.tokens)
                wanted = logprobs_of(drawn, len(PROMPT)) if own else ()
                assert said.logprobs == pytest.approx(wanted, abs=2e-3)
        finally:
            await server.close()
        await check_lane(url)

    if mode == "incremental":
        flags, environment = ["--incremental-streaming-output"], {"SGLANG_RETURN_ORIGINAL_LOGPROB": "1"}
    else:
        flags, environment = [], {}
    with real_server(*flags, **environment) as url:
        asyncio.run(run(url))
