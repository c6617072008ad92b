"""Measure everything that is claimed for a GPU, in one go.

    python -m bench.gpu_proof --out DIR [--minutes 9] [--only PART]... [--dry-run]

Writes DIR/gpu_proof_DEVICE_DATE.json after every part, plots beside it, and a table on stdout at the end. A part that
fails or runs out of its share of the time says so, and the rest goes on. --dry-run: small shapes on the CPU, Triton in
its interpreter; its figures mean nothing, and its file is named `dry_...`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from atts_engine.evaluation.files import cannot_write, write_text
from bench.gpu_proof import build, correctness, engine, facts, job, kernels, profiles
from bench.gpu_proof.context import Context, Found, Part, run_parts
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
PACKAGES = ("triton", "transformers", "flashinfer-python", "vllm", "liger-kernel", "quack-kernels", "cut-cross-entropy")


def main(argv: list[str] | None = None, parts: tuple[tuple[str, float, Part], ...] = PARTS) -> int:
    """Exit code 1 where a part failed, 2 without a GPU or for a part that does not exist."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_proof", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--only", action="append", metavar="PART", help=f"of {', '.join(n for n, _, _ in parts)}")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args(argv)
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
        last = list(outcome)[-1]
        print(f"{last}: {outcome[last]['status']}, {outcome[last]['seconds']:.1f} s", file=sys.stderr, flush=True)
        # A whole file at any moment: what was measured outlives an interruption.
        part_file = path.with_suffix(".part")
        write_text(part_file, json.dumps(record, indent=1) + "\n")
        os.replace(part_file, path)

    outcome = run_parts(ctx, chosen, args.minutes, save)
    drawn = plots(outcome, args.out)
    if args.dry_run:
        print("DRY RUN: the figures below are of small shapes on a CPU and mean nothing")
    print(table(lines_of(outcome, chosen)))
    print(f"{path}" + (f", {', '.join(drawn)}" if drawn else "; no plots: nothing to draw, or no matplotlib"))
    return int(any(cell["status"] == "failed" for cell in outcome.values()))


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
