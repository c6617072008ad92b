"""Health is a question that the lanes answer; a fault turns it red and makes every request fail at once; SIGTERM lets
open requests end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from atts_engine import LaneError
from tests.serve.running import MODEL, QUESTION, Running, serving, until

ROOT = Path(__file__).resolve().parent.parent.parent
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 20}


def test_both_lanes_are_asked(server: Running, http: httpx.Client) -> None:
    before = {name: lane["sampled_tokens"] for name, lane in server.engine.stats().items()}
    # A check is good for a second, however often it is asked for.
    server.service._checked_at = -1e9
    for _ in range(5):
        reply = http.get("/health")
        assert reply.status_code == 200
        found = reply.json()
        assert found["status"] == "ok"
        assert {name: lane["ok"] for name, lane in found["lanes"].items()} == {"draft": True, "target": True}
        assert all(lane["seconds"] > 0 for lane in found["lanes"].values())
    after = {name: lane["sampled_tokens"] for name, lane in server.engine.stats().items()}
    assert all(1 <= after[name] - before[name] <= 5 for name in before)
    assert http.get("/version").json()["version"]


@pytest.mark.parametrize("lane", ["draft", "target"])
def test_a_device_fault_is_seen_at_once_and_stays(lane: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as running, httpx.Client(base_url=running.url, timeout=60.0) as http:
        assert http.get("/health").status_code == 200
        running.service._checked_at = -1e9
        core = running.engine._lanes[lane == "target"].core

        def fault(*_: Any) -> None:
            raise RuntimeError("device-side assert")

        monkeypatch.setattr(core._runner, "launch", fault)
        request = CHAT | ({"atts": {}, "max_tokens": None} if lane == "draft" else {})
        for stream in (False, True):
            failed = http.post("/v1/chat/completions", json=request | {"stream": stream})
            assert failed.status_code == 500
            assert failed.json()["error"]["code"] == "lane_failed"
            # The fault's own words are for the log: they are nobody's who may only ask.
            assert "a lane has failed" in failed.json()["error"]["message"] and "assert" not in failed.text
        if lane == "target":
            failed = http.post("/v1/score", json={"model": MODEL, "prompt": "a", "spans": ["b", "c"]})
            assert (failed.status_code, failed.json()["error"]["code"]) == (500, "lane_failed")
        red = http.get("/health")
        assert red.status_code == 503
        lanes = red.json()["lanes"]
        assert (red.json()["status"], lanes[lane]["ok"]) == ("failed", False)
        assert lanes[lane]["error"] == "failed; the server's log has the details"
        other = "draft" if lane == "target" else "target"
        assert lanes[other]["ok"]
        if lane == "draft":
            # The target alone serves on.
            assert http.post("/v1/chat/completions", json=CHAT).status_code == 200


def test_a_fault_in_the_middle_of_a_stream_ends_it_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as running:
        body = CHAT | {"stream": True, "ignore_eos": True, "max_tokens": 400}
        core = running.engine._lanes[1].core
        launch, launched = core._runner.launch, []

        def fault(*args: Any) -> Any:
            launched.append(args)
            if len(launched) > 40:
                raise RuntimeError("device-side assert")
            return launch(*args)

        monkeypatch.setattr(core._runner, "launch", fault)
        response = httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=60.0)
        *chunks, error, done = [line for line in response.text.split("\n\n") if line]
        assert response.status_code == 200 and done == "data: [DONE]" and len(chunks) > 10
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "lane_failed"
        text = running.service.metrics.text().decode()
        assert 'vllm:request_success_total{finished_reason="error",model_name="tiny-pair"} 1.0' in text


def test_a_lane_that_says_nothing_is_not_well(server: Running) -> None:
    with pytest.raises(LaneError, match="no answer within"):
        server.call(server.engine.check("target", timeout_s=1e-9))
    assert until(lambda: not any(server.open_sequences().values()))


def test_a_draining_server_says_so_and_takes_nothing_new() -> None:
    with serving() as running, httpx.Client(base_url=running.url, timeout=60.0) as http:
        running.service.drain()
        refused = http.post("/v1/chat/completions", json=CHAT)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert "retry-after" in refused.headers
        health = http.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "draining")


def test_sigterm_lets_open_requests_end() -> None:
    command = [
        sys.executable,
        "-m",
        "atts_engine.cli.main",
        "serve",
        "--draft",
        "tiny-draft",
        "--target",
        "tiny-target",
    ]
    command += ["--port", "0", "--kv-tokens", "4096", "--threads", "1", "--draft-tokens", "24", "--target-tokens", "24"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ, cwd=ROOT
    )
    try:
        assert process.stdout is not None
        found = re.search(r"serving tiny-target at (http://127\.0\.0\.1:\d+)", process.stdout.readline())
        assert found is not None
        url = found.group(1)
        body = CHAT | {"model": "tiny-target", "stream": True, "ignore_eos": True, "max_tokens": 400}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60.0) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)

            def refused() -> bool:
                try:
                    return httpx.get(f"{url}/version", timeout=60.0).status_code == 503
                except httpx.TransportError:
                    return True

            assert until(refused)
            said = [line for line in lines if line]
        assert said[-1] == "data: [DONE]"
        assert json.loads(said[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        _, log = process.communicate(timeout=60)
        assert process.returncode == 0
        assert "length after" in log and QUESTION not in log and "Traceback" not in log
    finally:
        process.kill()
        process.wait()
