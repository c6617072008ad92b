"""A model as both halves of a pair, on two in-process lanes of one scheduler thread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import torch

from atts_engine.backends import InProcessLane
from atts_engine.models import Decoder, Model
from atts_engine.pipeline import Pair, Tongues, Words
from atts_engine.runtime import EngineLoop, LaneCore, Mailbox


@asynccontextmanager
async def open_pair(model: Model, kv_tokens: int) -> AsyncIterator[Pair]:
    """Both lanes share the weights. kv_tokens: capacity of each lane's pool; give enough that nothing is preempted."""
    # A decoder's buffers belong to one lane.
    models = (model, replace(model, decoder=Decoder(model.config, model.decoder.weights)))
    device = torch.device("cpu")
    cores = [
        LaneCore(name, m, kv_tokens=kv_tokens, page_size=16, max_batch_tokens=2048, device=device)
        for name, m in zip(("draft", "target"), models, strict=True)
    ]
    for core in cores:
        core.warm_up()
    loop = EngineLoop([(core, lambda *_: None) for core in cores])
    mailbox = Mailbox(asyncio.get_running_loop())
    draft, target = (InProcessLane(core, loop, mailbox) for core in cores)
    loop.start()
    try:
        words = Words(model.tokenizer, frozenset())
        yield Pair(draft, target, Tongues(words, words))
    finally:
        await asyncio.to_thread(loop.stop)


def prompt_of(problem: int, tokens: int) -> list[int]:
    """Token ids of no text in particular, another for each problem."""
    return [100 + (37 * problem + 11 * i) % 40_000 for i in range(tokens)]
