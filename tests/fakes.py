"""A model whose every output depends on the whole prefix as it is read back through the pages.

Its KV holds token ids. The next token of a prefix is a checksum of it, so one page that is shared, stale or copied
wrong shows at once; a list of tokens is oracle enough.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from atts_engine import ops
from atts_engine.models import ForwardBatch, Model, ModelConfig
from atts_engine.models.decoder import DecoderWeights

VOCAB = 13
EOS = VOCAB - 1
HOT = 4.0
"""Logit of the favoured token; all others are 0."""


def favoured(prefix: Sequence[int]) -> int:
    """The token the fake model wants after `prefix`; depends on every token and its place, and is never EOS."""
    value = 7
    for token in prefix:
        value = (value * 31 + token + 1) % 1_000_003
    return value % (VOCAB - 1)


def log_probability(prefix: Sequence[int], token: int) -> float:
    log_norm = math.log(math.exp(HOT) + VOCAB - 1)
    return (HOT if token == favoured(prefix) else 0.0) - log_norm


def greedy(prefix: Sequence[int], n: int) -> list[int]:
    tokens = list(prefix)
    for _ in range(n):
        tokens.append(favoured(tokens))
    return tokens[len(prefix) :]


class FakeDecoder:
    """Implements what `Runner` asks of a decoder. `poison`: a token id after which all outputs are NaN."""

    def __init__(self, config: ModelConfig, poison: int | None = None) -> None:
        self.config = config
        self.lm_head = torch.eye(VOCAB)
        self.weights = DecoderWeights(self.lm_head, (), torch.ones(VOCAB), self.lm_head)
        self.poison = poison
        self.rows = 0

    def forward(self, batch: ForwardBatch, kv: torch.Tensor) -> torch.Tensor:
        assert bool((batch.ids >= 0).all()), "a row without a token"
        page = kv.shape[3]
        flat = kv[0, 0].view(-1, 2)[:, 0]
        values = batch.ids.to(torch.float32)
        if self.poison is not None:
            values = torch.where(batch.ids == self.poison, torch.nan, values)
        flat[ops.kv_slots(batch.positions, batch.block_table, batch.cu_q, page)] = values
        hidden = torch.zeros(len(batch.ids), VOCAB)
        bounds = batch.cu_q.tolist()
        self.rows += len(batch.ids)
        for b, (first, last) in enumerate(zip(bounds, bounds[1:])):
            length = int(batch.kv_len[b])
            table = batch.block_table[b].tolist()
            # Padding is read like real attention reads it: weight zero, which does not save it from a NaN.
            padding = sum(float(flat[p * page : (p + 1) * page].sum()) * 0.0 for p in table)
            held = [float(flat[table[p // page] * page + p % page]) for p in range(length)]
            for row in range(first, last):
                prefix = held[: length - (last - 1 - row)]
                if any(math.isnan(t) for t in prefix) or math.isnan(padding):
                    hidden[row] = torch.nan
                else:
                    hidden[row, favoured([int(t) for t in prefix])] = HOT
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


@dataclass(frozen=True)
class FakeTokenizer:
    """Token i is the letter chr(97 + i); EOS has no text."""

    eos_token_ids: tuple[int, ...] = (EOS,)
    vocab_size: int = VOCAB
    fingerprint: str = "fake"

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return "".join(chr(97 + i) for i in ids if i != EOS)

    def detokenizer(self, skip_special: bool = True) -> FakeTextStream:
        return FakeTextStream()


class FakeTextStream:
    settled = True

    def push(self, ids: Sequence[int]) -> str:
        return FakeTokenizer().decode(ids)

    def settle(self) -> str:
        return ""

    def copy(self) -> FakeTextStream:
        return self


def fake_model(max_positions: int = 64, poison: int | None = None) -> Model:
    config = ModelConfig(
        family="llama",
        vocab_size=VOCAB,
        hidden_size=VOCAB,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=2,
        intermediate_size=1,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        rope_scaling=None,
        max_positions=max_positions,
        tie_embeddings=True,
        eos_token_ids=(EOS,),
        qkv_bias=False,
        qk_norm=False,
    )
    return Model("fake", config, FakeDecoder(config, poison), FakeTokenizer(), "fake")  # type: ignore[arg-type]
