"""Measure everything that is claimed for a GPU, in one go.

    python -m bench.gpu_proof --out DIR [--minutes 9] [--only PART]... [--dry-run]

Writes DIR/gpu_proof_DEVICE_DATE.json as figures come, plots beside it, and a table on stdout at the end. A part that
fails or runs out of its share of the time says so, and the rest goes on; so it does where a kernel hangs or ends the
process, as parts run in processes of their own (bench/gpu_proof/apart.py). --dry-run: small shapes on the CPU in one
process, Triton in its interpreter; its figures mean nothing, and its file is named `dry_...`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
import time
from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import Any

import torch

from atts_engine.evaluation.files import cannot_write
from bench.gpu_proof import build, correctness, engine, facts, job, kernels, profiles
from bench.gpu_proof.ahead import Ahead
from bench.gpu_proof.apart import HANG_S, run_apart, serve
from bench.gpu_proof.context import Context, Found, Part, measured, run_parts, written
from bench.gpu_proof.report import file_name, lines_of, plots, table
from bench.provenance import provenance

PARTS: tuple[tuple[str, float, Part], ...] = (
    ("facts", 0.02, facts),
    ("build", 0.10, build),
    ("correctness", 0.15, correctness),
    ("kernels", 0.20, kernels),
    ("engine", 0.23, engine),
    ("job", 0.25, job),
    ("profiles", 0.05, profiles),
)
"""Name, share of the time, module."""
HERE = ("build", "profiles")
"""Parts that leave the device to processes of their own."""
LONG = ("job",)
"""Parts whose cells take as long as the time allows."""
PACKAGES = ("triton", "transformers", "flashinfer-python", "vllm", "liger-kernel", "quack-kernels", "cut-cross-entropy")


def main(argv: list[str] | None = None, parts: tuple[tuple[str, float, Part], ...] = PARTS) -> int:
    """Exit code 1 where a part failed, 2 without a GPU or for a part that does not exist."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_proof", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--only", action="append", metavar="PART", help=f"of {', '.join(n for n, _, _ in parts)}")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--part", nargs=3, metavar=("PART", "STATE", "SECONDS"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.part:
        return _part(args.out, *args.part)
    unknown = set(args.only or ()) - {name for name, _, _ in parts}
    if unknown:
        print(f"no part is named {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    if not args.dry_run and not torch.cuda.is_available():
        print("torch sees no CUDA device: --dry-run exercises the code without one", file=sys.stderr)
        return 2
    if args.dry_run:
        torch.set_num_threads(1)  # on tensors this small a second thread costs more than it brings
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(cannot_write(args.out, error), file=sys.stderr)
        return 2
    device = torch.device("cpu") if args.dry_run else torch.device("cuda", torch.cuda.current_device())
    ctx = Context(device, args.out, args.dry_run)
    chosen = tuple(part for part in parts if not args.only or part[0] in args.only)
    command = "python -m bench.gpu_proof " + " ".join(sys.argv[1:] if argv is None else argv)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    record: dict[str, Any] = {
        "device": name,
        "dry": args.dry_run,
        "minutes": args.minutes,
        "provenance": provenance(command) | {"packages": _versions(), "cuda": torch.version.cuda},
    }
    path = args.out / file_name(name, record["provenance"]["date"], args.dry_run)

    def save(outcome: dict[str, Found]) -> None:
        record["parts"] = outcome
        record["lines"] = [
            [part[0], *line] for part in chosen if part[0] in outcome for line in lines_of(outcome, [part])
        ]
        written(path, record)

    def run(name: str, part: Part, ctx: Context, cell: Found, keep: Callable[[], None]) -> None:
        if ctx.device.type != "cuda" or name in HERE:
            measured(name, part, ctx, cell, keep)
            return
        if name == "kernels":
            compiling.settle(ctx.left() / 4)
        state = args.out.resolve() / f"{name}.state"
        command = [sys.executable, "-m", "bench.gpu_proof", "--out", str(args.out.resolve())]
        run_apart([*command, "--part", name, str(state)], state, ctx, cell, keep, inf if name in LONG else HANG_S)

    compiling = Ahead(args.out)
    if device.type == "cuda" and any(name == "kernels" for name, _, _ in chosen):
        compiling.start()
    try:
        outcome = run_parts(ctx, chosen, args.minutes, save, run)
    finally:
        compiling.settle(0.0)
    drawn = plots(outcome, args.out)
    if args.dry_run:
        print("DRY RUN: the figures below are of small shapes on a CPU and mean nothing")
    print(table(lines_of(outcome, chosen)))
    print(f"{path}" + (f", {', '.join(drawn)}" if drawn else "; no plots: nothing to draw, or no matplotlib"))
    return int(any(cell["status"] == "failed" for cell in outcome.values()))


def _part(out: Path, name: str, state: str, seconds: str) -> int:
    """One part of `PARTS` in this process, for the one that has started it."""
    began = time.perf_counter()
    ctx = Context(torch.device("cuda", torch.cuda.current_device()), out, dry=False)
    ctx.deadline = began + float(seconds)
    serve(name, {known: part for known, _, part in PARTS}[name], ctx, Path(state))
    return 0


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


if __name__ == "__main__":
    # Triton reads it when a kernel is defined, which no import above does.
    if "--dry-run" in sys.argv[1:] and not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    sys.exit(main())
