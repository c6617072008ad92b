"""What the parts share: the device, the clock that they must look at, and how a part that fails is recorded."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from bench.kernels.devices import Facts
from bench.provenance import ROOT

Found = dict[str, Any]
Line = tuple[str, str, str]
"""Of the table: what, how much was measured, and what it stands beside."""


class OutOfTime(Exception):
    """The part's time is over; what it had found by then stays."""


@dataclass(slots=True)
class Context:
    """dry: small shapes, for a machine without a GPU. deadline: of the part that runs, on time.perf_counter.
    facts: the device's limits as measured, once the part `facts` has run."""

    device: torch.device
    out: Path
    dry: bool
    deadline: float = float("inf")
    facts: Facts | None = None

    def check(self) -> None:
        """To be called between cells. Raises OutOfTime."""
        if time.perf_counter() > self.deadline:
            raise OutOfTime

    def left(self) -> float:
        """Seconds until the part's time is over."""
        return max(0.0, self.deadline - time.perf_counter())

    def limits(self) -> Facts:
        """The device's limits; measured now if the part `facts` was left out."""
        if self.facts is None:
            from bench.gpu_proof.facts import measured_limits

            self.facts = measured_limits(self)
        return self.facts


class Part(Protocol):
    """A module of this folder. `measure` fills `found`, JSON-able at any time, so that what was measured outlives a
    failure; `lines` tells a person of it, whatever of it is there."""

    def measure(self, ctx: Context, found: Found) -> None: ...

    def lines(self, found: Found) -> list[Line]: ...


def run_parts(
    ctx: Context,
    parts: Sequence[tuple[str, float, Part]],
    minutes: float,
    save: Callable[[dict[str, Found]], None],
) -> dict[str, Found]:
    """Run (name, share of the time, part) one after the other; what one leaves over is the next one's too.

    Each comes back as {"status": "ok", "failed" or "out of time", "error", "seconds", "found"}; `save` is called with
    all of them after each.
    """
    whole, began, spent = sum(share for _, share, _ in parts), time.perf_counter(), 0.0
    outcome: dict[str, Found] = {}
    for name, share, part in parts:
        spent += share
        ctx.deadline = began + 60 * minutes * spent / whole
        found: Found = {}
        outcome[name] = {"status": "ok", "error": None, "seconds": 0.0, "found": found}
        started = time.perf_counter()
        try:
            part.measure(ctx, found)
        except (OutOfTime, TimeoutError, subprocess.TimeoutExpired):
            outcome[name] |= {"status": "out of time", "error": "its share of --minutes was over"}
        except (Exception, SystemExit) as error:  # whatever a part stumbles over, the others are wanted all the same
            outcome[name] |= {"status": "failed", "error": one_line(error)}
        outcome[name]["seconds"] = time.perf_counter() - started
        save(outcome)
        free_memory(ctx.device)
    return outcome


def free_memory(device: torch.device) -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def ran(command: Sequence[str], seconds: float) -> subprocess.CompletedProcess[str]:
    """Run a command at the repository's root. Past its time it is ended with all that it has started, so that nothing
    of it disturbs what is measured next."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=seconds if seconds < 1e6 else None)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def one_line(error: BaseException) -> str:
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0][:300] if said else 'no message'}"


def share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "-"
