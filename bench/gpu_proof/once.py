"""Run each case of an op once on the GPU, for a profiler: `ncu ... python -m bench.gpu_proof.once OP [SIZE]`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from atts_engine import ops
from bench.kernels.cases import cases
from bench.kernels.devices import synchronise
from bench.kernels.run import implementations


@contextmanager
def profiled(device: torch.device) -> Iterator[None]:
    synchronise(device)
    if device.type == "cuda":
        torch.cuda.profiler.start()
    try:
        yield
    finally:
        synchronise(device)
        if device.type == "cuda":
            torch.cuda.profiler.stop()


def main(op: str, size: str = "8b") -> int:
    """In every implementation of ours but the reference, where there is another one. With `ncu --profile-from-start
    off` only the second call of each is profiled: what makes the inputs and compiles is not."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    wanted = [case for case in cases(size, dtype) if case.op == op]
    for case in wanted:
        able = [impl for impl in implementations(case, device) if impl != "flashinfer"]
        for impl in able[1:] or able:
            first, second = case.make(device, 0), case.make(device, 1)
            with ops.use(impl):
                getattr(ops, op)(*first)
                with profiled(device):
                    getattr(ops, op)(*second)
    print(f"{op}: {len(wanted)} cases")
    return 0 if wanted else 2


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
