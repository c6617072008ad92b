"""Causal attention over the paged KV cache, for decode steps, appended spans and prefill alike."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import prod

import torch
from torch import Tensor

from atts_engine.errors import InputError
from atts_engine.ops import checks, flash, native
from atts_engine.ops.dispatch import FLASHINFER, TRITON, chosen, runs_native

ROW_BLOCK = 4
"""Query rows are padded to a multiple of this: a batched CPU product gives a row the same bits for every such M
(with 1 to 3 rows BLAS takes another kernel)."""
KEY_BLOCK = 64
"""Keys of a block, aligned to absolute positions, so that a span's cut into chunks cannot move a block's edge."""
_WORKSPACE = 1 << 20
"""Scores held at once; what is larger is cut into groups of sequences, which changes no bit."""


@dataclass(frozen=True, slots=True)
class _Group:
    """Sequences that are worked on together, and where their queries, keys and results lie.

    M: query rows of a sequence, padded; most: the largest number of them that is live; blocks: key blocks.
    """

    batch: int
    padded: int
    most: int
    blocks: int
    source: Tensor  # [batch * M]: row of q for each padded row
    slots: Tensor  # [batch * Hkv * blocks * KEY_BLOCK]: row of the cache, one per slot and head
    masked: Tensor  # [batch, 1, blocks, most, 1, KEY_BLOCK]: keys that a row must not see
    live: Tensor  # [n]: padded rows (of batch * most) that are live
    target: Tensor  # [n]: their rows of the output


class Scratch:
    """Buffers and indices that one caller reuses from call to call. Not for two threads at once.

    Fresh memory costs a page fault for every 4 KiB written, which on a CPU is more than the arithmetic. The layers of
    a forward pass share one set of indices for each window, recognised by the very tensors they were made of, which
    must not be changed in place between calls.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._planned: tuple[Tensor, Tensor, Tensor] | None = None
        self._plans: dict[int, list[_Group]] = {}
        self._flash: flash.Attention | None = None

    def take(self, name: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """An fp32 tensor of this shape; what it holds is left over from an earlier use, but finite."""
        size = prod(shape)
        held = self._buffers.get(name)
        if held is None or held.numel() < size or held.device != device:
            held = self._buffers[name] = torch.zeros(size, device=device)
        return held[:size].view(shape)

    def plan(
        self, q: Tensor, kv_layer: Tensor, block_table: Tensor, cu_q: Tensor, kv_len: Tensor, window: int
    ) -> list[_Group]:
        """The groups of a batch, made once for all layers of a window."""
        key = self._planned
        if key is None or key[0] is not block_table or key[1] is not cu_q or key[2] is not kv_len:
            self._plans = {}
            self._planned = (block_table, cu_q, kv_len)
        if window not in self._plans:
            self._plans[window] = _plan(q, kv_layer, block_table, cu_q, kv_len, window)
        return self._plans[window]

    def flashinfer(self, device: torch.device) -> flash.Attention:
        """FlashInfer's attention with the workspace and the plan of this caller."""
        if self._flash is None or self._flash.device != device:
            self._flash = flash.Attention(device)
        return self._flash


def paged_attention(
    q: Tensor,
    kv_layer: Tensor,
    block_table: Tensor,
    cu_q: Tensor,
    kv_len: Tensor,
    scale: float,
    scratch: Scratch | None = None,
    *,
    window: int = 0,
) -> Tensor:
    """Causal attention of q[N, Hq, D] over pages -> [N, Hq, D].

    kv_layer[2, P, page, Hkv, D]; block_table[B, maxpages] int32; cu_q[B + 1] int32; kv_len[B] int32 (tokens, the
    queries' own included). Query rows cu_q[b] .. cu_q[b+1]-1 are the last positions of sequence b's kv_len[b] tokens: a
    row at position p sees the keys 0 .. p, with a window > 0 the keys p - window + 1 .. p. Slots that no row of the
    sequence sees may hold NaN, and pages before every row's window need not be the sequence's own any more. Hq is a
    multiple of Hkv; softmax in fp32.

    A row's bits depend on its own query, keys and values alone: neither on the other rows, nor on the chunks a span
    came in, nor on padding. So on the CPU in fp32 and bfloat16, and with the Triton kernel in every dtype. In the fp32
    reference keys are taken in fixed blocks, the row maximum (exact in any order) first, and the blocks' sums are added
    in order; a block that is masked for a row adds exact zeros to it. The native kernel has no window: the reference
    serves that.

    scratch: buffers of the reference to work in, None for fresh ones.
    Raises InputError where shapes do not fit or a sequence has more query rows than tokens; the Triton kernel, which
    reads nothing on the host outside `ops.checked()`, gives NaN for rows that see no key and leaves sequences longer
    than the block table to the caller. It takes fp32, fp16 and bf16, the same in q and kv_layer, heads of up to 256.
    """
    checks.paged_attention(q, kv_layer, block_table, cu_q, kv_len)
    if window < 0:
        raise InputError(f"paged_attention: a window has 1 key or more, or is 0 for none, not {window}")
    impl = chosen("paged_attention", q.device)
    if impl == TRITON:
        return _triton(q, kv_layer, block_table, cu_q, kv_len, scale, window)
    if not window and runs_native("paged_attention", q.device, q.dtype) and native.serves_attention(q, kv_layer):
        try:
            return native.paged_attention(q, kv_layer, block_table, cu_q, kv_len, scale)
        except InputError:
            _plan(q, kv_layer, block_table, cu_q, kv_len, window)  # has better words for most of what can be wrong
            raise
    scratch = Scratch() if scratch is None else scratch
    if impl == FLASHINFER:
        return scratch.flashinfer(q.device)(q, kv_layer, block_table, cu_q, kv_len, scale, window)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for group in scratch.plan(q, kv_layer, block_table, cu_q, kv_len, window):
        _attend(out, q, kv_layer, group, scale, scratch)
    return out


def _triton(
    q: Tensor, kv_layer: Tensor, block_table: Tensor, cu_q: Tensor, kv_len: Tensor, scale: float, window: int
) -> Tensor:
    import atts_triton

    try:
        return atts_triton.paged_attention(q, kv_layer, block_table, cu_q, kv_len, scale, window)
    except ValueError as error:
        raise InputError(str(error)) from error


def _plan(q: Tensor, kv_layer: Tensor, block_table: Tensor, cu_q: Tensor, kv_len: Tensor, window: int) -> list[_Group]:
    starts, lengths = cu_q.tolist(), kv_len.tolist()
    if starts[-1] != q.shape[0] or len(starts) != len(lengths) + 1:
        raise InputError(f"paged_attention: cu_q ends at {starts[-1]} for {q.shape[0]} rows, {len(lengths)} sequences")
    counts = [end - start for start, end in pairwise(starts)]
    if any(count < 0 or count > length for count, length in zip(counts, lengths, strict=True)):
        raise InputError("paged_attention: a sequence has more query rows than tokens")
    if max(lengths, default=0) > block_table.shape[1] * kv_layer.shape[2]:
        raise InputError("paged_attention: a sequence is longer than its row of the block table")
    checks.pages_in_pool("paged_attention", block_table, kv_len, kv_layer.shape[2], kv_layer.shape[1])
    return [
        _group(members, starts, counts, lengths, block_table, kv_layer.shape[2], kv_layer.shape[3], window)
        for members in _members(counts, lengths, q.shape[1])
    ]


def _members(counts: list[int], lengths: list[int], heads: int) -> list[list[int]]:
    """Sequences to work on together: alike in rows and in key blocks (to a power of two each), bounded in workspace."""
    alike: dict[tuple[int, int], list[int]] = {}
    for index, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        if count:
            blocks = -(-length // KEY_BLOCK)
            alike.setdefault(((max(count, ROW_BLOCK) - 1).bit_length(), (blocks - 1).bit_length()), []).append(index)
    groups = []
    for (bits, block_bits), members in alike.items():
        fit = max(1, _WORKSPACE // (KEY_BLOCK * heads << (bits + block_bits)))
        groups += [members[at : at + fit] for at in range(0, len(members), fit)]
    return groups


def _group(
    members: list[int],
    starts: list[int],
    counts: list[int],
    lengths: list[int],
    block_table: Tensor,
    page: int,
    kv_heads: int,
    window: int,
) -> _Group:
    device = block_table.device
    most = max(counts[index] for index in members)
    padded = -(-most // ROW_BLOCK) * ROW_BLOCK
    blocks = max(-(-lengths[index] // KEY_BLOCK) for index in members)
    facts = torch.tensor([[counts[i], lengths[i], starts[i], i] for i in members], device=device)
    count, length, start, member = facts.unbind(1)
    row = torch.arange(padded, device=device)
    live = row < count[:, None]  # [batch, M]
    offset = torch.where(live, row, 0)  # a row past the end repeats row 0 and is dropped at the end
    source = start[:, None] + offset
    position = (length - count)[:, None] + offset
    key = torch.arange(blocks * KEY_BLOCK, device=device)
    # A key that no row sees is read from the slot of one that some row sees: what nobody wrote may be NaN.
    first = (length - count + 1 - window).clamp(min=0) if window else torch.zeros_like(length)
    safe_key = torch.where((key < length[:, None]) & (key >= first[:, None]), key, first[:, None])
    slots = block_table[member].long().gather(1, safe_key // page) * page + safe_key % page
    by_head = slots[:, None, :] * kv_heads + torch.arange(kv_heads, device=device)[:, None]
    place, own = key.view(1, blocks, 1, KEY_BLOCK), position[:, None, :most, None]
    masked = place > own
    if window:
        masked |= place <= own - window
    keep = live[:, :most].reshape(-1).nonzero().view(-1)
    return _Group(
        batch=len(members),
        padded=padded,
        most=most,
        blocks=blocks,
        source=source.view(-1),
        slots=by_head.reshape(-1),
        masked=masked[:, None, :, :, None],
        live=keep,
        target=source[:, :most].reshape(-1)[keep],
    )


def _attend(out: Tensor, q: Tensor, kv_layer: Tensor, g: _Group, scale: float, scratch: Scratch) -> None:
    """Attention of one group of sequences, written to their rows of out."""
    heads, dim = q.shape[1], q.shape[2]
    kv_heads = kv_layer.shape[3]
    group = heads // kv_heads
    used, tiles = g.most * group, g.batch * kv_heads * g.blocks
    flat = kv_layer.view(2, -1, dim)

    def take(name: str, *shape: int) -> Tensor:
        return scratch.take(name, shape, q.device)

    def tile(which: int) -> Tensor:
        """Keys (0) or values (1): [tiles, KEY_BLOCK, dim] fp32, a tile for each sequence, head and block."""
        if flat.dtype != torch.float32:
            return flat[which].index_select(0, g.slots).float().view(tiles, KEY_BLOCK, dim)
        held = take("tile", tiles * KEY_BLOCK, dim)
        torch.index_select(flat[which], 0, g.slots, out=held)
        return held.view(tiles, KEY_BLOCK, dim)

    # Products take whole row blocks; everything else, the exponentials above all, only rows that some sequence has.
    queries = q[g.source].float().mul_(scale).view(g.batch, g.padded, kv_heads, 1, group, dim)
    queries = queries.permute(0, 2, 3, 1, 4, 5).expand(-1, -1, g.blocks, -1, -1, -1)
    product = take("product", tiles, g.padded * group, KEY_BLOCK)
    torch.bmm(queries.reshape(tiles, g.padded * group, dim), tile(0).mT, out=product)
    scores = take("scores", g.batch, kv_heads, g.blocks, g.most, group, KEY_BLOCK)
    flat_scores = scores.view(tiles, used, KEY_BLOCK)
    flat_scores.copy_(product[:, :used])
    scores.masked_fill_(g.masked, float("-inf"))
    peak = scores.amax(dim=(2, 5), keepdim=True)  # finite: every row sees its own key
    scores.sub_(peak).exp_()
    norms = scores.sum(-1, keepdim=True).unbind(2)
    product[:, :used] = flat_scores
    part = take("part", tiles, g.padded * group, dim)
    torch.bmm(product, tile(1), out=part)
    parts = part.view(g.batch, kv_heads, g.blocks, g.padded, group, dim)[:, :, :, : g.most].unbind(2)
    total, norm = parts[0], norms[0]
    for block in range(1, g.blocks):
        total, norm = total + parts[block], norm + norms[block]
    result = (total / norm).permute(0, 2, 1, 3, 4)  # [batch, most, kv_heads, group, dim]
    out[g.target] = result.reshape(g.batch * g.most, heads, dim)[g.live].to(out.dtype)
