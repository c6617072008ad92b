"""What a remote lane is asked for in tests, and what the local model says to the same."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

import torch

from atts_engine import ops
from atts_engine.backends.remote.lane import RemoteLane
from atts_engine.models import load_model
from atts_engine.runtime.records import SamplingParams, TokenChunk
from tests.fake_vllm import FakeVllm

MODEL = load_model("tiny-target")
PROMPT = MODEL.tokenizer.encode("<bos>Q: a = 85; b = a-43; c = b+11; c?\n\n")
STEP = MODEL.tokenizer.encode("b = a-43 = 85-43 = 42\n\n")
WRONG = MODEL.tokenizer.encode("c = b+11 = 42+11 = 57\n\n")
GREEDY = SamplingParams(temperature=0.0)
WARM = SamplingParams(temperature=5.0, seed=3)


async def span(lane: RemoteLane, seq: Any, n: int, sampling: SamplingParams, **more: Any) -> list[TokenChunk]:
    async with aclosing(lane.decode(seq, n, sampling, **more)) as chunks:
        return [chunk async for chunk in chunks]


def tokens_of(chunks: Sequence[TokenChunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.tokens]


def logprobs_of(tokens: Sequence[int], start: int) -> list[float]:
    """Of tokens[start:] under the local model."""
    rows = FakeVllm(MODEL).rows(tokens)[start - 1 : -1]
    return ops.score_logits(rows, torch.tensor(tokens[start:])).tolist()


def greedy(tokens: Sequence[int], n: int) -> list[int]:
    fake, found = FakeVllm(MODEL), list(tokens)
    for _ in range(n):
        found.append(int(fake.rows(found)[-1].argmax()))
        if found[-1] in MODEL.eos_token_ids:
            break
    return found[len(tokens) :]
