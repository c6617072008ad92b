"""Causal attention over the paged KV cache, for decode steps, appended spans and prefill alike."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from atts_engine.errors import InputError

ROW_BLOCK = 4
"""Query rows are padded to a multiple of this: a batched CPU product gives a row the same bits for every such M
(with 1 to 3 rows BLAS takes another kernel)."""
KEY_BLOCK = 64
"""Keys of a block, aligned to absolute positions, so that a span's cut into chunks cannot move a block's edge."""
_WORKSPACE = 1 << 20
"""Scores held at once; what is larger is cut into groups of sequences, which changes no bit."""


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
    counts = [end - start for start, end in pairwise(starts)]
    if any(count < 0 or count > length for count, length in zip(counts, lengths, strict=True)):
        raise InputError("paged_attention: a sequence has more query rows than tokens")
    if max(lengths, default=0) > block_table.shape[1] * kv_layer.shape[2]:
        raise InputError("paged_attention: a sequence is longer than its row of the block table")
    out = torch.empty_like(q)
    for members in _groups(counts, lengths, heads):
        _attend(out, q, kv_layer, block_table, starts, counts, lengths, members, scale)
    return out


def _groups(counts: list[int], lengths: list[int], heads: int) -> list[list[int]]:
    """Sequences that are worked on together, longest first: alike in rows (to a power of two), bounded in workspace."""
    by_rows: dict[int, list[int]] = {}
    for index, count in enumerate(counts):
        if count:
            by_rows.setdefault((max(count, ROW_BLOCK) - 1).bit_length(), []).append(index)
    groups = []
    for bits, members in by_rows.items():
        members.sort(key=lambda index: -lengths[index])
        at = 0
        while at < len(members):
            span = -(-lengths[members[at]] // KEY_BLOCK) * KEY_BLOCK
            fit = max(1, _WORKSPACE // (span * heads << bits))
            groups.append(members[at : at + fit])
            at += fit
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
    """Attention of one group of sequences, longest first, written to their rows of out."""
    device = q.device
    heads, dim = q.shape[1], q.shape[2]
    page, kv_heads = kv_layer.shape[2], kv_layer.shape[3]
    group = heads // kv_heads
    batch = len(members)
    rows = -(-max(counts[index] for index in members) // ROW_BLOCK) * ROW_BLOCK
    blocks = -(-lengths[members[0]] // KEY_BLOCK)
    # Sequences that reach key block j: the first reach[j], as the group is sorted.
    reach = [sum(lengths[index] > block * KEY_BLOCK for index in members) for block in range(blocks)]

    facts = torch.tensor([[counts[i], lengths[i], starts[i], i] for i in members], device=device)
    count, length, start, member = facts.unbind(1)
    row = torch.arange(rows, device=device)
    live = row < count[:, None]  # [batch, rows]
    offset = torch.where(live, row, 0)  # a row past the end repeats row 0 and is dropped at the end
    source = (start[:, None] + offset).view(-1)
    position = (length - count)[:, None] + offset

    key = torch.arange(blocks * KEY_BLOCK, device=device)
    # A key past the end is read from the sequence's first slot: what lies in slots that nobody wrote may be NaN.
    safe_key = torch.where(key < length[:, None], key, 0)
    pages = block_table[member].long().gather(1, safe_key // page)
    slots = (pages * page + safe_key % page).view(batch, blocks, KEY_BLOCK)
    flat = kv_layer.view(2, -1, kv_heads * dim)

    def tile(which: int, block: int) -> Tensor:
        rows_of_block = flat[which].index_select(0, slots[: reach[block], block].reshape(-1))
        return rows_of_block.view(-1, KEY_BLOCK, kv_heads, dim).float()

    queries = q[source].float().mul_(scale).view(batch, rows, kv_heads, group, dim)
    queries = queries.permute(2, 0, 1, 3, 4).reshape(kv_heads, batch, rows * group, dim)
    scores = queries.new_full((blocks, kv_heads, batch, rows * group, KEY_BLOCK), float("-inf"))
    for block, reached in enumerate(reach):
        keys = tile(0, block)
        for head in range(kv_heads):
            torch.bmm(queries[head, :reached], keys[:, :, head].mT, out=scores[block, head, :reached])
    scores = scores.view(blocks, kv_heads, batch, rows, group, KEY_BLOCK)
    masked = key.view(blocks, 1, 1, 1, 1, KEY_BLOCK) > position.view(1, 1, batch, rows, 1, 1)
    scores.masked_fill_(masked, float("-inf"))
    peak = scores.amax(dim=(0, 5), keepdim=True)  # finite: every row sees its own key
    weights = scores.sub_(peak).exp_().view(blocks, kv_heads, batch, rows * group, KEY_BLOCK)
    norms = weights.sum(-1, keepdim=True)
    norm = norms[0]
    total = torch.empty_like(queries)
    for block, reached in enumerate(reach):
        values = tile(1, block)
        for head in range(kv_heads):
            part = torch.bmm(weights[block, head, :reached], values[:, :, head])
            if block:
                total[head, :reached] += part
            else:
                total[head] = part
        if block:
            norm = norm + norms[block]
    result = (total / norm).view(kv_heads, batch, rows, group, dim).permute(1, 2, 0, 3, 4)
    keep = live.view(-1)
    out[source[keep]] = result.reshape(batch * rows, heads, dim)[keep].to(out.dtype)
