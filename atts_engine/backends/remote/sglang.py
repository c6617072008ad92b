"""SGLang's own HTTP interface. Files and functions named here are those of its package `sglang.srt`, version 0.5.23,
which this was read from and tried on."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from atts_engine.backends.remote.client import AGAIN, Client
from atts_engine.backends.remote.server import Scores, Served, Written
from atts_engine.errors import ChainError, LaneError, Refused, Unreachable
from atts_engine.runtime.records import Alternatives, SamplingParams

STREAM_INTERVAL = 16
"""Tokens of a piece. By default SGLang sends each token with all that came before it, which is quadratic."""

# A server may be started with other defaults (--preferred-sampling-params); what is said here overrules them.
_NEUTRAL = {
    "top_k": -1,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "min_new_tokens": 0,
}
_GREEDY = {**_NEUTRAL, "temperature": 0.0}


class SGLangServer:
    """Implements `Server` on SGLang's `/generate`.

    What it cannot do as an in-process lane does:

    - A seed counts only where the server runs with --enable-deterministic-inference; otherwise SGLang draws from one
      generator of its own and does not look at it (`SamplingBatchInfo.from_schedule_batch`).
    - Logprobs and confidences at a temperature other than 0 and 1 are of the tempered distribution
      (`Sampler.forward`), unless the server runs with SGLANG_RETURN_ORIGINAL_LOGPROB=1. Two requests of one token find
      out. Where they are not the model's own, no logprobs are handed over, and confidences are refused.
    - With ignore_eos it looks at no stop id (`Req._check_token_based_finish`), and for a stop string in as many of the
      last tokens as its own spelling has and one (`Req._stop_match_tail_len`). What it passes over, the lane finds.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._appends = True
        self._asking = asyncio.Lock()
        self._largest = -1
        self._original: bool | None = None

    @property
    def appends(self) -> bool:
        return self._appends

    async def describe(self) -> Served:
        model, server = await self._client.get("/model_info"), await self._client.get("/server_info")
        try:
            if not model["is_generation"]:
                raise LaneError(f"{self._client.server}: the server makes embeddings, and writes no text")
            self._appends = not server["disable_radix_cache"]
            # A request has to be shorter than max_req_input_len (`validate_input_length`), also one that only scores.
            context = server["max_req_input_len"] - 1
            return Served(
                model["served_model_name"],
                model["model_path"],
                model["tokenizer_path"],
                context,
                server["version"],
                seeded=bool(server["enable_deterministic_inference"]),
            )
        except (KeyError, TypeError) as error:
            raise _strange(self._client.server, "/model_info and /server_info", error) from error

    async def encode(self, text: str) -> list[int]:
        answer = await self._client.post("/tokenize", {"prompt": text, "add_special_tokens": False})
        try:
            return [int(token) for token in answer["tokens"]]
        except (KeyError, TypeError) as error:
            raise _strange(self._client.server, "/tokenize", error) from error

    async def decode(
        self, tokens: Sequence[int], max_tokens: int, sampling: SamplingParams
    ) -> AsyncGenerator[Written, None]:
        likeliest = max(sampling.confidence, sampling.alternatives)
        await self._admit(tokens, likeliest)
        judged = bool(sampling.logprobs or likeliest)
        judged = judged and (sampling.temperature in (0.0, 1.0) or await self._tells_original(tokens))
        if likeliest and not judged:
            raise Refused(
                f"{self._client.server}: at temperature {sampling.temperature} SGLang does not tell the model's own "
                f"{'confidences' if sampling.confidence else 'alternatives'}: start it with "
                "SGLANG_RETURN_ORIGINAL_LOGPROB=1 in its environment, or sample at 0 or 1"
            )
        body: dict[str, Any] = {"input_ids": list(tokens), "stream": True, "sampling_params": _settings(sampling)}
        body["sampling_params"]["max_new_tokens"] = max_tokens
        if judged:
            body |= {"return_logprob": True, "top_logprobs_num": likeliest}
        server, count = self._client.server, 0
        async with aclosing(self._client.stream("/generate", body)) as events:
            async for event in events:
                piece = _written(server, event, count, sampling if judged else None, len(tokens))
                count += len(piece.tokens)
                if piece.finish == "length" and count < max_tokens:
                    raise ChainError(
                        f"{server}: the span ended after {count} of {max_tokens} tokens, by a limit of the server "
                        "(its context, its KV cache, or SGLANG_MAX_NEW_TOKENS_LIMIT)"
                    )
                if piece.tokens or piece.finish:
                    yield piece
                if piece.finish:
                    return
        raise LaneError(f"{server}: the span ended without a reason")

    async def score(self, tokens: Sequence[int], start: int) -> Scores:
        """One request that writes nothing. The cached prefix ends at the token before `start`
        (`Req._compute_max_prefix_len`), so the tokens scored and that one are computed, and nothing twice."""
        await self._admit(tokens)
        # The first entry is null, it stands for the token at logprob_start_len (`SchedulerLogprobResultProcessor`).
        body = {"input_ids": list(tokens), "return_logprob": True, "logprob_start_len": start - 1}
        answer = await self._client.post("/generate", {**body, "sampling_params": {**_GREEDY, "max_new_tokens": 0}})
        meta = _meta(self._client.server, answer, len(tokens))
        rows = meta.get("input_token_logprobs")
        logprobs = _logprobs(self._client.server, rows, tokens[start - 1 :], first_null=True)
        return Scores(logprobs, len(tokens), meta.get("cached_tokens"))

    async def close(self) -> None:
        await self._client.close()

    async def _admit(self, tokens: Sequence[int], likeliest: int = 0) -> None:
        """Raise for ids outside the vocabulary, and for more likeliest tokens than it holds.

        SGLang takes both and dies of them, by an IndexError in its scheduler. The one thing that it compares with the
        vocabulary is token_ids_logprob (`TokenizerManager._validate_token_ids_logprob`), so the largest id so far is
        asked for by that, once."""
        least = min(tokens)
        largest = least if least < 0 else max(*tokens, likeliest - 1)
        if 0 <= largest <= self._largest:
            return
        async with self._asking:
            if 0 <= largest <= self._largest:
                return
            body = {"input_ids": [0], "return_logprob": True, "token_ids_logprob": [largest]}
            try:
                await self._client.post("/generate", {**body, "sampling_params": {**_GREEDY, "max_new_tokens": 0}})
            except Refused as error:
                raise Refused(f"{error}; was token id {largest} made by another tokenizer?") from error
            self._largest = largest

    async def _tells_original(self, tokens: Sequence[int]) -> bool:
        """Whether logprobs of a tempered draw are the model's own: then the temperature leaves the distance between
        the two likeliest tokens as it is."""
        async with self._asking:
            if self._original is None:
                cold, hot = [await self._distance(tokens, temperature) for temperature in (0.0, 2.0)]
                if cold < 1e-3:  # a tie, which says nothing
                    return False
                self._original = hot > 0.75 * cold
            return self._original

    async def _distance(self, tokens: Sequence[int], temperature: float) -> float:
        settings = {**_NEUTRAL, "temperature": temperature, "max_new_tokens": 1}
        body = {"input_ids": list(tokens), "return_logprob": True, "top_logprobs_num": 2, "sampling_params": settings}
        meta = _meta(self._client.server, await self._client.post("/generate", body), len(tokens))
        (((_, first), (_, second)),) = _likeliest(self._client.server, meta.get("output_top_logprobs"), 1, 2)
        return first - second


def _settings(sampling: SamplingParams) -> dict[str, Any]:
    return {
        **_NEUTRAL,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k or -1,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        # SGLang reads 64 bits with a sign and hashes them without one.
        "sampling_seed": (sampling.seed + 2**63) % 2**64 - 2**63,
        "stop": list(sampling.stop),
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": sampling.ignore_eos,
        "stream_interval": STREAM_INTERVAL,
    }


def _written(server: str, event: Any, count: int, judged: SamplingParams | None, prompt_tokens: int) -> Written:
    """What is new in an event, `count` tokens having come before. judged: the logprobs and confidences asked for."""
    meta = _meta(server, event, prompt_tokens)
    try:
        ids, total, reason = event["output_ids"], meta["completion_tokens"], meta["finish_reason"]
        # Cumulative by default, new tokens alone with --incremental-streaming-output, and then shorter than the total.
        # A cumulative list may already hold more than the total counts: it is handed on as the list it grows in.
        skip = count if len(ids) >= total else 0
        tokens = tuple(ids[skip : skip + total - count])
    except (KeyError, TypeError) as error:
        raise _strange(server, "/generate", error) from error
    if len(tokens) != total - count:
        raise LaneError(f"{server}: {len(tokens)} tokens where the server counts {total - count}")
    finish = None if reason is None else str(reason["type"])
    new = slice(skip, skip + len(tokens))
    logprobs: tuple[float, ...] = ()
    confidences: tuple[float, ...] = ()
    alternatives: tuple[Alternatives, ...] = ()
    if judged is not None and judged.logprobs:
        logprobs = _logprobs(server, (meta.get("output_token_logprobs") or [])[new], tokens)
    if judged is not None and (most := max(judged.confidence, judged.alternatives)):
        rows = _likeliest(server, (meta.get("output_top_logprobs") or [])[new], len(tokens), most)
        if k := judged.confidence:
            confidences = tuple(-math.fsum(value for _, value in row[:k]) / k for row in rows)
        if k := judged.alternatives:
            alternatives = tuple(row[:k] for row in rows)
    if count:
        return Written(tokens, finish, logprobs, confidences, alternatives)
    return Written(tokens, finish, logprobs, confidences, alternatives, prompt_tokens, meta.get("cached_tokens"))


def _meta(server: str, answer: Any, prompt_tokens: int) -> Mapping[str, Any]:
    """meta_info of an answer to a prompt of so many tokens. Raises for one that tells of a failure with status 200; the
    tokens beside it are not the model's."""
    try:
        meta = answer["meta_info"]
        reason = meta["finish_reason"]
        if reason is not None and reason["type"] == "abort":
            # No status at all: a pause, or /abort_request.
            status = reason["status_code"]
            passes = status is None or status in AGAIN or status >= 500
            raise (Unreachable if passes else Refused)(f"{server}: {reason['message']}")
        if reason is not None and reason.get("matched") == "NaN happened":  # `Req._check_vocab_boundary_finish`
            raise ChainError(f"{server}: the model answered with NaN")
        read = meta["prompt_tokens"]
    except (AttributeError, KeyError, TypeError) as error:
        raise _strange(server, "/generate", error) from error
    if read != prompt_tokens:
        raise ChainError(f"{server}: {read} of {prompt_tokens} tokens were read: serve without --allow-auto-truncate")
    assert isinstance(meta, dict)
    return meta


def _logprobs(server: str, rows: Any, tokens: Sequence[int], *, first_null: bool = False) -> tuple[float, ...]:
    """Of rows [logprob, id, text], one for each token; `first_null`: the first has none."""
    if not isinstance(rows, list) or len(rows) != len(tokens):
        told = len(rows) if isinstance(rows, list) else "no"
        raise LaneError(f"{server}: {told} log-probabilities where {len(tokens)} were asked for")
    for row, token in zip(rows, tokens, strict=True):
        # The last id of the vocabulary is told as 0 (`_process_input_token_logprobs`).
        if row[1] not in (token, 0):
            raise LaneError(f"{server}: the log-probability of token {row[1]} in place of {token}'s")
    return tuple(_number(server, row[0]) for row in rows[first_null:])


def _likeliest(server: str, rows: Any, n: int, k: int) -> list[Alternatives]:
    """The k likeliest tokens at each of n places."""
    if not isinstance(rows, list) or len(rows) != n or any(not row or len(row) != k for row in rows):
        raise LaneError(f"{server}: the {k} likeliest tokens are not told at each of {n} places")
    return [tuple((int(entry[1]), _number(server, entry[0])) for entry in row) for row in rows]


def _number(server: str, value: Any) -> float:
    if not isinstance(value, int | float):  # NaN and infinities are null in SGLang's JSON
        raise ChainError(f"{server}: a log-probability is no finite number")
    return float(value)


def _strange(server: str, route: str, error: Exception) -> LaneError:
    return LaneError(f"{server}: {route} answers otherwise than SGLang 0.5.23 does ({error!r})")
