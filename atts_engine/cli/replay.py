"""`atts replay`: recorded chains through a calibrator, without a model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from atts_engine.cli import options
from atts_engine.cli.tables import Table, check_json_target, human_stream, percent, show, write_json

if TYPE_CHECKING:
    from atts_engine.evaluation.replay import Scored


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `replay` to the commands."""
    parser = subparsers.add_parser(
        "replay",
        help="put recorded chains through a calibrator, or check a run's decision log",
        description="Put recorded chains through a calibrator; or decide all of a run's decision log again.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--traces", metavar="FILE", help="trace file, .jsonl or .jsonl.gz")
    source.add_argument(
        "--log",
        metavar="DIR",
        help="folder of a run: every verdict in its log is decided again, with the run's own calibrator (a saved one "
        "is named by --calibration; the options below are for traces)",
    )
    parser.add_argument("--alpha", type=float, default=0.4, help="nominal takeover rate (default: %(default)s)")
    options.add_calibrator(parser, "; reference: the paper's published rule")
    parser.add_argument(
        "--policy",
        default="threshold",
        metavar="NAME",
        help="threshold (default), exact-count, or top-b, the synchronous oracle",
    )
    parser.add_argument(
        "--compare",
        default="",
        metavar="NAME,...",
        help="further calibrators, or calibrator+policy, set beside it (cold start)",
    )
    parser.add_argument("--plot", metavar="FILE", help="draw the rates by turn and by problem: .svg, .png or .pdf")
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
    """Replay and report; `InputError` for anything that cannot be used. 1 for a log that does not come out again."""
    if args.log is not None:
        return _check_log(args)
    from atts_engine.conformal import POLICIES
    from atts_engine.evaluation.replay import CALIBRATORS, check_name, scored_spans
    from atts_engine.evaluation.replay_plot import check_plot_target, draw_rates
    from atts_engine.evaluation.traces import read_chains

    others = [name.strip() for name in args.compare.split(",") if name.strip()]
    for name in [f"{args.calibrator}+{args.policy}", *others]:
        calibrator, policy = _parts(name)
        check_name("calibrator", calibrator, CALIBRATORS)
        check_name("policy", policy, POLICIES)
    check_json_target(args.json)
    check_plot_target(args.plot)
    spans = scored_spans(read_chains(args.traces), args.order, args.seed)
    found = _replayed(args, spans, args.calibrator, args.policy, args.calibration, args.frozen)
    compared = {name: _replayed(args, spans, *_parts(name), None, False) for name in others}
    out = human_stream(args.json)
    show(_table(found), out, args.plain)
    if compared:
        found["compared"] = compared
        show(_comparison({_label(found): found} | compared), out, args.plain)
    if args.plot is not None:
        draw_rates({_label(found): found} | compared, args.alpha, args.plot)
        out.write(f"plot: {args.plot}\n")
    write_json(found, args.json)
    return 0


def _check_log(args: argparse.Namespace) -> int:
    from atts_engine.evaluation.run_log import log_figures

    check_json_target(args.json)
    found = log_figures(args.log, args.calibration)
    rows = [
        ("decisions", f"{found['decisions']:,}"),
        ("of chains that were cut off", f"{found['discarded']:,}"),
        ("in force", f"{found['in_force']:,}, {percent(found['rate'])} of them takeovers"),
    ]
    difference = found["difference"]
    if difference is None:
        rows.append(("decided again", "all as recorded, to the bit"))
    else:
        rows.append(
            (
                f"decision {difference['decision_seq']}",
                f"{difference['field']} was recorded as {difference['recorded']!r}, comes out as "
                f"{difference['replayed']!r}",
            )
        )
    title = f"decision log of {found['log']}, {found['calibrator']} at alpha {found['alpha']:g}"
    show(Table(title, ("", ""), tuple(rows), left=2), human_stream(args.json), args.plain)
    write_json(found, args.json)
    return 0 if difference is None else 1


def _parts(name: str) -> tuple[str, str]:
    """(calibrator, policy) of a name such as adaptive or adaptive+exact-count."""
    calibrator, _, policy = name.partition("+")
    return calibrator, policy or "threshold"


def _label(found: dict[str, Any]) -> str:
    name: str = found["calibrator"]
    return name if found["policy"] == "threshold" else f"{name}+{found['policy']}"


def _replayed(
    args: argparse.Namespace,
    spans: Sequence[Scored],
    calibrator: str,
    policy: str,
    calibration: str | None,
    frozen: bool,
) -> dict[str, Any]:
    from atts_engine.evaluation.replay import figures, replay, reproduced

    result = replay(
        spans,
        calibrator,
        args.alpha,
        policy,
        calibration=calibration,
        frozen=frozen,
        outstanding=1 if policy == "top-b" else args.outstanding,
        seed=args.seed,
        cold=options.cold_start(args),
    )
    found = {
        "calibrator": calibrator,
        "policy": policy,
        "alpha": args.alpha,
        "order": args.order,
        "outstanding": args.outstanding,
        "seed": args.seed,
        **figures(result, args.alpha),
    }
    return found | (reproduced(result) if calibrator == "reference" else {})


def _comparison(replays: dict[str, dict[str, Any]]) -> Table:
    """One line per replay."""

    def number(value: float | None, digits: int = 3) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    rows = []
    for name, found in replays.items():
        rates = [cell["rate"] for cell in found["by_problem"].values()]
        rows.append(
            (
                name,
                number(found["rate"]),
                number(found["max_abs_dev_by_turn"]),
                number(found["problem_off"]),
                f"{number(min(rates, default=None), 2)} to {number(max(rates, default=None), 2)}",
                number(found["selection_power"]),
                number(found["coverage"]),
                number(found["set_size"], 2),
            )
        )
    return Table(
        "side by side",
        ("calibrator", "rate", "worst turn off", "problems off", "by problem", "power", "coverage", "set size"),
        tuple(rows),
        note="problems off: mean |rate - alpha| of a problem; coverage: how often the set of spans taken over in a "
        "problem's turn holds its worst span; set size: spans in that set",
    )


def _table(found: dict[str, Any]) -> Table:
    """Takeover rate per turn, the whole, and the spread over problems."""
    alpha = found["alpha"]

    def row(name: str, cell: dict[str, Any]) -> tuple[str, ...]:
        return name, f"{cell['n']:,}", percent(cell["rate"]), f"{100 * (cell['rate'] - alpha):+.1f}"

    rows = [row(f"turn {turn}", cell) for turn, cell in found["by_turn"].items()]
    if found["n"]:
        rows.append(row("all", found))
    return Table(
        f"{_label(found)} at alpha {alpha:g}, {found['order']} order",
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
    if found["coverage"] is not None:
        parts.append(f"coverage {found['coverage']:.3f} at set size {found['set_size']:.2f}")
    if found["by_problem"]:
        rates = [cell["rate"] for cell in found["by_problem"].values()]
        parts.append(f"per problem {percent(min(rates), 0)} to {percent(max(rates), 0)}")
    if "percentiles_recorded" in found:
        parts.append(
            f"{found['percentiles_reproduced']:,} of {found['percentiles_recorded']:,} recorded percentiles "
            f"and {found['verdicts_reproduced']:,} verdicts reproduced exactly"
        )
    return "; ".join(parts)
