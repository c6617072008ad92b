"""ATTS jobs in this process, over two vLLM servers, and over both mixed pairs: do the verdicts agree?

    python -m bench.e2e.agreement --vllm PYTHON --out bench/results/e2e_agreement_cpu.json

PYTHON: an interpreter that has vLLM. Chains are greedy and the calibration is one frozen file, so what differs is
arithmetic alone. Each way is the command `atts run` with other names of models; weights and tokenizers are read from
the same folders.
A chain is followed for as long as its text is the first way's: behind a token that came out otherwise the spans are
others.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atts_engine.evaluation.files import write_text
from atts_engine.models import load_model, resolve
from bench.e2e.decode import VLLM_ENVIRONMENT
from bench.e2e.export import export
from bench.output import out_file
from bench.provenance import provenance

START_S = 300.0
WAYS = {
    "in this process": (False, False),
    "two servers": (True, True),
    "draft here, target on a server": (False, True),
    "draft on a server, target here": (True, False),
}
FIRST = next(iter(WAYS))


@dataclass(frozen=True, slots=True)
class Case:
    """models: draft and target; options: of every run; ways: that vLLM on a CPU can serve (its attention knows no heads
    of 16, as tiny-draft has)."""

    models: tuple[str, str]
    options: tuple[str, ...]
    dtype: str = "float32"
    ways: tuple[str, ...] = tuple(WAYS)


SMOLLM2 = ("smollm2-135m", "smollm2-135m")
SHORT = ("--turns", "4", "--draft-tokens", "24", "--target-tokens", "24")
CASES = {
    "built-in pair": Case(("tiny-draft", "tiny-target"), (), ways=(FIRST, "draft here, target on a server")),
    "SmolLM2-135M with itself": Case(SMOLLM2, SHORT),
    "SmolLM2-135M in bfloat16": Case(SMOLLM2, SHORT, "bfloat16", ("in this process", "two servers")),
}


@contextmanager
def served(python: str, folder: Path, name: str, dtype: str, *, log: Path) -> Iterator[str]:
    """A vLLM server with the model of a folder; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "vllm.entrypoints.cli.main", "serve", str(folder), "--served-model-name", name]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", dtype, "--enforce-eager"]
    command += ["--max-model-len", "512", "--enable-prompt-tokens-details", "--uvicorn-log-level", "error"]
    environment = os.environ | VLLM_ENVIRONMENT | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            _wait(process, f"http://127.0.0.1:{port}/health", log)
            yield f"vllm://127.0.0.1:{port}/{name}"
            if process.poll() is not None:
                raise SystemExit(f"vLLM with {name} ended with {process.returncode}: {log.read_text()[-2000:]}")
        finally:
            process.terminate()
            process.wait()


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"vLLM ended with {process.returncode}: {log.read_text()[-2000:]}")
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            pass
        time.sleep(0.5)
    raise SystemExit(f"vLLM did not come up within {START_S:g} s: {log.read_text()[-2000:]}")


def run(words: Sequence[str], *, command: str = "run") -> None:
    done = subprocess.run([sys.executable, "-m", "atts_engine.cli.main", command, *words], stdout=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(f"atts {command} ended with {done.returncode}")


def chains_of(folder: Path) -> dict[tuple[str, int], dict[str, Any]]:
    lines = (folder / "chains.jsonl").read_text(encoding="utf-8").splitlines()
    return {(c["problem_id"], c["chain"]): c for c in map(json.loads, lines)}


def compare(first: Path, other: Path) -> dict[str, Any]:
    """The verdicts of the same spans behind the same text, in both folders."""
    found: dict[str, Any] = {"chains": 0, "equal_chains": 0, "spans": 0, "equal_verdicts": 0, "otherwise": []}
    apart, p_apart = [], []
    others = chains_of(other)
    for key, chain in chains_of(first).items():
        twin = others[key]
        found["chains"] += 1
        texts = [[(t["draft"], t["target"], t["takeover"]) for t in c["turns"]] for c in (chain, twin)]
        found["equal_chains"] += texts[0] == texts[1]
        for mine, its in zip(chain["turns"], twin["turns"], strict=False):
            if mine["draft"] != its["draft"]:
                break
            found["spans"] += 1
            found["equal_verdicts"] += mine["takeover"] == its["takeover"]
            apart.append(abs(mine["score"] - its["score"]))
            p_apart.append(abs(mine["p_value"] - its["p_value"]))
            if mine["takeover"] != its["takeover"]:
                names = ("score", "p_value", "takeover")
                found["otherwise"].append(
                    {"chain": list(key), "turn": mine["turn"], "first": [mine[n] for n in names]}
                    | {"other": [its[n] for n in names]}
                )
            if mine["target"] != its["target"]:
                break
    found |= {
        "score_apart_max": max(apart),
        "score_apart_median": statistics.median(apart),
        "p_value_apart_max": max(p_apart),
    }
    return found


def measure(args: argparse.Namespace, case: Case, folder: Path) -> dict[str, Any]:
    common = ["--task", "registers", "--steps", args.steps, "--dtype", case.dtype, "--plain"]
    names = [_folder(name, folder / name) for name in case.models]
    shape = [*case.options, "--chains", "1", "--temperature", "0", "--alpha", f"{args.alpha}"]
    calibration = folder / "calibration.npz"
    # Other problems than those of the runs.
    many = ["--problems-count", f"{args.calibrate}", "--seed-tasks", "1", "--out", str(calibration)]
    run([*common, *shape, *many, "--draft", str(names[0]), "--target", str(names[1])], command="calibrate")
    work = [*common, *shape, "--problems-count", f"{args.problems}", "--calibration", str(calibration), "--frozen"]
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        needed = {i for way in case.ways for i in (0, 1) if WAYS[way][i]}
        servers = {
            i: stack.enter_context(
                served(args.vllm, names[i], case.models[i], case.dtype, log=folder / f"server-{i}.log")
            )
            for i in sorted(needed)
        }
        for way in case.ways:
            pair = [servers[i] if WAYS[way][i] else str(names[i]) for i in (0, 1)]
            out = folder / way.replace(" ", "-")
            began = time.perf_counter()
            run([*work, "--draft", pair[0], "--target", pair[1], "--out", str(out)])
            seconds = time.perf_counter() - began
            summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
            found[way] = compare(folder / FIRST.replace(" ", "-"), out) | {
                "seconds": seconds,
                "takeover_rate": summary["takeovers"]["rate"],
                "servers": {
                    name: {k: v for k, v in server.items() if k not in ("address", "root")}
                    for name, server in summary["servers"].items()
                },
            }
    return found


def _folder(name: str, at: Path) -> Path:
    """Where the model's files are, in the Hugging Face layout."""
    path = resolve(name)
    if not path.is_dir():
        if not at.exists():
            export(load_model(name), at)
        path = at
    return path


def table(cases: dict[str, Any]) -> str:
    columns = ("chains", "equal", "spans", "verdicts equal", "score apart", "p apart", "sent a score", "seconds")
    lines = []
    for case, ways in cases.items():
        lines.append(f"{case:32}" + "".join(f"{name:>16}" for name in columns))
        for way, o in ways.items():
            cost = o["servers"].get("target", {}).get("sent_per_scored")
            cells = (
                f"{o['chains']}",
                f"{o['equal_chains']}",
                f"{o['spans']}",
                f"{o['equal_verdicts']}",
                f"{o['score_apart_max']:.1e}",
                f"{o['p_value_apart_max']:.1e}",
                "1" if cost is None else f"{cost:.2f}",
                f"{o['seconds']:.1f}",
            )
            lines.append(f"{way:32}" + "".join(f"{cell:>16}" for cell in cells))
    lines.append(
        "equal: chains with every text and verdict the same as in this process. score apart (nats a token), p apart: "
        "the largest.\nsent a score: prompt tokens that the target was sent for one token scored; in this process it "
        "computes 1."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--vllm", required=True, metavar="PYTHON", help="an interpreter that has vLLM")
    parser.add_argument("--cases", default=",".join(CASES), metavar="NAMES", help="(default: %(default)s)")
    parser.add_argument("--problems", type=int, default=32)
    parser.add_argument("--calibrate", type=int, default=48, metavar="N", help="problems of the calibration")
    parser.add_argument("--steps", default="4-6")
    parser.add_argument("--alpha", type=float, default=0.4)
    parser.add_argument("--out", type=out_file, metavar="FILE")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    for name in args.cases.split(","):
        if name not in CASES:
            raise SystemExit(f"no case {name!r}; there are {', '.join(CASES)}")
        with tempfile.TemporaryDirectory() as folder:
            found[name] = measure(args, CASES[name], Path(folder))
        if args.out:
            write_text(args.out, json.dumps(whole(args, found), indent=1) + "\n")
    print(table(found))


def whole(args: argparse.Namespace, cases: dict[str, Any]) -> dict[str, Any]:
    settings = {n: getattr(args, n) for n in ("problems", "calibrate", "steps", "alpha")}
    versions = {s["version"] for ways in cases.values() for o in ways.values() for s in o["servers"].values()}
    return {
        "provenance": provenance("python -m bench.e2e.agreement --vllm PYTHON"),
        "settings": settings | {"temperature": 0.0, "chains": 1},
        "vllm": sorted(versions),
        "cases": cases,
    }


if __name__ == "__main__":
    main()
