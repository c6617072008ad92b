"""Options that several commands share, and what is made of them: settings, parameters, problems."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from atts_engine.errors import InputError

if TYPE_CHECKING:
    from atts_engine.config import ATTSParams, EngineConfig
    from atts_engine.conformal import ColdStart
    from atts_engine.evaluation.datasets import Dataset
    from atts_engine.pipeline.records import Problem

# What a built-in task runs with where a flag is left out: its spans are much shorter than those of real models.
TASK_DEFAULTS: dict[str, dict[str, Any]] = {
    "registers": {
        "draft": "tiny-draft",
        "target": "tiny-target",
        "draft_tokens": 24,
        "target_tokens": 24,
        "turns": 16,
    }
}
GYM = "reasoning-gym:"
DEFAULT_COUNT = 48
"""Problems of a task."""
DEFAULTS: dict[str, Any] = {"draft_tokens": 500, "target_tokens": 500, "turns": 15}


def place(text: str) -> str:
    """A folder or file to write to, as a type of argparse: an empty text would name the folder that one stands in."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must name a place, not an empty text")
    return text


def add_models(parser: argparse.ArgumentParser) -> None:
    """Which models, where, and in which precision."""
    group = parser.add_argument_group("models")
    text = (
        "a Hugging Face folder, a .gguf file, tiny-draft, tiny-target, smollm2-135m, or a server's: "
        "vllm://HOST:PORT/NAME, sglang://HOST:PORT/NAME"
    )
    group.add_argument(
        "--draft", metavar="MODEL", help=f"the model that writes: {text}; needed but for --task registers"
    )
    group.add_argument("--target", metavar="MODEL", help="the model that scores and takes over: as --draft")
    group.add_argument(
        "--draft-device", default="cpu", metavar="DEVICE", help="cpu, cuda or cuda:N (default: %(default)s)"
    )
    group.add_argument("--target-device", default="cpu", metavar="DEVICE", help="as --draft-device")
    group.add_argument(
        "--draft-tokenizer",
        metavar="MODEL",
        help="where the tokenizer of a server's draft is read from (default: the folder that the server names)",
    )
    group.add_argument("--target-tokenizer", metavar="MODEL", help="as --draft-tokenizer")
    group.add_argument(
        "--patience",
        type=float,
        default=60.0,
        metavar="S",
        help="seconds without any answer after which a server is given up; ten times as long without a byte of one "
        "request, ten minutes at the least, and that is asked again (default: 60)",
    )
    group.add_argument(
        "--server-requests",
        type=int,
        default=256,
        metavar="N",
        help="requests open to one server at a time (default: %(default)s)",
    )
    group.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (default: %(default)s)")
    group.add_argument(
        "--page-size", type=int, default=16, metavar="N", help="tokens in a KV page (default: %(default)s)"
    )
    group.add_argument(
        "--kv-tokens", type=int, default=None, metavar="N", help="KV capacity of a lane in tokens (default: what fits)"
    )
    group.add_argument(
        "--kv-memory-fraction",
        type=float,
        default=None,
        metavar="F",
        help="of a device's free memory for KV, where --kv-tokens is left out (default: 0.85 on a GPU, 0.25 on a CPU)",
    )
    group.add_argument(
        "--preemption",
        choices=("auto", "swap", "recompute"),
        default="auto",
        help="KV that does not fit is moved to host memory, or dropped and computed again (default: the quicker)",
    )
    group.add_argument(
        "--chunk-tokens",
        type=int,
        default=64,
        metavar="N",
        help="tokens that the draft hands over at a time; traces hold a score for each chunk (default: %(default)s)",
    )
    group.add_argument("--threads", type=int, default=None, metavar="N", help="CPU threads of torch (default: its own)")
    group.add_argument(
        "--overlap",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="a lane launches a step before it has seen the results of the one before (default: on a GPU)",
    )
    group.add_argument(
        "--graphs",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="forward passes as CUDA graphs (default: where every op of one can be captured)",
    )
    group.add_argument(
        "--packed-weights",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="weights in three quarters of their bytes, without loss (default: bfloat16 on a CPU with AVX512-BF16)",
    )
    group.add_argument(
        "--lane-threads",
        choices=("one", "each"),
        help="one scheduler thread for both lanes, or each lane its own (default: each on a CPU of several cores)",
    )
    group.add_argument("--profile", action="store_true", help="NVTX ranges on the time line of a GPU")
    group.add_argument(
        "--ops",
        default=None,
        metavar="NAME",
        help="force an implementation of the kernels, as `atts doctor` names them (default: each device's own choice)",
    )
    group.add_argument(
        "--tuning",
        default=None,
        metavar="FILE",
        help="launch settings of the kernels, as `atts bench --tune` writes them",
    )
    group.add_argument(
        "--check-ops", action="store_true", help="kernels check the values of their inputs too (slow on a GPU)"
    )


def add_problems(parser: argparse.ArgumentParser) -> None:
    """Where the problems come from."""
    group = parser.add_argument_group("problems")
    group.add_argument(
        "--problems", metavar="FILE", help="problem file, one JSON object a line: id, problem, optional answer"
    )
    group.add_argument("--limit", type=int, default=None, metavar="N", help="only the first N problems")
    group.add_argument(
        "--dataset",
        metavar="NAME",
        help="a set of the Hugging Face hub, NAME[:CONFIG][/SPLIT], such as openai/gsm8k:main/test",
    )
    group.add_argument("--question-field", metavar="COLUMN", help="column of the set with the problems")
    group.add_argument("--answer-field", metavar="COLUMN", help="column of the set with the gold answers")
    group.add_argument(
        "--task",
        type=_task_name,
        metavar="TASK",
        help="problems made by a task: registers (built in), or reasoning-gym:NAME",
    )
    group.add_argument(
        "--seed-tasks", type=int, default=None, metavar="N", help="seed of a task's problems (default: --seed)"
    )
    group.add_argument("--steps", default=None, metavar="LO-HI", help="steps of a register problem (default: 4-6)")
    group.add_argument(
        "--problems-count", type=int, default=None, metavar="N", help=f"problems of a task (default: {DEFAULT_COUNT})"
    )


def add_sampling(parser: argparse.ArgumentParser, *, strategy: bool = True) -> None:
    """How chains are drawn, tested and voted on."""
    group = parser.add_argument_group("algorithm")
    group.add_argument("--chains", type=int, default=8, metavar="M", help="chains a problem (default: %(default)s)")
    group.add_argument("--turns", type=int, metavar="N", help="turns a chain has at most (default: 15; registers: 16)")
    group.add_argument(
        "--draft-tokens", type=int, metavar="K", help="tokens of a draft span (default: 500; registers: 24)"
    )
    group.add_argument(
        "--target-tokens", type=int, metavar="K", help="tokens of a target span (default: 500; registers: 24)"
    )
    group.add_argument("--alpha", type=float, default=0.4, help="nominal takeover rate (default: %(default)s)")
    add_decoding(group)
    group.add_argument(
        "--takeover",
        choices=("continue", "replace"),
        default="continue",
        help="the target goes on after the span, or redoes it (default: %(default)s)",
    )
    if strategy:
        group.add_argument(
            "--strategy",
            metavar="NAME[:OPTION=VALUE...]",
            help="how chains are written and voted on, such as atts (default), target or rsd:threshold=0.8; "
            "docs/strategies.md has them all",
        )
        group.add_argument(
            "--mode", choices=("async", "sync"), help="async is --strategy atts, sync is --strategy atts-sync"
        )


def add_decoding(group: argparse._ActionsContainer) -> None:
    """How tokens are drawn and chains are voted on."""
    group.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default: %(default)s)")
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="0 is off (default)")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="1 is off (default)")
    group.add_argument("--min-p", type=float, default=0.0, metavar="P", help="0 is off (default)")
    group.add_argument("--seed", type=int, default=0, help="seed of everything random (default: %(default)s)")
    group.add_argument(
        "--vote",
        choices=("majority", "weighted"),
        default="majority",
        help="how chains become an answer (default: %(default)s)",
    )


def add_calibration(parser: argparse.ArgumentParser, *, monitor: bool = True) -> None:
    """Which calibrator, and from which state it starts. monitor: whether the user is asked about the drift monitor."""
    group = parser.add_argument_group("calibration")
    add_calibrator(group)
    group.add_argument(
        "--policy", default="threshold", metavar="NAME", help="threshold (default) or exact-count (per problem)"
    )
    if monitor:
        group.add_argument(
            "--monitor", action="store_true", help="watch the p-values for drift and say so when it is found"
        )
    group.add_argument("--calibration", metavar="FILE", help="state to start from, as `atts calibrate` saves it")
    group.add_argument(
        "--frozen", action="store_true", help="do not learn from this run's scores (needs --calibration)"
    )


def add_early_verdict(parser: argparse.ArgumentParser) -> None:
    """For the commands that can run with a frozen calibration."""
    parser.add_argument(
        "--early-verdict",
        action="store_true",
        help="end a draft span where nothing could save it from being taken over any more (needs --frozen)",
    )


def add_calibrator(group: argparse._ActionsContainer, further: str = "") -> None:
    """The calibrator, and what it does before it has scores."""
    group.add_argument(
        "--calibrator",
        default="adaptive",
        metavar="NAME",
        help="adaptive (default), aci, mondrian, window, weighted, hierarchical, tracker or split" + further,
    )
    group.add_argument(
        "--cold-start",
        metavar="RULE:N",
        help="while a key has fewer than N scores: coin, accept, takeover, or borrow those of other keys",
    )


def cold_start(args: argparse.Namespace) -> ColdStart | None:
    """What --cold-start names; None where it was left out, which leaves the calibrator its own."""
    if args.cold_start is None:
        return None
    from atts_engine.conformal import CalibrationError, ColdStart

    rule, colon, minimum = args.cold_start.partition(":")
    if not colon or not minimum.isdecimal():
        raise InputError(f"--cold-start must be RULE:N, such as accept:16, not {args.cold_start!r}")
    try:
        return ColdStart(rule, int(minimum))
    except CalibrationError as error:
        raise InputError(str(error)) from error


def add_output(parser: argparse.ArgumentParser) -> None:
    """What is shown, and how many problems are in flight."""
    group = parser.add_argument_group("running")
    group.add_argument(
        "--concurrency", type=int, default=8, metavar="N", help="problems in flight (default: %(default)s)"
    )
    group.add_argument("--json", metavar="FILE", help="write the figures as JSON to FILE, or - for stdout")
    group.add_argument("--plain", action="store_true", help="plain lines even on a terminal")


def add_ray(parser: argparse.ArgumentParser) -> None:
    """Many hosts (docs/scale-out.md)."""
    group = parser.add_argument_group("scale-out")
    group.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="share the problems among workers of a Ray cluster: auto, HOST:PORT, ray://HOST:PORT, or local",
    )
    group.add_argument(
        "--ray-workers", type=int, metavar="N", help="workers, each an engine (default: as many as there is room for)"
    )


def check_ray(args: argparse.Namespace) -> None:
    """`InputError` for --ray-workers that cannot be had."""
    if args.ray_workers is not None and args.ray is None:
        raise InputError("--ray-workers belongs to --ray: name the cluster, or --ray local")
    if args.ray_workers is not None and args.ray_workers < 1:
        raise InputError(f"--ray-workers must be 1 or more, not {args.ray_workers}")


def fill_defaults(args: argparse.Namespace) -> None:
    """Give every flag that was left out its value: the task's, or the general one. `InputError` for a missing model."""
    task = TASK_DEFAULTS.get(args.task or "", {})
    for name in ("draft_tokens", "target_tokens", "turns"):
        if getattr(args, name) is None:
            setattr(args, name, task.get(name, DEFAULTS[name]))
    for name in ("draft", "target"):
        if getattr(args, name) is None:
            if name not in task:
                raise InputError(
                    f"--{name} is missing: name a model folder, a .gguf file or a built-in model such as tiny-{name}"
                )
            setattr(args, name, task[name])


def strategy_of(args: argparse.Namespace) -> str:
    """The strategy that --strategy and --mode name together, with its options: what `parse_strategy` reads."""
    of_mode = {"async": "atts", "sync": "atts-sync"}.get(args.mode or "")
    if args.strategy and of_mode and args.strategy.partition(":")[0] != of_mode:
        raise InputError(f"--mode {args.mode} is --strategy {of_mode}, but --strategy {args.strategy} was given too")
    return args.strategy or of_mode or "atts"


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """The engine's settings. `InputError` for a model that is not there, before anything is written or loaded."""
    from atts_engine.backends.remote.address import is_address
    from atts_engine.config import EngineConfig
    from atts_engine.models import resolve

    for name in (args.draft, args.target, args.draft_tokenizer, args.target_tokenizer):
        if name is not None and not is_address(name):
            resolve(name)
    return EngineConfig(
        draft=args.draft,
        target=args.target,
        draft_tokenizer=args.draft_tokenizer,
        target_tokenizer=args.target_tokenizer,
        patience_s=args.patience,
        server_requests=args.server_requests,
        draft_device=args.draft_device,
        target_device=args.target_device,
        dtype=args.dtype,
        packed_weights=args.packed_weights,
        page_size=args.page_size,
        kv_tokens=args.kv_tokens,
        kv_memory_fraction=args.kv_memory_fraction,
        preemption=args.preemption,
        chunk_tokens=args.chunk_tokens,
        threads=args.threads,
        overlap=args.overlap,
        graphs=args.graphs,
        lane_threads=args.lane_threads,
        profile=args.profile,
        ops=args.ops,
        check_ops=args.check_ops,
        tuning=args.tuning,
    )


def params(args: argparse.Namespace, strategy: str, early_verdict: bool = False) -> ATTSParams:
    """The algorithm's parameters, validated. strategy: with its options, as `strategy_of` gives it."""
    from atts_engine.config import ATTSParams
    from atts_engine.pipeline.settings import parse_strategy

    name, chosen = parse_strategy(strategy)
    return ATTSParams(
        chains=args.chains,
        turns=args.turns,
        draft_tokens=args.draft_tokens,
        target_tokens=args.target_tokens,
        alpha=args.alpha,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        seed=args.seed,
        strategy=name,
        options=chosen,
        policy=args.policy,
        takeover=args.takeover,
        vote=args.vote,
        early_verdict=early_verdict,
    )


def problems(args: argparse.Namespace) -> tuple[Problem, ...]:
    """The problems of `dataset`, in order; at least one."""
    return dataset(args).problems


def dataset(args: argparse.Namespace) -> Dataset:
    """What --problems, --dataset or --task names."""
    from atts_engine.evaluation import datasets

    if args.concurrency < 1:
        raise InputError(f"--concurrency must be 1 or more, not {args.concurrency}")
    if sum(source is not None for source in (args.problems, args.dataset, args.task)) != 1:
        raise InputError(
            "name the problems by either --problems FILE or --task registers (or --task reasoning-gym:NAME, or "
            "--dataset NAME)"
        )
    owners = {
        "--dataset": ("question_field", "answer_field"),
        "--task": ("steps", "problems_count", "seed_tasks"),
    }
    for owner, names in owners.items():
        for name in names:
            if getattr(args, owner[2:]) is None and getattr(args, name) is not None:
                raise InputError(f"--{name.replace('_', '-')} belongs to {owner}")
    if args.task is not None:
        if args.limit is not None:
            raise InputError("--limit belongs to a file or set; a task's problems are counted by --problems-count")
        return _task(args)
    if args.limit is not None and args.limit < 1:
        raise InputError(f"--limit must be 1 or more, not {args.limit}")
    if args.problems is not None:
        return datasets.from_file(args.problems, args.limit)
    return datasets.from_hub(args.dataset, question=args.question_field, answer=args.answer_field, limit=args.limit)


def _task_name(text: str) -> str:
    if text in TASK_DEFAULTS or (text.startswith(GYM) and len(text) > len(GYM)):
        return text
    raise argparse.ArgumentTypeError(f"no task {text!r}; there are {', '.join(sorted(TASK_DEFAULTS))}, {GYM}NAME")


def _task(args: argparse.Namespace) -> Dataset:
    from atts_engine.evaluation import datasets

    count = DEFAULT_COUNT if args.problems_count is None else args.problems_count
    if count < 1:
        raise InputError(f"--problems-count must be 1 or more, not {count}")
    seed = args.seed if args.seed_tasks is None else args.seed_tasks
    if args.task.startswith(GYM):
        if args.steps is not None:
            raise InputError("--steps belongs to --task registers")
        return datasets.from_gym(args.task.removeprefix(GYM), seed, count)
    return datasets.from_registers(seed, count, _step_range(args.steps or "4-6"))


def _step_range(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    try:
        steps = int(low), int(high or low)
    except ValueError:
        raise InputError(f"--steps must be a number or a range such as 4-6, not {text!r}") from None
    if not 1 <= steps[0] <= steps[1]:
        raise InputError(f"--steps must be a range such as 4-6 with 1 <= LO <= HI, not {text!r}")
    return steps
