"""What an engine is made of: two models, how they spell, and a lane's core for each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from atts_engine.config import MATH_PROMPT, EngineConfig, dtype_of
from atts_engine.errors import InputError
from atts_engine.models import Decoder, Model, load_model, resolve_device
from atts_engine.ops import tuning
from atts_engine.pipeline import Tongues, Words
from atts_engine.runtime import LaneCore, available_bytes, kv_bytes_per_token, pool_tokens


def tune(config: EngineConfig) -> None:
    """Put the tuning table of --tuning in force, or that of the target's GPU where there is one. The table is the
    process's: two kinds of GPU share the target's."""
    device = resolve_device(config.target_device)
    path = Path(config.tuning) if config.tuning is not None else None
    if path is None and device.type == "cuda":
        path = tuning.find(torch.cuda.get_device_name(device))
    if path is not None:
        tuning.put_in_force(tuning.load(path), path)


def load_pair(config: EngineConfig) -> tuple[Model, Model]:
    dtype = dtype_of(config.dtype)
    # Both before anything is loaded: a large draft should not be read for a target device that is not there.
    places = resolve_device(config.draft_device), resolve_device(config.target_device)
    draft = load_model(config.draft, places[0], dtype, packed=config.packed_weights)
    if config.target == config.draft and places[0] == places[1]:
        # One copy of the weights, two decoders: a decoder's buffers belong to one lane's thread and stream.
        return draft, replace(draft, decoder=Decoder(draft.config, draft.decoder.weights))
    return draft, load_model(config.target, places[1], dtype, packed=config.packed_weights)


def tongues(draft: Model, target: Model) -> Tongues:
    ends = [frozenset(m.tokenizer.eos_token_ids) | frozenset(m.config.eos_token_ids) for m in (draft, target)]
    if draft.tokenizer.fingerprint == target.tokenizer.fingerprint:
        words = Words(target.tokenizer, ends[0] | ends[1])
        return Tongues(words, words)
    for model in (draft, target):
        if model.tokenizer.eos_token_id is None:
            raise InputError(
                f"{model.name}: the tokenizer has no end-of-text token, which a pair with two tokenizers needs; "
                "name one as `eos_token` in its tokenizer_config.json"
            )
        try:
            model.tokenizer.encoder()
        except InputError as error:
            raise InputError(f"{model.name}: {error}; choose a pair that shares a tokenizer") from error
    codecs = draft.tokenizer, target.tokenizer
    own = [Words(codec, end, codec.eos_token_id) for codec, end in zip(codecs, ends, strict=True)]
    return Tongues(own[0], own[1], codecs)


def cores(config: EngineConfig, draft: Model, target: Model) -> tuple[LaneCore, LaneCore]:
    models, devices = (draft, target), (draft.decoder.device, target.decoder.device)
    token_bytes = [kv_bytes_per_token(model) for model in models]
    if config.kv_tokens is not None:
        tokens = [config.kv_tokens, config.kv_tokens]
    else:
        free = [available_bytes(device) for device in devices]
        tokens = pool_tokens(devices, token_bytes, free, config.kv_memory_fraction)
    cpu = torch.device("cpu")
    room = pool_tokens((cpu, cpu), token_bytes, [available_bytes(cpu)] * 2, None)

    def core(name: str, lane: int, stream_priority: int) -> LaneCore:
        host = config.host_kv_tokens
        if host is None:
            moves = config.preemption == "swap" or (config.preemption == "auto" and devices[lane].type != "cpu")
            host = min(tokens[lane], room[lane]) if moves else 0
        made = LaneCore(
            name,
            models[lane],
            kv_tokens=tokens[lane],
            page_size=config.page_size,
            max_batch_tokens=config.max_batch_tokens,
            device=devices[lane],
            host_kv_tokens=host,
            preemption=config.preemption,
            overlap=config.overlap,
            graphs=config.graphs,
            stream_priority=stream_priority,
            profile=config.profile,
        )
        made.warm_up()
        return made

    # Where both lanes share a GPU, drafting goes first: many short steps, and every chain waits for them.
    return core("draft", 0, -1), core("target", 1, 0)


def default_prompt(draft: Model, target: Model) -> str:
    return "{problem}" if {draft.name, target.name} <= {"tiny-draft", "tiny-target"} else MATH_PROMPT
