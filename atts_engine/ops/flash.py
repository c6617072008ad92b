"""FlashInfer's kernels behind the ops that they can serve: `paged_attention` and `kv_append`, on a CUDA device.

They are never chosen by themselves, only by `ops.use("flashinfer")`: Triton's serve the same ops, are captured in a
graph, and give a row the same bits whoever shares its batch. Attention here does neither. Its plan is made on the host
(`plan` copies row bounds and lengths to it), and the tile of query rows and the cuts through the keys follow from the
whole batch (flashinfer #1675, #2830).

`sample` is not among them, because it cannot keep that op's contract. In FlashInfer 0.6.0 a call takes one seed for
the whole batch. Later versions take one per request and check how many there are, but their kernels read
`seed_arr[0]` and `offset_arr[0]` alone (flashinfer #1104, #2078; #2345 and #4861 propose to mend it). In all of them
the row's place in the batch is the Philox subsequence. So a draw depends on the place of its row, and one seed does
not give one result. Rows with -inf (#1050) or neighbouring floats (#3623) have hung the filters, and NaN (#2456) has
made them read memory that is not theirs; our contract answers such rows.

Not supported: float32 (no kernel for it), a query dtype other than the cache's, heads of other sizes than `HEAD_DIMS`.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atts_engine.errors import InputError

OPS = frozenset({"kv_append", "paged_attention"})
HEAD_DIMS = (64, 128, 256)
_DTYPES = (torch.float16, torch.bfloat16)
_WORKSPACE_BYTES = 128 << 20
"""What FlashInfer recommends for partial results of split sequences."""
_PACKAGES = {
    "flashinfer": "flashinfer-python",
    "tvm_ffi": "apache-tvm-ffi",
    "packaging": "packaging",
    "pynvml": "nvidia-ml-py",
    "requests": "requests",
}
"""Modules that `import flashinfer` asks for, by the package that brings them."""


@cache
def lacking() -> str | None:
    """Why FlashInfer cannot be imported here, and the mend; None where it can."""
    missing = [package for module, package in _PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        return f"FlashInfer's kernels need {', '.join(missing)}: pip install 'atts-engine[gpu]'"
    return None


class PageIndices(NamedTuple):
    """A batch as FlashInfer reads it: sequences with query rows, each with as many pages as its tokens fill."""

    rows: Tensor
    """[S + 1] int32 on the host: bounds of the sequences' query rows."""
    bounds: Tensor
    """[S + 1] int32 on the host: bounds of the sequences' parts of `pages`."""
    pages: Tensor
    """[bounds[S]] int32, where the block table is."""
    last: Tensor
    """[S] int32 on the host: tokens in a sequence's last page, 1 .. page."""


def page_indices(block_table: Tensor, cu_q: Tensor, kv_len: Tensor, page: int, rows: int) -> PageIndices:
    """From block_table[B, W] int32, cu_q[B + 1] and kv_len[B] of `paged_attention`, for q of `rows` rows.

    Sequences without query rows are left out: they may be empty, which FlashInfer's last page cannot be.
    Raises InputError as the reference does. Reads cu_q and kv_len on the host.
    """
    starts, lengths = cu_q.tolist(), kv_len.tolist()
    if starts[-1] != rows or len(starts) != len(lengths) + 1:
        raise InputError(f"paged_attention: cu_q ends at {starts[-1]} for {rows} rows, {len(lengths)} sequences")
    counts = [end - start for start, end in pairwise(starts)]
    if any(count < 0 or count > length for count, length in zip(counts, lengths, strict=True)):
        raise InputError("paged_attention: a sequence has more query rows than tokens")
    if max(lengths, default=0) > block_table.shape[1] * page:
        raise InputError("paged_attention: a sequence is longer than its row of the block table")
    kept = [index for index, count in enumerate(counts) if count]
    needed = torch.tensor([-(-lengths[index] // page) for index in kept], dtype=torch.int32)
    bounds = torch.zeros(len(kept) + 1, dtype=torch.int32)
    torch.cumsum(needed, 0, dtype=torch.int32, out=bounds[1:])
    device = block_table.device
    column = torch.arange(block_table.shape[1], device=device)
    own = block_table[torch.tensor(kept, dtype=torch.long).to(device)]
    return PageIndices(
        rows=torch.tensor([*(starts[index] for index in kept), rows], dtype=torch.int32),
        bounds=bounds,
        pages=own[column < needed.to(device)[:, None]].int(),
        last=torch.tensor([(lengths[index] - 1) % page + 1 for index in kept], dtype=torch.int32),
    )


class Attention:
    """`paged_attention` of one caller on one device: a wrapper of FlashInfer's, its workspace and its plan. Not for two
    threads at once.

    Decode steps, appended spans and prefill take the same wrapper: FlashInfer's decode wrapper with tensor cores runs
    the same kernels. The layers of a forward pass share one plan, recognised by the very tensors it was made of, which
    must not be changed in place between calls.
    """

    def __init__(self, device: torch.device) -> None:
        import flashinfer

        self.device = device
        workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._wrapper: Any = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        self._batch: tuple[Tensor, Tensor, Tensor] | None = None
        self._layer: tuple[object, ...] = ()

    def __call__(
        self,
        q: Tensor,
        kv_layer: Tensor,
        block_table: Tensor,
        cu_q: Tensor,
        kv_len: Tensor,
        scale: float,
        window: int = 0,
    ) -> Tensor:
        """As `atts_engine.ops.paged_attention`; window: keys that a row sees, its own included, 0 for all."""
        check_attention(q, kv_layer)
        if not q.shape[0]:
            return torch.empty_like(q)
        batch, layer = self._batch, (q.shape[1:], q.dtype, kv_layer.shape[2:], scale, window)
        same = batch is not None and batch[0] is block_table and batch[1] is cu_q and batch[2] is kv_len
        if not same or layer != self._layer:
            # Of no use if planning fails half way.
            self._batch = None
            self._plan(q, kv_layer, page_indices(block_table, cu_q, kv_len, kv_layer.shape[2], len(q)), scale, window)
            self._batch, self._layer = (block_table, cu_q, kv_len), layer
        return self._wrapper.run(q.contiguous(), (kv_layer[0], kv_layer[1]))

    def _plan(self, q: Tensor, kv_layer: Tensor, indices: PageIndices, scale: float, window: int) -> None:
        self._wrapper.plan(
            qo_indptr=indices.rows,
            paged_kv_indptr=indices.bounds,
            paged_kv_indices=indices.pages,
            paged_kv_last_page_len=indices.last,
            num_qo_heads=q.shape[1],
            num_kv_heads=kv_layer.shape[3],
            head_dim_qk=q.shape[2],
            page_size=kv_layer.shape[2],
            causal=True,
            sm_scale=scale,
            window_left=window - 1,  # keys before the row's own; -1: all
            q_data_type=q.dtype,
            kv_data_type=kv_layer.dtype,
        )


def check_attention(q: Tensor, kv_layer: Tensor) -> None:
    """Raises InputError where FlashInfer has no attention kernel for q[N, Hq, D] and kv_layer[2, P, page, Hkv, D]."""
    if q.dtype not in _DTYPES or kv_layer.dtype != q.dtype or q.shape[2] not in HEAD_DIMS:
        raise InputError(
            f"paged_attention: FlashInfer takes fp16 or bf16 in q and cache alike and heads of {HEAD_DIMS}, not "
            f"{q.dtype}, {kv_layer.dtype} and {q.shape[2]}: use('triton')"
        )


def kv_append(k: Tensor, v: Tensor, kv_layer: Tensor, slots: Tensor) -> None:
    """As `atts_engine.ops.kv_append`, for a cache of fp16 or bf16 and heads of `HEAD_DIMS`; nothing is read on the
    host.

    Every slot must be one of the cache's: where another is written to is not checked. FlashInfer appends to sequences;
    here the whole cache is one, whose pages are in order and whose positions are the slots.
    """
    import flashinfer

    check_append(kv_layer)
    rows, (pages, page), device = len(slots), kv_layer.shape[1:3], kv_layer.device
    if not rows:
        return
    flashinfer.append_paged_kv_cache(
        k.to(kv_layer.dtype).contiguous(),
        v.to(kv_layer.dtype).contiguous(),
        batch_indices=torch.zeros(rows, dtype=torch.int32, device=device),
        positions=slots.int(),
        paged_kv_cache=(kv_layer[0], kv_layer[1]),
        kv_indices=torch.arange(pages, dtype=torch.int32, device=device),
        kv_indptr=torch.arange(0, pages + 1, pages, dtype=torch.int32, device=device),
        kv_last_page_len=torch.full((1,), page, dtype=torch.int32, device=device),
        kv_layout="NHD",
    )


def check_append(kv_layer: Tensor) -> None:
    """Raises InputError where FlashInfer cannot append to kv_layer[2, P, page, Hkv, D]."""
    if kv_layer.dtype not in _DTYPES or kv_layer.shape[4] not in HEAD_DIMS:
        raise InputError(
            f"kv_append: FlashInfer takes a cache of fp16 or bf16 and heads of {HEAD_DIMS}, not {kv_layer.dtype} and "
            f"{kv_layer.shape[4]}: use('triton')"
        )
    if kv_layer.shape[1] * kv_layer.shape[2] > 1 << 31:
        raise InputError(f"kv_append: FlashInfer counts slots in int32, not {kv_layer.shape[1:3].numel()} of them")
