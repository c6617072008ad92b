"""What the parts share: the device, the clock that they must look at, and how a part that fails is recorded."""

from __future__ import annotations

import gc
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from atts_engine.evaluation.files import write_text
from bench.kernels.devices import Facts, one_line
from bench.provenance import ROOT

Found = dict[str, Any]
Line = tuple[str, str, str]
"""Of the table: what, how much was measured, and what it stands beside."""


_SAVE_S = 1.0
"""Between two looks of `Context.check` at what is to be kept."""


class OutOfTime(Exception):
    """The part's time is over; what it had found by then stays."""


class DeviceLost(Exception):
    """The process can do nothing with the device any more: an error in a kernel has taken its context."""


@dataclass(slots=True)
class Context:
    """dry: small shapes, for a machine without a GPU. deadline: of the part that runs, on time.perf_counter.
    facts: the device's limits as measured, once the part `facts` has run. keep: told now and then that there is
    something new to keep. doing: the cell that runs; apart: in a process that may end with it; lost: cells that an
    earlier process of the part ended with, and what is known of it."""

    device: torch.device
    out: Path
    dry: bool
    deadline: float = float("inf")
    facts: Facts | None = None
    keep: Callable[[], None] = lambda: None
    doing: str = ""
    apart: bool = False
    lost: dict[str, str] = field(default_factory=dict)
    kept_at: float = 0.0

    def check(self) -> None:
        """To be called between cells. Raises OutOfTime."""
        if time.perf_counter() > self.deadline:
            raise OutOfTime
        if time.perf_counter() > self.kept_at + _SAVE_S:
            self.keep()
            self.kept_at = time.perf_counter()

    def begin(self, cell: str) -> str | None:
        """`check`, and from here on it is this cell that runs. Returns None, or what is known of how an earlier process
        ended with it: it is not to be tried again."""
        self.check()
        if cell not in self.lost:
            self.doing = cell
            if self.apart:
                self.keep()
        return self.lost.get(cell)

    def survived(self) -> None:
        """To be called behind an error that is only noted. Raises DeviceLost where nothing can follow it."""
        if self.device.type == "cuda":
            try:
                torch.zeros(1, device=self.device).item()
            except RuntimeError as error:
                raise DeviceLost(one_line(error)) from error

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
    run: Callable[[str, Part, Context, Found, Callable[[], None]], None] | None = None,
) -> dict[str, Found]:
    """Run (name, share of the time, part) one after the other; what one leaves over is the next one's too.

    Each comes back as {"status": "ok", "failed" or "out of time", "error", "seconds", "found"}; `save` is called with
    all of them after each, and within a part when there is something new. run: does a part in place of `measured`.
    """
    run = run or measured
    whole, began, spent = sum(share for _, share, _ in parts), time.perf_counter(), 0.0
    outcome: dict[str, Found] = {}
    for name, share, part in parts:
        spent += share
        ctx.deadline = began + 60 * minutes * spent / whole
        found: Found = {}
        cell = outcome[name] = {"status": "running", "error": None, "seconds": 0.0, "found": found}
        started = time.perf_counter()

        def keep(cell: Found = cell, started: float = started) -> None:
            cell["seconds"] = time.perf_counter() - started
            save(outcome)

        run(name, part, ctx, cell, keep)
        keep()
        print(f"{name}: {cell['status']}, {cell['seconds']:.1f} s", file=sys.stderr, flush=True)
        free_memory(ctx.device)
    return outcome


def measured(name: str, part: Part, ctx: Context, cell: Found, keep: Callable[[], None]) -> None:
    """Run a part here, and say in its cell how it ended."""
    ctx.keep = keep
    cell |= {"status": "running", "error": None}
    try:
        part.measure(ctx, cell["found"])
        cell["status"] = "ok"
    except (OutOfTime, TimeoutError, subprocess.TimeoutExpired):
        cell |= {"status": "out of time", "error": "its share of --minutes was over"}
    except (Exception, SystemExit) as error:  # whatever a part stumbles over, the others are wanted all the same
        lost = isinstance(error, DeviceLost)
        cell |= {"status": "device lost" if lost else "failed", "error": one_line(error)}


def written(path: Path, record: Found) -> None:
    """Write JSON, a whole file at any moment. It has no NaN and no infinity: they become null."""
    write_text(path, json.dumps(_finite(record), indent=1, allow_nan=False) + "\n")


def _finite(x: Any) -> Any:
    if isinstance(x, dict):
        return {key: _finite(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


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


def share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "-"
