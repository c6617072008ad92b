"""vLLM's side of `bench.e2e.plugin` where it scores a prompt, run by a Python that has vLLM; one JSON line.

    python vllm_scoring_peer.py FOLDER '{"dtype": "bfloat16", "enforce_eager": true}' TOKENS

The engine runs in this process, so that its peak of resident memory can be read: what scoring a prompt of TOKENS adds
to the peak after the same prompt without scores.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import time

REPEATS = 5


def main() -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import vllm

    folder, settings, tokens = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    limits = {"max_model_len": tokens + 1, "max_num_batched_tokens": tokens + 1, "max_num_seqs": 1}
    model = vllm.LLM(folder, skip_tokenizer_init=True, enable_prefix_caching=False, **limits, **settings)
    prompt = {"prompt_token_ids": [100 + 37 * i * i % 40_000 for i in range(tokens)]}

    def seconds(scored: bool) -> float:
        params = vllm.SamplingParams(max_tokens=1, detokenize=False, prompt_logprobs=0 if scored else None)
        began = time.perf_counter()
        model.generate(prompt, params, use_tqdm=False)
        return time.perf_counter() - began

    def peak_mib() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    plain = [seconds(False) for _ in range(REPEATS)]
    before = peak_mib()
    scored = [seconds(True) for _ in range(REPEATS)]
    found = {"prefill_s": statistics.median(plain), "scored_s": statistics.median(scored)}
    print("DONE " + json.dumps(found | {"added_mib": peak_mib() - before, "version": vllm.__version__}), flush=True)


if __name__ == "__main__":
    main()
