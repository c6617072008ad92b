"""What a configuration costs: the budget of AgentTTS (arXiv 2508.00890), operations, tokens and seconds.

AgentTTS counts a model of M parameters that reads a prompt of Np tokens once and writes S samples of Nd tokens as
M (Np + S Nd), in units of what its smallest model does for one sample, less that model's prompt:

    budget = b2 (a b3 (b1 + S) / b1 - 1),   a = M / M_small,  b1 = Np / Nd,  b2 = Np2 / Nd2,  b3 = Np / Np2

so that one sample of the unit model costs exactly 1. Here each model of the pair is such a term with S = chains. Every
token of a chain goes through both models, whoever wrote it: the target scores what the draft wrote, and the draft reads
what the target wrote. Operations are therefore the same count in another scale, 2 M (Np + S Nd) for each model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from atts_engine.errors import InputError
from atts_engine.evaluation.tuning.space import Configuration

Costs = Mapping[str, float]
KINDS = {
    "tokens": "target tokens",
    "flops": "FLOPs",
    "units": "cost units",
    "seconds": "seconds",
}
"""What a budget may be in, always for one problem, and how it is called."""


@dataclass(frozen=True, slots=True)
class Unit:
    """The unit of cost: one sample of a model of `parameters`. The defaults are the paper's (3B, 128, 64)."""

    parameters: float = 3e9
    prompt_tokens: float = 128
    written_tokens: float = 64


@dataclass(frozen=True, slots=True)
class Sizes:
    """Parameters of a pair's models."""

    draft: int
    target: int


@dataclass(frozen=True, slots=True)
class Workload:
    """What one problem takes, on average. prompt_tokens: of the prompt, as (draft, target) count them; draft_tokens,
    target_tokens: written by each, for one chain."""

    chains: int
    prompt_tokens: tuple[float, float]
    draft_tokens: float
    target_tokens: float


@dataclass(frozen=True, slots=True)
class Budget:
    """At most `limit` of `kind` (a key of `KINDS`) for one problem."""

    kind: str
    limit: float

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"a budget must be in one of {', '.join(KINDS)}, not {self.kind!r}")
        if not 0.0 < self.limit < float("inf"):
            raise InputError(f"a budget must be a positive number of {KINDS[self.kind]}, not {self.limit}")

    def holds(self, costs: Costs) -> bool:
        """Whether a problem at these costs keeps to the budget."""
        return costs[self.kind] <= self.limit

    def __str__(self) -> str:
        return f"{self.limit:,.6g} {KINDS[self.kind]} a problem"


def unit_cost(
    samples: float, parameters: float, prompt_tokens: float, written_tokens: float, unit: Unit | None = None
) -> float:
    """AgentTTS's budget of S samples: b2 (a b3 (b1 + S) / b1 - 1); `unit`: the paper's where it is left out."""
    a, b2, b3 = _ratios(parameters, prompt_tokens, unit or Unit())
    # (b1 + S) / b1 in a form that holds for Nd = 0 too.
    return b2 * (a * b3 * (1.0 + samples * written_tokens / prompt_tokens) - 1.0)


def samples_within(
    budget: float, parameters: float, prompt_tokens: float, written_tokens: float, unit: Unit | None = None
) -> float:
    """The inverse of `unit_cost`: S = b1 ((budget / b2 + 1) / (a b3) - 1), a real number."""
    a, b2, b3 = _ratios(parameters, prompt_tokens, unit or Unit())
    if written_tokens <= 0:
        raise InputError("samples of no tokens cost nothing: any number is within a budget")
    return prompt_tokens / written_tokens * ((budget / b2 + 1.0) / (a * b3) - 1.0)


def _ratios(parameters: float, prompt_tokens: float, unit: Unit) -> tuple[float, float, float]:
    """a, b2, b3."""
    if min(parameters, prompt_tokens, unit.parameters, unit.prompt_tokens, unit.written_tokens) <= 0:
        raise InputError("the cost model needs parameters and tokens above 0")
    return parameters / unit.parameters, unit.prompt_tokens / unit.written_tokens, prompt_tokens / unit.prompt_tokens


def flops(work: Workload, sizes: Sizes) -> float:
    """Floating-point operations of a problem: two for each parameter and token of either model, without attention."""
    through = work.chains * (work.draft_tokens + work.target_tokens)
    reads = zip((sizes.draft, sizes.target), work.prompt_tokens, strict=True)
    return sum(2.0 * parameters * (prompt + through) for parameters, prompt in reads)


def computed_costs(work: Workload, sizes: Sizes, unit: Unit) -> dict[str, float]:
    """Costs of a problem that follow from its tokens: every kind but seconds."""
    through = work.draft_tokens + work.target_tokens
    reads = zip((sizes.draft, sizes.target), work.prompt_tokens, strict=True)
    return {
        "tokens": work.chains * work.target_tokens,
        "flops": flops(work, sizes),
        "units": sum(unit_cost(work.chains, parameters, prompt, through, unit) for parameters, prompt in reads),
    }


def planned_work(configuration: Configuration, text_tokens: float, prompt_tokens: tuple[float, float]) -> Workload:
    """The work to expect where a whole solution is `text_tokens` long.

    A turn adds K_d + alpha K_t tokens to a chain that goes on, (1 - alpha) K_d + alpha K_t where the target replaces
    the span; turns are used up or the solution is whole, whichever is first.
    """
    c = configuration
    kept = c.draft_tokens * (1.0 if c.takeover == "continue" else 1.0 - c.alpha)
    turns = min(float(c.turns), text_tokens / (kept + c.alpha * c.target_tokens))
    return Workload(c.chains, prompt_tokens, turns * c.draft_tokens, turns * c.alpha * c.target_tokens)
