"""`atts tune`: find chains, turns, span lengths, alpha and the pair under a budget."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from atts_engine.cli import options
from atts_engine.cli.tables import Table, check_json_target, human_stream, seconds, show, write_json
from atts_engine.errors import InputError

if TYPE_CHECKING:
    from atts_engine.conformal import ColdStart
    from atts_engine.evaluation.tuning import (
        Budget,
        EngineEvaluator,
        Measurement,
        Proposer,
        Sizes,
        Space,
        StudyFolder,
        Trial,
        Unit,
    )
    from atts_engine.pipeline.params import ATTSParams
    from atts_engine.pipeline.records import Problem

PROPOSERS = ("optuna", "agent", "random", "grid")
DEFAULT_SPACE = {"turns": "5-20", "draft_tokens": "100-1000", "target_tokens": "100-1000"}
TASK_SPACE = {"registers": {"turns": "4-16", "draft_tokens": "8-48", "target_tokens": "8-48"}}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `tune` to the commands."""
    text = (
        "Search for the settings of ATTS (chains, turns, span lengths, alpha, pair, takeover) with the most accurate "
        "vote under a budget. Launch settings of the kernels are another matter: `atts bench --tune`."
    )
    parser = subparsers.add_parser("tune", help="find settings of ATTS under a budget", description=text)
    options.add_models(parser)
    options.add_problems(parser)
    group = parser.add_argument_group(
        "search space", "LOW-HIGH is a range, A,B,C a list, one value is fixed; a task has ranges of its own"
    )
    group.add_argument(
        "--pair",
        action="append",
        metavar="D:T",
        help="a draft and a target to choose from, once for each pair (default: --draft and --target)",
    )
    group.add_argument("--chains", default="1-16", metavar="SPACE", help="chains a problem (default: %(default)s)")
    group.add_argument("--turns", metavar="SPACE", help="turns a chain has at most (default: 5-20)")
    group.add_argument("--draft-tokens", metavar="SPACE", help="tokens of a draft span (default: 100-1000)")
    group.add_argument("--target-tokens", metavar="SPACE", help="tokens of a target span (default: 100-1000)")
    group.add_argument("--alpha", default="0.1-0.9", metavar="SPACE", help="takeover rate (default: %(default)s)")
    group.add_argument("--takeover", default="continue,replace", metavar="LIST", help="default: %(default)s")
    options.add_decoding(parser.add_argument_group("what all trials share"))
    options.add_calibrator(parser.add_argument_group("calibration, from a cold start in every trial"))
    group = parser.add_argument_group("budget of a problem, in one kind")
    group.add_argument("--budget-tokens", type=float, metavar="N", help="tokens that the target writes")
    group.add_argument("--budget-flops", type=float, metavar="F", help="operations of both models")
    group.add_argument(
        "--budget-units",
        type=float,
        metavar="U",
        help="AgentTTS's cost (docs/tuning.md); 1: one sample of the unit model",
    )
    group.add_argument("--budget-seconds", type=float, metavar="S", help="wall time over the tuning problems, by each")
    group.add_argument(
        "--unit-parameters",
        type=float,
        metavar="M",
        help="parameters of the unit model (default: the smallest draft's)",
    )
    group = parser.add_argument_group("study")
    group.add_argument("--trials", type=int, default=24, metavar="N", help="proposals in all (default: %(default)s)")
    group.add_argument(
        "--proposer", choices=PROPOSERS, default="random", help="what chooses the next trial (default: %(default)s)"
    )
    group.add_argument(
        "--grid-levels",
        type=int,
        default=3,
        metavar="N",
        help="values of each range, with --proposer grid (default: 3)",
    )
    group.add_argument("--prune", action="store_true", help="end a trial early that looks hopeless (docs/tuning.md)")
    group.add_argument(
        "--validate",
        type=int,
        default=0,
        metavar="N",
        help="keep the last N problems out of the study, and run the best configuration on them",
    )
    group.add_argument("--out", type=options.place, required=True, metavar="DIR", help="folder of the study")
    group.add_argument("--resume", action="store_true", help="go on with the study that DIR holds")
    group = parser.add_argument_group("agent, with --proposer agent")
    group.add_argument(
        "--agent-url", metavar="URL", help="OpenAI-compatible endpoint, such as http://localhost:8000/v1"
    )
    group.add_argument("--agent-model", metavar="NAME", help="the model's name there")
    group.add_argument("--agent-key-env", metavar="NAME", help="environment variable that holds the key")
    group.add_argument(
        "--agent-timeout", type=float, default=120.0, metavar="S", help="seconds for one answer (default: %(default)g)"
    )
    options.add_output(parser)


def run(args: argparse.Namespace) -> int:
    """Search, save, report. `InputError` before any work for anything that cannot be used."""
    from atts_engine.cli.job import resumable
    from atts_engine.evaluation.folder import write_json as save_json
    from atts_engine.evaluation.report import write_report
    from atts_engine.evaluation.tuning import StudyFolder, best, run_study
    from atts_engine.evaluation.tuning.chat import EndpointError
    from atts_engine.evaluation.tuning.report import figures, study_report

    check_json_target(args.json)
    _check_counts(args)
    study = _Study(args)
    folder = StudyFolder.open(args.out, study.settings(), study.space, resume=args.resume)
    out = human_stream(args.json)
    validation: Measurement | None = None
    with resumable(args, lambda: f"{len(folder.trials)} trials are saved in {folder.path}"):
        try:
            with folder, study.evaluator() as evaluator:
                if folder.restored:
                    out.write(f"{folder.restored} trials were saved by an earlier process\n")

                def ended(trial: Trial) -> None:
                    out.write(f"[{trial.number}/{args.trials}] {_trial_line(trial, study.budget)}\n")
                    out.flush()

                run_study(
                    folder, study.budget, study.proposer, evaluator, trials=args.trials, prune=args.prune, ended=ended
                )
                top = best(folder.trials, study.budget)
                if top is not None and study.kept_out:
                    assert top[0].configuration is not None
                    validation = evaluator.validate(top[0].configuration, study.kept_out)
        except EndpointError as error:
            saved = f"{len(folder.trials)} trials are saved; --resume goes on with them"
            raise EndpointError(f"{error} ({saved})") from error
        found = figures(folder.trials, study.budget, study.settings(), validation)
        save_json(folder.path / "summary.json", found)
        page = folder.path / "report.html"
        write_report(page, study_report(folder.trials, study.budget, study.settings(), validation))
        show(_table(folder, study.budget, validation), out, args.plain)
        out.write(f"report: {page}\n")
        write_json(found, args.json)
    return 0


class _Study:
    """What the command line asks for, checked as far as that goes without the models."""

    def __init__(self, args: argparse.Namespace) -> None:
        from atts_engine.cli.options import cold_start
        from atts_engine.conformal import make_calibrator
        from atts_engine.evaluation.tuning.evaluator import check_gold

        self._args = args
        self._pairs = _pairs(args)
        self.budget = _budget(args)
        self.space = _space(args, list(self._pairs))
        self.base = _base(args)
        self._cold: ColdStart | None = cold_start(args)
        make_calibrator(args.calibrator, self.base.alpha, cold=self._cold)
        self._configs = {
            name: options.engine_config(argparse.Namespace(**{**vars(args), "draft": draft, "target": target}))
            for name, (draft, target) in self._pairs.items()
        }
        self._sizes = _sizes(self._pairs)
        self._unit = _unit(args, self._sizes)
        self._problems, self.kept_out = _split(options.problems(args), args.validate)
        check_gold((*self._problems, *self.kept_out))
        self.proposer = _proposer(args, self.space, self.budget, self._sizes, self._unit)

    def evaluator(self) -> EngineEvaluator:
        """What runs the trials."""
        from atts_engine.conformal import Calibrator, make_calibrator
        from atts_engine.engine import AsyncEngine
        from atts_engine.evaluation.tuning import EngineEvaluator

        def fresh(engine: AsyncEngine, params: ATTSParams) -> Calibrator:
            meta = engine.calibration_meta(params)
            return make_calibrator(self._args.calibrator, params.alpha, meta=meta, cold=self._cold)

        return EngineEvaluator(
            self._configs, self._sizes, self._unit, self._problems, self.base, fresh, self._args.concurrency
        )

    def settings(self) -> dict[str, Any]:
        """All that decides what trials are proposed and what they measure, as JSON. How many there are does not, nor
        where the agent is served."""
        from atts_engine.evaluation.job import problems_digest

        args = self._args
        shared = ("temperature", "top_k", "top_p", "min_p", "seed", "vote")
        return {
            "format": "atts-tune/1",
            "models": {name: list(pair) for name, pair in self._pairs.items()} | {"dtype": args.dtype},
            "space": self.space.as_json(),
            "budget": asdict(self.budget),
            "unit": asdict(self._unit),
            "params": {name: getattr(self.base, name) for name in shared},
            "calibration": {
                "calibrator": args.calibrator,
                "cold_start": None if self._cold is None else [self._cold.rule, self._cold.minimum],
            },
            "proposer": {
                "name": args.proposer,
                "grid_levels": args.grid_levels if args.proposer == "grid" else None,
                "model": args.agent_model if args.proposer == "agent" else None,
            },
            "prune": args.prune,
            "problems": {"count": len(self._problems), "sha256": problems_digest(self._problems)},
        }


def _check_counts(args: argparse.Namespace) -> None:
    for flag, value, least in (
        ("--trials", args.trials, 1),
        ("--grid-levels", args.grid_levels, 1),
        ("--validate", args.validate, 0),
    ):
        if value < least:
            raise InputError(f"{flag} must be {least} or more, not {value}")


def _pairs(args: argparse.Namespace) -> dict[str, tuple[str, str]]:
    """{name: (draft, target)} of the pairs to choose from."""
    task = options.TASK_DEFAULTS.get(args.task or "", {})
    if args.pair is None:
        draft, target = args.draft or task.get("draft"), args.target or task.get("target")
        if draft is None or target is None:
            raise InputError("name the models: --pair DRAFT:TARGET, once for each pair, or --draft and --target")
        found = [(draft, target)]
    else:
        if args.draft or args.target:
            raise InputError("--pair names draft and target: leave --draft and --target out")
        found = [_pair(text) for text in args.pair]
    pairs = {f"{draft}:{target}": (draft, target) for draft, target in found}
    if len(pairs) != len(found):
        raise InputError("--pair names a pair twice")
    return pairs


def _pair(text: str) -> tuple[str, str]:
    # The colons of a scheme and of a port belong to a model's name.
    model = r"(\w+://[^/]*/[^:]*|[^:]+)"
    found = re.fullmatch(f"{model}:{model}", text)
    if found is None:
        raise InputError(f"--pair must be DRAFT:TARGET, not {text!r}")
    return found[1], found[2]


def _budget(args: argparse.Namespace) -> Budget:
    from atts_engine.evaluation.tuning import KINDS, Budget

    given = {kind: limit for kind in KINDS if (limit := getattr(args, f"budget_{kind}")) is not None}
    if len(given) != 1:
        raise InputError(f"name one budget: {', '.join(f'--budget-{kind}' for kind in KINDS)}")
    return Budget(*next(iter(given.items())))


def _space(args: argparse.Namespace, pairs: Sequence[str]) -> Space:
    from atts_engine.evaluation.tuning import Choice, Space, dimension

    task = TASK_SPACE.get(args.task or "", {})
    takeovers = tuple(name.strip() for name in args.takeover.split(","))
    return Space(
        {
            "pair": Choice(tuple(pairs)),
            "takeover": Choice(takeovers),
            **{
                name: dimension(name, getattr(args, name) or task.get(name) or DEFAULT_SPACE[name])
                for name in ("chains", "turns", "draft_tokens", "target_tokens", "alpha")
            },
        }
    )


def _base(args: argparse.Namespace) -> ATTSParams:
    from atts_engine.config import ATTSParams

    return ATTSParams(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        seed=args.seed,
        vote=args.vote,
    )


def _sizes(pairs: dict[str, tuple[str, str]]) -> dict[str, Sizes]:
    from atts_engine.evaluation.tuning import Sizes
    from atts_engine.models.size import parameter_count

    counts = {model: parameter_count(model) for pair in pairs.values() for model in pair}
    return {name: Sizes(counts[draft], counts[target]) for name, (draft, target) in pairs.items()}


def _unit(args: argparse.Namespace, sizes: dict[str, Sizes]) -> Unit:
    from atts_engine.evaluation.tuning import Unit

    if args.unit_parameters is not None and not args.unit_parameters >= 1:
        raise InputError(f"--unit-parameters must be 1 or more, not {args.unit_parameters}")
    return Unit(parameters=args.unit_parameters or min(pair.draft for pair in sizes.values()))


def _split(problems: tuple[Problem, ...], kept_out: int) -> tuple[tuple[Problem, ...], tuple[Problem, ...]]:
    if kept_out >= len(problems):
        raise InputError(f"--validate {kept_out} leaves none of the {len(problems)} problems to tune on")
    at = len(problems) - kept_out
    return problems[:at], problems[at:]


def _proposer(args: argparse.Namespace, space: Space, budget: Budget, sizes: dict[str, Sizes], unit: Unit) -> Proposer:
    from atts_engine.evaluation.tuning import GridSearch, RandomSearch

    if args.proposer == "random":
        return RandomSearch(space, args.seed)
    if args.proposer == "grid":
        return GridSearch(space, args.seed, args.grid_levels)
    if args.proposer == "optuna":
        from atts_engine.evaluation.tuning.optuna_proposer import OptunaProposer

        return OptunaProposer(space, budget, args.seed)
    from atts_engine.evaluation.tuning.agent import Agent
    from atts_engine.evaluation.tuning.chat import ChatEndpoint

    if args.agent_url is None or args.agent_model is None:
        raise InputError("--proposer agent needs --agent-url URL and --agent-model NAME")
    if not args.agent_timeout > 0:
        raise InputError(f"--agent-timeout must be more than 0 seconds, not {args.agent_timeout}")
    key = None
    if args.agent_key_env is not None and not (key := os.environ.get(args.agent_key_env)):
        raise InputError(f"--agent-key-env: there is no environment variable {args.agent_key_env}")
    endpoint = ChatEndpoint(args.agent_url, args.agent_model, key, args.agent_timeout)
    return Agent(endpoint, space, budget, sizes, unit)


def _trial_line(trial: Trial, budget: Budget) -> str:
    from atts_engine.evaluation.tuning import KINDS
    from atts_engine.evaluation.tuning.report import cells

    if trial.configuration is None:
        return f"refused: {'; '.join(trial.complaints)}"
    m = trial.measurement
    if m is None:
        return (
            f"{trial.configuration}: not run, planned {trial.planned_cost:,.4g} {KINDS[budget.kind]}, over the budget"
        )
    accuracy, spread, _, cost = cells(m, budget)
    ended = f"as trial {trial.repeats}" if trial.repeats is not None else seconds(m.wall_s)
    pruned = f", ended after {m.problems} problems" if trial.state == "pruned" else ""
    return f"{trial.configuration}: {accuracy} ({spread}), {cost} {KINDS[budget.kind]}; {ended}{pruned}"


def _table(folder: StudyFolder, budget: Budget, validation: Measurement | None) -> Table:
    from atts_engine.evaluation.tuning import KINDS, best, pareto
    from atts_engine.evaluation.tuning.report import COLUMNS, optimism, rows
    from atts_engine.evaluation.tuning.results import measured

    trials = folder.trials
    notes = []
    if (top := best(trials, budget)) is None:
        notes.append(f"Nothing was measured that keeps to {budget}: raise it, or lower the ranges of the search space.")
    else:
        notes.append(f"best within {budget}: trial {top[0].number}, {top[0].configuration}")
        notes.append(optimism(len(measured(trials)), validation, top[1].accuracy))
    if trials and trials[-1].insights:
        notes += ["what the agent believes:", *(f"- {line}" for line in trials[-1].insights)]
    columns = (*COLUMNS[:-1], f"{KINDS[budget.kind]} a problem")
    title = f"{len(trials)} proposals; nothing beats these in accuracy and cost"
    return Table(title, columns, tuple(rows(pareto(trials, budget.kind), budget)), left=2, note="\n".join(notes))
