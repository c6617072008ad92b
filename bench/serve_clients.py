"""The server under other people's load generators, unmodified: guidellm and `vllm bench serve`.

    python -m bench.serve_clients --guidellm path/to/guidellm --vllm path/to/vllm --out FILE

Starts `atts serve` with the built-in pair, runs each program that is named against it, and keeps what it counted:
requests that ended well and others, tokens, and its own figures of latency (of a tiny model on a CPU: they show that
the programs understand the server, not how fast it is). Exit code 1 if any request failed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from atts_engine.evaluation.files import write_text
from atts_engine.models.load import resolve
from bench import serve_load
from bench.output import out_file
from bench.provenance import provenance

OUTPUT_TOKENS = 30
OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_TARGET_DEVICE": "cpu"}


def prompts(count: int, seed: int) -> list[str]:
    """Problems that the built-in tokenizer can spell."""
    rng = random.Random(seed)
    return [
        f"a = {rng.randint(10, 99)}; b = a+{rng.randint(1, 9)}; c = b+{rng.randint(1, 9)}; c?" for _ in range(count)
    ]


def guidellm(program: str, url: str, folder: Path, requests: int) -> dict[str, Any]:
    """Four streams of chat requests at a time."""
    data, out = folder / "prompts.jsonl", folder / "guidellm.json"
    rows = [{"prompt": text, "output_tokens_count": OUTPUT_TOKENS} for text in prompts(requests, 0)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [program, "run", "--backend", f"kind=openai_http,target={url}", "--profile", "kind=concurrent,streams=4"]
    command += ["--constraint", f"kind=max_requests,count={requests}", "--data", f"kind=json_file,path={data}"]
    command += ["--tokenizer", f"kind=hf_auto,model={resolve('tiny-target')}"]
    command += ["--output", f"kind=json,path={out}", "--disable-console"]
    _run(command, folder)
    found = json.loads(out.read_text())["benchmarks"][0]["metrics"]

    def median(name: str) -> float:
        return float(found[name]["successful"]["median"])

    return {
        "completed": found["request_totals"]["successful"],
        "failed": found["request_totals"]["errored"] + found["request_totals"]["incomplete"],
        "output_tokens_median": median("output_token_count"),
        "ttft_ms_median": median("time_to_first_token_ms"),
        "itl_ms_median": median("inter_token_latency_ms"),
    }


def vllm_bench(program: str, url: str, folder: Path, requests: int) -> dict[str, Any]:
    """`vllm bench serve` over the chat endpoint, four at a time."""
    data, out = folder / "custom.jsonl", folder / "vllm.json"
    rows = [{"prompt": text, "output_tokens": OUTPUT_TOKENS} for text in prompts(requests, 1)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [program, "bench", "serve", "--backend", "openai-chat", "--endpoint", "/v1/chat/completions"]
    command += ["--base-url", url, "--model", "tiny-target", "--tokenizer", str(resolve("tiny-target"))]
    command += ["--dataset-name", "custom", "--dataset-path", str(data), "--skip-chat-template", "--ignore-eos"]
    command += ["--num-prompts", str(requests), "--max-concurrency", "4", "--disable-tqdm"]
    command += ["--custom-output-len", str(OUTPUT_TOKENS), "--save-result", "--result-filename", str(out)]
    _run(command, folder)
    found = json.loads(out.read_text())
    return {
        "completed": found["completed"],
        "failed": requests - found["completed"],
        "output_tokens_median": found["total_output_tokens"] / max(1, found["completed"]),
        "ttft_ms_median": found["median_ttft_ms"],
        "itl_ms_median": found["median_itl_ms"],
    }


def _run(command: list[str], folder: Path) -> None:
    # Their own environment: nothing of this tree is to be imported there.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | OFFLINE
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")


def version(program: str, *words: str) -> str:
    done = subprocess.run([program, *words], capture_output=True, text=True, env=os.environ | OFFLINE, timeout=120)
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--guidellm", metavar="PROGRAM")
    parser.add_argument("--vllm", metavar="PROGRAM")
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--out", type=out_file, help="write the figures here as JSON")
    args = parser.parse_args()
    found: dict[str, Any] = provenance(f"python -m bench.serve_clients --requests {args.requests}")
    served = serve_load.parser().parse_args(["--kv-tokens", "16384", "--max-chains", "256"])
    with serve_load.server(served) as (url, _), tempfile.TemporaryDirectory() as folder:
        if args.guidellm:
            figures = guidellm(args.guidellm, url, Path(folder), args.requests)
            found["guidellm"] = {"version": version(args.guidellm, "--version"), **figures}
        if args.vllm:
            figures = vllm_bench(args.vllm, url, Path(folder), args.requests)
            found["vllm bench serve"] = {"version": version(args.vllm, "--version"), **figures}
    text = json.dumps(found, indent=1)
    print(text)
    if args.out is not None:
        write_text(args.out, text + "\n")
    ran = [part for part in found.values() if isinstance(part, dict)]
    return 0 if ran and not any(part["failed"] for part in ran) else 1


if __name__ == "__main__":
    sys.exit(main())
