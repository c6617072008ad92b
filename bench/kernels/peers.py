"""Other people's kernels for the same work, each with the exact call that its project documents.

A peer is asked for by package; where the package, or the part of it, is not there, it is left out and the output says
so. The set-up of a call (plans, layouts that a peer wants and we do not) is not timed.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernels.devices import Call

Build = Callable[..., Call]
"""Arguments of the op -> the call that is timed."""


@dataclass(frozen=True, slots=True)
class Peer:
    """sign: what its result must be multiplied by to be ours; 0 where it cannot be compared element by element.
    cuda: whether it needs a GPU. less: it does only part of the work, so it is shown and not compared with."""

    name: str
    package: str
    build: Build
    sign: int = 1
    cuda: bool = True
    less: bool = False


def why_absent(peer: Peer, device: torch.device) -> str | None:
    """Why a peer does not run here, or None where it should."""
    if peer.cuda and device.type != "cuda":
        return "needs a CUDA device"
    return None if importlib.util.find_spec(peer.package) else f"{peer.package} is not installed"


# Scores ---------------------------------------------------------------------------------------------------------------


def _torch_linear_cross_entropy(hidden: Tensor, weight: Tensor, ids: Tensor) -> Call:
    fused = F.linear_cross_entropy  # torch 2.13
    return lambda: fused(hidden, weight, ids, reduction="none")


def _torch_materialised(hidden: Tensor, weight: Tensor, ids: Tensor) -> Call:
    return lambda: F.cross_entropy(F.linear(hidden, weight), ids, reduction="none")


def _cce(hidden: Tensor, weight: Tensor, ids: Tensor) -> Call:
    fused = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return lambda: fused(hidden, weight, ids, reduction="none")


def _liger_score(hidden: Tensor, weight: Tensor, ids: Tensor) -> Call:
    # Without LIGER_SCALED_CE_SM90_VALIDATE_TARGETS=0 in the environment it waits for the device to look at the ids.
    module = importlib.import_module("liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90")
    function = module.LigerFusedScaledCrossEntropySM90Function
    return lambda: function.apply(hidden, weight, ids)


def _quack_score(hidden: Tensor, weight: Tensor, ids: Tensor) -> Call:
    fused = importlib.import_module("quack.epilogue.library").lse_target_epi
    target = ids.int()

    def call() -> Tensor:
        found = fused(hidden, weight.mT, store_d=False, target=target, tuned=False)
        return found["lse"] - found["target_logit"]

    return call


def _torch_cross_entropy(logits: Tensor, ids: Tensor) -> Call:
    return lambda: F.cross_entropy(logits, ids, reduction="none")


def _quack_cross_entropy(logits: Tensor, ids: Tensor) -> Call:
    forward = importlib.import_module("quack.cross_entropy").cross_entropy_fwd
    return lambda: forward(logits, ids, return_lse=True)[0]


def _vllm_logprobs(logits: Tensor, ids: Tensor) -> Call:
    function = importlib.import_module("vllm.v1.worker.gpu.sample.logprob").compute_token_logprobs
    column = ids[:, None]
    return lambda: function(logits, column)[:, 0]


def _segment_reduce(logprob: Tensor, cu_seqlens: Tensor) -> Call:
    return lambda: torch.segment_reduce(logprob, "mean", offsets=cu_seqlens)


def _searchsorted(score: Tensor, key: Tensor, ring: Tensor, *_: Tensor) -> Call:
    """The count alone, in rings that somebody has sorted: no test, no insertion."""
    ordered, wanted = ring.sort(1).values[key], score[:, None]
    return lambda: torch.searchsorted(ordered, wanted)


# Dense ----------------------------------------------------------------------------------------------------------------


def _torch_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Call:
    return lambda: F.rms_norm(x, weight.shape, weight, eps)


def _flashinfer_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Call:
    norm = importlib.import_module("flashinfer.norm").rmsnorm
    return lambda: norm(x, weight, eps)


def _liger_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Call:
    function = importlib.import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction
    return lambda: function.apply(x, weight, eps)


def _quack_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Call:
    norm = importlib.import_module("quack").rmsnorm
    return lambda: norm(x, weight, eps=eps)


def _torch_add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Call:
    return lambda: F.rms_norm(x + delta, weight.shape, weight, eps)


def _flashinfer_add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Call:
    norm = importlib.import_module("flashinfer.norm").fused_add_rmsnorm
    own = delta.clone(), x.clone()  # it writes to both
    return lambda: norm(*own, weight, eps)


def _torch_silu_mul(gate: Tensor, up: Tensor) -> Call:
    return lambda: F.silu(gate) * up


def _flashinfer_silu_mul(gate: Tensor, up: Tensor) -> Call:
    function = importlib.import_module("flashinfer.activation").silu_and_mul
    both = torch.cat((gate, up), 1)
    return lambda: function(both)


def _liger_silu_mul(gate: Tensor, up: Tensor) -> Call:
    function = importlib.import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction
    own = gate.contiguous(), up.contiguous()
    return lambda: function.apply(*own)


def _torch_linear(x: Tensor, weight: Tensor) -> Call:
    return lambda: F.linear(x, weight)


# Paging, attention, sampling ------------------------------------------------------------------------------------------


def _vllm_append(k: Tensor, v: Tensor, kv_layer: Tensor, slots: Tensor) -> Call:
    write = importlib.import_module("vllm._custom_ops").reshape_and_cache_flash
    one = torch.ones((), device=k.device)
    return lambda: write(k, v, kv_layer[0], kv_layer[1], slots, "auto", one, one)


def _flashinfer_append(k: Tensor, v: Tensor, kv_layer: Tensor, slots: Tensor) -> Call:
    """The same number of tokens at the start of one sequence's pages, since it takes positions and not slots."""
    append = importlib.import_module("flashinfer").append_paged_kv_cache
    rows, page, device = k.shape[0], kv_layer.shape[2], k.device
    pages = -(-rows // page)
    batch, positions = torch.zeros(rows, dtype=torch.int32, device=device), torch.arange(rows, device=device).int()
    indices, indptr = torch.arange(pages, device=device).int(), torch.tensor([0, pages], device=device).int()
    last = torch.tensor([rows - (pages - 1) * page], device=device).int()
    cache = kv_layer[0], kv_layer[1]
    return lambda: append(k, v, batch, positions, cache, indices, indptr, last, "NHD")


def _torch_sdpa(q: Tensor, kv_layer: Tensor, table: Tensor, cu_q: Tensor, kv_len: Tensor, scale: float) -> Call:
    """Over keys and values that lie in one piece for each sequence: no paging."""
    batch, length = table.shape[0], int(kv_len[0])
    new = q.shape[0] // batch
    k, v = (kv_layer[i][table.long()].flatten(1, 2)[:, :length].transpose(1, 2).contiguous() for i in range(2))
    own = q.view(batch, new, *q.shape[1:]).transpose(1, 2).contiguous()
    ones = torch.ones(new, length, dtype=torch.bool, device=q.device)
    mask = ones.tril(length - new) if new > 1 else None
    attend = F.scaled_dot_product_attention
    return lambda: attend(own, k, v, mask, scale=scale, enable_gqa=True)


def _flashinfer_attention(
    q: Tensor, kv_layer: Tensor, table: Tensor, cu_q: Tensor, kv_len: Tensor, scale: float, backend: str = "auto"
) -> Call:
    module = importlib.import_module("flashinfer")
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=q.device)
    page, kv_heads, batch = kv_layer.shape[2], kv_layer.shape[3], table.shape[0]
    indptr = torch.arange(batch + 1, device=q.device, dtype=torch.int32) * table.shape[1]
    last = (kv_len - (table.shape[1] - 1) * page).int()
    sizes = q.shape[1], kv_heads, q.shape[2]
    cache = kv_layer[0], kv_layer[1]
    if q.shape[0] == batch:
        wrapper = module.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True, backend=backend)
        wrapper.plan(indptr, table.flatten(), last, *sizes, page, q_data_type=q.dtype, sm_scale=scale)
    else:
        wrapper = module.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend=backend)
        kinds: dict[str, Any] = {"causal": True, "q_data_type": q.dtype, "sm_scale": scale}
        wrapper.plan(cu_q, indptr, table.flatten(), last, *sizes, page, **kinds)
    return lambda: wrapper.run(q, cache)


def _torch_multinomial(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, *_: Tensor) -> Call:
    _unfiltered(top_p)
    return lambda: torch.multinomial(torch.softmax(logits.float() / temperature[:, None], 1), 1)


def _flashinfer_sample(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, *_: Tensor) -> Call:
    module = importlib.import_module("flashinfer.sampling")
    if bool((top_p < 1).any()):
        return lambda: module.top_p_sampling_from_probs(
            torch.softmax(logits.float() / temperature[:, None], 1), top_p, deterministic=True
        )
    return lambda: module.sampling_from_logits(logits.float() / temperature[:, None])


def _unfiltered(top_p: Tensor) -> None:
    if bool((top_p < 1).any()):
        raise ValueError("it has no top_p")


PEERS: dict[str, Sequence[Peer]] = {
    "score_tokens": (
        Peer("torch linear_cross_entropy", "torch", _torch_linear_cross_entropy, -1, cuda=False),
        Peer("torch, with logits", "torch", _torch_materialised, -1, cuda=False),
        Peer("cut-cross-entropy", "cut_cross_entropy", _cce, -1),
        Peer("Liger sm90", "liger_kernel", _liger_score, -1),
        Peer("QuACK lse_target_epi", "quack", _quack_score, -1),
    ),
    "score_logits": (
        Peer("torch cross_entropy", "torch", _torch_cross_entropy, -1, cuda=False),
        Peer("QuACK cross_entropy", "quack", _quack_cross_entropy, -1),
        Peer("vLLM compute_token_logprobs", "vllm", _vllm_logprobs),
    ),
    "span_mean": (Peer("torch segment_reduce", "torch", _segment_reduce, -1, cuda=False),),
    "gate": (Peer("torch searchsorted, count only", "torch", _searchsorted, 0, cuda=False, less=True),),
    "linear": (Peer("torch linear", "torch", _torch_linear, cuda=False),),
    "rms_norm": (
        Peer("torch rms_norm", "torch", _torch_rms_norm, cuda=False),
        Peer("FlashInfer rmsnorm", "flashinfer", _flashinfer_rms_norm),
        Peer("Liger RMSNorm", "liger_kernel", _liger_rms_norm),
        Peer("QuACK rmsnorm", "quack", _quack_rms_norm),
    ),
    "add_rms_norm": (
        Peer("torch add, rms_norm", "torch", _torch_add_rms_norm, 0, cuda=False),
        Peer("FlashInfer fused_add_rmsnorm", "flashinfer", _flashinfer_add_rms_norm, 0),
    ),
    "silu_mul": (
        Peer("torch silu, mul", "torch", _torch_silu_mul, cuda=False),
        Peer("FlashInfer silu_and_mul", "flashinfer", _flashinfer_silu_mul),
        Peer("Liger SiLUMul", "liger_kernel", _liger_silu_mul),
    ),
    "kv_append": (
        Peer("vLLM reshape_and_cache_flash", "vllm", _vllm_append, 0),
        Peer("FlashInfer append_paged_kv_cache", "flashinfer", _flashinfer_append, 0),
    ),
    "paged_attention": (
        Peer("torch sdpa, not paged", "torch", _torch_sdpa, 0, cuda=False, less=True),
        Peer("FlashInfer", "flashinfer", _flashinfer_attention),
        # On Hopper "auto" means FlashAttention 3, whose tiles suit prefill, and whose sources need more headers.
        Peer("FlashInfer fa2", "flashinfer", partial(_flashinfer_attention, backend="fa2")),
    ),
    "sample": (
        Peer("torch softmax, multinomial", "torch", _torch_multinomial, 0, cuda=False),
        Peer("FlashInfer sampling", "flashinfer", _flashinfer_sample, 0),
    ),
}
"""Peers by op, in the order of the table."""
