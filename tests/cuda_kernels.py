"""Launches of kernels on the devices of `tests.cuda_tensors`: one piece of work each, which runs the torch reference of
the op on the tensors behind its arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

_INPUTS = {
    "gate": 8,
    "kv_append": 4,
    "kv_copy_pages": 3,
    "kv_gather": 2,
    "kv_scatter": 3,
    "kv_swap": 5,
    "rope_kv_append": 7,
    "score_logits": 2,
    "span_mean": 2,
}
"""Arguments of each op that csrc/ computes. Behind them its functions take where results go, and a workspace."""
_WORKSPACE_BYTES = 8
"""For each row of a batch, in ops that take a workspace."""


class Queue(Protocol):
    def __call__(self, name: str, run: Callable[[], object], reads: Any, writes: Any) -> None: ...


def triton_launcher(name: str, launches: Callable[[str, Any], None]) -> Callable[..., Any]:
    """Stands for the function of `atts_triton` that launches the op of this name: torch's dispatcher finds the rest.
    launches: told of it with its arguments."""
    op = getattr(torch.ops.atts, name)
    schema = op.default._schema.arguments
    named = [argument.name for argument in schema if argument.kwarg_only]
    positional = len(schema) - len(named)

    def launch(*args: Any) -> Any:
        launches(name, args)
        return op(*args[:positional], **dict(zip(named, args[positional:], strict=False)))

    return launch


def csrc_call(queue: Queue) -> Callable[..., Any]:
    """Stands for `atts_engine.ops.cuda._call`: a function of csrc/ by its name."""

    def call(name: str, *args: Any) -> Any:
        if name.endswith("_workspace"):
            return _WORKSPACE_BYTES * len(args[0])
        if name == "kv_gather":
            kv, staged, pages, scatter = args
            name, args = ("kv_scatter", (staged, kv, pages)) if scatter else (name, (kv, pages, staged))
        op = getattr(torch.ops.atts, name)
        schema = op.default._schema
        inputs, results = args[: _INPUTS[name]], args[_INPUTS[name] :][: len(schema.returns)]
        workspace = [t for t in args[_INPUTS[name] + len(results) :] if t is not None]
        kept = [t for t, a in zip(inputs, schema.arguments, strict=False) if a.alias_info is not None]
        held, outs, scratch = ([getattr(t, "held", t) for t in some] for some in (inputs, results, workspace))

        def run() -> None:
            if any(t.any() for t in scratch):
                raise RuntimeError("the workspace is not zero")
            found = op(*held)
            for out, value in zip(outs, found if isinstance(found, tuple) else (found,), strict=bool(outs)):
                out.copy_(value)

        reads = [t for t in inputs if isinstance(t, torch.Tensor) and not any(t is k for k in kept)]
        queue(f"csrc {name}", run, reads, [*kept, *results, *workspace])
        return None

    return call
