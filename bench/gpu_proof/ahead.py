"""FlashInfer compiles each of its kernels with nvcc when it is first called: done here beside the parts that time
nothing, a process for each op. What is not ready when kernels are timed is left out, and says so.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.gpu_proof.build import find_nvcc
from bench.gpu_proof.context import one_line, written
from bench.kernels.cases import cases
from bench.kernels.peers import PEERS
from bench.provenance import ROOT

_NICE = 10
"""The parts that run meanwhile go first."""
PACKAGE = "flashinfer"
OPS = tuple(op for op, peers in PEERS.items() if any(peer.package == PACKAGE for peer in peers))


@dataclass(slots=True)
class Ahead:
    """Processes under way, by op."""

    out: Path
    running: dict[str, subprocess.Popen[str]] = field(default_factory=dict)

    def start(self) -> None:
        """Nothing where FlashInfer is not installed."""
        ready_file(self.out).unlink(missing_ok=True)
        if importlib.util.find_spec(PACKAGE) is None:
            return
        if flags := curand_flags(find_nvcc()):
            os.environ.setdefault("FLASHINFER_EXTRA_CUDAFLAGS", flags)
        for op in OPS:
            command = [sys.executable, "-m", "bench.gpu_proof.ahead", op]
            pipe = subprocess.PIPE
            self.running[op] = subprocess.Popen(
                command, cwd=ROOT, stdout=pipe, stderr=subprocess.DEVNULL, text=True, start_new_session=True
            )
            os.setpriority(os.PRIO_PROCESS, self.running[op].pid, _NICE)  # what it starts has it too

    def settle(self, seconds: float) -> None:
        """Wait that long at most, end what is still running, and write by op why it is not ready ("": it is)."""
        until, found = time.perf_counter() + seconds, {}
        for op, process in self.running.items():
            try:
                said = process.communicate(timeout=max(0.0, until - time.perf_counter()))[0].strip()
                found[op] = "" if process.returncode == 0 else said or f"its process ended with {process.returncode}"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                found[op] = "its kernels were not compiled in time"
        if self.running:
            written(ready_file(self.out), found)
        self.running.clear()


def curand_flags(nvcc: str | None) -> str:
    """Some of FlashInfer's sources include cuRAND's headers, which an nvcc without the rest of the toolkit lacks and
    torch's wheels bring. Searched last, so that no other header comes from there; "" where there is no need."""
    toolkit = Path(nvcc).resolve().parent.parent if nvcc else None
    if toolkit is None or next(toolkit.glob("**/include/curand_kernel.h"), None) is not None:
        return ""
    spec = importlib.util.find_spec("nvidia")
    places = spec.submodule_search_locations or () if spec else ()
    found = next((path for place in places for path in Path(place).glob("**/curand_kernel.h")), None)
    return f"-Xcompiler -idirafter,{found.parent}" if found else ""


def ready_file(out: Path) -> Path:
    return out / "flashinfer.json"


def main(op: str) -> int:
    """Call FlashInfer's kernels for an op once, on the cases of the table."""
    device = torch.device("cuda")
    works, said = False, ""
    for peer in PEERS[op]:
        if peer.package == PACKAGE:
            try:
                for case in cases("8b", torch.bfloat16):
                    if case.op == op:
                        peer.build(*case.make(device, 0))()
                torch.cuda.synchronize(device)
                works = True
            except Exception as error:  # whatever another project's code raises
                said = one_line(error)
    print(said)
    return 0 if works else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
