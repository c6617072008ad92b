"""A whole job, chains with takeovers, on this engine and through two vLLM servers, in the same run.

    python -m bench.e2e.job --out bench/results/e2e_job_cpu.json [--vllm PYTHON]

PYTHON: an interpreter that has vLLM; without it our side is measured alone, and the output says so. Both sides get the
same weights and prompts, write spans of the same lengths (no token ends one) and take over the same turns of the same
chains, which a seed says and no score; all problems are in flight together. Ours is the engine's own pipeline; vLLM's
is `vllm_job.py`. The tokens differ, as the two draw other random numbers; how many there are is checked. The two take
turns, and every round of each is in the file.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from atts_engine import ops
from atts_engine.backends import Lane, Seq
from atts_engine.config import SamplingParams, dtype_of
from atts_engine.evaluation.files import write_text
from atts_engine.models import load_model
from atts_engine.pipeline import ATTSParams, Pair, Problem, Prompts, run_problem
from atts_engine.pipeline.gate import Judged, Place
from atts_engine.pipeline.streams import stream_key
from bench.e2e.export import export
from bench.e2e.pair import open_pair, prompt_of
from bench.output import out_file
from bench.provenance import provenance

SETTINGS: tuple[dict[str, Any], ...] = (
    {"dtype": "float32", "cores": ["0", "1"]},
    {"dtype": "float32", "cores": ["0-1", "0-1"]},
    {"dtype": "bfloat16", "cores": ["0", "1"]},
    {"dtype": "bfloat16", "cores": ["0-1", "0-1"]},
    {"dtype": "bfloat16", "cores": ["0-1", "0-1"], "enforce_eager": False},
)
"""Of the peer, on two cores: a core for each server, or both for both; eager unless it says otherwise."""


@dataclass(frozen=True, slots=True)
class Job:
    """takeovers: of each turn of each chain of each problem."""

    prompts: list[list[int]]
    takeovers: list[list[list[bool]]]
    draft_tokens: int
    target_tokens: int

    @property
    def work(self) -> tuple[int, int]:
        """Tokens that the draft and the target are to write."""
        flat = [taken for problem in self.takeovers for chain in problem for taken in chain]
        return len(flat) * self.draft_tokens, sum(flat) * self.target_tokens


def make_job(args: argparse.Namespace, round_: int) -> Job:
    """Another round has other prompts, so that no prefix cache knows them."""

    def taken(problem: int, chain: int, turn: int) -> bool:
        return stream_key(args.seed, f"{problem}", chain, "takeover", turn) % 1000 < 1000 * args.alpha

    return Job(
        [prompt_of(1 + p + round_ * args.problems, args.prompt_tokens) for p in range(args.problems)],
        [[[taken(p, c, t) for t in range(args.turns)] for c in range(args.chains)] for p in range(args.problems)],
        args.draft_tokens,
        args.target_tokens,
    )


class ScheduledGate:
    """Has every span scored, and takes over the turns that the job says."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.scores: list[float] = []

    async def ask(self, lane: Lane, seq: Seq, place: Place, seed: int, most: int | None = None) -> Judged:
        result = await lane.verdict(seq, None)
        self.scores.append(result.score)
        takeover = self._job.takeovers[int(place.problem_id)][place.chain][place.turn]
        return Judged(result.score, takeover, logprobs=result.logprobs, wait_s=result.wait_s)

    def settled(self, place: Place, seed: int, logprobs: Sequence[float], most: int) -> int | None:
        return None

    def begin(self, problem_id: str, chains: Sequence[int]) -> None:
        return None

    def enter(self, place: Place) -> None:
        return None

    def leave(self, place: Place) -> None:
        return None

    def end(self, problem_id: str) -> None:
        return None


class FixedLengths(ATTSParams):
    """Spans of exactly the lengths asked for."""

    def sampling(self, key: int, *, logprobs: bool = False) -> SamplingParams:
        return replace(ATTSParams.sampling(self, key, logprobs=logprobs), ignore_eos=True)


async def ours(pair: Pair, job: Job) -> dict[str, Any]:
    chains, turns = len(job.takeovers[0]), len(job.takeovers[0][0])
    params = FixedLengths(
        chains=chains, turns=turns, draft_tokens=job.draft_tokens, target_tokens=job.target_tokens, seed=0
    )
    gate = ScheduledGate(job)
    began = time.perf_counter()
    solutions = await asyncio.gather(
        *(
            run_problem(pair, Prompts(tuple(p), tuple(p)), Problem(f"{i}", "-"), params, gate, lambda _: None)
            for i, p in enumerate(job.prompts)
        )
    )
    seconds = time.perf_counter() - began
    written = [chain for solution in solutions for chain in solution.chains]
    ended = {chain.finish: chain.error for chain in written if chain.finish != "turns"}
    if ended:
        raise SystemExit(f"chains that ended before their last turn: {ended}")
    return {
        "seconds": seconds,
        "draft_tokens": sum(chain.draft_tokens for chain in written),
        "target_tokens": sum(chain.target_tokens for chain in written),
        "mean_score": statistics.mean(gate.scores),
    }


class Peer:
    """Two vLLM servers and their client, in processes of their own."""

    def __init__(self, python: str, folder: Path, settings: dict[str, Any]) -> None:
        script = Path(__file__).with_name("vllm_job.py")
        self._process = subprocess.Popen(
            [python, str(script), str(folder), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.version: str = self._answer("READY ")["version"]

    def stop(self) -> None:
        """Stand still while the other side is measured: idle servers poll."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.killpg(self._process.pid, signal.SIGCONT)

    async def run(self, job: Job) -> dict[str, Any]:
        assert self._process.stdin is not None
        fields = ("prompts", "takeovers", "draft_tokens", "target_tokens")
        self._process.stdin.write(json.dumps({name: getattr(job, name) for name in fields}) + "\n")
        self._process.stdin.flush()
        return await asyncio.to_thread(self._answer, "DONE ")

    def _answer(self, mark: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(mark):
                answer: dict[str, Any] = json.loads(line[len(mark) :])
                return answer
        raise SystemExit(f"vLLM's side ended with {self._process.wait()} before it answered")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    model = load_model(args.model, "cpu", dtype_of(args.dtype))
    longest = args.prompt_tokens + args.turns * (args.draft_tokens + args.target_tokens)
    kv_tokens = (longest + 32) * args.chains * args.problems
    runs: list[dict[str, Any]] = []
    version = None
    load = os.getloadavg()
    own = f"atts-engine {args.dtype}"

    draft_tokens, target_tokens = make_job(args, 0).work

    def all_found() -> dict[str, Any]:
        return {
            "provenance": provenance("python -m bench.e2e.job"),
            "settings": {
                name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items() if name != "vllm"
            },
            "threads": torch.get_num_threads(),
            "load_before": load,
            "linear": ops.chosen("linear", "cpu"),
            "vllm": version,
            "work": {"draft_tokens": draft_tokens, "target_tokens": target_tokens},
            "runs": runs,
            "engines": summary(runs, own, draft_tokens + target_tokens),
        }

    def note(name: str, round_: int, job: Job, found: dict[str, Any]) -> None:
        if (found["draft_tokens"], found["target_tokens"]) != job.work:
            raise SystemExit(f"{name} wrote {found}, and the job is {job.work}")
        runs.append({"engine": name, "round": round_, "load": os.getloadavg()[0]} | found)
        print(f"{name:60} round {round_}: {found['seconds']:8.1f} s, mean score {found['mean_score']:.3f}", flush=True)
        if args.out:  # after every run: what was measured outlives an interruption
            write_text(args.out, json.dumps(all_found(), indent=1) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        if args.vllm:
            export(model, Path(folder))
        async with open_pair(model, kv_tokens) as pair:
            warm = make_job(argparse.Namespace(**vars(args) | {"problems": 1, "chains": 2, "turns": 1}), 0)
            await ours(pair, warm)
            round_ = 1
            for settings in [SETTINGS[i] for i in args.settings] if args.vllm else (None,):
                peer = None if settings is None else Peer(args.vllm, Path(folder), settings)
                try:
                    if peer is not None:
                        version = peer.version
                        await peer.run(warm)
                    for _ in range(args.rounds):
                        job = make_job(args, round_)
                        if peer is not None:
                            peer.stop()
                        note(own, round_, job, await ours(pair, job))
                        if peer is not None:
                            peer.go_on()
                            note(f"vLLM {version} {json.dumps(settings)}", round_, job, await peer.run(job))
                        round_ += 1
                finally:
                    if peer is not None:
                        peer.close()
    return all_found()


def summary(runs: Sequence[dict[str, Any]], own: str, tokens: int) -> dict[str, dict[str, float]]:
    """Medians over rounds of seconds and of written tokens a second; times_ours: the median of the ratios to our time
    within each round."""
    alone = {run["round"]: run["seconds"] for run in runs if run["engine"] == own}
    found = {}
    for engine in dict.fromkeys(run["engine"] for run in runs):
        rows = [run for run in runs if run["engine"] == engine]
        seconds = statistics.median(run["seconds"] for run in rows)
        ratio = statistics.median(run["seconds"] / alone[run["round"]] for run in rows)
        found[engine] = {"seconds": seconds, "tokens_per_s": tokens / seconds, "times_ours": ratio}
    return found


def table(found: dict[str, Any]) -> str:
    lines = [f"{'engine':60} {'seconds':>8} {'tokens/s':>9} {'times ours':>10}"]
    for engine, o in found["engines"].items():
        lines.append(f"{engine:60} {o['seconds']:8.1f} {o['tokens_per_s']:9.1f} {o['times_ours']:10.2f}")
    if found["vllm"] is None:
        lines.append("vLLM was not given (--vllm PYTHON): our side alone")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="smollm2-135m", help="both halves of the pair")
    parser.add_argument("--dtype", default="bfloat16", help="of our side")
    parser.add_argument("--problems", type=int, default=8)
    parser.add_argument("--chains", type=int, default=16)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--draft-tokens", type=int, default=64)
    parser.add_argument("--target-tokens", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--alpha", type=float, default=0.4, help="share of the turns that are taken over")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3, help="for each setting of the peer")
    parser.add_argument("--settings", type=lambda t: [int(n) for n in t.split(",")], default=[*range(len(SETTINGS))])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--vllm", metavar="PYTHON")
    parser.add_argument("--out", type=out_file)
    args = parser.parse_args()
    found = asyncio.run(measure(args))
    print(table(found))


if __name__ == "__main__":
    main()
