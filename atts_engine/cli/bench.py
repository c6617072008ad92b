"""`atts bench --tune`: find launch settings for this machine's GPU and write them as a tuning table."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atts_engine.cli import options
from atts_engine.cli.tables import check_json_target, human_stream, write_json
from atts_engine.errors import InputError
from atts_engine.evaluation.files import atomically, check_file

if TYPE_CHECKING:
    from atts_engine.ops.tuning import Entry

ROWS = (16, 64, 256, 2048, 8192)
_TINY_ROWS = (5, 40)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `bench` to the commands."""
    text = (
        "Measure launch settings of the kernels on this machine's GPU and write them as a tuning table. The "
        "microbenchmarks are `python -m bench.kernels` in a source tree."
    )
    parser = subparsers.add_parser("bench", help="tune kernels for this GPU", description=text)
    parser.add_argument("--tune", action="store_true", help="search; needs a CUDA device")
    parser.add_argument(
        "--out",
        type=options.place,
        metavar="FILE",
        help="the table (default: the device's file in ~/.cache/atts/tuning)",
    )
    parser.add_argument(
        "--vocab", type=int, default=128256, metavar="V", help="rows of the LM head (default: %(default)s)"
    )
    parser.add_argument("--hidden", type=int, default=4096, metavar="H", help="its columns (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="float32, bfloat16 or float16 (default: %(default)s)")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="try the search on tiny sizes with made-up times, in Triton's interpreter where there is no GPU; writes "
        "no table",
    )
    parser.add_argument("--json", metavar="FILE", help="write what was found as JSON to FILE, or - for stdout")


def run(args: argparse.Namespace) -> int:
    """Search and write; `InputError` where there is no GPU to measure on."""
    if not args.tune:
        raise InputError("name what to do: --tune (microbenchmarks: python -m bench.kernels in a source tree)")
    check_json_target(args.json)
    if args.dry_run:
        return _dry_run(args)
    import torch

    from atts_engine.config import dtype_of
    from atts_engine.ops import tuning
    from atts_engine.ops.tuning import search

    dtype = dtype_of(args.dtype)
    if not torch.cuda.is_available():
        raise InputError("tuning needs a CUDA device, and torch sees none here (--dry-run tries the search alone)")
    if args.vocab < 1 or args.hidden < 1:
        raise InputError(f"--vocab and --hidden must be 1 or more, not {args.vocab} and {args.hidden}")
    device = torch.cuda.get_device_name()
    out = Path(args.out) if args.out else Path.home() / ".cache" / "atts" / "tuning" / tuning.file_name(device)
    if not args.out:
        out.parent.mkdir(parents=True, exist_ok=True)
    check_file(out, "--out")
    old = tuning.load(out) if out.is_file() else None
    problem = search.Problem(args.vocab, args.hidden, dtype, ROWS)
    told = human_stream(args.json)
    entries = search.score_tokens(problem, torch.device("cuda"), search.cuda_timer, lambda line: print(line, file=told))
    with atomically(out) as partial:
        tuning.save(tuning.merged(old, device, {"score_tokens": entries}), partial)
    told.write(f"wrote {out}\n")
    write_json({"device": device, "dry_run": False, "table": str(out), **_figures(entries)}, args.json)
    return 0


def _dry_run(args: argparse.Namespace) -> int:
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when a kernel is defined
    from atts_engine.ops.tuning import search

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    problem = search.Problem(48, 32, torch.float32, _TINY_ROWS)
    told = human_stream(args.json)
    entries = search.score_tokens(problem, device, search.dry_timer, lambda line: print(line, file=told))
    told.write(f"dry run: {len(entries)} entries, times are made up, no table was written\n")
    write_json({"device": device.type, "dry_run": True, "table": None, **_figures(entries)}, args.json)
    return 0


def _figures(entries: Sequence[Entry]) -> dict[str, Any]:
    return {"entries": {"score_tokens": [asdict(entry) for entry in entries]}}
