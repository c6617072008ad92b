"""A server that answers as vLLM 0.32 does, on a model of this repository. What it copies is named by its file under
`vllm/`; `tests/vllm_answers.json` holds what the real one said to the same requests."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tokenizers
import torch
from aiohttp import web

from atts_engine import ops
from atts_engine.models import Model, resolve
from tests.models_oracle import paged_logits

BLOCK = 16
TOKENIZER = resolve("tiny-target") / "tokenizer.json"
MAX_LOGPROBS = 20
NEEDS_V2 = (
    "prompt_logprob_token_ids requires the V2 model runner (VLLM_USE_V2_MODEL_RUNNER=1). "
    "(parameter=prompt_logprob_token_ids)"
)


class Refusal(Exception):
    def __init__(self, status: int, message: str, kind: str = "BadRequestError", param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.param = status, kind, param


@dataclass(slots=True)
class Fault:
    """What becomes of one request. status: answered in its place, with retry_after as its header; after: tokens of a
    stream behind which the connection is cut, 0 before anything; lost: likewise, behind which nothing comes while the
    connection stays, of an answer that is no stream half of it; body: said in place of the answer; change: applied to
    every choice of the answer."""

    status: int | None = None
    retry_after: str | None = None
    after: int | None = None
    lost: int | None = None
    body: bytes | None = None
    change: Any = None


@dataclass(slots=True)
class FakeVllm:
    """scale_out, v2, details: --enable-scale-out, the V2 model runner, --enable-prompt-tokens-details. root: of the
    model, as it is told; end_ids: that end a text for the server. pace: seconds that a token takes; hang: no token
    comes, /health answers `healthy`. heard: (path, body) of every request to compute; computed: positions forwarded;
    open: requests that run; aborted: that their client left. faults: of the next requests to compute, None for none."""

    model: Model
    root: str = "/models/tiny"
    scale_out: bool = False
    v2: bool = False
    details: bool = True
    context: int = 512
    end_ids: tuple[int, ...] = (2,)
    key: str | None = None
    pace: float = 0.0
    hang: bool = False
    healthy: bool = True
    heard: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    computed: int = 0
    open: int = 0
    most_open: int = 0
    aborted: int = 0
    faults: deque[Fault | None] = field(default_factory=deque)
    spelling: tokenizers.Tokenizer = field(default_factory=lambda: tokenizers.Tokenizer.from_file(str(TOKENIZER)))
    _cached: set[tuple[int, ...]] = field(default_factory=set)
    _rows: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)

    async def health(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if self.healthy else 503)

    async def version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "0.32.0"})

    async def models(self, request: web.Request) -> web.Response:
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        card = {"id": "tiny", "object": "model", "root": self.root, "parent": None, "max_model_len": self.context}
        return web.json_response({"object": "list", "data": [card]})

    async def tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        assert body["add_special_tokens"] is False
        # Not `Tokenizer.encode`, which refuses what it cannot spell.
        ids = self.spelling.encode(body["prompt"], add_special_tokens=False).ids
        return web.json_response({"count": len(ids), "max_model_len": self.context, "tokens": ids, "token_strs": None})

    async def compute(self, request: web.Request) -> web.StreamResponse:
        """/v1/completions and /inference/v1/generate."""
        body = await request.json()
        self.heard.append((request.path, body))
        fault = (self.faults.popleft() if self.faults else None) or Fault()
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            return await self._answered(request, body, fault)
        except Refusal as refusal:
            shape = {"message": str(refusal), "type": refusal.kind, "param": refusal.param, "code": refusal.status}
            return web.json_response({"error": shape}, status=refusal.status)
        except (asyncio.CancelledError, ConnectionResetError):
            # The second where it was just being written to.
            self.aborted += 1
            raise
        finally:
            self.open -= 1

    async def _answered(self, request: web.Request, body: dict[str, Any], fault: Fault) -> web.StreamResponse:
        if fault.status is not None:
            headers = {} if fault.retry_after is None else {"Retry-After": fault.retry_after}
            return web.json_response({"error": {"message": "not\n now"}}, status=fault.status, headers=headers)
        if fault.body is not None:
            return web.Response(body=fault.body)
        if fault.after == 0:
            return _cut(request)
        if fault.lost == 0:
            await asyncio.Event().wait()
        while self.hang:
            await asyncio.sleep(0.01)
        if request.path == "/v1/completions":
            return await (self._stream if body.get("stream") else self._completion)(request, body, fault)
        return await self._generate(body, fault)

    async def _stream(self, request: web.Request, body: dict[str, Any], fault: Fault) -> web.StreamResponse:
        prompt, cached = self._admit(body["prompt"], body, skip=False)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        written = 0
        async for token, row, finish in self._written(prompt, body):
            written += 1
            choice = {"index": 0, "finish_reason": finish, "token_ids": [token]}
            choice["logprobs"] = self._logprobs(token, row, body)
            choice = fault.change(choice) if fault.change else choice
            await _send(response, {"choices": [choice]})
            if fault.after == written:
                await asyncio.sleep(0.02)  # an abort takes back what was not sent yet
                return _cut(request, response)
            if fault.lost == written:
                await asyncio.Event().wait()
        await _send(response, {"choices": [], "usage": self._usage(prompt, written, cached)})
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _completion(self, request: web.Request, body: dict[str, Any], fault: Fault) -> web.Response:
        # sampling_params.py, __post_init__: prompt log-probabilities do not read the prefix cache.
        prompt, cached = self._admit(body["prompt"], body, skip=body.get("prompt_logprobs") is not None)
        choice: dict[str, Any] = {"index": 0, "prompt_logprobs": None}
        async for token, row, finish in self._written(prompt, body):
            choice |= {"finish_reason": finish, "logprobs": self._logprobs(token, row, body)}
        if body.get("prompt_logprobs") is not None:
            choice["prompt_logprobs"] = [None, *({str(t): {"logprob": v}} for t, v in self._of_prompt(prompt, 1))]
        choice = fault.change(choice) if fault.change else choice
        answer = web.json_response({"choices": [choice], "usage": self._usage(prompt, 1, cached)})
        if fault.lost:
            assert isinstance(answer.body, bytes)
            half = web.StreamResponse(headers={"content-length": str(len(answer.body))})
            await half.prepare(request)
            await half.write(answer.body[: len(answer.body) // 2])
            await asyncio.Event().wait()
        return answer

    async def _generate(self, body: dict[str, Any], fault: Fault) -> web.Response:
        if not self.scale_out:  # entrypoints/scale_out/factories.py
            raise Refusal(403, "Scale-out endpoints are disabled.", "PermissionDeniedError")
        sampling = body["sampling_params"]
        rows, start = sampling["prompt_logprob_token_ids"], sampling["prompt_logprob_start"]
        if not self.v2:  # v1/engine/input_processor.py
            raise Refusal(400, NEEDS_V2, param="prompt_logprob_token_ids")
        prompt, cached = self._admit(body["token_ids"], sampling, skip=sampling["skip_reading_prefix_cache"])
        if len(rows) != len(prompt) - 1 - start:
            raise Refusal(400, f"prompt_logprob_token_ids has {len(rows)} rows")
        async for _ in self._written(prompt, sampling):
            pass
        found = None
        if cached <= start:  # v1/worker/gpu/sample/prompt_logprob.py: else they are dropped
            assert rows == [[t] for t in prompt[start + 1 :]]
            file = io.BytesIO()
            np.save(file, np.array([[v] for _, v in self._of_prompt(prompt, start + 1)], np.float32))
            found = base64.b64encode(file.getvalue()).decode()
        answer = {"prompt_token_id_logprobs": found, "usage": self._usage(prompt, 1, cached), "choices": [{"index": 0}]}
        return web.json_response(fault.change(answer) if fault.change else answer)

    def _admit(self, prompt: list[int], sampling: dict[str, Any], *, skip: bool) -> tuple[list[int], int]:
        """The prompt, and how many of its tokens are cached."""
        vocab, room = self.model.config.vocab_size, self.context - len(prompt)
        unknown = next((t for t in prompt if t >= vocab), None)
        if unknown is not None:
            raise Refusal(400, f"Token id {unknown} is out of vocabulary")
        if sampling["max_tokens"] > room:
            raise Refusal(
                400,
                f"max_tokens must be at least 1, got {room}. (parameter=max_tokens, value={room})",
                param="max_tokens",
            )
        asked = sampling.get("logprobs") or 0
        if asked > MAX_LOGPROBS:
            said = f"Requested sample logprobs of {asked}, which is greater than max allowed: {MAX_LOGPROBS}"
            raise Refusal(400, f"{said} (parameter=logprobs, value={asked})", param="logprobs")
        whole = range(BLOCK, len(prompt), BLOCK)
        cached = 0 if skip else max((n for n in whole if tuple(prompt[:n]) in self._cached), default=0)
        self.computed += len(prompt) - cached
        return prompt, cached

    async def _written(self, prompt: list[int], sampling: dict[str, Any]) -> AsyncIterator[tuple[int, Any, str | None]]:
        tokens, text = list(prompt), ""
        ends = {*(sampling.get("stop_token_ids") or ()), *(() if sampling.get("ignore_eos") else self.end_ids)}
        for n in range(1, sampling["max_tokens"] + 1):
            await asyncio.sleep(self.pace)
            row = self.rows(tokens)[-1]
            # The last token of a request is never forwarded.
            self._cached |= {tuple(tokens[:k]) for k in range(BLOCK, len(tokens) + 1, BLOCK)}
            token = self._draw(row, sampling, n)
            tokens.append(token)
            text = self.model.tokenizer.decode(tokens[len(prompt) :])
            stopped = token in ends or any(s in text for s in sampling.get("stop") or ())
            yield token, row, "stop" if stopped else "length" if n == sampling["max_tokens"] else None
            if stopped:
                return

    def _draw(self, row: torch.Tensor, s: dict[str, Any], n: int) -> int:
        """By the request's seed and the place within it."""
        floats = [torch.tensor([s[name]]) for name in ("temperature", "top_p", "min_p")]
        seed, place = torch.tensor([s.get("seed") or 0]), torch.tensor([n])
        return int(ops.sample(row[None], floats[0], torch.tensor([s["top_k"]]), *floats[1:], seed, place))

    @torch.inference_mode()
    def rows(self, tokens: Sequence[int]) -> torch.Tensor:
        """Logits [len, V]."""
        key = tuple(tokens)
        if key not in self._rows:
            self._rows[key] = paged_logits(self.model.decoder, [tokens])[0]
        return self._rows[key]

    def _of_prompt(self, prompt: Sequence[int], first: int) -> list[tuple[int, float]]:
        found = ops.score_logits(self.rows(prompt)[first - 1 : -1], torch.tensor(prompt[first:]))
        return list(zip(prompt[first:], found.tolist(), strict=True))

    def _logprobs(self, token: int, row: torch.Tensor, body: dict[str, Any]) -> dict[str, Any] | None:
        """entrypoints/openai/completion/serving.py, _create_completion_logprobs: the drawn token first."""
        if body.get("logprobs") is None:
            return None
        logprobs = row.log_softmax(0)
        others = body.get("logprob_token_ids") or logprobs.topk(min(body["logprobs"], len(row))).indices.tolist()
        top = {f"token_id:{t}": float(logprobs[t]) for t in (token, *others)}
        name = f"token_id:{token}"
        return {"tokens": [name], "token_logprobs": [top[name]], "top_logprobs": [top]}

    def _usage(self, prompt: list[int], written: int, cached: int) -> dict[str, Any]:
        usage: dict[str, Any] = {"prompt_tokens": len(prompt), "completion_tokens": written}
        return usage | ({"prompt_tokens_details": {"cached_tokens": cached}} if self.details else {})


async def _send(response: web.StreamResponse, event: dict[str, Any]) -> None:
    await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")


def _cut(request: web.Request, response: web.StreamResponse | None = None) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return response or web.Response()


@asynccontextmanager
async def serving(fake: FakeVllm, port: int = 0) -> AsyncIterator[str]:
    """The fake on the loopback, at a free port where none is named; HOST:PORT. A handler ends with its client, as under
    uvicorn."""
    app = web.Application()
    for path, handler in (("/health", fake.health), ("/version", fake.version), ("/v1/models", fake.models)):
        app.router.add_get(path, handler)
    app.router.add_post("/tokenize", fake.tokenize)
    app.router.add_post("/v1/completions", fake.compute)
    app.router.add_post("/inference/v1/generate", fake.compute)
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        yield "{}:{}".format(*runner.addresses[0][:2])
    finally:
        await runner.cleanup()
