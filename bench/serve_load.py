"""The server under load: many clients, plain requests and ATTS mixed, some of whom leave in mid-answer.

    python -m bench.serve_load --minutes 10 --clients 64 --out bench/results/serve_load_cpu.json

Starts `atts serve` on a free loopback port with the built-in pair, drives it, and looks at what is left when all
clients have gone: pages and sequences of both lanes, requests, threads and memory of the process. Every request must
end as an answer, as a refusal (503) or as a client's own leaving; anything else is a failure, and the exit code 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np

from atts_engine.evaluation.files import write_text
from bench.output import out_file
from bench.provenance import provenance

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

KINDS = ("chat", "chat-stream", "completion", "score", "atts", "atts-stream")
LEAVES_ONE_IN = 5


@dataclass
class Tally:
    """How requests ended, by kind, and the seconds of those that were answered."""

    ended: Counter[tuple[str, str]] = field(default_factory=Counter)
    seconds: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    failures: list[str] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        """JSON: per kind the number of each end, and quantiles of the answers' seconds."""
        found: dict[str, Any] = {}
        for kind in KINDS:
            ends = {end: n for (k, end), n in sorted(self.ended.items()) if k == kind}
            times = np.array(self.seconds[kind])
            spread = {f"p{q}": float(np.percentile(times, q)) for q in (50, 95, 99)} if len(times) else {}
            found[kind] = {"ended": ends, "seconds": spread}
        return found


def request(kind: str, model: str, rng: random.Random) -> tuple[str, dict[str, Any]]:
    """Path and body of one request of the kind."""
    a, b, c = rng.randint(10, 99), rng.randint(1, 9), rng.randint(10, 99)
    question = f"a = {a}; b = a+{b}; c = b+{c}; c?"
    chat = {"model": model, "messages": [{"role": "user", "content": question}]}
    path = "/v1/chat/completions"
    match kind:
        case "chat":
            return path, chat | {"n": rng.choice((1, 1, 2, 4)), "max_completion_tokens": rng.randint(1, 120)}
        case "chat-stream":
            more = {"stream": True, "ignore_eos": True, "max_tokens": rng.randint(1, 200)}
            return path, chat | more | {"stream_options": {"include_usage": True}}
        case "completion":
            return "/v1/completions", {
                "model": model,
                "prompt": question,
                "max_tokens": rng.randint(1, 40),
                "logprobs": 1,
            }
        case "score":
            spans = [f"b = a+{b} = {a}+{b} = {a + b + i}" for i in range(3)]
            return "/v1/score", {"model": model, "prompt": f"Q: {question}\n\n", "spans": spans}
        case _:
            atts = {"chains": rng.randint(1, 6), "turns": rng.randint(1, 8), "verdicts": rng.random() < 0.5}
            return path, chat | {"atts": atts, "stream": kind == "atts-stream"}


async def one(client: httpx.AsyncClient, kind: str, model: str, rng: random.Random) -> tuple[str, str]:
    """Send one request; returns how it ended, and what was wrong if anything was."""
    path, body = request(kind, model, rng)
    patience = rng.expovariate(1 / 0.3) if rng.randrange(LEAVES_ONE_IN) == 0 else None
    try:
        async with asyncio.timeout(patience):
            response = await client.post(path, json=body)
    except TimeoutError:
        return "left", ""
    if response.status_code == 503 and "retry-after" in response.headers:
        return "refused", ""
    if response.status_code != 200:
        return "failed", f"{kind}: {response.status_code} {response.text[:300]}"
    if body.get("stream") and not response.text.endswith("data: [DONE]\n\n"):
        return "failed", f"{kind}: the stream ends with {response.text[-200:]!r}"
    if body.get("stream") and '"error"' in response.text and '"lane_failed"' in response.text:
        return "failed", f"{kind}: {response.text[-300:]}"
    return "answered", ""


async def drive(url: str, model: str, clients: int, seed: int, enough: Callable[[int], bool]) -> Tally:
    """`clients` at a time, each with one kind of request after the other; who is refused asks the same again later.
    enough: told how many requests of a client have ended otherwise, whether it stops."""
    tally = Tally()

    async def client(number: int) -> None:
        rng, done = random.Random(f"{seed}/{number}"), 0
        async with httpx.AsyncClient(base_url=url, timeout=300.0) as http:
            while not enough(done):
                kind, began = KINDS[(number + done) % len(KINDS)], time.perf_counter()
                try:
                    how, wrong = await one(http, kind, model, rng)
                except httpx.HTTPError as error:
                    how, wrong = "failed", f"{kind}: {error!r}"
                tally.ended[kind, how] += 1
                if how == "answered":
                    tally.seconds[kind].append(time.perf_counter() - began)
                if wrong:
                    tally.failures.append(wrong)
                if how == "refused":
                    await asyncio.sleep(0.5 * rng.random())
                else:
                    done += 1

    await asyncio.gather(*(client(i) for i in range(clients)))
    return tally


def load(url: str, args: argparse.Namespace, seconds: float, seed: int) -> Tally:
    end = time.monotonic() + seconds
    return asyncio.run(drive(url, args.target, args.clients, seed, lambda _: time.monotonic() > end))


def scrape(url: str) -> dict[str, float]:
    """Figures of /metrics without labels beside the model's name, or by lane: "name" or "name.lane"."""
    text = httpx.get(f"{url}/metrics", timeout=60.0).text
    found = {}
    for line in text.splitlines():
        if match := re.match(r"^([\w:]+)(?:\{(.*)\})? (\S+)$", line):
            labels = dict(re.findall(r'(\w+)="([^"]*)"', match[2] or ""))
            labels.pop("model_name", None)
            if not labels.keys() - {"lane"}:
                found[".".join((match[1], *labels.values()))] = float(match[3])
    return found


def resident_mb(pid: int) -> float:
    """Of a process, in 2**20 bytes."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


@contextmanager
def server(args: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """`atts serve` with the built-in pair while the block runs: its address and process id."""
    words = ["serve", "--draft", args.draft, "--target", args.target, "--port", "0", "--kv-tokens", str(args.kv_tokens)]
    words += ["--draft-tokens", "24", "--target-tokens", "24", "--max-chains", str(args.max_chains), "--drain-s", "30"]
    words += ["--threads", "1", "--log-level", "warning"]
    process = subprocess.Popen(
        [sys.executable, "-m", "atts_engine.cli.main", *words], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"(http://\S+)", line)
        if found is None:
            raise SystemExit(f"atts serve did not start: {line!r}")
        yield found.group(1), process.pid
        process.send_signal(signal.SIGTERM)
        if process.wait(60) != 0:
            raise SystemExit(f"atts serve ended with {process.returncode}")
    finally:
        process.kill()
        process.wait()


def settle(url: str, seconds: float = 60.0) -> dict[str, float]:
    """What is left when nobody asks any more: waits for open requests, then one look."""
    end = time.monotonic() + seconds
    while True:
        found = scrape(url)
        if not found["atts:admitted_chains.target"] + found["atts:admitted_chains.draft"] or time.monotonic() > end:
            return found
        time.sleep(0.1)


def run(args: argparse.Namespace) -> dict[str, Any]:
    with server(args) as (url, pid):
        # Once through everything, so that what is made on first use is there.
        load(url, args, args.warm_up_s, args.seed + 1)
        before, memory = settle(url), [resident_mb(pid)]
        tally, slices = Tally(), max(1, round(args.minutes))
        for part in range(slices):
            some = load(url, args, 60.0 * args.minutes / slices, args.seed + 100 * part)
            tally.ended += some.ended
            tally.failures += some.failures
            for kind, times in some.seconds.items():
                tally.seconds[kind] += times
            after = settle(url)
            memory.append(resident_mb(pid))
            print(f"{part + 1}/{slices}: {sum(tally.ended.values()):,} requests, {memory[-1]:.0f} MiB", flush=True)
        count = threads(pid)
    prefixes = after["atts:used_pages.target"]
    return {
        **provenance(f"python -m bench.serve_load --minutes {args.minutes:g} --clients {args.clients}"),
        "clients": args.clients,
        "minutes": args.minutes,
        "requests": sum(tally.ended.values()),
        "ended": {
            end: sum(n for (_, e), n in tally.ended.items() if e == end)
            for end in ("answered", "refused", "left", "failed")
        },
        "kinds": tally.figures(),
        "failures": tally.failures[:20],
        "left_over": {
            "requests": after["vllm:num_requests_running"] + after["vllm:num_requests_waiting"],
            "draft_pages": after["atts:used_pages.draft"],
            "draft_sequences": after["atts:open_sequences.draft"],
            "target_pages_of_prefixes": prefixes,
            "target_sequences_of_prefixes": after["atts:open_sequences.target"],
        },
        "preemptions": {lane: after[f"vllm:num_preemptions_total.{lane}"] for lane in ("draft", "target")},
        "generated_tokens": after["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"],
        "threads": count,
        "resident_mib": {"before": memory[0], "each_part": memory[1:], "growth": memory[-1] - memory[0]},
    }


def sound(found: dict[str, Any]) -> bool:
    left = found["left_over"]
    return not found["ended"]["failed"] and not left["requests"] + left["draft_pages"] + left["draft_sequences"]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    made.add_argument("--draft", default="tiny-draft")
    made.add_argument("--target", default="tiny-target")
    made.add_argument("--minutes", type=float, default=10.0)
    made.add_argument("--warm-up-s", type=float, default=20.0)
    made.add_argument("--clients", type=int, default=64)
    made.add_argument("--kv-tokens", type=int, default=3072, help="small, so that sequences are preempted")
    made.add_argument("--max-chains", type=int, default=96, help="few, so that requests are refused")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--out", type=out_file, help="write the figures here as JSON")
    return made


def main() -> int:
    args = parser().parse_args()
    found = run(args)
    text = json.dumps(found, indent=1)
    print(text)
    if args.out is not None:
        write_text(args.out, text + "\n")
    return 0 if sound(found) else 1


if __name__ == "__main__":
    sys.exit(main())
