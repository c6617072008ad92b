"""Causal attention over the paged KV cache, for decode steps, appended spans and prefill alike."""

from __future__ import annotations

from itertools import pairwise
from math import prod

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


class Scratch:
    """Buffers that one caller reuses from call to call: fresh memory costs a page fault for every 4 KiB written, which
    on a CPU is more than the arithmetic. Not for two threads at once."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """An fp32 tensor of this shape; what it holds is left over from an earlier use, but finite."""
        size = prod(shape)
        held = self._buffers.get(name)
        if held is None or held.numel() < size or held.device != device:
            held = self._buffers[name] = torch.zeros(size, device=device)
        return held[:size].view(shape)


def paged_attention(
    q: Tensor,
    kv_layer: Tensor,
    block_table: Tensor,
    cu_q: Tensor,
    kv_len: Tensor,
    scale: float,
    scratch: Scratch | None = None,
) -> Tensor:
    """Causal attention of q[N, Hq, D] over pages -> [N, Hq, D].

    kv_layer[2, P, page, Hkv, D]; block_table[B, maxpages] int32; cu_q[B + 1] int32; kv_len[B] int32 (tokens, the
    queries' own included). Query rows cu_q[b] .. cu_q[b+1]-1 are the last positions of sequence b's kv_len[b] tokens.
    Hq is a multiple of Hkv; softmax in fp32.

    On the CPU in fp32 a row's bits depend on its own query, keys and values alone: neither on the other rows, nor on
    the chunks a span came in, nor on padding. Keys are taken in fixed blocks, the row maximum (exact in any order)
    first, and the blocks' sums are added in order; a block that is masked for a row adds exact zeros to it.

    scratch: buffers to work in, None for fresh ones.
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
    scratch = Scratch() if scratch is None else scratch
    for members in _groups(counts, lengths, heads):
        _attend(out, q, kv_layer, block_table, starts, counts, lengths, members, scale, scratch)
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
    scratch: Scratch,
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

    def take(name: str, *shape: int) -> Tensor:
        return scratch.take(name, shape, device)

    def tile(which: int, block: int) -> Tensor:
        """Keys (0) or values (1) of one block: [reach, KEY_BLOCK, kv_heads, dim] fp32."""
        index = slots[: reach[block], block].reshape(-1)
        if flat.dtype == torch.float32:
            held = take("tile", index.shape[0], kv_heads * dim)
            torch.index_select(flat[which], 0, index, out=held)
        else:
            held = flat[which].index_select(0, index).float()
        return held.view(-1, KEY_BLOCK, kv_heads, dim)

    queries = q[source].float().mul_(scale).view(batch, rows, kv_heads, group, dim)
    queries = queries.permute(2, 0, 1, 3, 4).reshape(kv_heads, batch, rows * group, dim)
    # Products take whole row blocks; everything else, the exponentials above all, only rows that some sequence has.
    most = max(counts[index] for index in members)
    used = most * group
    scores = take("scores", blocks, kv_heads, batch, used, KEY_BLOCK).fill_(float("-inf"))
    product = take("product", batch, rows * group, KEY_BLOCK)
    for block, reached in enumerate(reach):
        keys = tile(0, block)
        for head in range(kv_heads):
            torch.bmm(queries[head, :reached], keys[:, :, head].mT, out=product[:reached])
            scores[block, head, :reached] = product[:reached, :used]
    shaped = scores.view(blocks, kv_heads, batch, most, group, KEY_BLOCK)
    masked = key.view(blocks, 1, 1, 1, 1, KEY_BLOCK) > position[:, :most].reshape(1, 1, batch, most, 1, 1)
    shaped.masked_fill_(masked, float("-inf"))
    peak = shaped.amax(dim=(0, 5), keepdim=True)  # finite: every row sees its own key
    weights = shaped.sub_(peak).exp_().view(blocks, kv_heads, batch, used, KEY_BLOCK)
    norms = weights.sum(-1, keepdim=True)
    norm = norms[0]
    total = take("total", kv_heads, batch, used, dim)
    part = take("part", batch, rows * group, dim)
    for block, reached in enumerate(reach):
        values = tile(1, block)
        for head in range(kv_heads):
            product[:reached, :used] = weights[block, head, :reached]
            torch.bmm(product[:reached], values[:, :, head], out=part[:reached])
            if block:
                total[head, :reached] += part[:reached, :used]
            else:
                total[head] = part[:, :used]
        if block:
            norm = norm + norms[block]
    result = (total / norm).view(kv_heads, batch, most, group, dim).permute(1, 2, 0, 3, 4)
    keep = live[:, :most].reshape(-1)
    target = source.view(batch, rows)[:, :most].reshape(-1)
    out[target[keep]] = result.reshape(batch * most, heads, dim)[keep].to(out.dtype)
