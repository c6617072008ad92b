"""Which implementation of an op runs. Decided once per op and device, shown by `atts doctor`, forced by `use`."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache

import torch

from atts_engine.errors import InputError
from atts_engine.ops import native

REFERENCE = "reference"
TRITON = "triton"
NATIVE = "native-bf16"
"""csrc/ on the CPU, for tensors of bfloat16; others run the reference."""
OPS = (
    "add_rms_norm",
    "gate",
    "kv_append",
    "kv_copy_pages",
    "kv_swap",
    "linear",
    "paged_attention",
    "rms_norm",
    "rope",
    "sample",
    "score_logits",
    "score_tokens",
    "silu_mul",
    "span_mean",
)
_HOST_READERS = frozenset({"gate", "paged_attention", "sample", "span_mean"})
"""Ops whose reference reads tensors on the host."""
TRITON_OPS = frozenset({"gate", "paged_attention", "score_tokens"})
NATIVE_OPS = frozenset(
    {"add_rms_norm", "kv_append", "linear", "paged_attention", "rms_norm", "rope", "sample", "score_tokens", "silu_mul"}
)
_PRODUCTS = frozenset({"linear", "score_tokens"})
"""Native ops that a CPU with bfloat16 instructions leaves to torch."""


class _Selection:
    """The implementation that `use` forces; None leaves the choice to the device. Lanes run in threads of their own
    and must all see it, so it belongs to the process and not to a context."""

    forced: str | None = None


@cache
def _triton_devices() -> frozenset[str]:
    if importlib.util.find_spec("triton") is None:
        return frozenset()
    if os.environ.get("TRITON_INTERPRET") == "1":
        return frozenset({"cpu", "cuda"})
    return frozenset({"cuda"}) if torch.cuda.is_available() else frozenset()


def _has_triton(op: str, device_type: str) -> bool:
    return op in TRITON_OPS and device_type in _triton_devices()


def _has_native(op: str) -> bool:
    return op in NATIVE_OPS and native.library() is not None


def runs_native(op: str, x: torch.Tensor) -> bool:
    """Whether op on x is the native kernel's: bfloat16, and the kernel is chosen."""
    return x.dtype == torch.bfloat16 and chosen(op, x.device) == NATIVE


def available() -> dict[str, list[str]]:
    """Implementations of every op that this machine can run, the reference first."""
    return {
        op: [
            REFERENCE,
            *([TRITON] if op in TRITON_OPS and _triton_devices() else []),
            *([NATIVE] if _has_native(op) else []),
        ]
        for op in OPS
    }


def chosen(op: str, device: torch.device | str) -> str:
    """The implementation of op that runs for tensors on device: "reference", "triton" or "native-bf16".

    An op without a Triton kernel runs its reference under `use("triton")` too; one that has a kernel which cannot run
    on that device raises InputError instead of falling back. So with "native-bf16", which is chosen by itself on a CPU,
    for products on one that cannot multiply bfloat16.
    """
    if op not in OPS:
        raise InputError(f"no op is named {op!r}; there are {', '.join(OPS)}")
    device_type = device.type if isinstance(device, torch.device) else torch.device(device).type
    forced = _Selection.forced
    if forced is None:
        if device_type == "cpu":
            return NATIVE if _has_native(op) and not (op in _PRODUCTS and native.multiplies_bf16()) else REFERENCE
        return TRITON if device_type == "cuda" and _has_triton(op, "cuda") else REFERENCE
    if forced == NATIVE:
        if op in NATIVE_OPS and device_type != "cpu":
            raise InputError(f"the native kernel of {op} runs on the CPU, not on {device_type}: use('reference')")
        return NATIVE if op in NATIVE_OPS else REFERENCE
    if forced == TRITON and op in TRITON_OPS and not _has_triton(op, device_type):
        raise InputError(
            f"the Triton kernel of {op} cannot run on {device_type}: use a cuda device or use('reference')"
        )
    return TRITON if forced == TRITON and op in TRITON_OPS else REFERENCE


def capturable(op: str, device: torch.device | str) -> bool:
    """Whether op, as it runs on device now, can be captured in a CUDA graph: on a CUDA device, and all of it enqueued
    without the host reading a tensor."""
    kind = device.type if isinstance(device, torch.device) else torch.device(device).type
    return kind == "cuda" and (chosen(op, device) != REFERENCE or op not in _HOST_READERS)


def use(impl: str | None) -> AbstractContextManager[None]:
    """Force "reference", "triton" or "native-bf16" from here on, or leave the choice to the device again (None).

    Also a context manager that restores what was set before. Raises InputError where this machine cannot run it.
    """
    if impl not in (None, REFERENCE, TRITON, NATIVE):
        raise InputError(f"an implementation is '{REFERENCE}', '{TRITON}' or '{NATIVE}', not {impl!r}")
    if impl == NATIVE and native.library() is None:
        raise InputError(
            "csrc/ was not built: install CMake and a C++ compiler, then pip install --no-build-isolation -e ."
        )
    if impl == TRITON and not _triton_devices():
        raise InputError("Triton kernels need a CUDA device and triton: pip install 'atts-engine[gpu]'")
    before, _Selection.forced = _Selection.forced, impl

    @contextmanager
    def restored() -> Iterator[None]:
        try:
            yield
        finally:
            _Selection.forced = before

    return restored()
