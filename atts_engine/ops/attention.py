"""Causal attention over the paged KV cache, for decode steps, appended spans and prefill alike."""

from __future__ import annotations

import torch
from torch import Tensor

from atts_engine.errors import InputError

ROW_BLOCK = 8
"""Query rows of a block. A CPU matrix product gives a row the same bits for any M that is a multiple of 8."""
KEY_BLOCK = 64
"""Keys of a block, aligned to absolute positions, so that a span's cut into chunks cannot move a block's edge."""
_WORKSPACE = 1 << 22
"""Elements of the largest intermediate of one group of sequences."""


def paged_attention(
    q: Tensor, kv_layer: Tensor, block_table: Tensor, cu_q: Tensor, kv_len: Tensor, scale: float
) -> Tensor:
    """Causal attention of q[N, Hq, D] over pages -> [N, Hq, D].

    kv_layer[2, P, page, Hkv, D]; block_table[B, maxpages] int32; cu_q[B + 1] int32; kv_len[B] int32 (tokens, the
    queries' own included). Query rows cu_q[b] .. cu_q[b+1]-1 are the last positions of sequence b's kv_len[b] tokens.
    Hq is a multiple of Hkv; softmax in fp32.

    On the CPU in fp32 a row's bits depend on its own query, keys and values alone: neither on the other rows, nor on
    the chunks a span came in, nor on padding. Keys are taken in fixed blocks, the row maximum (exact in any order)
    first, and the blocks' sums are added in order; a block that is masked for a row adds exact zeros to it.

    Raises InputError where shapes do not fit or a sequence has more query rows than tokens.
    """
    heads, dim = q.shape[1], q.shape[2]
    kv_heads = kv_layer.shape[3]
    if heads % kv_heads or kv_layer.shape[4] != dim:
        raise InputError(f"paged_attention: q {tuple(q.shape)} does not fit the cache {tuple(kv_layer.shape)}")
    starts, lengths = cu_q.tolist(), kv_len.tolist()
    if starts[-1] != q.shape[0] or len(starts) != len(lengths) + 1:
        raise InputError(f"paged_attention: cu_q ends at {starts[-1]} for {q.shape[0]} rows, {len(lengths)} sequences")
    counts = [end - start for start, end in zip(starts, starts[1:], strict=False)]
    if any(count < 0 or count > length for count, length in zip(counts, lengths, strict=True)):
        raise InputError("paged_attention: a sequence has more query rows than tokens")
    if max(lengths, default=0) > block_table.shape[1] * kv_layer.shape[2]:
        raise InputError("paged_attention: a sequence is longer than its row of the block table")
    out = torch.empty_like(q)
    for members in _groups(counts, lengths, heads * dim):
        _attend(out, q, kv_layer, block_table, starts, counts, lengths, members, scale)
    return out


def _groups(counts: list[int], lengths: list[int], width: int) -> list[list[int]]:
    """Sequences that are worked on together: alike in rows (to a power of two), bounded in workspace."""
    by_rows: dict[int, list[int]] = {}
    for index, count in enumerate(counts):
        if count:
            by_rows.setdefault((count - 1).bit_length() if count > ROW_BLOCK else 3, []).append(index)
    groups = []
    for bits, members in by_rows.items():
        members.sort(key=lambda index: lengths[index])
        group: list[int] = []
        for index in members:
            blocks = -(-lengths[index] // KEY_BLOCK)
            if group and (len(group) + 1) * blocks * (width << bits) > _WORKSPACE:
                groups.append(group)
                group = []
            group.append(index)
        groups.append(group)
    return groups


def _attend(
    out: Tensor,
    q: Tensor,
    kv_layer: Tensor,
    block_table: Tensor,
    starts: list[int],
    counts: list[int],
    lengths: list[int],
    members: list[int],
    scale: float,
) -> None:
    device = q.device
    heads, dim = q.shape[1], q.shape[2]
    page, kv_heads = kv_layer.shape[2], kv_layer.shape[3]
    group = heads // kv_heads
    batch = len(members)
    rows = -(-max(counts[index] for index in members) // ROW_BLOCK) * ROW_BLOCK
    blocks = -(-max(lengths[index] for index in members) // KEY_BLOCK)
    span = blocks * KEY_BLOCK

    count = torch.tensor([counts[index] for index in members], device=device)
    length = torch.tensor([lengths[index] for index in members], device=device)
    start = torch.tensor([starts[index] for index in members], device=device)
    row = torch.arange(rows, device=device)
    live = row < count[:, None]  # [batch, rows]
    source = torch.where(live, start[:, None] + row, start[:, None])
    position = (length - count)[:, None] + torch.where(live, row, 0)  # a dead row repeats row 0 and is dropped

    key = torch.arange(span, device=device)
    table = block_table[torch.tensor(members, device=device)].long()
    # A key past the end is read from the sequence's first slot: what lies in slots that nobody wrote may be NaN.
    safe_key = torch.where(key < length[:, None], key, 0)
    slots = (table.gather(1, safe_key // page) * page + safe_key % page).view(-1)
    flat = kv_layer.view(2, -1, kv_heads * dim)
    keys = flat[0].index_select(0, slots).view(batch, blocks, KEY_BLOCK, kv_heads, dim).float()
    values = flat[1].index_select(0, slots).view(batch, blocks, KEY_BLOCK, kv_heads, dim).float()
    tiles = batch * kv_heads * blocks
    keys = keys.permute(0, 3, 1, 4, 2).reshape(tiles, dim, KEY_BLOCK)
    values = values.permute(0, 3, 1, 2, 4).reshape(tiles, KEY_BLOCK, dim)

    queries = q[source.view(-1)].float().mul_(scale).view(batch, rows, kv_heads, group, dim)
    queries = queries.permute(0, 2, 1, 3, 4).reshape(batch, kv_heads, 1, rows * group, dim)
    queries = queries.expand(batch, kv_heads, blocks, rows * group, dim).reshape(tiles, rows * group, dim)

    scores = torch.bmm(queries, keys).view(batch, kv_heads, blocks, rows, group, KEY_BLOCK)
    masked = key.view(1, 1, blocks, 1, 1, KEY_BLOCK) > position.view(batch, 1, 1, rows, 1, 1)
    scores.masked_fill_(masked, float("-inf"))
    peak = scores.amax(dim=(2, 5), keepdim=True)  # finite: every row sees its own key
    weights = scores.sub_(peak).exp_()
    sums = weights.sum(-1, keepdim=True)
    parts = torch.bmm(weights.view(tiles, rows * group, KEY_BLOCK), values)
    parts = parts.view(batch, kv_heads, blocks, rows, group, dim)
    total, norm = parts[:, :, 0], sums[:, :, 0]
    for block in range(1, blocks):
        total = total + parts[:, :, block]
        norm = norm + sums[:, :, block]
    result = (total / norm).permute(0, 2, 1, 3, 4).reshape(batch * rows, heads, dim)
    keep = live.view(-1)
    out[source.view(-1)[keep]] = result[keep].to(out.dtype)
