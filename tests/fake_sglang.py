"""A server that answers as SGLang 0.5.23 does, on tiny-target. What it copies is named by its file under `sglang/srt`;
`tests/sglang_answers.json` holds what the real one said to the same requests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from aiohttp import web

from atts_engine.models import Model
from tests.models_oracle import paged_logits

# proto/sglang/api/v1, which /generate is checked against first (entrypoints/api_contract.py).
SETTINGS = (
    "max_new_tokens stop stop_token_ids stop_regex temperature top_p top_k min_p frequency_penalty presence_penalty "
    "repetition_penalty min_new_tokens n json_schema regex ebnf structural_tag ignore_eos skip_special_tokens "
    "spaces_between_special_tokens no_stop_trim stream_interval logit_bias sampling_seed custom_params beam_width "
    "watermark choice"
).split()


class Abort(Exception):
    """FINISH_ABORT (managers/schedule_batch.py): what the scheduler does not take."""

    def __init__(self, message: str, status: int | None = 400) -> None:
        super().__init__(message)
        self.status = status


class Local:
    """A model that is asked for the logits of whole sequences, and remembers them."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._known: dict[tuple[int, ...], torch.Tensor] = {}

    @torch.inference_mode()
    def rows(self, tokens: Sequence[int]) -> torch.Tensor:
        """Logits [len, V]."""
        key = tuple(tokens)
        if key not in self._known:
            self._known[key] = paged_logits(self.model.decoder, [key])[0]
        return self._known[key]


@dataclass(slots=True)
class FakeSGLang:
    """Flags are those of the server. computed: positions forwarded so far; heard: bodies of /generate, in order; pace:
    seconds that a token takes; running: requests in the scheduler; dead: the scheduler met an id outside the
    vocabulary. For one request each: `fail` is raised in its place, `broken` changes its first
    answer, or ends the stream in place of it where it gives None.
    """

    local: Local
    incremental: bool = False  # --incremental-streaming-output
    original: bool = False  # SGLANG_RETURN_ORIGINAL_LOGPROB=1
    deterministic: bool = False  # --enable-deterministic-inference
    truncate: bool = False  # --allow-auto-truncate
    radix: bool = True  # not --disable-radix-cache
    pace: float = 0.0
    computed: int = 0
    heard: list[dict[str, Any]] = field(default_factory=list)
    running: int = 0
    aborted: int = 0
    dead: bool = False
    fail: Abort | None = None
    broken: Any = None
    _cache: list[tuple[int, ...]] = field(default_factory=list)
    _noise: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(1))

    @property
    def model(self) -> Model:
        return self.local.model

    @property
    def context(self) -> int:
        return self.model.config.max_positions

    @property
    def max_req_len(self) -> int:
        return self.context - 1  # managers/tp_worker.py, get_worker_info

    # HTTP (entrypoints/http_server.py) -----------------------------------------------------------------------------

    async def model_info(self, request: web.Request) -> web.Response:
        name = self.model.name
        return web.json_response(
            {"model_path": name, "served_model_name": "tiny", "tokenizer_path": name, "is_generation": True}
        )

    async def server_info(self, request: web.Request) -> web.Response:
        return web.json_response(
            {
                "version": "0.5.23",
                "max_req_input_len": self.max_req_len - 5,
                "disable_radix_cache": not self.radix,
                "enable_deterministic_inference": self.deterministic,
                "incremental_streaming_output": self.incremental,
            }
        )

    async def tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        assert body["add_special_tokens"] is False
        ids = self.model.tokenizer.encode(body["prompt"])
        return web.json_response({"tokens": ids, "count": len(ids), "max_model_len": self.context})

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.heard.append(body)
        unknown = sorted({*body["sampling_params"]} - {*SETTINGS})
        if unknown:
            expected = ", ".join(f"`{name}`" for name in SETTINGS)
            return web.json_response({"error": f"unknown field `{unknown[0]}`, expected one of {expected}"}, status=400)
        if not body.get("stream"):
            try:
                async for last in self._answers(body):
                    answer = last
            except ValueError as error:
                return web.json_response({"error": {"message": str(error)}}, status=400)
            reason = answer.get("meta_info", {}).get("finish_reason", {})
            if reason.get("type") == "abort" and reason["status_code"]:  # _handle_abort_finish_reason
                said, status = reason["message"], reason["status_code"]
                shape = {"object": "error", "message": said, "type": str(status), "param": None, "code": status}
                return web.json_response({"error": {"message": said}} if status == 400 else shape, status=status)
            return web.json_response(answer)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        try:
            async for answer in self._answers(body):
                await response.write(b"data: " + json.dumps(answer).encode() + b"\n\n")
        except ValueError as error:
            said = {"message": str(error), "type": "invalid_request_error", "code": 400, "retryable": False}
            await response.write(b"data: " + json.dumps({"error": said}).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response

    # Tokenizer manager (managers/tokenizer_manager.py) ---------------------------------------------------------------

    async def _answers(self, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        ids, settings = list(body["input_ids"]), body["sampling_params"]
        if not ids:
            raise ValueError("input_ids cannot be empty.")
        most = settings["max_new_tokens"]
        if len(ids) >= self.context:
            raise ValueError(
                f"The input ({len(ids)} tokens) is longer than the model's context length ({self.context} tokens)."
            )
        if len(ids) + most > self.context:
            raise ValueError(
                f"Requested token count exceeds the model's maximum context length of {self.context} tokens. You "
                f"requested a total of {len(ids) + most} tokens: {len(ids)} tokens from the input messages and {most} "
                "tokens for the completion. Please reduce the number of tokens in the input messages or the completion "
                "to fit within the limit."
            )
        for token in body.get("token_ids_logprob") or ():
            if not 0 <= token < self.model.config.vocab_size:
                raise ValueError(
                    f"token_ids_logprob contains out-of-vocabulary token id {token}; valid range is "
                    f"[0, {self.model.config.vocab_size})."
                )
        if not settings.get("temperature", 1.0) >= 0.0:  # sampling_params.py, verify
            raise ValueError(f"temperature must be a non-negative finite number, got {settings['temperature']}.")
        sent = 0
        try:
            self.running += 1
            async for answer in self._schedule(ids, body):
                meta, streams = answer["meta_info"], body.get("stream", False)
                if streams and self.incremental:  # _slice_streaming_output_meta_info
                    answer["output_ids"] = answer["output_ids"][sent:]
                    for key in {"output_token_logprobs", "output_top_logprobs"} & meta.keys():
                        meta[key] = meta[key][sent:]
                    sent = meta["completion_tokens"]
                if self.broken is not None:
                    answer, self.broken = self.broken(answer), None
                    if answer is None:
                        return
                if streams or meta["finish_reason"]:
                    yield answer
        except asyncio.CancelledError:  # the client is gone: _release_req_states_on_failure
            self.aborted += 1
            raise
        finally:
            self.running -= 1

    # Scheduler (managers/scheduler.py, managers/schedule_batch.py) ----------------------------------------------------

    async def _schedule(self, ids: list[int], body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        settings, start = body["sampling_params"], body.get("logprob_start_len", -1)
        wanted = body.get("return_logprob", False)
        try:
            if self.fail is not None:
                fail, self.fail = self.fail, None
                raise fail
            longest = self.max_req_len - 5
            if len(ids) >= longest:  # managers/utils.py, validate_input_length
                if not self.truncate:
                    raise Abort(
                        f"Input length ({len(ids)} tokens) exceeds the maximum allowed length ({longest} tokens). "
                        "Use a shorter input or enable --allow-auto-truncate."
                    )
                ids = ids[:longest]
            if wanted and start > len(ids):
                raise Abort(
                    f"req.logprob_start_len={start} is higher than the number of input tokens "
                    f"len(req.origin_input_ids)={len(ids)}. Please use a smaller logprob_start_len."
                )
        except Abort as abort:  # set_finish_with_abort: the prompt becomes [0], and one token is written all the same
            finish = {"type": "abort", "message": str(abort), "status_code": abort.status, "err_type": None}
            if abort.status == 400:
                finish["err_type"] = "BadRequestError"
            written = [int(self.local.rows([0])[-1].argmax())]
            yield _answer(written, finish, 1, 0, {})
            return
        if any(not 0 <= token < self.model.config.vocab_size for token in ids) or body.get("top_logprobs_num", 0) > (
            self.model.config.vocab_size
        ):
            self.dead = True
            raise ConnectionError("IndexError: index out of range in self")
        await asyncio.sleep(self.pace)
        cached = self._match(ids, start if wanted else -1)
        self.computed += len(ids) - cached
        self._insert(ids)
        told = self._told(ids, start, body) if wanted else {}
        most = min(settings["max_new_tokens"], self.max_req_len - len(ids) - 1)  # init_req_max_new_tokens
        written: list[int] = []
        finish = {"type": "length", "length": 0} if most == 0 else None
        if finish:
            yield _answer(written, finish, len(ids), cached, told)
        unsent = 0
        while finish is None:
            await asyncio.sleep(self.pace)
            self._draw(ids, written, body, told)
            finish = self._finish(written, settings, most)
            if finish is None:
                self.computed += 1
            unsent += 1
            due = unsent >= settings.get("stream_interval", 1) or len(written) == unsent
            # scheduler_components/output_streamer.py, accept; check_match_stop_str_prefix
            if finish or (due and not self._begins_stop(written, settings)):
                yield _answer(written, finish, len(ids), cached, told)
                unsent = 0
        self._insert([*ids, *written[:-1]])

    def _match(self, ids: list[int], start: int) -> int:
        """_compute_max_prefix_len, and the longest prefix in the radix cache."""
        most = len(ids) - 1 if start < 0 else min(len(ids) - 1, start)
        shared = (
            next((i for i, (a, b) in enumerate(zip(held, ids, strict=False)) if a != b), min(len(held), len(ids)))
            for held in self._cache
        )
        return min(most, max(shared, default=0))

    def _insert(self, ids: Sequence[int]) -> None:
        if self.radix:
            self._cache.append(tuple(ids))

    def _told(self, ids: list[int], start: int, body: dict[str, Any]) -> dict[str, Any]:
        """scheduler_components/logprob_result_processor.py: None at logprob_start_len; the last id told as 0."""
        told: dict[str, Any] = {"input_token_logprobs": [], "output_token_logprobs": []}
        if 0 <= start < len(ids):
            logprobs = self.local.rows(ids).log_softmax(1)
            values = [None, *(float(logprobs[i - 1, ids[i]]) for i in range(start + 1, len(ids)))]
            shown = [token if token < self.model.config.vocab_size - 1 else 0 for token in ids[start:]]
            told["input_token_logprobs"] = [[value, token, None] for value, token in zip(values, shown, strict=True)]
        if body.get("top_logprobs_num", 0):
            told |= {"input_top_logprobs": [], "output_top_logprobs": []}
        if body.get("token_ids_logprob"):
            logprobs = self.local.rows(ids)[-1].log_softmax(0)
            rows = [[float(logprobs[token]), token, None] for token in body["token_ids_logprob"]]
            told |= {"input_token_ids_logprobs": [], "output_token_ids_logprobs": [rows]}
        return told

    def _draw(self, ids: list[int], written: list[int], body: dict[str, Any], told: dict[str, Any]) -> None:
        """layers/sampler.py: seeds count with --enable-deterministic-inference alone, logprobs are tempered."""
        settings = body["sampling_params"]
        logits, temperature = self.local.rows([*ids, *written])[-1], settings.get("temperature", 1.0)
        scaled = logits / temperature if temperature > 0 else logits
        noise = self._noise
        if self.deterministic:
            seed = settings.get("sampling_seed", 42)
            noise = torch.Generator().manual_seed(hash((seed, len(ids) + len(written))) % 2**63)
        if temperature == 0:
            token = int(scaled.argmax())
        else:
            token = int(torch.multinomial(scaled.softmax(0), 1, generator=noise))
        written.append(token)
        if told:
            logprobs = (logits if self.original else scaled).log_softmax(0)
            told["output_token_logprobs"].append([float(logprobs[token]), token, None])
            if body.get("top_logprobs_num", 0):
                top = logprobs.topk(body["top_logprobs_num"])
                told["output_top_logprobs"].append(
                    [[float(v), int(i), None] for v, i in zip(top.values, top.indices, strict=True)]
                )

    def _finish(self, written: list[int], settings: dict[str, Any], most: int) -> dict[str, Any] | None:
        """update_finish_state: stop strings, then ids, of which none with ignore_eos, then the length."""
        tail = self._tail(written, settings)
        for stop in settings.get("stop") or ():
            if stop in tail:
                return {"type": "stop", "matched": stop}
        ends = {*self.model.tokenizer.eos_token_ids, *(settings.get("stop_token_ids") or ())}
        if written[-1] in ends and not settings.get("ignore_eos"):
            return {"type": "stop", "matched": written[-1]}
        return {"type": "length", "length": most} if len(written) >= most else None

    def _tail(self, written: list[int], settings: dict[str, Any]) -> str:
        stops = settings.get("stop") or ()
        if not stops:
            return ""
        encode = self.model.tokenizer.encode
        window = max(len(encode(stop)) for stop in stops) + 1  # _stop_match_tail_len
        return str(self.model.tokenizer.decode(written[-window:], skip_special=False))

    def _begins_stop(self, written: list[int], settings: dict[str, Any]) -> bool:
        tail = self._tail(written, settings)
        return any(
            tail.endswith(stop[:n]) for stop in settings.get("stop") or () for n in range(1, len(stop) + 1) if tail
        )


def _answer(
    written: list[int], finish: dict[str, Any] | None, prompt: int, cached: int, told: dict[str, Any]
) -> dict[str, Any]:
    """Without the text, which nobody here reads; the ids keep the stop that the text loses."""
    meta = {
        "finish_reason": finish,
        "prompt_tokens": prompt,
        "completion_tokens": len(written),
        "cached_tokens": cached,
        **{key: list(rows) for key, rows in told.items()},
    }
    if told:
        meta["output_token_logprobs_length"] = len(told["output_token_logprobs"])
    return {"output_ids": list(written), "meta_info": meta}


@asynccontextmanager
async def serving(fake: FakeSGLang) -> AsyncIterator[str]:
    """The fake on a free port of the loopback; its address. A handler ends with its client, as under uvicorn."""
    app = web.Application()
    app.router.add_get("/model_info", fake.model_info)
    app.router.add_get("/server_info", fake.server_info)
    app.router.add_post("/tokenize", fake.tokenize)
    app.router.add_post("/generate", fake.generate)
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()
