"""What the model tests share: a decoder driven through a scattered paged cache, and transformers on the same text."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from atts_engine.models import Decoder, ForwardBatch


def paged_logits(
    decoder: Decoder, sequences: Sequence[Sequence[int]], page: int = 16, chunks: random.Random | None = None
) -> list[torch.Tensor]:
    """Logits [len, V] of every sequence, all forwarded side by side.

    chunks None: each sequence in one piece. Otherwise steps of random pieces of a random subset of the sequences. Pages
    are handed out in random order and the cache starts as NaN, so reading a row that was not written shows.
    """
    c, device = decoder.config, decoder.device
    need = [-(-len(s) // page) for s in sequences]
    pages = torch.randperm(sum(need), generator=torch.Generator().manual_seed(0)).split(need)
    kv = torch.full(
        (c.num_layers, 2, sum(need), page, c.num_kv_heads, c.head_dim),
        float("nan"),
        dtype=decoder.dtype,
        device=device,
    )
    done, out = [0] * len(sequences), [[] for _ in sequences]
    while any(d < len(s) for d, s in zip(done, sequences, strict=True)):
        step = []
        for i, s in enumerate(sequences):
            left = len(s) - done[i]
            take = left if chunks is None else min(left, chunks.choice([0, 1, 1, 2, 7, 16, 33]))
            if take:
                step.append((i, done[i], done[i] + take))
        if not step:
            continue
        batch = _batch(step, sequences, pages, device)
        logits = decoder.logits(decoder.forward(batch, kv))
        for (i, start, end), rows in zip(step, logits.split([e - s for _, s, e in step]), strict=True):
            assert start == done[i]
            out[i].append(rows)
            done[i] = end
    return [torch.cat(rows) for rows in out]


def _batch(
    step: list[tuple[int, int, int]],
    sequences: Sequence[Sequence[int]],
    pages: Sequence[torch.Tensor],
    device: torch.device,
) -> ForwardBatch:
    ids = [t for i, start, end in step for t in sequences[i][start:end]]
    positions = [torch.arange(start, end) for _, start, end in step]
    table = torch.nn.utils.rnn.pad_sequence([pages[i] for i, _, _ in step], batch_first=True)
    lengths = torch.tensor([end - start for _, start, end in step])
    return ForwardBatch(
        ids=torch.tensor(ids, device=device),
        positions=torch.cat(positions).to(device),
        block_table=table.to(device, torch.int32),
        cu_q=torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0))).to(device, torch.int32),
        kv_len=torch.tensor([end for _, _, end in step], dtype=torch.int32, device=device),
    )


@torch.inference_mode()
def reference_logits(model: torch.nn.Module, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Logits [len, V] of each sequence by transformers, one at a time."""
    return [model(torch.tensor([list(s)], device=next(model.parameters()).device)).logits[0] for s in sequences]
