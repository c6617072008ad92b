"""Settings of an engine, checked when they are made. `ATTSParams` are the settings of one request."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from atts_engine.errors import InputError
from atts_engine.pipeline.params import ATTSParams
from atts_engine.runtime.records import SamplingParams

__all__ = ["MATH_PROMPT", "ATTSParams", "EngineConfig", "SamplingParams", "dtype_of", "prompt_hash"]

MATH_PROMPT = "Solve the following problem step by step, and put the final answer within \\boxed{{}}.\n\n{problem}"
"""Prompt of models that were not trained for a built-in task. `{problem}` is replaced, `{{` and `}}` are braces."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Which models, where, and how much memory.

    draft, target: a Hugging Face folder, a .gguf file, or a built-in name. dtype: of weights and KV.
    page_size: tokens per KV page. kv_tokens: capacity of each lane's KV pool; None: what `kv_bytes` holds.
    max_batch_tokens: rows of one forward pass. chunk_tokens: tokens handed over at a time while a span is written.
    threads: CPU threads of torch; None leaves torch's own choice.
    overlap: a lane launches a step before it has seen the results of the one before; None: on a GPU, not on a CPU.
    graphs: decode steps as CUDA graphs; None: where every op of a step can be captured.
    lane_threads: "one" scheduler thread for both lanes, or "each" lane its own. profile: NVTX ranges on a GPU.
    prompt: user message with `{problem}` in it; None: the problem alone for the built-in pair, `MATH_PROMPT` otherwise.
    Raises `InputError` for a value outside its range.
    """

    draft: str
    target: str
    draft_device: str = "cpu"
    target_device: str = "cpu"
    dtype: str = "float32"
    page_size: int = 16
    kv_tokens: int | None = None
    kv_bytes: int = 2 << 30
    max_batch_tokens: int = 2048
    chunk_tokens: int = 64
    threads: int | None = None
    overlap: bool | None = None
    graphs: bool | None = None
    lane_threads: str = "one"
    profile: bool = False
    prompt: str | None = None

    def __post_init__(self) -> None:
        dtype_of(self.dtype)
        for name in ("page_size", "kv_bytes", "max_batch_tokens", "chunk_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be 1 or more, not {getattr(self, name)}")
        for name in ("kv_tokens", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be 1 or more, not {value}")
        if self.lane_threads not in ("one", "each"):
            raise InputError(f"lane_threads must be 'one' or 'each', not {self.lane_threads!r}")
        if self.prompt is not None:
            fill_prompt(self.prompt, "")


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
