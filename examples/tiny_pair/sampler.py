"""A small batched sampler with a KV cache, and mean-NLL scores, to measure a trained model without the engine."""

from __future__ import annotations

import torch

from .model import Llama
from .vocab import EOS, PAD


class Cached:
    """Rows of different lengths, left-padded to one length, decoded side by side."""

    def __init__(self, model: Llama, prompts: list[list[int]], room: int) -> None:
        self.model = model
        shape, rows = model.shape, len(prompts)
        longest = max(map(len, prompts))
        self.pads = torch.tensor([longest - len(p) for p in prompts])
        self.length = 0
        size = (shape.layers, rows, shape.heads, longest + room, shape.width // shape.heads)
        self.k, self.v = torch.zeros(size), torch.zeros(size)
        padded = torch.tensor([[PAD] * (longest - len(p)) + p for p in prompts])
        self.logits = self.extend(padded)

    def extend(self, ids: torch.Tensor) -> torch.Tensor:
        """Append ids [rows, n] -> logits [rows, V] after the last of them."""
        n, begin = ids.shape[1], self.length
        end = begin + n
        position = torch.arange(begin, end)[None] - self.pads[:, None]  # [rows, n]
        cos, sin = (table[position.clamp(min=0)][:, None] for table in (self.model.cos, self.model.sin))
        key = torch.arange(end)
        seen = (key[None, None] <= torch.arange(begin, end)[None, :, None]) & (
            key[None, None] >= self.pads[:, None, None]
        )
        # A padding row sees itself, so that its softmax has something to sum over.
        seen |= key[None, None] == torch.arange(begin, end)[None, :, None]
        mask = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))[:, None]
        x = self.model.model.embed_tokens(ids)
        for i, block in enumerate(self.model.model.layers):
            q, k, v = block.self_attn.project(block.input_layernorm(x), cos, sin)
            self.k[i, :, :, begin:end], self.v[i, :, :, begin:end] = k, v
            x = x + block.self_attn.attend(q, self.k[i, :, :, :end], self.v[i, :, :, :end], mask)
            x = x + block.mlp(block.post_attention_layernorm(x))
        self.length = end
        return self.model.lm_head(self.model.model.norm(x[:, -1]))


@torch.inference_mode()
def sample(
    model: Llama, prompts: list[list[int]], max_tokens: int, temperature: float, seed: int, batch: int = 256
) -> list[list[int]]:
    """New tokens per prompt, ``<eos>`` left out; ``temperature`` 0 is greedy. A chain that does not end stops at
    ``max_tokens``.
    """
    generator = torch.Generator().manual_seed(seed)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    out: list[list[int]] = [[] for _ in prompts]
    for at in range(0, len(order), batch):
        rows = order[at : at + batch]
        cache = Cached(model, [prompts[i] for i in rows], max_tokens)
        logits, live = cache.logits, torch.ones(len(rows), dtype=torch.bool)
        for _ in range(max_tokens):
            if temperature:
                token = torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator)[:, 0]
            else:
                token = logits.argmax(-1)
            live &= token != EOS
            for row, new in zip(rows, torch.where(live, token, -1).tolist(), strict=True):
                if new >= 0:
                    out[row].append(new)
            if not live.any():
                break
            logits = cache.extend(token[:, None])
    return out


@torch.inference_mode()
def token_nll(model: Llama, sequences: list[list[int]], batch: int = 128) -> list[torch.Tensor]:
    """Per sequence of n ids: negative log-likelihood (nats) of ids 1..n-1 under ``model``, float32 [n - 1]."""
    out: list[torch.Tensor] = []
    for at in range(0, len(sequences), batch):
        rows = sequences[at : at + batch]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
        logp = torch.log_softmax(model(ids[:, :-1])[0].float(), -1)
        nll = -logp.gather(-1, ids[:, 1:, None])[..., 0]
        out += [nll[i, : len(row) - 1] for i, row in enumerate(rows)]
    return out
