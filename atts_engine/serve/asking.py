"""From a request to the work that it asks for."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from atts_engine.config import ATTSParams
from atts_engine.pipeline import Prompts
from atts_engine.pipeline.streams import stream_key
from atts_engine.runtime import SamplingParams
from atts_engine.serve.admission import LANES, Demand, Guess
from atts_engine.serve.errors import TOO_LONG, bad_request
from atts_engine.serve.generation import AttsJob, Delta, PlainPrompt, atts_deltas, plain_deltas
from atts_engine.serve.requests import AttsOptions, Sampling
from atts_engine.serve.service import Account, Service

Source = Callable[[Account], AsyncGenerator[Delta, None]]


@dataclass(frozen=True, slots=True)
class Ask:
    """One generation request, ready to be admitted. choices: how many; guess: what its length was taken for, None where
    it names a limit; attributes: for its trace."""

    id: str
    operation: str
    choices: int
    prompt_tokens: int
    demand: dict[str, Demand]
    source: Source
    by_chains: bool
    guess: Guess | None
    stream: bool
    usage: bool
    running_usage: bool
    attributes: Mapping[str, Any]


def new_id(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(12)}"


def plain_ask(
    service: Service,
    body: Sampling,
    ask_id: str,
    operation: str,
    prompts: Sequence[Sequence[int]],
    limit: int | None,
    logprobs: int | None,
) -> Ask:
    """The target alone. prompts: token ids; limit: tokens of a choice at most, None: as many as there is room for;
    logprobs: likeliest tokens to tell beside each one's log-probability, None: tell neither."""
    choices = body.n or 1
    if choices * len(prompts) > service.settings.max_choices:
        raise bad_request(
            f"{choices * len(prompts)} choices are more than the {service.settings.max_choices} that are allowed; ask "
            "for fewer (n), or for fewer prompts at a time",
            "n",
        )
    vocab = service.engine.target_model.vocab_size
    if (bad := next((i for i in body.stop_token_ids or () if i >= vocab), None)) is not None:
        raise bad_request(f"token id {bad} is outside the vocabulary of {vocab}", "stop_token_ids")
    seed = service.seed(body.seed)
    made = [
        PlainPrompt(
            tuple(ids),
            tuple(_sampling(body, seed, i * choices + j, logprobs) for j in range(choices)),
            _room(service, body, "target", len(ids), limit),
            i * choices,
        )
        for i, ids in enumerate(prompts)
    ]
    guess = service.admission.answers if limit is None else None
    tokens = sum(len(p.ids) + choices * _reserved(guess, p.max_tokens) for p in made)
    deadline_s = service.deadline_s(body.timeout_s)

    def source(account: Account) -> AsyncGenerator[Delta, None]:
        return plain_deltas(
            service.engine,
            made,
            account.counts,
            priority=body.priority or 0,
            deadline_s=deadline_s,
            # What a lane has not handed over when the deadline comes is lost to the answer.
            chunk_tokens=service.settings.stream_tokens if body.stream or deadline_s is not None else None,
        )

    return Ask(
        id=ask_id,
        operation=operation,
        choices=choices * len(made),
        prompt_tokens=sum(len(p.ids) for p in made),
        demand={"target": Demand(choices * len(made), tokens)},
        source=source,
        by_chains=False,
        guess=guess,
        stream=bool(body.stream),
        usage=body.wants_usage,
        running_usage=body.wants_running_usage,
        attributes=_attributes(body, limit),
    )


def atts_ask(
    service: Service,
    body: Sampling,
    options: AttsOptions,
    ask_id: str,
    operation: str,
    prompts: Prompts,
    limit: int | None,
    logprobs: int | None,
) -> Ask:
    """Chains by both models. limit: tokens that a chain may write, which bounds its turns."""
    plain_only = {
        "n": body.n not in (None, 1),
        "logprobs": logprobs is not None,
        "stop": bool(body.stops),
        "stop_token_ids": bool(body.stop_token_ids),
        "ignore_eos": bool(body.ignore_eos),
    }
    for name, asked in plain_only.items():
        if asked:
            mend = "; atts.verdicts tells the score of each span" if name == "logprobs" else ""
            raise bad_request(f"{name} belongs to plain requests, not to one with atts{mend}", name)
    params = _atts_params(service, body, options, limit)
    service.check_calibration(params)
    guess = service.admission.chains if limit is None else None
    demand = {}
    for lane, ids in zip(LANES, prompts, strict=True):
        written = min(params.token_limit, _room(service, body, lane, len(ids), None))
        demand[lane] = Demand(params.chains, len(ids) + params.chains * _reserved(guess, written))

    def source(account: Account) -> AsyncGenerator[Delta, None]:
        job = AttsJob(
            id=ask_id,
            prompts=prompts,
            params=params,
            calibrator=service.calibrator,
            streamed=bool(body.stream),
            verdicts=options.verdicts,
            on_verdict=lambda event, alpha: service.verdict(account, event, alpha),
            on_chain=lambda chain: service.metrics.chain(chain.finish),
        )
        deadline_s = service.deadline_s(body.timeout_s)
        return atts_deltas(service.engine, job, account.counts, priority=body.priority or 0, deadline_s=deadline_s)

    return Ask(
        id=ask_id,
        operation=operation,
        choices=1,
        prompt_tokens=len(prompts.target),
        demand=demand,
        source=source,
        by_chains=True,
        guess=guess,
        stream=bool(body.stream),
        usage=body.wants_usage,
        running_usage=body.wants_running_usage,
        attributes=_attributes(body, limit) | {"atts.chains": params.chains, "atts.alpha": params.alpha},
    )


def _sampling(body: Sampling, seed: int, choice: int, logprobs: int | None) -> SamplingParams:
    return SamplingParams(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=max(0, body.top_k or 0),
        top_p=1.0 if body.top_p is None else body.top_p,
        min_p=body.min_p or 0.0,
        seed=stream_key(seed, "serve", choice, "plain"),
        stop=body.stops,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs is not None,
        alternatives=logprobs or 0,
    )


def _room(service: Service, body: Sampling, lane: str, prompt_tokens: int, limit: int | None) -> int:
    """Tokens that the lane may write behind a prompt: `limit`, or all that there is room for."""
    context = service.engine.lane_context_tokens[lane]
    room = context - prompt_tokens
    if room < 1:
        raise bad_request(
            f"the prompt has {prompt_tokens} tokens, and the {lane} has room for {context} with what is to be written: "
            "shorten the prompt",
            body.prompt_name,
            TOO_LONG,
        )
    if limit is not None and limit > room:
        raise bad_request(
            f"the prompt has {prompt_tokens} tokens, {limit} more were asked for, and the {lane} has room for "
            f"{context} in all: ask for {room} or fewer, or shorten the prompt",
            body.limit_name,
            TOO_LONG,
        )
    return room if limit is None else limit


def _reserved(guess: Guess | None, most: int) -> int:
    return most if guess is None else guess.tokens(most)


def _atts_params(service: Service, body: Sampling, options: AttsOptions, limit: int | None) -> ATTSParams:
    asked: dict[str, Any] = {name: getattr(body, name) for name in ("temperature", "top_p", "min_p")}
    asked["top_k"] = None if body.top_k is None else max(0, body.top_k)
    for name in ("chains", "turns", "draft_tokens", "target_tokens", "alpha", "policy", "vote"):
        asked[name] = getattr(options, name)
    params = replace(
        service.settings.params, seed=service.seed(body.seed), **{k: v for k, v in asked.items() if v is not None}
    )
    if limit is None:
        return params
    turn = params.draft_tokens + params.target_tokens
    if limit < turn:
        raise bad_request(
            f"{limit} tokens are fewer than one turn may have (draft_tokens + target_tokens = {turn}); ask for shorter "
            "spans or more tokens",
            body.limit_name,
        )
    return replace(params, turns=min(params.turns, limit // turn))


def _attributes(body: Sampling, limit: int | None) -> dict[str, Any]:
    """By OpenTelemetry's conventions, those that the request names."""
    named = {
        "gen_ai.request.max_tokens": limit,
        "gen_ai.request.temperature": body.temperature,
        "gen_ai.request.top_p": body.top_p,
        "gen_ai.request.top_k": body.top_k,
        "gen_ai.request.seed": body.seed,
        "gen_ai.request.choice.count": body.n,
        "gen_ai.request.stop_sequences": body.stops or None,
    }
    return {name: value for name, value in named.items() if value is not None}
