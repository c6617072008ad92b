"""vLLM's HTTP interface: OpenAI's completions over token ids, and its scale-out route for scores. Fields and behaviour
are those of vLLM 0.32."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import numpy as np

from atts_engine.backends.remote.client import Client
from atts_engine.backends.remote.server import Scores, Served, Written
from atts_engine.errors import ChainError, LaneError, Unreachable
from atts_engine.runtime.records import Alternatives, SamplingParams

BLOCK = 16
"""Tokens of a block of vLLM's prefix cache, unless its --block-size says otherwise."""

# A model's generation_config.json is the server's default for what a request leaves out.
_PLAIN = {"repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0, "min_tokens": 0}
_SCORE = {**_PLAIN, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "max_tokens": 1}
_ROUTE = "/inference/v1/generate"


class VllmServer:
    """Implements `Server`.

    Scores over `/v1/completions` are prompt log-probabilities, which vLLM takes past its prefix cache: every score
    computes the whole chain again. Where the server offers `/inference/v1/generate` and runs its V2 model runner
    (--enable-scale-out, a GPU), scores are asked for from a row on, with the cache: a span costs its own tokens. Which
    of the two it is, `describe` finds out by asking. The log-probability of one token behind a prompt is asked for as
    that of a token to be written, which takes either server's cache.
    """

    def __init__(self, client: Client, name: str) -> None:
        self._client = client
        self._name = name
        self._rows = False
        self._context = 0

    @property
    def appends(self) -> bool:
        return self._rows

    async def describe(self) -> Served:
        models = await self._client.get("/v1/models")
        version = (await self._client.get("/version")).get("version", "unknown")
        try:
            cards = {card["id"]: card for card in models["data"]}
            card = cards.get(self._name)
            if card is None:
                raise LaneError(
                    f"{self._client.server}: the server has no model {self._name!r}; it has {', '.join(cards)}"
                )
            # The card of a LoRA adapter names its model as parent, and leaves length and tokenizer to that one.
            base = cards.get(card.get("parent"), card)
            length = card.get("max_model_len")
            self._context = int(base["max_model_len"] if length is None else length)
        except (KeyError, TypeError) as error:
            raise LaneError(f"{self._client.server}: /v1/models does not answer as vLLM does: no {error}") from error
        self._rows = await self._offers_rows()
        return Served(self._name, card.get("root"), base.get("root"), self._context, version)

    async def encode(self, text: str) -> list[int]:
        body = {"model": self._name, "prompt": text, "add_special_tokens": False}
        found = await self._client.post("/tokenize", body)
        return [int(i) for i in self._field(found, "tokens")]

    async def decode(
        self, tokens: Sequence[int], max_tokens: int, sampling: SamplingParams
    ) -> AsyncGenerator[Written, None]:
        likeliest = max(sampling.confidence, sampling.alternatives) or (0 if sampling.logprobs else None)
        body: dict[str, Any] = {
            **_PLAIN,
            "model": self._name,
            "prompt": list(tokens),
            "max_tokens": max_tokens,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "seed": sampling.seed,
            "stop": list(sampling.stop),
            "include_stop_str_in_output": True,
            "stop_token_ids": list(sampling.stop_token_ids),
            "ignore_eos": sampling.ignore_eos,
            "logprobs": likeliest,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        last: Written | None = None
        async with aclosing(self._client.stream("/v1/completions", body)) as events:
            async for event in events:
                choices = self._field(event, "choices")
                if choices:
                    piece = self._written(choices[0], sampling)
                    if piece.finish is None:
                        yield piece
                    else:
                        last = piece
                elif last is not None:
                    # The figures of the prompt come behind the last token.
                    prompt, cached = _usage(event)
                    last = replace(last, prompt_tokens=prompt, cached_tokens=cached)
        if last is None:
            raise LaneError(f"{self._client.server}: the span ended without a reason")
        yield last

    async def score(self, tokens: Sequence[int], start: int) -> Scores:
        end = len(tokens)
        # Every request writes a token, for which a full context has no room. And a prompt of whole blocks is cached
        # whole, while the next score needs the row of its last token again.
        if end >= self._context or (self._rows and end % BLOCK == 0):
            if end - start == 1:
                return await self._score_next(tokens)
            # What is left over here comes with the next request.
            end -= 1
        return await (self._score_rows if self._rows else self._score_whole)(tokens[:end], start)

    async def close(self) -> None:
        await self._client.close()

    async def _score_whole(self, tokens: Sequence[int], start: int) -> Scores:
        body = {**_SCORE, "model": self._name, "prompt": list(tokens), "prompt_logprobs": 0}
        found = await self._client.post("/v1/completions", body)
        rows = self._field(self._field(found, "choices")[0], "prompt_logprobs")
        try:
            logprobs = [_logprob(rows[at][str(tokens[at])]["logprob"]) for at in range(start, len(tokens))]
        except (KeyError, IndexError, TypeError) as error:
            raise LaneError(f"{self._client.server}: a prompt's log-probabilities are missing: {error!r}") from error
        prompt, cached = _usage(found)
        return Scores(tuple(logprobs), prompt or len(tokens), cached)

    async def _score_next(self, tokens: Sequence[int]) -> Scores:
        """Of the last token alone."""
        *prompt, last = tokens
        asked = {"logprobs": 1, "logprob_token_ids": [last], "return_tokens_as_token_ids": True}
        found = await self._client.post("/v1/completions", {**_SCORE, "model": self._name, "prompt": prompt, **asked})
        try:
            logprob = _logprob(self._field(found, "choices")[0]["logprobs"]["top_logprobs"][0][f"token_id:{last}"])
        except (KeyError, IndexError, TypeError) as error:
            raise LaneError(f"{self._client.server}: a token's log-probability is missing: {error!r}") from error
        sent, cached = _usage(found)
        return Scores((logprob,), sent or len(prompt), cached)

    async def _score_rows(self, tokens: Sequence[int], start: int) -> Scores:
        found = await self._client.post(_ROUTE, self._rows_body(tokens, start, skip=False))
        prompt, cached = _usage(found)
        rows = found.get("prompt_token_id_logprobs") if isinstance(found, dict) else None
        if rows is None:
            # The cache held more than the rows asked for begin with: vLLM then leaves them all out without a word.
            found = await self._client.post(_ROUTE, self._rows_body(tokens, start, skip=True))
            rows = self._field(found, "prompt_token_id_logprobs")
            again, cached_again = _usage(found)
            prompt = None if prompt is None or again is None else prompt + again
            cached = None if cached is None or cached_again is None else cached + cached_again
        logprobs = self._decoded(rows)
        if len(logprobs) != len(tokens) - start:
            raise LaneError(f"{self._client.server}: {len(logprobs)} scores for {len(tokens) - start} tokens")
        return Scores(logprobs, prompt or len(tokens), cached)

    def _rows_body(self, tokens: Sequence[int], start: int, *, skip: bool) -> dict[str, Any]:
        rows = {
            "prompt_logprob_start": start - 1,
            "prompt_logprob_token_ids": [[t] for t in tokens[start:]],
            "skip_reading_prefix_cache": skip,
        }
        return {"model": self._name, "token_ids": list(tokens), "sampling_params": {**_SCORE, **rows}}

    async def _offers_rows(self) -> bool:
        try:
            found = await self._client.post(_ROUTE, self._rows_body((0, 0), 1, skip=True))
        except Unreachable:
            raise
        except (ChainError, LaneError):
            # No such route, or a model runner that does not know the fields: both are said by a refusal.
            return False
        return isinstance(found, dict) and found.get("prompt_token_id_logprobs") is not None

    def _written(self, choice: dict[str, Any], sampling: SamplingParams) -> Written:
        tokens = tuple(int(i) for i in choice.get("token_ids") or ())
        finish = choice.get("finish_reason")
        if finish == "abort":
            raise Unreachable(f"{self._client.server}: the server gave up the span: is it shutting down?")
        if finish not in (None, "stop", "length"):
            raise ChainError(f"{self._client.server}: the span ended with {finish!r}")
        logprobs: tuple[float, ...] = ()
        confidences: tuple[float, ...] = ()
        alternatives: tuple[Alternatives, ...] = ()
        if sampling.logprobs or sampling.confidence or sampling.alternatives:
            told = choice.get("logprobs") or {}
            of_tokens = told.get("token_logprobs") or []
            if len(of_tokens) != len(tokens):
                raise LaneError(f"{self._client.server}: {len(of_tokens)} log-probabilities for {len(tokens)} tokens")
            logprobs = tuple(map(_logprob, of_tokens)) if sampling.logprobs else ()
            if sampling.confidence or sampling.alternatives:
                of_others = told.get("top_logprobs") or []
                if len(of_others) != len(tokens) or not all(of_others):
                    raise LaneError(f"{self._client.server}: the likeliest tokens are not told at each place")
                if sampling.confidence:
                    confidences = tuple(_confidence(likeliest, sampling.confidence) for likeliest in of_others)
                if sampling.alternatives:
                    alternatives = tuple(_alternatives(likeliest, sampling.alternatives) for likeliest in of_others)
        return Written(tokens, finish, logprobs, confidences, alternatives)

    def _decoded(self, rows: str) -> tuple[float, ...]:
        """float32[rows, 1], an .npy file in base64."""
        try:
            array = np.load(io.BytesIO(base64.b64decode(rows)), allow_pickle=False)
        except ValueError as error:
            raise LaneError(f"{self._client.server}: scores cannot be read: {error}") from error
        return tuple(float(x) for x in array[:, 0])

    def _field(self, answer: Any, name: str) -> Any:
        if not isinstance(answer, dict) or answer.get(name) is None:
            raise LaneError(f"{self._client.server}: an answer without {name}: is this a vLLM server?")
        return answer[name]


def _logprob(told: float | None) -> float:
    """vLLM writes -9999 for what is not finite, and JSON null for NaN: neither is a log-probability."""
    return math.nan if told is None or told <= -9999.0 else float(told)


def _usage(answer: dict[str, Any]) -> tuple[int | None, int | None]:
    """Prompt tokens, and those of them that were cached: told with --enable-prompt-tokens-details alone."""
    usage = answer.get("usage") or {}
    details = usage.get("prompt_tokens_details") or {}
    return usage.get("prompt_tokens"), details.get("cached_tokens")


def _confidence(likeliest: dict[str, float | None], k: int) -> float:
    """As `ops.token_confidence`, NaN where one of the k is no log-probability. The token itself is among them, whether
    it is one of the k or not."""
    if None in likeliest.values():
        return math.nan
    top = sorted(map(_logprob, likeliest.values()), key=lambda x: -math.inf if math.isnan(x) else x, reverse=True)[:k]
    return -math.fsum(top) / len(top)


def _alternatives(likeliest: dict[str, float | None], k: int) -> Alternatives:
    """Of a map {"token_id:ID": logprob}, in which the token itself may stand beside the k."""
    told = [(int(name.removeprefix("token_id:")), _logprob(value)) for name, value in likeliest.items()]
    return tuple(sorted((entry for entry in told if math.isfinite(entry[1])), key=lambda entry: -entry[1])[:k])
