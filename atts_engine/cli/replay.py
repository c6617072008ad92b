"""`atts replay`: recorded chains through a calibrator, without a model."""

from __future__ import annotations

import argparse
from typing import Any

from atts_engine.cli.tables import Table, check_json_target, human_stream, percent, show, write_json


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `replay` to the commands."""
    parser = subparsers.add_parser(
        "replay",
        help="put recorded chains through a calibrator",
        description="Put recorded chains through a calibrator.",
    )
    parser.add_argument("--traces", required=True, metavar="FILE", help="trace file, .jsonl or .jsonl.gz")
    parser.add_argument("--alpha", type=float, default=0.4, help="nominal takeover rate (default: %(default)s)")
    parser.add_argument(
        "--calibrator", default="mondrian", metavar="NAME", help="mondrian (default), split or reference"
    )
    parser.add_argument("--policy", default="threshold", metavar="NAME", help="threshold, the only one of this version")
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        help=".npz state to start from, or an .npy array of perplexities (reference, split)",
    )
    parser.add_argument("--frozen", action="store_true", help="do not learn from the trace (needs --calibration)")
    parser.add_argument("--order", default="arrival", metavar="ORDER", help="arrival (default) or shuffle")
    parser.add_argument(
        "--outstanding",
        type=int,
        default=1,
        metavar="D",
        help="decisions in flight, the one being made included (default: 1)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of uniforms and shuffle (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON to FILE, or - for stdout")
    parser.add_argument("--plain", action="store_true", help="plain lines even on a terminal")


def run(args: argparse.Namespace) -> int:
    """Replay and report; `InputError` for anything that cannot be used."""
    from atts_engine.evaluation.replay import (
        CALIBRATORS,
        POLICIES,
        check_name,
        figures,
        replay,
        reproduced,
        scored_spans,
    )
    from atts_engine.evaluation.traces import read_chains

    check_name("calibrator", args.calibrator, CALIBRATORS)
    check_name("policy", args.policy, POLICIES)
    check_json_target(args.json)
    spans = scored_spans(read_chains(args.traces), args.order, args.seed)
    result = replay(
        spans,
        args.calibrator,
        args.alpha,
        calibration=args.calibration,
        frozen=args.frozen,
        outstanding=args.outstanding,
        seed=args.seed,
    )
    found: dict[str, Any] = {
        "calibrator": args.calibrator,
        "policy": args.policy,
        "alpha": args.alpha,
        "order": args.order,
        "outstanding": args.outstanding,
        "seed": args.seed,
        **figures(result, args.alpha),
    }
    if args.calibrator == "reference":
        found |= reproduced(result)
    show(_table(found), human_stream(args.json), args.plain)
    write_json(found, args.json)
    return 0


def _table(found: dict[str, Any]) -> Table:
    """Takeover rate per turn, the whole, and the spread over problems."""
    alpha = found["alpha"]

    def row(name: str, cell: dict[str, Any]) -> tuple[str, ...]:
        return name, f"{cell['n']:,}", percent(cell["rate"]), f"{100 * (cell['rate'] - alpha):+.1f}"

    rows = [row(f"turn {turn}", cell) for turn, cell in found["by_turn"].items()]
    if found["n"]:
        rows.append(row("all", found))
    return Table(
        f"{found['calibrator']} at alpha {alpha:g}, {found['order']} order",
        ("span", "decisions", "taken over", "off by"),
        tuple(rows),
        note=_note(found),
    )


def _note(found: dict[str, Any]) -> str:
    parts = []
    if found["selection_power"] is not None:
        parts.append(f"selection power {found['selection_power']:.3f} (a coin: 0.500)")
    if found["max_abs_dev_by_turn"] is not None:
        parts.append(f"worst turn off by {100 * found['max_abs_dev_by_turn']:.1f}")
    if found["by_problem"]:
        rates = [cell["rate"] for cell in found["by_problem"].values()]
        parts.append(f"per problem {percent(min(rates), 0)} to {percent(max(rates), 0)}")
    if "percentiles_recorded" in found:
        parts.append(
            f"{found['percentiles_reproduced']:,} of {found['percentiles_recorded']:,} recorded percentiles "
            f"and {found['verdicts_reproduced']:,} verdicts reproduced exactly"
        )
    return "; ".join(parts)
