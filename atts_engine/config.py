"""Settings of an engine, checked when they are made. `ATTSParams` are the settings of one request."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from atts_engine.backends.remote.address import Address, is_address
from atts_engine.errors import InputError
from atts_engine.ops import IMPLEMENTATIONS
from atts_engine.pipeline.params import ATTSParams
from atts_engine.runtime.preemption import PREEMPTIONS
from atts_engine.runtime.records import SamplingParams

__all__ = ["MATH_PROMPT", "ATTSParams", "EngineConfig", "SamplingParams", "dtype_of", "prompt_hash"]

MATH_PROMPT = "Solve the following problem step by step, and put the final answer within \\boxed{{}}.\n\n{problem}"
"""Prompt of models that were not trained for a built-in task. `{problem}` is replaced, `{{` and `}}` are braces."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Which models, where, and how much memory.

    draft, target: a Hugging Face folder, a .gguf file, a built-in name, or the address of a server that has the model,
    `vllm://HOST:PORT/NAME` or `sglang://HOST:PORT/NAME`, whose key is read from the environment as ATTS_DRAFT_API_KEY
    or ATTS_TARGET_API_KEY. dtype: of weights and KV. Settings of devices, KV and kernels are for lanes in this process.
    draft_tokenizer, target_tokenizer: where the tokenizer of a server's model is read from; None: the folder that the
    server names, if it can be read here.
    packed_weights: hold the weights of this process's models packed (`DecoderWeights.packed`): quicker steps in about
    the same memory, with the same results; None: where they help, in bfloat16 on a CPU with AVX512-BF16; True: an error
    elsewhere, and for a model without a matrix that packs.
    patience_s: seconds without any answer after which a server is given up; ten times as long, ten minutes at the
    least, without a byte of one request, and that is made again. server_requests: to one server at a time.
    page_size: tokens per KV page. kv_memory_fraction: of the memory free on a device once the weights are there,
    for all KV pools on it, split so that both lanes hold as many tokens; None: 0.85 on a GPU, 0.25 on a CPU.
    kv_tokens: capacity of each lane's KV pool, whatever is free.
    preemption: what becomes of the KV of a sequence that gives up its pages: "swap" moves it to host memory where there
    is room, "recompute" drops it and computes it again, "auto" does whichever is quicker.
    host_kv_tokens: capacity of each lane's host pool; None: as much as its pool, within a quarter of the host's free
    memory; none on a CPU with "auto", where both pools would be the same memory.
    max_sequences: chains that may be open at a time over all requests; one that would bring more is refused with
    `QueueFull`. None: no bound.
    max_batch_tokens: rows of one forward pass. chunk_tokens: tokens handed over at a time while a span is written.
    threads: CPU threads of torch; None leaves torch's own choice.
    overlap: a lane launches a step before it has seen the results of the one before; None: on a GPU, not on a CPU.
    graphs: forward passes as CUDA graphs; None: where every op of one can be captured.
    lane_threads: "one" scheduler thread for both lanes, or "each" lane its own; None: each where both run on a CPU with
    two cores or more, else one. profile: NVTX ranges on a GPU.
    ops: the implementation that every op with a kernel of that name runs ("reference", "triton", ...), in the whole
    process; None: each device's own choice. check_ops: ops look into their tensors for values out of range, which on a
    GPU waits for the device at each of them (`ops.checked`).
    tuning: file of a tuning table for the kernels; None: the device's own file where there is one (`ops.tuning.find`).
    score_cache_tokens: tokens of prefixes that `AsyncEngine.score` keeps open; None: an eighth of the target's pool.
    prompt: user message with `{problem}` in it; None: the problem alone for the built-in pair, `MATH_PROMPT` otherwise.
    Raises `InputError` for a value outside its range.
    """

    draft: str
    target: str
    draft_device: str = "cpu"
    target_device: str = "cpu"
    draft_tokenizer: str | None = None
    target_tokenizer: str | None = None
    patience_s: float = 60.0
    server_requests: int = 256
    dtype: str = "float32"
    packed_weights: bool | None = None
    page_size: int = 16
    kv_tokens: int | None = None
    kv_memory_fraction: float | None = None
    host_kv_tokens: int | None = None
    preemption: str = "auto"
    max_sequences: int | None = None
    max_batch_tokens: int = 2048
    chunk_tokens: int = 64
    threads: int | None = None
    overlap: bool | None = None
    graphs: bool | None = None
    lane_threads: str | None = None
    profile: bool = False
    ops: str | None = None
    check_ops: bool = False
    tuning: str | None = None
    score_cache_tokens: int | None = None
    prompt: str | None = None

    def __post_init__(self) -> None:
        dtype_of(self.dtype)
        for name in ("page_size", "max_batch_tokens", "chunk_tokens", "server_requests"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be 1 or more, not {getattr(self, name)}")
        for name in ("kv_tokens", "max_sequences", "threads", "score_cache_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be 1 or more, not {value}")
        if not self.patience_s > 0.0:
            raise InputError(f"patience_s must be more than 0 seconds, not {self.patience_s}")
        for lane in ("draft", "target"):
            self._check_place(lane)
        if self.lane_threads not in (None, "one", "each"):
            raise InputError(f"lane_threads must be 'one' or 'each', not {self.lane_threads!r}")
        if self.kv_memory_fraction is not None and not 0.0 < self.kv_memory_fraction <= 1.0:
            raise InputError(f"kv_memory_fraction must be in (0, 1], not {self.kv_memory_fraction}")
        if self.preemption not in PREEMPTIONS:
            raise InputError(f"preemption must be one of {', '.join(PREEMPTIONS)}, not {self.preemption!r}")
        if self.host_kv_tokens is not None and self.host_kv_tokens < (self.preemption == "swap"):
            raise InputError(
                f"host_kv_tokens must be {'1 or more to swap' if self.preemption == 'swap' else '0 or more'}, "
                f"not {self.host_kv_tokens}"
            )
        if self.ops is not None and self.ops not in IMPLEMENTATIONS:
            raise InputError(f"ops must be one of {', '.join(IMPLEMENTATIONS)}, not {self.ops!r}")
        if self.prompt is not None:
            fill_prompt(self.prompt, "")

    def _check_place(self, lane: str) -> None:
        name, device, tokenizer = (getattr(self, lane + part) for part in ("", "_device", "_tokenizer"))
        if is_address(name):
            Address.parse(name)
            if device != "cpu":
                raise InputError(f"{lane}_device {device} is for a model in this process, and {name} is a server's")
        elif tokenizer is not None:
            raise InputError(f"{lane}_tokenizer is for the model of a server; {name} brings its own")


def dtype_of(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise InputError(f"dtype must be one of {', '.join(_DTYPES)}, not {name!r}")
    return _DTYPES[name]


def fill_prompt(prompt: str, problem: str) -> str:
    """The prompt with the problem in its place; `InputError` when the prompt is not a valid template."""
    try:
        if "{problem}" not in prompt:
            raise InputError("the prompt must hold {problem}, which stands for the problem's text")
        return prompt.format(problem=problem)
    except (KeyError, IndexError, ValueError) as error:
        raise InputError(
            f"the prompt is no valid template ({error}); write {{problem}} for the problem and double other braces"
        ) from error


def prompt_hash(prompt: str) -> str:
    """Short hash of a prompt template: scores taken under another prompt are not comparable."""
    return hashlib.blake2b(prompt.encode(), digest_size=8).hexdigest()
