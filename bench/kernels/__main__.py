"""Microbenchmarks of the ops, beside the device's limits and beside other kernels, in one table.

    python -m bench.kernels [--op NAME]... [--device DEVICE] [--size 8b|135m|tiny] [--dtype NAME] [--out FILE.json]

Peers are measured where they are installed; the output names those that are not.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

import torch

from atts_engine.evaluation.files import write_text
from bench.kernels.cases import SIZES, cases
from bench.kernels.devices import measure
from bench.kernels.run import measure_case
from bench.kernels.table import Row, table
from bench.output import out_file
from bench.provenance import provenance

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, write the file after every case. Returns 2 for an op that has no case."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__.partition("\n")[0])
    parser.add_argument("--op", action="append", metavar="NAME", help="only this op; may be given again")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda" if gpu else "cpu"))
    parser.add_argument("--size", choices=SIZES, default="8b" if gpu else "135m", help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--rounds", type=int, default=11, help="turns of each provider (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads of torch")
    parser.add_argument("--out", type=out_file, metavar="FILE")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    wanted = [case for case in cases(args.size, DTYPES[args.dtype]) if not args.op or case.op in args.op]
    missing = set(args.op or ()) - {case.op for case in wanted}
    if missing:
        print(f"no case for {', '.join(sorted(missing))}", file=sys.stderr)
        return 2
    tiny = args.size == "tiny"
    facts = measure(args.device, *((1 << 20, 128) if tiny else (1 << 28, 4096 if gpu else 1024)))
    rows: list[Row] = []
    absent: dict[str, str] = {}
    command = "python -m bench.kernels " + " ".join(sys.argv[1:] if argv is None else argv)
    for case in wanted:
        print(f"{case.op} {case.label}", file=sys.stderr, flush=True)
        rows += measure_case(case, args.device, facts, args.rounds, absent)
        if args.out:  # after every case: what was measured outlives an interruption
            found = {
                "provenance": provenance(command.strip()),
                "device": asdict(facts),
                "threads": torch.get_num_threads(),
                "rows": [asdict(row) for row in rows],
                "absent": absent,
            }
            write_text(args.out, json.dumps(found, indent=1) + "\n")
    print(table(rows, facts))
    for name, reason in absent.items():
        print(f"left out: {name} ({reason})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
