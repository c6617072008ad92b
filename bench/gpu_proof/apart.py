"""A part in a process of its own. A kernel that hangs, or that takes the device's context with it, then ends one cell
of one part: the process is ended and another one goes on behind that cell.

Parent and child share a file of JSON, the child's to write: the part's cell, the cell that runs, the device's limits,
and what was lost.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from bench.gpu_proof.context import Context, Found, Part, measured, written
from bench.kernels.devices import Facts
from bench.provenance import ROOT

_POLL_S = 0.2
_GRACE_S = 15.0
"""Behind the deadline, for the cell that runs then; a part looks at the clock between cells."""
HANG_S = 90.0
"""A cell that says nothing for longer, while its kernels are compiled for instance, is taken to hang."""
_START_S = 60.0
"""More for the first: a process starts by importing torch."""
_LIVES = 4
"""Processes of a part at most."""


def run_apart(
    command: Sequence[str], state: Path, ctx: Context, cell: Found, keep: Callable[[], None], hang_s: float = HANG_S
) -> None:
    """Have `command` run a part, which ends in `serve(part, ctx, state)`, and fill the part's cell from it. command is
    followed by the seconds that it has."""
    shared: Found = {"cell": cell, "doing": "", "lost": {}, "facts": asdict(ctx.facts) if ctx.facts else None}
    for _ in range(_LIVES):
        shared["cell"] |= {"status": "running", "error": None}
        shared["doing"] = ""
        written(state, shared)
        ended = _watched([*command, f"{ctx.left():.1f}"], state, ctx, cell, keep, hang_s)
        shared = json.loads(state.read_text(encoding="utf-8"))
        cell |= shared["cell"]
        if shared["facts"] is not None:
            ctx.facts = Facts(**shared["facts"])
        if cell["status"] in ("ok", "failed", "out of time"):
            break
        # The device was lost, the process died, or it was ended; by the deadline, or for its cell.
        known = cell["error"] or ended
        late = ctx.left() <= 0 and cell["status"] == "running"
        cell |= {
            "status": "out of time" if late else "failed",
            "error": f"{known}, in {shared['doing'] or 'its start'}",
        }
        if late or not shared["doing"] or shared["doing"] in shared["lost"] or ctx.left() < _GRACE_S:
            break
        shared["lost"][shared["doing"]] = known
    state.unlink(missing_ok=True)


def _watched(
    command: Sequence[str], state: Path, ctx: Context, cell: Found, keep: Callable[[], None], hang_s: float
) -> str:
    """Run it to its end, and say what that was; `keep` what comes meanwhile."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    changed, seen = time.perf_counter() + _START_S, state.stat().st_mtime_ns
    try:
        while process.poll() is None:
            time.sleep(_POLL_S)
            if (now := state.stat().st_mtime_ns) != seen:
                changed, seen = time.perf_counter(), now
                cell |= json.loads(state.read_text(encoding="utf-8"))["cell"]
                keep()
            if time.perf_counter() > min(ctx.deadline + _GRACE_S, changed + hang_s):
                hung = time.perf_counter() > changed + hang_s
                return f"nothing came for {hang_s:g} s" if hung else "its share of --minutes was over"
        return f"its process ended with {process.returncode}"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def serve(name: str, part: Part, ctx: Context, state: Path) -> None:
    """The child's side: run the part, behind what an earlier process has left of it in `state`."""
    faulthandler.enable()
    shared = json.loads(state.read_text(encoding="utf-8"))
    cell, ctx.lost, ctx.apart = shared["cell"], shared["lost"], True
    ctx.facts = Facts(**shared["facts"]) if shared["facts"] is not None else None

    def keep() -> None:
        written(state, shared | {"doing": ctx.doing, "facts": asdict(ctx.facts) if ctx.facts else None})

    measured(name, part, ctx, cell, keep)
    keep()
