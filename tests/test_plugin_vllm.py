"""examples/vllm in the real vLLM on a CPU, against transformers. ATTS_VLLM_PYTHON names a Python that has vLLM."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atts_engine.conformal import Mondrian, load_calibrator
from atts_engine.conformal.state import Meta
from atts_engine.evaluation.decisions import check_log, read_decisions
from atts_engine.models.fingerprint import fingerprint
from atts_engine.models.load import resolve

pytestmark = pytest.mark.long
SPAN, SPANS, MARK, ALPHA = 8, 4, 0, 0.4
ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {
    "skip_tokenizer_init": True,
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 4,  # fewer than there are requests: rows come and go
    "max_num_batched_tokens": 64,  # prompts come in pieces
    "enable_prefix_caching": False,
}
PLUGGED = {
    "logits_processors": ["examples.vllm.self_gate:SelfGate"],
    "worker_cls": "examples.vllm.scoring_worker.ScoringWorker",
}


@pytest.fixture(scope="module")
def python() -> str:
    found = os.environ.get("ATTS_VLLM_PYTHON")
    if not found:
        pytest.skip("ATTS_VLLM_PYTHON names no interpreter that has vLLM")
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with random weights, sharp enough that scores differ, and the built-in pair's tokenizer."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=48, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.15, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(resolve("tiny-draft") / name, path)
    return path


def _environment() -> dict[str, str]:
    ours = {
        "PYTHONPATH": str(ROOT),
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | ours


def _outputs(python: str, settings: dict[str, Any], requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    done = subprocess.run(
        [python, str(ROOT / "tests" / "plugin_peer.py")], env=_environment(), capture_output=True, text=True,
        input=json.dumps({"settings": settings, "requests": requests}), timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    outputs: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return outputs


def _requests(gated: bool) -> list[dict[str, Any]]:
    """Twelve chains. Every third is greedy, never gated, and has its prompt scored; on a CPU vLLM 0.32 takes no seed
    for a prompt that comes in pieces, so that no sampled chain could be compared with itself."""
    requests = []
    for chain in range(12):
        prompt = [3 + (7 * i * i + 5 * chain + i) % 45 for i in range(20 + 15 * chain)]
        sampling: dict[str, Any] = {"temperature": 0.8 if chain % 3 else 0, "ignore_eos": True}
        sampling["max_tokens"] = SPANS * SPAN + 1
        if chain % 3 == 0:
            sampling["prompt_logprobs"] = 0
        elif gated:
            sampling["stop_token_ids"] = [MARK]
            sampling["extra_args"] = {"atts_turn": 0, "atts_mark": MARK, "atts_problem": "p", "atts_chain": chain}
        requests.append({"prompt": prompt, "sampling": sampling})
    return requests


def _span_scores(folder: Path, prompt: list[int], written: list[int]) -> list[float]:
    """Mean negative log-likelihood of each whole span, by transformers."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + written])).logits[0].double()
    logprob = logits.log_softmax(-1)[:-1].gather(1, torch.tensor((prompt + written)[1:])[:, None])[:, 0]
    spans = logprob[len(prompt) - 1 :][: len(written) // SPAN * SPAN].view(-1, SPAN)
    return (-spans.mean(1)).tolist()


@pytest.fixture(scope="module")
def plain(python: str, folder: Path) -> list[dict[str, Any]]:
    return _outputs(python, SETTINGS | {"model": str(folder)}, _requests(gated=False))


@pytest.fixture(scope="module")
def calibration(plain: list[dict[str, Any]], folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores of chains that were not gated."""
    identity = fingerprint([folder / "config.json", folder / "model.safetensors"])
    made = Mondrian(ALPHA, keys=SPANS, meta=Meta(draft=identity, target=identity, draft_tokens=SPAN))
    for request, output in zip(_requests(gated=False), plain, strict=True):
        for turn, score in enumerate(_span_scores(folder, request["prompt"], output["ids"])):
            made.observe(score, turn)
    path = tmp_path_factory.mktemp("calibration") / "self.npz"
    made.save(path)
    return path


def test_gate_and_worker_in_one_engine(
    python: str, folder: Path, plain: list[dict[str, Any]], calibration: Path, tmp_path: Path
) -> None:
    log = tmp_path / "decisions.jsonl"
    configured = {"additional_config": {"atts_gate": {"calibration": str(calibration), "log": str(log)}}}
    requests = _requests(gated=True)
    outputs = _outputs(python, SETTINGS | PLUGGED | configured | {"model": str(folder)}, requests)
    decisions = read_decisions(log)
    assert check_log(decisions, load_calibrator(calibration, frozen=True)) is None
    verdicts = {(d.chain, d.turn): d for d in decisions}
    assert {d.verdict for d in decisions} == {"takeover", "keep"}
    for chain, (request, output, before) in enumerate(zip(requests, outputs, plain, strict=True)):
        if chain % 3 == 0:
            assert output["ids"] == before["ids"]
            found, expected = np.array(output["scores"]), np.array(before["scores"])
            np.testing.assert_allclose(found[:, 0], expected[:, 0], atol=1e-4, rtol=0)
            np.testing.assert_array_equal(found[:, 1], expected[:, 1])
            continue
        stopped = output["finish_reason"] == "stop"
        assert output["stop_reason"] == (MARK if stopped else None)
        written = output["ids"][: -1 if stopped else None]
        assert MARK not in written
        spans = _span_scores(folder, request["prompt"], written)
        assert len(written) == (len(spans) * SPAN if stopped else SPANS * SPAN + 1)
        for turn, score in enumerate(spans):
            decision = verdicts.pop((chain, turn))
            assert decision.score == pytest.approx(score, abs=1e-4)
            assert decision.verdict == ("takeover" if stopped and turn == len(spans) - 1 else "keep")
    assert not verdicts


@contextmanager
def _server(python: str, folder: Path, calibration: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "vllm.entrypoints.cli.main", "serve", str(folder), "--port", str(port)]
    command += "--host 127.0.0.1 --dtype float32 --enforce-eager --max-model-len 256 --max-num-seqs 4".split()
    command += ["--logits-processors", *PLUGGED["logits_processors"], "--worker-cls", PLUGGED["worker_cls"]]
    command += ["--additional-config", json.dumps({"atts_gate": {"calibration": str(calibration)}})]
    command += ["--uvicorn-log-level", "error"]
    server = subprocess.Popen(command, env=_environment(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 240
        while True:
            assert server.poll() is None and time.monotonic() < deadline, "the server did not come up"
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1/completions"
    finally:
        server.terminate()
        server.wait(60)


def _post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def test_over_http(python: str, folder: Path, plain: list[dict[str, Any]], calibration: Path) -> None:
    prompt = _requests(gated=False)[3]["prompt"]
    body = {"model": str(folder), "prompt": prompt, "max_tokens": SPAN + 1, "ignore_eos": True}
    with _server(python, folder, calibration) as url:
        # At 0.999 every span is taken over, whatever its score.
        asked = {"atts_turn": 0, "atts_mark": MARK, "atts_alpha": 0.999}
        taken = _post(url, body | {"stop_token_ids": [MARK], "vllm_xargs": asked})["choices"][0]
        assert (taken["finish_reason"], taken["stop_reason"]) == ("stop", MARK)
        with pytest.raises(urllib.error.HTTPError) as refused:
            _post(url, body | {"vllm_xargs": asked})
        assert refused.value.code == 400 and "stop_token_ids" in refused.value.read().decode()
        scored = _post(url, body | {"prompt_logprobs": 0})["choices"][0]["prompt_logprobs"]
    found = [scored[i][str(prompt[i])]["logprob"] for i in range(1, len(prompt))]
    np.testing.assert_allclose(found, [score for score, _ in plain[3]["scores"]], atol=1e-4, rtol=0)
