"""`atts simulate`: what a job would take on machines that are not there. Nothing it prints was measured."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atts_engine.cli import options
from atts_engine.cli.tables import Table, check_json_target, count, human_stream, percent, seconds, show, write_json
from atts_engine.errors import InputError

if TYPE_CHECKING:
    from atts_engine.evaluation.simulation.fit import RunRecord
    from atts_engine.evaluation.simulation.placement import Half
    from atts_engine.evaluation.simulation.simulator import Rules
    from atts_engine.evaluation.simulation.sweep import Hardware, Scenario
    from atts_engine.evaluation.simulation.work import Recorded

PROBLEMS, CHAINS, PROMPT_TOKENS = 32, 16, 200


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `simulate` to the commands."""
    text = (
        "Simulate a pair on GPUs from recorded turn lengths and a cost model (docs/simulate.md), or on the machine of "
        "recorded runs from their own step times (--fit). Lists such as 8,16,32 sweep; one option may have one."
    )
    parser = subparsers.add_parser("simulate", help="predict a job on other machines", description=text)
    group = parser.add_argument_group("pair and machine")
    model = "a folder with a config.json, or a name such as qwen2.5-1.5b, qwq-32b or llama-3.1-70b"
    group.add_argument("--draft", metavar="MODEL", help=model)
    group.add_argument("--target", metavar="MODEL", help="as --draft")
    group.add_argument(
        "--device", default="h100", metavar="NAME", help="h100 (default), h200, a100, b200, l40s or a .json file"
    )
    group.add_argument("--gpus", metavar="N,...", help="GPUs (default: 8)")
    group.add_argument("--draft-gpus", type=int, metavar="N", help="of these for the draft (default: chosen)")
    group.add_argument("--target-gpus", type=int, metavar="N", help="of these for the target (default: chosen)")
    group.add_argument(
        "--draft-tp", type=int, metavar="N", help="GPUs a copy of the draft is split over (default: chosen)"
    )
    group.add_argument(
        "--target-tp", type=int, metavar="N", help="GPUs a copy of the target is split over (default: chosen)"
    )
    group.add_argument(
        "--placement",
        choices=("auto", "split", "shared"),
        default="auto",
        help="GPUs of its own for either model, or both on all (default: split where there are enough)",
    )
    group.add_argument(
        "--weight-bytes", type=int, default=2, metavar="N", help="an element of weights and KV (default: 2)"
    )
    group.add_argument(
        "--memory-fraction",
        type=float,
        default=0.9,
        metavar="F",
        help="share of a GPU's memory that is usable (default: 0.9)",
    )
    for name, what, share in (
        ("compute", "bf16 peak", 0.6),
        ("memory", "memory bandwidth", 0.7),
        ("link", "link bandwidth", 0.65),
    ):
        text = f"share of the {what} that is reached (default: {share})"
        group.add_argument(f"--{name}-efficiency", type=float, metavar="F", help=text)
    group.add_argument(
        "--step-overhead-us", type=float, metavar="US", help="time of every step beside its arithmetic (default: 500)"
    )
    group.add_argument("--all-reduce-us", type=float, metavar="US", help="latency of an all-reduce (default: 10)")
    group.add_argument("--lanes", metavar="FILE", help="measured step times of one lane or both, in place of computed")
    group.add_argument(
        "--fit", nargs="+", metavar="DIR", help="folders of `atts run` at different numbers of chains: step times"
    )
    group.add_argument("--price-per-hour", type=float, metavar="P", help="of one GPU; without it no cost is shown")
    group = parser.add_argument_group("job")
    group.add_argument("--traces", metavar="FILE", help="recorded chains (default: lengths that come with the package)")
    group.add_argument(
        "--chars-per-token", type=float, default=3.0, metavar="C", help="for traces without token counts (default: 3)"
    )
    group.add_argument(
        "--problems",
        type=int,
        metavar="N",
        help="problems drawn from the recorded ones (default: 32, or with --traces the recorded ones, once each)",
    )
    group.add_argument("--chains", metavar="M,...", help="chains a problem (default: 16, or as recorded)")
    group.add_argument("--turns", metavar="N,...", help="turns a chain has at most (default: as recorded)")
    group.add_argument(
        "--strategies",
        default="atts,atts-sync,target,draft",
        metavar="NAME,...",
        help="of these (default: %(default)s)",
    )
    group.add_argument("--concurrency", type=int, metavar="N", help="problems in flight (default: all)")
    group.add_argument("--prompt-tokens", type=int, metavar="N", help="tokens of a prompt (default: 200)")
    group.add_argument("--chunk-tokens", type=int, default=64, metavar="N", help="handed over at a time (default: 64)")
    group.add_argument("--max-batch-tokens", type=int, default=2048, metavar="N", help="rows of a step (default: 2048)")
    group.add_argument(
        "--hop-us",
        type=float,
        default=200.0,
        metavar="US",
        help="from a lane's result to what its chain asks next (default: 200)",
    )
    group.add_argument("--seed", type=int, default=0, help="of what is drawn (default: %(default)s)")
    group = parser.add_argument_group("output")
    group.add_argument("--out", type=options.place, metavar="DIR", help="write simulate.json and simulate.png there")
    group.add_argument("--json", metavar="FILE", help="write the figures as JSON to FILE, or - for stdout")
    group.add_argument("--plain", action="store_true", help="plain lines even on a terminal")


def run(args: argparse.Namespace) -> int:
    """Simulate and report; `InputError` for anything that cannot be used."""
    from atts_engine.evaluation.folder import write_json as save_json
    from atts_engine.evaluation.simulation.plot import check_plot_folder, draw_sweep
    from atts_engine.evaluation.simulation.sweep import run_sweep

    check_json_target(args.json)
    chains, turns = (_counts(args, name, [None]) for name in ("chains", "turns"))
    scenario, told = _scenario(args)
    gpus = [None] if "fit" in told else _counts(args, "gpus", [8])
    if chains == [None] and args.traces is None and not args.fit:
        chains = [CHAINS]
    check_plot_folder(args.out)
    found = {"simulated": True, **told, **run_sweep(scenario, gpus, chains, turns)}
    out = human_stream(args.json)
    if "runs" in told:
        show(_fit_table(told), out, args.plain)
    show(_table(found, args.price_per_hour is not None), out, args.plain)
    if args.out is not None:
        folder = Path(args.out)
        save_json(folder / "simulate.json", found)
        draw_sweep(found, folder / "simulate.png")
        out.write(f"plot: {folder / 'simulate.png'}\n")
    write_json(found, args.json)
    return 0


def _counts(args: argparse.Namespace, name: str, default: list[int | None]) -> list[int | None]:
    """The numbers of an option such as --gpus 8,16,32, in the order given."""
    text = getattr(args, name)
    if text is None:
        return default
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"--{name} must be a number of 1 or more, or a list such as 8,16,32, not {text!r}")
    return [int(part) for part in parts]


def _checked(args: argparse.Namespace) -> tuple[str, ...]:
    """The strategies of --strategies. `InputError` for numbers that are none of a job."""
    from atts_engine.evaluation.simulation.figures import STRATEGIES

    strategies = tuple(dict.fromkeys(name.strip() for name in args.strategies.split(",")))
    if unknown := [name for name in strategies if name not in STRATEGIES]:
        raise InputError(f"no strategy {unknown[0]!r}: choose from {', '.join(STRATEGIES)}")
    for name in ("problems", "concurrency", "chunk_tokens", "max_batch_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be 1 or more, not {getattr(args, name)}")
    for name in ("chars_per_token", "price_per_hour"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            raise InputError(f"--{name.replace('_', '-')} must be above 0, not {getattr(args, name):g}")
    if args.hop_us < 0 or (args.prompt_tokens or 0) < 0:
        raise InputError("--hop-us and --prompt-tokens must be 0 or more")
    return strategies


def _scenario(args: argparse.Namespace) -> tuple[Scenario, dict[str, Any]]:
    """The scenario, and what the figures tell of it."""
    from atts_engine.evaluation.simulation import fit
    from atts_engine.evaluation.simulation.sweep import OneMachine, Scenario

    strategies = _checked(args)
    runs = [fit.RunRecord.read(folder) for folder in args.fit or ()]
    lanes: dict[str, Any] = {}
    prompt = None
    if runs:
        if args.lanes is not None or args.draft is not None or args.target is not None:
            raise InputError("--fit brings its own step times: leave --lanes, --draft and --target out")
        fitted = fit.fit(runs)
        lanes, prompt = {"draft": fitted.draft, "target": fitted.target}, fitted.prompt_tokens
    elif args.lanes is not None:
        lanes, prompt = fit.read_lanes(args.lanes)
    recorded, source = _recorded(args, runs)
    prompt = args.prompt_tokens if args.prompt_tokens is not None else PROMPT_TOKENS if prompt is None else prompt
    rules = _rules(args, prompt)
    problems = args.problems
    if problems is None and args.traces is None:
        problems = PROBLEMS
    told = {"traces": source, "tokens_estimated": recorded.estimated, "seed": args.seed, "prompt_tokens": prompt}
    hardware: Hardware
    if args.draft is None and args.target is None and lanes.keys() == {"draft", "target"}:
        if args.gpus is not None:
            raise InputError("--gpus needs --draft and --target: measured steps alone are of one machine")
        hardware = OneMachine(fit.lane_model(lanes["draft"]), fit.lane_model(lanes["target"]))
        told["fit"] = fitted.to_json() if runs else {"lanes": args.lanes}
        if runs:
            told["runs"] = [_compared(run, hardware, rules) for run in runs]
    else:
        hardware, of_gpus = _gpus(args, lanes)
        told |= of_gpus
    scenario = Scenario(recorded, hardware, rules, strategies, problems, args.seed, args.price_per_hour)
    return scenario, told


def _recorded(args: argparse.Namespace, runs: list[RunRecord]) -> tuple[Recorded, str]:
    """Turn lengths, and where they are from."""
    from atts_engine.evaluation.simulation import fit, work
    from atts_engine.evaluation.traces import read_chains

    if args.traces is not None:
        return work.recorded_turns(read_chains(args.traces), args.chars_per_token), args.traces
    if runs:
        return fit.pooled(runs), "the runs of --fit"
    return work.load_turns(), "lengths that come with the package"


def _rules(args: argparse.Namespace, prompt_tokens: int) -> Rules:
    from atts_engine.evaluation.simulation.simulator import Rules

    return Rules(
        in_flight=args.concurrency,
        prompt_tokens=prompt_tokens,
        chunk_tokens=args.chunk_tokens,
        max_batch_tokens=args.max_batch_tokens,
        hop_s=args.hop_us * 1e-6,
    )


def _gpus(args: argparse.Namespace, lanes: dict[str, Any]) -> tuple[Hardware, dict[str, Any]]:
    from dataclasses import asdict

    from atts_engine.evaluation.simulation.catalogue import device_named, model_named
    from atts_engine.evaluation.simulation.cost import Efficiency
    from atts_engine.evaluation.simulation.placement import Half
    from atts_engine.evaluation.simulation.sweep import Gpus

    device = device_named(args.device)
    given = {
        "compute": args.compute_efficiency,
        "memory": args.memory_efficiency,
        "link": args.link_efficiency,
        "step_s": None if args.step_overhead_us is None else args.step_overhead_us * 1e-6,
        "all_reduce_s": None if args.all_reduce_us is None else args.all_reduce_us * 1e-6,
    }
    efficiency = Efficiency(**{name: value for name, value in given.items() if value is not None})
    if args.weight_bytes < 1:
        raise InputError(f"--weight-bytes must be 1 or more, not {args.weight_bytes}")

    def half(lane: str) -> Half:
        name = getattr(args, lane)
        if name is None:
            raise InputError(
                f"--{lane} is missing: name a model such as qwen2.5-1.5b, or give --fit or --lanes for both"
            )
        table = lanes.get(lane)
        if table is not None and not isinstance(table, tuple):
            raise InputError(f"--lanes: with a model, lane {lane} needs rows and seconds, not a fitted line")
        return Half.of(
            name,
            model_named(name),
            device,
            efficiency,
            itemsize=args.weight_bytes,
            memory_fraction=args.memory_fraction,
            tp=getattr(args, f"{lane}_tp"),
            table=table,
        )

    draft, target = half("draft"), half("target")
    told = {
        "pair": {"draft": args.draft, "target": args.target, "bytes": args.weight_bytes},
        "device": asdict(device),
        "efficiency": asdict(efficiency),
        "gpus_per_copy": {"draft": draft.tp, "target": target.tp},
        "measured_steps": sorted(lanes),
    }
    return Gpus(draft, target, args.placement, args.draft_gpus, args.target_gpus), told


def _compared(run: RunRecord, hardware: Hardware, rules: Rules) -> dict[str, Any]:
    """A run that was fitted, and the simulation of its own chains."""
    from atts_engine.evaluation.simulation.sweep import Scenario, run_point

    found = run_point(Scenario(run.recorded, hardware, rules, (run.strategy,)), None, None, None)
    simulated = found["strategies"][run.strategy]["wall_s"]
    return {
        "folder": str(run.folder),
        "chains": run.chains,
        "measured_s": run.wall_s,
        "simulated_s": simulated,
        "error": simulated / run.wall_s - 1.0,
    }


def _fit_table(told: dict[str, Any]) -> Table:
    rows = [
        (run["folder"], count(run["chains"]), *(f"{run[key]:.2f} s" for key in ("measured_s", "simulated_s")),
         f"{100 * run['error']:+.1f}%")
        for run in told["runs"]
    ]  # fmt: skip
    lanes = told["fit"]["lanes"]
    cost = (
        f"{name}: {1e3 * lane['base_s']:.3g} ms a step, {1e6 * lane['row_s']:.3g} us a row"
        for name, lane in lanes.items()
    )
    return Table("fitted", ("run", "chains", "measured", "simulated", "off by"), tuple(rows), note="; ".join(cost))


def _table(found: dict[str, Any], priced: bool) -> Table:
    """One line per point and strategy."""
    axis = found["axis"]
    columns = (
        axis, "strategy", "GPUs d+t", "time", "latency p50", "p99", "tokens/s", "draft busy", "target busy",
        "at barriers", "waiting", "r draft", "r target", "KV/GPU", "GPU-hours",
    )  # fmt: skip
    rows = []
    for point in found["points"]:
        for name, cell in point["strategies"].items():
            value = count(point[axis])
            if "does_not_fit" in cell:
                rows.append((value, name, "does not fit", *("",) * (len(columns) - 3 + priced)))
                continue
            rows.append((value, name, *_cells(cell), *((f"{cell['cost']:,.2f}",) if priced and cell["cost"] else ())))
    return Table("simulated", columns + (("cost",) if priced else ()), tuple(rows), left=2, note=_note(found))


def _cells(cell: dict[str, Any]) -> tuple[str, ...]:
    lanes, time, place = cell["lanes"], cell["chain_time"], cell.get("placement")

    def of(lane: str, key: str) -> Any:
        return lanes[lane][key] if lane in lanes else None

    held = [lane["peak_kv_bytes_per_gpu"] for lane in lanes.values() if lane["peak_kv_bytes_per_gpu"] is not None]
    ratios = [of(lane, "r") for lane in ("draft", "target")]
    at_barriers = percent(time["barrier"]) + (" !" if cell["synchronisation_dominates"]["chains"] else "")
    gpus = "-"
    if place is not None:
        gpus = f"{place['draft_gpus']}{'=' if place['shared'] else '+'}{place['target_gpus']}"
    return (
        gpus,
        seconds(cell["wall_s"]),
        seconds(cell["latency_s"]["p50"]),
        seconds(cell["latency_s"]["p99"]),
        count(cell["tokens_per_s"]["all"]),
        percent(of("draft", "busy_share"), 0),
        percent(of("target", "busy_share"), 0),
        at_barriers,
        percent(time["waiting"]),
        *("-" if r is None else f"{r:.3g}" for r in ratios),
        f"{max(held) / 1e9:.1f} GB" if held else "-",
        "-" if cell["gpu_hours"] is None else f"{cell['gpu_hours']:.2f}",
    )


def _note(found: dict[str, Any]) -> str:
    axis = found["axis"]
    parts = ["simulated, not measured; ! chains spend more time at barriers than in steps that compute their rows"]
    for strategy, places in found["synchronisation_dominates_at"].items():
        where = [f"{what} at {', '.join(map(str, at))} {axis}" for what, at in places.items() if at]
        if strategy in ("atts", "atts-sync"):
            parts.append(f"synchronisation dominates in {strategy}: {'; '.join(where) or 'nowhere here'}")
    if found["tokens_estimated"]:
        parts.append("tokens are estimated from characters")
    for point in found["points"]:
        reasons = dict.fromkeys(c["does_not_fit"] for c in point["strategies"].values() if "does_not_fit" in c)
        parts += [f"{point[axis]}: {reason}" for reason in reasons]
    return "; ".join(parts)
