"""What examples/vllm costs inside vLLM: decode speed with and without the gate, and time and memory of a scored prompt
with and without the scoring worker.

    python -m bench.e2e.plugin --vllm PYTHON --out bench/results/plugin_cpu.json

PYTHON: an interpreter that has vLLM and can import this package. Speeds are those of `bench.e2e.decode`; the two
engines take turns, one standing still while the other runs, and the table shows medians. Every request of the gated
engine is gated, at a level that takes none over. The gate's own time in a step is CPU time of one thread, measured
without vLLM: a machine that others use too does not change it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from atts_engine.conformal import Mondrian, load_calibrator
from atts_engine.conformal.state import Meta
from atts_engine.evaluation.files import write_text
from atts_engine.models import load_model
from atts_engine.models.fingerprint import fingerprint
from bench.e2e.decode import VLLM_ENVIRONMENT, Peer, speed
from bench.e2e.export import export
from bench.output import out_file
from bench.provenance import provenance
from examples.vllm.request import GatedRequest
from examples.vllm.span_gate import SpanGate

ENGINE = {"dtype": "bfloat16", "enforce_eager": True}
MARK = 3
NEVER = {"atts_turn": 0, "atts_mark": MARK, "atts_alpha": 1e-6}
WORKER = {"worker_cls": "examples.vllm.scoring_worker.ScoringWorker"}
SCORERS: dict[str, dict[str, Any]] = {
    "vLLM": {},
    "worker": WORKER,
    "worker, no ranks": WORKER | {"additional_config": {"atts_scoring": {"ranks": False}}},
}


def calibration(folder: Path, span: int, out: Path) -> Path:
    """Scores that nobody measured: at this level they decide nothing, and cost what others would."""
    identity = fingerprint([folder / "config.json", folder / "model.safetensors"])
    made = Mondrian(0.4, meta=Meta(draft=identity, target=identity, draft_tokens=span))
    for key in range(made.keys):
        for score in np.random.default_rng(key).normal(2.0, 0.3, 1000).tolist():
            made.observe(score, key)
    made.save(out)
    return out


async def decoding(args: argparse.Namespace, folder: Path, file: Path) -> list[dict[str, Any]]:
    gated = {
        "logits_processors": ["examples.vllm.self_gate:SelfGate"],
        "additional_config": {"atts_gate": {"calibration": str(file)}},
        "sampling": {"seed": None, "stop_token_ids": [MARK], "extra_args": NEVER},
    }
    sides = {}
    for name, settings in {"vLLM": {"sampling": {"seed": None}}, "gated": gated}.items():
        sides[name] = Peer(args.vllm, folder, ENGINE | settings)
        await speed(sides[name], 2, 2, 0)
        sides[name].stop()
    runs = []
    for sequences in args.sequences:
        for round_ in range(args.rounds):
            for name, side in sides.items():
                side.go_on()
                rate = await speed(side, sequences, args.tokens, round_)
                side.stop()
                runs.append({"engine": name, "sequences": sequences, "round": round_, "tokens_per_s": rate})
                print(f"{name:6} {sequences:3} sequences: {rate:7.1f} tokens/s", flush=True)
    for side in sides.values():
        side.go_on()
        side.close()
    return runs


def step_ms(file: Path, rows: int, steps: int, vocab: int) -> float:
    """Mean CPU time of the gate in a step of `rows` gated requests, in ms."""
    gate = SpanGate(load_calibrator(file, frozen=True), rows, torch.device("cpu"))
    for slot in range(rows):
        gate.open(slot, GatedRequest(turn=0, mark=MARK, level=1))
    place, tokens = torch.arange(rows), torch.zeros(rows, dtype=torch.int64)
    seconds = 0.0
    for drawn in range(steps + 1):
        logits = torch.randn(rows, vocab)
        began = time.process_time()
        gate.step(logits, place, place.numpy(), tokens, np.full(rows, drawn))
        seconds += time.process_time() - began
    return 1e3 * seconds / steps


def scoring(args: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    script, found = Path(__file__).with_name("vllm_scoring_peer.py"), {}
    for name, settings in SCORERS.items():
        done = subprocess.run(
            [args.vllm, str(script), str(folder), json.dumps(ENGINE | settings), str(args.prompt)],
            env=os.environ | VLLM_ENVIRONMENT | {"VLLM_CPU_KVCACHE_SPACE": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        found[name] = json.loads(done.stdout.splitlines()[-1].removeprefix("DONE "))
        print(name, found[name], flush=True)
    return found


def medians(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Of each engine's speeds, and of the ratio of the gated to the plain run of a round, neighbours in time."""
    plain, gated = ([r["tokens_per_s"] for r in runs if r["engine"] == name] for name in ("vLLM", "gated"))
    ratio = statistics.median(after / before for before, after in zip(plain, gated, strict=True))
    return {"vLLM": statistics.median(plain), "gated": statistics.median(gated), "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--vllm", metavar="PYTHON", required=True)
    parser.add_argument("--sequences", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=65)
    parser.add_argument("--span", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=out_file)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = load_model("smollm2-135m", "cpu", torch.bfloat16)
        vocab = model.config.vocab_size
        export(model, folder)
        scored = scoring(args, folder)
        file = calibration(folder, args.span, folder / "self.npz")
        torch.set_num_threads(1)
        steps = {n: step_ms(file, n, args.tokens, vocab) for n in args.sequences}
        print("the gate's ms in a step:", steps, flush=True)
        runs = asyncio.run(decoding(args, folder, file))
    cells = {n: medians([r for r in runs if r["sequences"] == n]) for n in args.sequences}
    for n, cell in cells.items():
        print(f"{n:3} sequences: " + ", ".join(f"{name} {value:.3f}" for name, value in cell.items()))
    if args.out:
        where = provenance("python -m bench.e2e.plugin " + " ".join(sys.argv[1:]))
        found = {"provenance": where, "engine": ENGINE, "span": args.span, "tokens": args.tokens, "prompt": args.prompt}
        found |= {"load_average": os.getloadavg(), "step_ms": steps, "scoring": scored, "medians": cells, "runs": runs}
        write_text(args.out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
