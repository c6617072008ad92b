"""What an engine is made of: a lane for each model, in this process or on a server, and how the two spell."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from atts_engine.backends import EngineLane, InProcessLane, ModelInfo
from atts_engine.backends.remote.address import is_address
from atts_engine.backends.remote.connect import connect
from atts_engine.backends.remote.lane import RemoteLane
from atts_engine.config import MATH_PROMPT, EngineConfig, dtype_of
from atts_engine.errors import InputError
from atts_engine.models import Decoder, Model, builtin_fingerprints, load_model, resolve_device
from atts_engine.ops import tuning
from atts_engine.pipeline import Tongues, Words
from atts_engine.runtime import (
    DecisionListener,
    EngineLoop,
    LaneCore,
    Mailbox,
    available_bytes,
    kv_bytes_per_token,
    pool_tokens,
)

LANES = ("draft", "target")


def tune(config: EngineConfig) -> None:
    """Put the tuning table of --tuning in force, or that of the target's GPU where there is one. The table is the
    process's: two kinds of GPU share the target's."""
    device = resolve_device(config.draft_device if is_address(config.target) else config.target_device)
    path = Path(config.tuning) if config.tuning is not None else None
    if path is None and device.type == "cuda":
        path = tuning.find(torch.cuda.get_device_name(device))
    if path is not None:
        tuning.put_in_force(tuning.load(path), path)


async def lanes(config: EngineConfig, mailbox: Mailbox, heard: DecisionListener) -> tuple[EngineLane, EngineLane]:
    """Draft and target, ready for work. heard: called on a lane's own thread with every verdict that it gives."""
    names = config.draft, config.target
    made: list[EngineLane | None] = [None, None]
    try:
        # Servers first: whether one answers is known at once, and weights may take minutes to load.
        for i, name in enumerate(names):
            if is_address(name):
                made[i] = await _connected(config, i)
        here = [i for i in (0, 1) if made[i] is None]
        models = await asyncio.to_thread(_load, config, here)
        cores = await asyncio.to_thread(_cores, config, models)
    except BaseException:
        for lane in made:
            if lane is not None:
                await lane.aclose()
        raise
    driven = {i: (core, heard) for i, core in cores.items()}
    if _threads(config.lane_threads, [core.model.decoder.device for core in cores.values()]) == "one":
        loops = dict.fromkeys(driven, EngineLoop(list(driven.values())))
    else:
        loops = {i: EngineLoop([lane]) for i, lane in driven.items()}
    for i, core in cores.items():
        made[i] = InProcessLane(core, loops[i], mailbox, chunk_tokens=config.chunk_tokens)
    for loop in set(loops.values()):
        loop.start()
    draft, target = made
    assert draft is not None and target is not None
    return draft, target


def _threads(asked: str | None, devices: Sequence[torch.device]) -> str:
    """As `EngineConfig.lane_threads` has it. A lane on a CPU computes in its own thread, for the most part without
    Python's lock; on a GPU a thread only hands out work, and one has both lanes in view."""
    if asked is not None:
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return "each" if cores > 1 and all(device.type == "cpu" for device in devices) else "one"


async def _connected(config: EngineConfig, i: int) -> RemoteLane:
    name, tokenizer = (config.draft, config.draft_tokenizer) if i == 0 else (config.target, config.target_tokenizer)
    return await connect(
        name,
        lane=LANES[i],
        tokenizer=tokenizer,
        key=os.environ.get(f"ATTS_{LANES[i].upper()}_API_KEY"),
        patience_s=config.patience_s,
        max_requests=config.server_requests,
        chunk_tokens=config.chunk_tokens,
    )


def _load(config: EngineConfig, here: Sequence[int]) -> dict[int, Model]:
    """The models of the lanes that run in this process, by 0 for the draft and 1 for the target."""
    dtype, names = dtype_of(config.dtype), (config.draft, config.target)
    devices = config.draft_device, config.target_device
    # All before anything is loaded: a large draft should not be read for a target device that is not there.
    places = {i: resolve_device(devices[i]) for i in here}
    models: dict[int, Model] = {}
    for i in here:
        if i == 1 and 0 in models and names[0] == names[1] and places[0] == places[1]:
            # One copy of the weights, two decoders: a decoder's buffers belong to one lane's thread and stream.
            twin = models[0]
            models[i] = replace(twin, decoder=Decoder(twin.config, twin.decoder.weights))
        else:
            models[i] = load_model(names[i], places[i], dtype, packed=config.packed_weights)
    return models


def tongues(draft: ModelInfo, target: ModelInfo) -> Tongues:
    ends = [frozenset(model.eos_token_ids) for model in (draft, target)]
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


def _cores(config: EngineConfig, models: Mapping[int, Model]) -> dict[int, LaneCore]:
    devices = [model.decoder.device for model in models.values()]
    token_bytes = [kv_bytes_per_token(model) for model in models.values()]
    if config.kv_tokens is not None:
        tokens = [config.kv_tokens] * len(models)
    else:
        free = [available_bytes(device) for device in devices]
        tokens = pool_tokens(devices, token_bytes, free, config.kv_memory_fraction)
    cpu = torch.device("cpu")
    room = pool_tokens([cpu] * len(models), token_bytes, [available_bytes(cpu)] * len(models), None)
    made = {}
    for (i, model), device, fits, host_room in zip(models.items(), devices, tokens, room, strict=True):
        host = config.host_kv_tokens
        if host is None:
            moves = config.preemption == "swap" or (config.preemption == "auto" and device.type != "cpu")
            host = min(fits, host_room) if moves else 0
        made[i] = LaneCore(
            LANES[i],
            model,
            kv_tokens=fits,
            page_size=config.page_size,
            max_batch_tokens=config.max_batch_tokens,
            device=device,
            host_kv_tokens=host,
            preemption=config.preemption,
            overlap=config.overlap,
            graphs=config.graphs,
            # Where both lanes share a GPU, drafting goes first: many short steps, and every chain waits for them.
            stream_priority=i - 1,
            profile=config.profile,
        )
        made[i].warm_up()
    return made


def default_prompt(draft: ModelInfo, target: ModelInfo) -> str:
    return "{problem}" if {draft.fingerprint, target.fingerprint} <= builtin_fingerprints() else MATH_PROMPT
