"""One ATTS job in this process, over two vLLM servers, and over both mixed pairs: do the verdicts agree?

    python -m bench.e2e.agreement --vllm PYTHON --out bench/results/e2e_agreement_cpu.json

PYTHON: an interpreter that has vLLM. The models are the built-in pair in float32; chains are greedy and the calibration
is one frozen file, so what differs is arithmetic alone. Each way is the command `atts run` with other names of models.
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
from pathlib import Path
from typing import Any

from atts_engine.models import resolve
from bench.e2e.decode import VLLM_ENVIRONMENT
from bench.provenance import provenance

START_S = 300.0
PAIR = ("tiny-draft", "tiny-target")
WAYS = {
    "in this process": (False, False),
    "two servers": (True, True),
    "draft here, target on a server": (False, True),
    "draft on a server, target here": (True, False),
}


@contextmanager
def served(python: str, name: str, dtype: str, *, log: Path) -> Iterator[str]:
    """A vLLM server with a built-in model; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "vllm.entrypoints.cli.main", "serve", str(resolve(name)), "--served-model-name", name]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", dtype, "--enforce-eager"]
    command += ["--enable-prompt-tokens-details", "--uvicorn-log-level", "error"]
    environment = os.environ | VLLM_ENVIRONMENT | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            _wait(process, f"http://127.0.0.1:{port}/health", log)
            yield f"vllm://127.0.0.1:{port}/{name}"
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


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    common = ["--task", "registers", "--steps", args.steps, "--dtype", args.dtype, "--threads", "1", "--plain"]
    pair = ["--draft", PAIR[0], "--target", PAIR[1]]
    calibration = folder / "calibration.npz"
    shape = ["--chains", "1", "--temperature", "0", "--alpha", f"{args.alpha}"]
    # Other problems than those of the runs.
    many = ["--problems-count", f"{args.calibrate}", "--seed-tasks", "1"]
    run([*common, *pair, *shape, *many, "--out", str(calibration)], command="calibrate")
    work = [*common, *shape, "--problems-count", f"{args.problems}", "--calibration", str(calibration), "--frozen"]
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        servers = [
            stack.enter_context(served(args.vllm, name, args.dtype, log=folder / f"{name}.log")) for name in PAIR
        ]
        for way, there in WAYS.items():
            names = [servers[i] if there[i] else PAIR[i] for i in (0, 1)]
            out = folder / way.replace(" ", "-")
            began = time.perf_counter()
            run([*work, "--draft", names[0], "--target", names[1], "--out", str(out)])
            seconds = time.perf_counter() - began
            summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
            found[way] = compare(folder / next(iter(WAYS)).replace(" ", "-"), out) | {
                "seconds": seconds,
                "takeover_rate": summary["takeovers"]["rate"],
                "right": summary["chain_accuracy"]["mean"],
                "servers": {
                    name: {k: v for k, v in server.items() if k != "address"}
                    for name, server in summary["servers"].items()
                },
            }
    return found


def table(ways: dict[str, Any]) -> str:
    columns = ("chains", "equal", "spans", "verdicts equal", "score apart", "p apart", "sent a score", "seconds")
    lines = [f"{'way':32}" + "".join(f"{name:>16}" for name in columns)]
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
    parser.add_argument("--problems", type=int, default=64)
    parser.add_argument("--calibrate", type=int, default=100, metavar="N", help="problems of the calibration")
    parser.add_argument("--steps", default="4-6")
    parser.add_argument("--alpha", type=float, default=0.4)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, metavar="FILE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(args, Path(folder))
    if args.out:
        settings = {n: getattr(args, n) for n in ("problems", "calibrate", "steps", "alpha", "dtype")}
        version = next(iter(found["two servers"]["servers"].values()))["version"]
        whole = {
            "provenance": provenance("python -m bench.e2e.agreement --vllm PYTHON"),
            "settings": settings | {"temperature": 0.0, "chains": 1},
            "vllm": version,
            "ways": found,
        }
        args.out.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
