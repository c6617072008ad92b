"""vLLM's side of `bench.e2e.decode`, run by a Python that has vLLM: token ids in, seconds out, one JSON line a batch.

    python vllm_peer.py FOLDER '{"dtype": "bfloat16", "enforce_eager": true, "sampling": {"seed": null}}'

Settings but for `sampling` are vLLM's. Reads lines {"prompts": [ids, ...], "tokens": t} from standard input and imports
nothing of this project.
"""

from __future__ import annotations

import json
import sys
import time


def main() -> None:
    import vllm

    folder, settings = sys.argv[1], json.loads(sys.argv[2])
    sampling = {"temperature": 0.8, "ignore_eos": True, "detokenize": False, "seed": 0} | settings.pop("sampling", {})
    model = vllm.LLM(
        folder, skip_tokenizer_init=True, max_model_len=2048, max_num_seqs=64, enable_prefix_caching=False, **settings
    )
    print("READY " + json.dumps({"version": vllm.__version__}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
        began = time.perf_counter()
        params = vllm.SamplingParams(max_tokens=asked["tokens"], **sampling)
        outputs = model.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - began
        assert all(len(o.outputs[0].token_ids) == asked["tokens"] for o in outputs)
        print("DONE " + json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
