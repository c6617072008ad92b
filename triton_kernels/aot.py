"""Compile every variant that can be dispatched, ahead of time and without a GPU: `python -m atts_triton.aot`.

Prints registers, shared memory and local memory of each kernel for each architecture. Ends with status 1 when one
spills or wants more shared memory than a block can have there, so that neither is first seen on a serving machine.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that one block can ask for, by compute capability (CUDA C++ Programming Guide, table 30)."""
_TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
_HIDDEN = (32, 4096, 1008, 4100)
"""Hidden sizes, one for each way that rows divide: less than a tile, whole tiles, whole vectors only, nothing."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One kernel with all that its code depends on."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]
    multiples_of_16: frozenset[str] = frozenset()
    """Integer arguments that the just-in-time compiler would see to be multiples of 16."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What one compiled kernel takes: registers a thread, shared bytes a block, local (spill and stack) bytes a
    thread."""

    registers: int
    shared: int
    local: int


def variants() -> Iterator[Variant]:
    """Every distinct kernel that the wrappers launch."""
    yield from _score_variants()
    gate = import_module("atts_triton.gate")
    pointers = {
        "score_ptr": "*fp32", "key_ptr": "*i64", "level_ptr": "*i64", "u_ptr": "*i64", "insert_ptr": "*u8",
        "ring_ptr": "*fp32", "size_ptr": "*i64", "head_ptr": "*i64", "greater_ptr": "*i64", "ties_ptr": "*i64",
        "n_ptr": "*i64", "takeover_ptr": "*u8", "p_ptr": "*fp64", "B": "i32", "C": "i32",
    }  # fmt: skip
    yield Variant(
        "gate",
        gate._gate_kernel,
        pointers,
        {"BLOCK_B": gate._BLOCK_B, "BLOCK_C": gate._BLOCK_C},
        {"num_warps": gate._NUM_WARPS, "enable_fp_fusion": False},
    )


def _score_variants() -> Iterator[Variant]:
    score = import_module("atts_triton.score_tokens")
    partials = {"peak_ptr": "*fp32", "total_ptr": "*fp32", "target_ptr": "*fp32"}
    for dtype, pointer in _TYPES.items():
        for hidden in _HIDDEN:
            sizes = score.tiling(1 << 17, hidden, dtype)
            signature = {"hidden_ptr": pointer, "weight_ptr": pointer, "ids_ptr": "*i64", **partials}
            signature |= dict.fromkeys(("T", "V", "H", "hidden_stride", "weight_stride", "tiles_per_split"), "i32")
            yield Variant(
                f"score_tokens split {pointer[1:]} H={hidden}",
                score._split_kernel,
                signature,
                {
                    "BLOCK_T": sizes.block_t,
                    "BLOCK_V": sizes.block_v,
                    "BLOCK_H": sizes.block_h,
                    "EVEN_H": hidden % sizes.block_h == 0,
                },
                {"num_warps": sizes.num_warps, "num_stages": sizes.num_stages, "enable_fp_fusion": True},
                frozenset() if hidden % 16 else frozenset({"H", "hidden_stride", "weight_stride"}),
            )
    signature = {**partials, "ids_ptr": "*i64", "logprob_ptr": "*fp32"}
    signature |= dict.fromkeys(("T", "V", "splits", "split_columns"), "i32")
    yield Variant(
        "score_tokens merge",
        score._merge_kernel,
        signature,
        {"BLOCK_T": score._MERGE_ROWS},
        {"num_warps": 2, "enable_fp_fusion": True},
    )


def compile_variant(variant: Variant, capability: int) -> Usage:
    """Compile for one compute capability (80, 90, 100), with 16-byte aligned pointers as torch allocates them."""
    signature = dict(variant.signature) | dict.fromkeys(variant.constants, "constexpr")
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(variant.kernel.arg_names)
        if signature[name].startswith("*") or name in variant.multiples_of_16
    }
    ordered = {name: signature[name] for name in variant.kernel.arg_names}
    source = ASTSource(variant.kernel, ordered, variant.constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=variant.options)
    return _usage(compiled.asm["cubin"], compiled.metadata.shared)


def _usage(cubin: bytes, shared: int) -> Usage:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run(
            [tool, "--dump-resource-usage", str(path)], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump did not name the resources of a kernel: {text.strip()!r}")
    registers, stack, _, local = map(int, found.groups())
    return Usage(registers, shared, stack + local)


def main(argv: list[str] | None = None) -> int:
    """Compile, print the table to stdout, return 1 where a kernel does not fit."""
    parser = argparse.ArgumentParser(prog="python -m atts_triton.aot", description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", type=int, action="append", choices=sorted(SHARED_LIMIT), help="default: all")
    arguments = parser.parse_args(argv)
    out = sys.stdout
    out.write(f"triton {triton.__version__}\n{'kernel':34} {'sm':>4} {'regs':>5} {'shared':>7} {'local':>6}\n")
    misfits = 0
    for variant in variants():
        for capability in arguments.arch or sorted(SHARED_LIMIT):
            usage = compile_variant(variant, capability)
            fits = not usage.local and usage.shared <= SHARED_LIMIT[capability]
            misfits += not fits
            out.write(
                f"{variant.name:34} {capability:>4} {usage.registers:>5} {usage.shared:>7} {usage.local:>6}"
                f"{'' if fits else '  DOES NOT FIT'}\n"
            )
            out.flush()
    out.write(f"{misfits} do not fit\n" if misfits else "all fit\n")
    return 1 if misfits else 0


if __name__ == "__main__":
    sys.exit(main())
