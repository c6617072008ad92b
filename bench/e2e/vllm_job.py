"""vLLM's side of `bench.e2e.job`, run by a Python that has vLLM: two HTTP servers and a client that writes the chains.

    python vllm_job.py FOLDER '{"dtype": "float32", "cores": ["0", "1"]}'

cores: of the draft's and the target's server, as VLLM_CPU_OMP_THREADS_BIND takes them. Reads jobs from standard input,
one JSON line each, and answers "DONE {json}". Imports nothing of this project.

A chain's history lives here: every request sends it whole, and the server's prefix cache finds what it has seen. A
score is a request for one token with the prompt's log-probabilities, for which vLLM computes the whole prompt again.
Requests carry no seed: on a CPU vLLM draws seeded rows one by one.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time

START_S = 300.0


class Server:
    def __init__(self, name: str, folder: str, settings: dict, cores: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.name = name
        options = {
            "--port": str(self.port),
            "--host": "127.0.0.1",
            "--dtype": settings["dtype"],
            "--max-model-len": "2048",
            "--max-num-seqs": "128",
            "--uvicorn-log-level": "error",
        }
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", folder, "--tokens-only"]
        command += ["--skip-tokenizer-init", "--enable-prefix-caching", "--no-enable-log-requests"]
        command += [word for option in options.items() for word in option]
        command += ["--enforce-eager"] if settings.get("enforce_eager", True) else []
        environment = {
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "4",
            "VLLM_CPU_OMP_THREADS_BIND": cores,
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_TARGET_DEVICE": "cpu",
            "VLLM_NO_USAGE_STATS": "1",
        }
        self.process = subprocess.Popen(
            command, env=os.environ | environment, stdin=subprocess.DEVNULL, stdout=sys.stderr
        )

    async def ready(self, http) -> None:
        import aiohttp

        deadline = time.monotonic() + START_S
        while True:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the {self.name} server did not come up")
            try:
                async with http.get(f"http://127.0.0.1:{self.port}/health") as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientConnectionError:
                pass
            await asyncio.sleep(0.5)

    async def generate(self, http, ids: list[int], max_tokens: int, *, prompt_logprobs: bool = False) -> dict:
        sampling = {"temperature": 0.8, "max_tokens": max_tokens, "ignore_eos": True, "detokenize": False}
        if prompt_logprobs:
            sampling["prompt_logprobs"] = 0
        body = {"token_ids": ids, "sampling_params": sampling}
        async with http.post(f"http://127.0.0.1:{self.port}/inference/v1/generate", json=body) as answer:
            if answer.status != 200:
                raise SystemExit(f"the {self.name} server: {answer.status} {await answer.text()}")
            return await answer.json()

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


async def chain(http, draft: Server, target: Server, job: dict, prompt: list[int], takeovers: list[bool]) -> dict:
    history, written, scores = list(prompt), {"draft": 0, "target": 0}, []
    for takeover in takeovers:
        found = await draft.generate(http, history, job["draft_tokens"])
        span = found["choices"][0]["token_ids"]
        written["draft"] += len(span)
        history += span
        scored = (await target.generate(http, history, 1, prompt_logprobs=True))["prompt_logprobs"]
        terms = [scored[i][str(history[i])]["logprob"] for i in range(len(history) - len(span), len(history))]
        scores.append(-sum(terms) / len(terms))
        if takeover:
            found = await target.generate(http, history, job["target_tokens"])
            span = found["choices"][0]["token_ids"]
            written["target"] += len(span)
            history += span
    return written | {"scores": scores}


async def run(http, draft: Server, target: Server, job: dict) -> dict:
    began = time.perf_counter()
    chains = await asyncio.gather(
        *(
            chain(http, draft, target, job, prompt, takeovers)
            for prompt, of_problem in zip(job["prompts"], job["takeovers"], strict=True)
            for takeovers in of_problem
        )
    )
    seconds = time.perf_counter() - began
    scores = [score for c in chains for score in c["scores"]]
    return {
        "seconds": seconds,
        "draft_tokens": sum(c["draft"] for c in chains),
        "target_tokens": sum(c["target"] for c in chains),
        "mean_score": sum(scores) / len(scores),
    }


async def main() -> None:
    import aiohttp
    import vllm

    folder, settings = sys.argv[1], json.loads(sys.argv[2])
    servers = [Server(name, folder, settings, cores) for name, cores in zip(("draft", "target"), settings["cores"])]
    try:
        # A connection that waits while the other side is measured would be closed by its server.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as http:
            for server in servers:
                await server.ready(http)
            print("READY " + json.dumps({"version": vllm.__version__}), flush=True)
            while line := await asyncio.to_thread(sys.stdin.readline):
                print("DONE " + json.dumps(await run(http, *servers, json.loads(line))), flush=True)
    finally:
        for server in servers:
            server.close()


if __name__ == "__main__":
    asyncio.run(main())
