"""The CUDA kernels of csrc/ through apache-tvm-ffi: tensors go by DLPack and launches to torch's current stream, and no
header of torch is in the module, so one build serves every torch.

Each function below is the CUDA form of the op of its name; the op has checked its inputs. Nothing is loaded before the
first call, so that a machine without a GPU, or without apache-tvm-ffi, imports this like any other.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from atts_engine.errors import InputError


def built() -> Path | None:
    """The module that the installation built; None where nvcc or apache-tvm-ffi was not there for it."""
    return next(iter(sorted(Path(__file__).parent.glob("_libatts_cuda.*"))), None)


@cache
def lacking() -> dict[str, str]:
    """What this machine lacks for the CUDA kernels: in two words each and as a thing; empty where they run."""
    found = {}
    if built() is None:
        found["not built"] = "nvcc and apache-tvm-ffi at installation (pip install -v says which of them it missed)"
    if importlib.util.find_spec("tvm_ffi") is None:
        found["not installed"] = "the apache-tvm-ffi wheel (pip install apache-tvm-ffi)"
    if not torch.cuda.is_available():
        found["no GPU"] = "a CUDA device"
    return found


@cache
def _module() -> Any:
    import tvm_ffi

    path = built()
    assert path is not None
    return tvm_ffi.load_module(str(path))


@cache
def _function(name: str) -> Callable[..., Any]:
    try:
        return getattr(_module(), name)
    except AttributeError as error:
        raise InputError(f"{built()} was built from other sources; install again") from error


def _call(name: str, *args: object) -> Any:
    """Raises InputError for what the kernel refuses: a stride, an alignment, memory of another device."""
    try:
        return _function(name)(*args)
    except ValueError as error:
        raise InputError(str(error)) from error


class _Workspaces:
    """Device memory that kernels leave as they found it, zero, one piece for each op and stream: calls of one stream
    follow each other, those of two streams do not."""

    held: ClassVar[dict[tuple[str, int, int], Tensor]] = {}

    @classmethod
    def of(cls, op: str, like: Tensor, size: int) -> Tensor | None:
        if size == 0:
            return None
        if torch.cuda.is_current_stream_capturing():
            # A graph may be replayed beside calls on any stream, so it gets memory of its own, zeroed in the graph.
            return torch.zeros(size, dtype=torch.uint8, device=like.device)
        place = op, like.get_device(), torch.cuda.current_stream(like.device).cuda_stream
        found = cls.held.get(place)
        if found is None or found.numel() < size:
            found = cls.held[place] = torch.zeros(size, dtype=torch.uint8, device=like.device)
        return found


def gate(
    score: Tensor, key: Tensor, ring: Tensor, size: Tensor, head: Tensor, level: Tensor, u: Tensor, insert: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    score, key, level, u, insert = (t.contiguous() for t in (score, key, level, u, insert))
    greater, ties, n = (torch.empty_like(key) for _ in range(3))
    takeover, p = torch.empty_like(insert), torch.empty_like(score, dtype=torch.float64)
    workspace = _Workspaces.of("gate", score, _call("gate_workspace", score, ring))
    _call("gate", score, key, ring, size, head, level, u, insert, greater, ties, n, takeover, p, workspace)
    return greater, ties, n, takeover, p


def span_mean(logprob: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """A span that is empty, or has a bound outside logprob, gives NaN."""
    spans = cu_seqlens.shape[0] - 1
    score = logprob.new_empty(spans)
    total = logprob.new_empty(spans, dtype=torch.float64)
    _call("span_mean", logprob.contiguous(), cu_seqlens.to(torch.int64).contiguous(), score, total)
    return score, total


def score_logits(logits: Tensor, ids: Tensor, softcap: float) -> Tensor:
    """An id outside the vocabulary gives NaN. There is no softcap in the kernel."""
    if softcap:
        raise InputError("score_logits: the CUDA kernel of csrc/ has no softcap: use('triton') or use('reference')")
    logits = _rows_without_gaps(logits)
    out = logits.new_empty(logits.shape[0], dtype=torch.float32)
    workspace = _Workspaces.of("score_logits", logits, _call("score_logits_workspace", logits))
    _call("score_logits", logits, ids.contiguous(), out, workspace)
    return out


def kv_append(k: Tensor, v: Tensor, kv_layer: Tensor, slots: Tensor) -> None:
    """A slot outside the cache is not written."""
    k, v = (_rows_without_gaps(t.to(kv_layer.dtype)) for t in (k, v))
    _call("kv_append", k, v, kv_layer, slots.contiguous())


def rope_kv_append(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, kv_layer: Tensor, slots: Tensor
) -> Tensor:
    """q, k and v have the dtype of the cache. For a slot outside the cache nothing is written, of its query neither."""
    q, k, v = (_rows_without_gaps(t) for t in (q, k, v))
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    _call("rope_kv_append", q, k, v, cos.contiguous(), sin.contiguous(), kv_layer, slots.contiguous(), out)
    return out


def kv_copy_pages(kv: Tensor, src: Tensor, dst: Tensor) -> None:
    """Copies run in no order: no page may be both a source and a destination."""
    _call("kv_copy_pages", kv, src.contiguous(), dst.contiguous())


def kv_gather(kv: Tensor, pages: Tensor) -> Tensor:
    layers, two, _, *rest = kv.shape
    out = kv.new_empty((pages.shape[0], layers, two, *rest))
    _call("kv_gather", kv, out, pages.contiguous(), False)
    return out


def kv_scatter(staged: Tensor, kv: Tensor, pages: Tensor) -> None:
    _call("kv_gather", kv, staged.contiguous(), pages.contiguous(), True)


def kv_swap(kv: Tensor, host: Tensor, pages: Tensor, slots: Tensor, to_host: bool) -> None:
    """The driver copies page by page and takes page numbers on the host: with `pages` on a GPU this waits for them."""
    _call("kv_swap", kv, host, pages.cpu().contiguous(), slots.contiguous(), to_host)


def _rows_without_gaps(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
