"""Which implementation of an op runs. Decided once per op and device, shown by `atts doctor`, forced by `use`."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import NamedTuple

import torch

from atts_engine.errors import InputError
from atts_engine.ops import checks, cuda, flash, native

REFERENCE = "reference"
TRITON = "triton"
NATIVE = "native"
"""csrc/ on the CPU, for tensors of `native.DTYPES`; others run the reference."""
FLASHINFER = "flashinfer"
"""The ops of `flash.OPS` on a CUDA device, never chosen by itself."""
CUDA = "cuda"
"""csrc/ on a GPU. Not chosen by itself as long as no measurement says where it is the quicker one."""
OPS = (
    "add_rms_norm",
    "gate",
    "kv_append",
    "kv_copy_pages",
    "kv_gather",
    "kv_scatter",
    "kv_slots",
    "kv_swap",
    "linear",
    "paged_attention",
    "rms_norm",
    "rope",
    "rope_kv_append",
    "sample",
    "score_gate",
    "score_logits",
    "score_tokens",
    "silu_mul",
    "span_mean",
    "token_confidence",
)
_HOST_READERS = frozenset({"gate", "paged_attention", "sample", "score_gate", "span_mean"})
"""Ops whose reference, and whose plan in FlashInfer, reads tensors on the host."""
TRITON_OPS = frozenset(
    {
        "add_rms_norm",
        "gate",
        "kv_append",
        "kv_copy_pages",
        "kv_gather",
        "kv_scatter",
        "kv_slots",
        "paged_attention",
        "rms_norm",
        "rope",
        "rope_kv_append",
        "sample",
        "score_gate",
        "score_logits",
        "score_tokens",
        "silu_mul",
        "span_mean",
    }
)
NATIVE_OPS = frozenset(
    {
        "add_rms_norm",
        "gate",
        "kv_append",
        "linear",
        "paged_attention",
        "rms_norm",
        "rope",
        "sample",
        "score_logits",
        "score_tokens",
        "silu_mul",
        "span_mean",
    }
)
CUDA_OPS = frozenset(
    {
        "gate",
        "kv_append",
        "kv_copy_pages",
        "kv_gather",
        "kv_scatter",
        "kv_swap",
        "rope_kv_append",
        "score_logits",
        "span_mean",
    }
)
_PRODUCTS = frozenset({"linear", "score_tokens"})
"""Native ops that are left to torch where `native.products_are_torchs`."""
_DEFAULTS = {"cpu": NATIVE, "cuda": TRITON}
"""What a device's ops run by themselves where it can; the reference elsewhere."""


class Obstacle(NamedTuple):
    """Why an implementation cannot run: in two words for a table, and in a sentence for an error."""

    short: str
    sentence: str


@cache
def _triton_devices() -> frozenset[str]:
    if importlib.util.find_spec("triton") is None:
        return frozenset()
    if os.environ.get("TRITON_INTERPRET") == "1":
        return frozenset({"cpu", "cuda"})
    return frozenset({"cuda"}) if torch.cuda.is_available() else frozenset()


def _no_gpu(kernels: str, device_type: str) -> Obstacle | None:
    """What keeps a GPU's kernels from tensors of this device type."""
    if device_type != "cuda":
        return Obstacle("GPU only", f"{kernels} cannot run on {device_type}: use a cuda device or use('reference')")
    return None if torch.cuda.is_available() else Obstacle("no GPU", f"{kernels} need a CUDA device")


def _no_triton(device_type: str) -> Obstacle | None:
    if importlib.util.find_spec("triton") is None:
        return Obstacle("not installed", "Triton kernels need triton: pip install 'atts-engine[gpu]'")
    if device_type in _triton_devices():
        return None
    return _no_gpu("Triton kernels", device_type) or Obstacle("no GPU", "Triton kernels need a CUDA device")


def _no_flashinfer(device_type: str) -> Obstacle | None:
    lacking = flash.lacking()
    if lacking is not None:
        return Obstacle("not installed", lacking)
    return _no_gpu("FlashInfer's kernels", device_type)


def _no_native(device_type: str) -> Obstacle | None:
    if device_type != "cpu":
        return Obstacle("CPU only", f"native kernels run on the CPU, not on {device_type}: use('reference')")
    if native.library() is None:
        sentence = "csrc/ was not built: install CMake and a C++ compiler, then pip install --no-build-isolation -e ."
        return Obstacle("not built", sentence)
    return None


def _no_cuda(device_type: str) -> Obstacle | None:
    kernels = "the CUDA kernels of csrc/"
    if device_type != "cuda":
        return Obstacle("GPU only", f"{kernels} cannot run on {device_type}: use a cuda device or use('reference')")
    lacking = cuda.lacking()
    return Obstacle(next(iter(lacking)), f"{kernels} lack {'; '.join(lacking.values())}") if lacking else None


_MACHINE: dict[str, Callable[[str], Obstacle | None]] = {
    REFERENCE: lambda device_type: None,
    TRITON: _no_triton,
    NATIVE: _no_native,
    FLASHINFER: _no_flashinfer,
    CUDA: _no_cuda,
}
"""What this machine lacks for each implementation, by device type."""
IMPLEMENTATIONS = tuple(_MACHINE)


def _ops_of(impl: str) -> frozenset[str]:
    kernels = {TRITON: TRITON_OPS, NATIVE: NATIVE_OPS, FLASHINFER: flash.OPS, CUDA: CUDA_OPS}
    return kernels[impl] if impl in kernels else frozenset(OPS)


class _Selection:
    """The implementation that `use` forces (None leaves the choice to the device), those that a tuning table prefers on
    a GPU, by op, and what was decided under both. Lanes run in threads of their own and must all see it, so it belongs
    to the process and not to a context."""

    forced: str | None = None
    preferred: Mapping[str, str] = {}
    decided: dict[tuple[str, torch.device | str], str] = {}

    @classmethod
    def forget(cls) -> None:
        # A dict of its own for each choice, put in place after it: a thread that decides meanwhile files what it found
        # under the old choice in the old dict.
        cls.decided = {}

    @classmethod
    def force(cls, impl: str | None) -> None:
        cls.forced = impl
        cls.forget()


def obstacle(op: str, impl: str, device: torch.device | str) -> Obstacle | None:
    """Why `impl` of op cannot run for tensors on device; None where it can."""
    if op not in OPS:
        raise InputError(f"no op is named {op!r}; there are {', '.join(OPS)}")
    if op not in _ops_of(impl):
        return Obstacle("no kernel", f"{op} has no {impl} kernel")
    return _MACHINE[impl](torch.device(device).type)


def available() -> dict[str, list[str]]:
    """Implementations of every op that this machine can run, the reference first."""
    return {
        op: [impl for impl in IMPLEMENTATIONS if any(obstacle(op, impl, kind) is None for kind in ("cpu", "cuda"))]
        for op in OPS
    }


def chosen(op: str, device: torch.device | str) -> str:
    """The implementation of op that runs for tensors on device, one of `IMPLEMENTATIONS`.

    An op without a kernel of the forced implementation is left to the device's own choice; one that has a kernel which
    cannot run on that device raises InputError instead of falling back. "native" is chosen by itself on a CPU;
    `runs_native` says which tensors it takes.
    """
    decided = _Selection.decided
    found = decided.get((op, device))
    if found is None:
        found = decided[op, device] = _decide(op, device)
    return found


def _decide(op: str, device: torch.device | str) -> str:
    forced = _Selection.forced
    if forced is not None and op in _ops_of(forced):
        lacking = obstacle(op, forced, device)
        if lacking is not None:
            raise InputError(f"{op}: {lacking.sentence}")
        return forced
    kind = torch.device(device).type
    if kind == "cuda" and op in _Selection.preferred:
        preferred = _Selection.preferred[op]
        lacking = obstacle(op, preferred, device)
        if lacking is not None:
            raise InputError(f"{op}: the tuning table asks for {preferred}: {lacking.sentence}")
        return preferred
    impl = _DEFAULTS.get(kind, REFERENCE)
    return impl if obstacle(op, impl, device) is None else REFERENCE


def runs_native(op: str, device: torch.device | str, dtype: torch.dtype) -> bool:
    """Whether op on tensors of dtype on device is the native kernel's: it is chosen, and has one for the dtype.
    Products are left to torch, unless they are asked for, where torch's own are faster (`products_are_torchs`)."""
    if dtype not in native.DTYPES or chosen(op, device) != NATIVE:
        return False
    return op not in _PRODUCTS or _Selection.forced == NATIVE or not native.products_are_torchs(dtype)


def packing_obstacle(device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Why a model in dtype on device gains nothing from packed weights, as a clause for an error; None where it does:
    bfloat16 on a CPU with AVX512-BF16, the only one they were measured on, whose products csrc/ runs."""
    kind = torch.device(device).type
    if kind != "cpu" or dtype is not torch.bfloat16:
        return f"they are for bfloat16 on the CPU, not for {str(dtype).removeprefix('torch.')} on {kind}"
    best, isa = native.ISAS[0], native.isa()
    if isa != best:
        return f"csrc/ runs {isa} kernels here, and they are for {best}" if isa else "csrc/ was not built"
    if runs_native("linear", device, dtype):
        return None
    found = chosen("linear", device)
    found = "torch's own products" if found == NATIVE else found
    return f"linear runs {found} here, and only {NATIVE} reads them"


def capturable(op: str, device: torch.device | str) -> bool:
    """Whether op, as it runs on device now, can be captured in a CUDA graph: on a CUDA device, and all of it enqueued
    without the host reading a tensor, as it does inside `checked()`."""
    enqueued = chosen(op, device) not in (REFERENCE, FLASHINFER) or op not in _HOST_READERS
    # kv_swap goes by slots that the host holds, whichever implementation runs: a replay would copy to the same ones.
    enqueued = enqueued and op != "kv_swap"
    return torch.device(device).type == "cuda" and enqueued and not checks.in_force()


def prefer(implementations: Mapping[str, str]) -> None:
    """By op, what a GPU's tensors run where nothing is forced: a tuning table's choice. {}: the defaults again."""
    _Selection.preferred = dict(implementations)
    _Selection.forget()


def use(impl: str | None) -> AbstractContextManager[None]:
    """Force one of `IMPLEMENTATIONS` from here on, or leave the choice to the device again (None).

    Also a context manager that restores what was set before. Raises InputError where this machine cannot run it.
    """
    if impl is not None:
        if impl not in IMPLEMENTATIONS:
            raise InputError(f"an implementation is one of {', '.join(IMPLEMENTATIONS)}, not {impl!r}")
        lacking = [_MACHINE[impl](kind) for kind in ("cpu", "cuda")]
        if None not in lacking:
            needed = next(found for found in lacking if found and found.short not in ("GPU only", "CPU only"))
            raise InputError(needed.sentence)
        if not _ops_of(impl):
            raise InputError(f"no op has a {impl} kernel")
    before = _Selection.forced
    _Selection.force(impl)

    @contextmanager
    def restored() -> Iterator[None]:
        try:
            yield
        finally:
            _Selection.force(before)

    return restored()
