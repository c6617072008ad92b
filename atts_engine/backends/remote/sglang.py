"""SGLang's own HTTP interface. Files and functions named here are those of its package `sglang.srt`, version 0.5.23,
which this was read from and tried on."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from atts_engine.backends.remote.server import Scores, Served, Written
from atts_engine.errors import ChainError, LaneError, Unreachable
from atts_engine.runtime.records import SamplingParams

STREAM_INTERVAL = 16
"""Tokens of a piece. By default SGLang sends each token with all that came before it, which is quadratic."""

# A server may be started with other defaults (--preferred-sampling-params); what is said here overrules them.
_NEUTRAL = {"repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0, "min_new_tokens": 0}
_GREEDY = {**_NEUTRAL, "temperature": 0.0}


class Http(Protocol):
    """What is asked of the client. It raises `Unreachable` and `ChainError` by status, as `Server` says."""

    async def get(self, path: str) -> Any: ...

    async def post(self, path: str, body: Mapping[str, Any]) -> Any: ...

    def stream(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[Any, None]:
        """What each event of the answer holds, without the closing [DONE]."""
        ...

    async def close(self) -> None: ...


class SGLangServer:
    """Implements `Server` on SGLang's `/generate`.

    What it cannot do as an in-process lane does:

    - A seed counts only where the server runs with --enable-deterministic-inference; otherwise SGLang draws from one
      generator of its own and does not look at it (`SamplingBatchInfo.from_schedule_batch`).
    - Logprobs and confidences at a temperature other than 0 and 1 are of the tempered distribution
      (`Sampler.forward`), unless the server runs with SGLANG_RETURN_ORIGINAL_LOGPROB=1. Two requests of one token find
      out. Where they are not the model's own, no logprobs are handed over, and confidences are refused.
    - A stop string is looked for in the last tokens only, as many as its own encoding has and one
      (`Req._stop_match_tail_len`), so one that the model spells in smaller tokens is passed over.
    """

    def __init__(self, http: Http) -> None:
        self._http = http
        self._appends = True
        self._asking = asyncio.Lock()
        self._largest = -1
        self._original: bool | None = None

    @property
    def appends(self) -> bool:
        return self._appends

    async def describe(self) -> Served:
        model, server = await self._http.get("/model_info"), await self._http.get("/server_info")
        try:
            if not model["is_generation"]:
                raise LaneError(f"the SGLang server serves {model['model_path']} for embeddings, which writes no text")
            self._appends = not server["disable_radix_cache"]
            # A request has to be shorter than max_req_input_len (`validate_input_length`), also one that only scores.
            context = server["max_req_input_len"] - 1
            return Served(
                model["served_model_name"], model["model_path"], model["tokenizer_path"], context, server["version"]
            )
        except (KeyError, TypeError) as error:
            raise LaneError(f"/model_info and /server_info do not answer as SGLang 0.5.23 does: no {error}") from error

    async def encode(self, text: str) -> list[int]:
        answer = await self._http.post("/tokenize", {"prompt": text, "add_special_tokens": False})
        try:
            return [int(token) for token in answer["tokens"]]
        except (KeyError, TypeError) as error:
            raise LaneError(f"/tokenize does not answer as SGLang does: no {error}") from error

    async def decode(
        self, tokens: Sequence[int], max_tokens: int, sampling: SamplingParams
    ) -> AsyncGenerator[Written, None]:
        await self._admit(tokens, sampling.confidence)
        judged = bool(sampling.logprobs or sampling.confidence)
        judged = judged and (sampling.temperature in (0.0, 1.0) or await self._tells_original(tokens))
        if sampling.confidence and not judged:
            raise ChainError(
                f"at temperature {sampling.temperature} the SGLang server tells no confidences of the model itself: "
                "start it with SGLANG_RETURN_ORIGINAL_LOGPROB=1 in its environment, or sample at temperature 1"
            )
        body: dict[str, Any] = {"input_ids": list(tokens), "stream": True, "sampling_params": _settings(sampling)}
        body["sampling_params"]["max_new_tokens"] = max_tokens
        if judged:
            body |= {"return_logprob": True, "top_logprobs_num": sampling.confidence}
        # With ignore_eos SGLang looks at no stop id at all (`Req._check_token_based_finish`).
        ends = frozenset(sampling.stop_token_ids if sampling.ignore_eos else ())
        count = 0
        async with aclosing(self._http.stream("/generate", body)) as events:
            async for event in events:
                piece = _written(event, count, sampling if judged else None, len(tokens), ends)
                count += len(piece.tokens)
                if piece.finish == "length" and count < max_tokens:
                    raise ChainError(
                        f"the SGLang server ended a span after {count} of {max_tokens} tokens by a limit of its own "
                        "(context, KV cache or SGLANG_MAX_NEW_TOKENS_LIMIT)"
                    )
                if piece.tokens or piece.finish:
                    yield piece
                if piece.finish:
                    return
        raise LaneError("the SGLang server ended the stream of a span without a reason")

    async def score(self, tokens: Sequence[int], start: int) -> Scores:
        """One request that writes nothing. The cached prefix ends at the token before `start`
        (`Req._compute_max_prefix_len`), so the tokens scored and that one are computed, and nothing twice."""
        await self._admit(tokens)
        # The first entry is null, it stands for the token at logprob_start_len (`LogprobResultProcessor`).
        body = {"input_ids": list(tokens), "return_logprob": True, "logprob_start_len": start - 1}
        answer = await self._http.post("/generate", {**body, "sampling_params": {**_GREEDY, "max_new_tokens": 0}})
        meta = _meta(answer, len(tokens))
        logprobs = _logprobs(meta.get("input_token_logprobs"), tokens[start - 1 :], first_null=True)
        return Scores(logprobs, len(tokens), meta.get("cached_tokens"))

    async def close(self) -> None:
        await self._http.close()

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
                await self._http.post("/generate", {**body, "sampling_params": {**_GREEDY, "max_new_tokens": 0}})
            except ChainError as error:
                raise ChainError(f"token id {largest}: {error}; was it made by another tokenizer?") from error
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
        meta = _meta(await self._http.post("/generate", body), len(tokens))
        first, second = _likeliest(meta.get("output_top_logprobs"), 1, 2)[0]
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


def _written(
    event: Any, count: int, judged: SamplingParams | None, prompt_tokens: int, ends: frozenset[int]
) -> Written:
    """What is new in an event, `count` tokens having come before. judged: the logprobs and confidences asked for."""
    meta = _meta(event, prompt_tokens)
    try:
        ids, total, reason = event["output_ids"], meta["completion_tokens"], meta["finish_reason"]
        # Cumulative by default, new tokens alone with --incremental-streaming-output, and then shorter than the total.
        # A cumulative list may already hold more than the total counts: it is handed on as the list it grows in.
        skip = count if len(ids) >= total else 0
        tokens = tuple(ids[skip : skip + total - count])
    except (KeyError, TypeError) as error:
        raise LaneError(f"/generate does not answer as SGLang does: no {error}") from error
    if len(tokens) != total - count:
        raise LaneError(f"the SGLang server told {len(tokens)} of {total - count} new tokens")
    finish = None if reason is None else str(reason["type"])
    cut = next((i + 1 for i, token in enumerate(tokens) if token in ends), None)
    if cut is not None:
        tokens, finish = tokens[:cut], "stop"
    stretch = slice(skip, skip + len(tokens))
    logprobs: tuple[float, ...] = ()
    confidences: tuple[float, ...] = ()
    if judged is not None and judged.logprobs:
        logprobs = _logprobs((meta.get("output_token_logprobs") or [])[stretch], tokens)
    if judged is not None and judged.confidence:
        top = (meta.get("output_top_logprobs") or [])[stretch]
        confidences = tuple(-math.fsum(row) / len(row) for row in _likeliest(top, len(tokens), judged.confidence))
    if count:
        return Written(tokens, finish, logprobs, confidences)
    return Written(tokens, finish, logprobs, confidences, prompt_tokens, meta.get("cached_tokens"))


def _meta(answer: Any, prompt_tokens: int) -> Mapping[str, Any]:
    """meta_info of an answer to a prompt of so many tokens; raises for one that tells of a failure.

    A stream tells of it with status 200: as an error in place of an answer, or as a reason to finish. What such an
    answer holds of tokens are not the model's."""
    if isinstance(answer, dict) and "error" in answer:
        said = answer["error"]
        raise _refusal(said.get("message"), said.get("code")) if isinstance(said, dict) else _refusal(said, 400)
    try:
        meta = answer["meta_info"]
        reason = meta["finish_reason"]
        if reason is not None and reason["type"] == "abort":
            raise _refusal(reason["message"], reason["status_code"])
        if reason is not None and reason.get("matched") == "NaN happened":  # `Req._check_vocab_boundary_finish`
            raise ChainError("the model on the SGLang server answered with NaN")
        read = meta["prompt_tokens"]
    except (KeyError, TypeError) as error:
        raise LaneError(f"/generate does not answer as SGLang does: no {error}") from error
    if read != prompt_tokens:
        raise ChainError(
            f"the SGLang server read {read} of {prompt_tokens} tokens: start it without --allow-auto-truncate"
        )
    assert isinstance(meta, dict)
    return meta


def _refusal(message: Any, status: Any) -> ChainError | Unreachable:
    """A request was refused for what it asks (4xx), or ended for a reason that may pass: a full queue or KV cache, a
    pause, /abort_request (no status at all)."""
    said = f"the SGLang server: {message}"
    return ChainError(said) if isinstance(status, int) and 400 <= status < 500 and status != 429 else Unreachable(said)


def _logprobs(rows: Any, tokens: Sequence[int], *, first_null: bool = False) -> tuple[float, ...]:
    """Of rows [logprob, id, text], one for each token; `first_null`: the first has none."""
    if not isinstance(rows, list) or len(rows) != len(tokens):
        told = len(rows) if isinstance(rows, list) else "no"
        raise LaneError(f"the SGLang server told {told} log-probabilities where {len(tokens)} were asked for")
    for row, token in zip(rows, tokens, strict=True):
        # The last id of the vocabulary is told as 0 (`_process_input_token_logprobs`).
        if row[1] not in (token, 0):
            raise LaneError(f"the SGLang server told the log-probability of token {row[1]} in place of {token}'s")
    values = [row[0] for row in rows[first_null:]]
    if any(not isinstance(value, int | float) for value in values):  # NaN and infinities are null in its JSON
        raise ChainError("the SGLang server told a log-probability that is no finite number")
    return tuple(map(float, values))


def _likeliest(rows: Any, n: int, k: int) -> list[list[float]]:
    """Log-probabilities of the k likeliest tokens at each of n places."""
    if not isinstance(rows, list) or len(rows) != n or any(not row or len(row) != k for row in rows):
        raise LaneError(f"the SGLang server did not tell the {k} likeliest tokens of each of {n}")
    values = [[entry[0] for entry in row] for row in rows]
    if any(not isinstance(value, int | float) for row in values for value in row):
        raise ChainError("the SGLang server told a log-probability that is no finite number")
    return values
