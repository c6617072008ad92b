"""vLLM's side of the long tests of examples/vllm, run by a Python that has vLLM: a job as JSON on standard input, its
outputs as the last line of standard output.

    python plugin_peer.py < {"settings": arguments of LLM, "requests": [{"prompt": ids, "sampling": arguments}]}
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    import vllm

    job = json.load(sys.stdin)
    model = vllm.LLM(**job["settings"])
    prompts = [{"prompt_token_ids": request["prompt"]} for request in job["requests"]]
    sampling = [vllm.SamplingParams(detokenize=False, **request["sampling"]) for request in job["requests"]]
    outputs = []
    for prompt, found in zip(prompts, model.generate(prompts, sampling, use_tqdm=False)):
        written = found.outputs[0]
        scored = found.prompt_logprobs
        ids = prompt["prompt_token_ids"]
        outputs.append(
            {
                "ids": list(written.token_ids),
                "finish_reason": written.finish_reason,
                "stop_reason": written.stop_reason,
                "scores": scored and [(scored[i][ids[i]].logprob, scored[i][ids[i]].rank) for i in range(1, len(ids))],
            }
        )
    print(json.dumps(outputs))


if __name__ == "__main__":
    main()
