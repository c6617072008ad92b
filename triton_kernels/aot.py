"""Compile every variant that can be dispatched, ahead of time and without a GPU: `python -m atts_triton.aot`.

Prints registers, shared memory and local memory of each kernel for each architecture. Ends with status 1 when one
spills or wants more shared memory than a block can have there, so that neither is first seen on a serving machine.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from atts_triton.variants import Variant

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that one block can ask for, by compute capability (CUDA C++ Programming Guide, table 30)."""
MODULES = (
    "gate",
    "paged_attention",
    "paging",
    "rows",
    "sample",
    "score_gate",
    "score_logits",
    "score_tokens",
    "span_mean",
)
"""Modules of kernels. Each has `variants()`."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What one compiled kernel takes: registers a thread, shared bytes a block, local (spill and stack) bytes a
    thread."""

    registers: int
    shared: int
    local: int


def variants(modules: Iterable[str] = MODULES) -> Iterator[Variant]:
    """Every distinct kernel that the wrappers launch: what `variants()` of each module gives."""
    for name in modules:
        yield from import_module(f"atts_triton.{name}").variants()


def compiled(variant: Variant, capability: int) -> CompiledKernel:
    """Code for one compute capability (80, 90, 100), with 16-byte aligned pointers as torch allocates them where
    the kernel looks at it."""
    signature = dict(variant.signature) | dict.fromkeys(variant.constants, "constexpr")
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(variant.kernel.arg_names)
        if (signature[name].startswith("*") and not variant.kernel.params[index].do_not_specialize_on_alignment)
        or name in variant.multiples_of_16
    }
    ordered = {name: signature[name] for name in variant.kernel.arg_names}
    source = ASTSource(variant.kernel, ordered, variant.constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=variant.options)


def compile_variant(variant: Variant, capability: int) -> Usage:
    """What the code of a variant takes there."""
    kernel = compiled(variant, capability)
    return _usage(kernel.asm["cubin"], kernel.metadata.shared)


@cache
def _of_module(name: str) -> tuple[Variant, ...]:
    return tuple(variants([name]))


def _compile(job: tuple[str, int, int]) -> Usage:
    """One job of a worker: module, place among its variants, compute capability. Kernels themselves cannot be sent."""
    module, index, capability = job
    return compile_variant(_of_module(module)[index], capability)


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
    parser.add_argument("--only", action="append", choices=MODULES, metavar="MODULE", help=f"of {', '.join(MODULES)}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="default: %(default)s")
    arguments = parser.parse_args(argv)
    jobs = [
        (module, index, capability)
        for module in arguments.only or MODULES
        for index, variant in enumerate(_of_module(module))
        for capability in arguments.arch or sorted(SHARED_LIMIT)
        if not variant.capabilities or capability in variant.capabilities
    ]
    out = sys.stdout
    out.write(f"triton {triton.__version__}\n{'kernel':40} {'sm':>4} {'regs':>5} {'shared':>7} {'local':>6}\n")
    misfits = 0
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for (module, index, capability), usage in zip(jobs, pool.map(_compile, jobs)):
            fits = not usage.local and usage.shared <= SHARED_LIMIT[capability]
            misfits += not fits
            out.write(
                f"{_of_module(module)[index].name:40} {capability:>4} {usage.registers:>5} {usage.shared:>7}"
                f" {usage.local:>6}{'' if fits else '  DOES NOT FIT'}\n"
            )
            out.flush()
    out.write(f"{misfits} do not fit\n" if misfits else "all fit\n")
    return 1 if misfits else 0


if __name__ == "__main__":
    sys.exit(main())
