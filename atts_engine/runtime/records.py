"""Records that cross the boundary of a lane. All are frozen: they are read by several threads."""

from __future__ import annotations

from dataclasses import dataclass, field

from atts_engine.errors import InputError

Alternatives = tuple[tuple[int, float], ...]
"""The likeliest tokens of one place, the likeliest first, each with its log-probability."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one span is sampled.

    temperature: 0 is greedy; top_k: 0 is off; top_p in (0, 1]; min_p in [0, 1).
    seed: 64-bit stream key of the chain; noise depends on (seed, position, token id) alone.
    stop: strings that end the span (the stop string itself is kept in the span).
    stop_token_ids: ids that end the span (the id is kept); the model's own EOS ids always do unless ignore_eos.
    logprobs: also hand over each token's log-probability under the model itself (`TokenChunk.logprobs`).
    confidence: also hand over how sure the model itself was at each token, by its k likeliest tokens
    (`TokenChunk.confidences`); 0: off.
    alternatives: also hand over the k likeliest tokens of each place (`TokenChunk.alternatives`); 0: off.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: bool = False
    confidence: int = 0
    alternatives: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0.0:
            raise InputError(f"temperature must be 0 or more, not {self.temperature}")
        if self.top_k < 0:
            raise InputError(f"top_k must be 0 (off) or more, not {self.top_k}")
        if not 0.0 < self.top_p <= 1.0:
            raise InputError(f"top_p must be in (0, 1], not {self.top_p}")
        if not 0.0 <= self.min_p < 1.0:
            raise InputError(f"min_p must be in [0, 1), not {self.min_p}")
        if any(not s for s in self.stop):
            raise InputError("a stop string must not be empty")
        if self.confidence < 0:
            raise InputError(f"confidence must be 0 (off) or more, not {self.confidence}")
        if self.alternatives < 0:
            raise InputError(f"alternatives must be 0 (off) or more, not {self.alternatives}")


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """Consecutive new tokens of one span. `finish` is set on the last chunk only: "stop" (EOS, stop id or stop
    string), "length" (max_tokens reached). logprobs: nats, float32, one for each token where `SamplingParams.logprobs`
    asked for them, else none; under the model's own distribution: temperature 1, nothing filtered away. confidences:
    likewise, where `SamplingParams.confidence` asked for them (`ops.token_confidence`). alternatives: likewise, where
    `SamplingParams.alternatives` asked for them, of each place as many as that, or all that have a probability above 0
    (`likeliest.top_logprobs`). wait_s: on the last chunk, seconds since the decode was asked for in which the sequence
    was in no running step; None where the lane does not tell."""

    tokens: tuple[int, ...]
    finish: str | None = None
    logprobs: tuple[float, ...] = ()
    wait_s: float | None = field(default=None, compare=False)
    confidences: tuple[float, ...] = ()
    alternatives: tuple[Alternatives, ...] = ()


@dataclass(frozen=True, slots=True)
class Proposal:
    """What became of proposed tokens. tokens: the first `accepted` of them, which are those that the lane drew itself,
    then the lane's own next token, unless the last of these ended the span. finish, logprobs, wait_s: as in
    `TokenChunk`; finish is None where the span may go on. Confidences and alternatives are not told of proposals."""

    tokens: tuple[int, ...]
    accepted: int
    finish: str | None = None
    logprobs: tuple[float, ...] = ()
    wait_s: float | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class GateOutcome:
    """What the gate found: greater = #{calibration > score}, ties = #{calibration == score} among n calibration scores,
    p_value = (greater + U (1 + ties)) / (n + 1), takeover = p_value <= alpha (decided in integers).
    decision_seq: order of decisions on this lane; batch: decisions with one number saw the same calibration store.
    """

    greater: int
    ties: int
    n: int
    p_value: float
    takeover: bool
    decision_seq: int
    batch: int


@dataclass(frozen=True, slots=True)
class SpanResult:
    """What a lane knows of a scored span. sum_logprob: nats, summed over n_tokens in a fixed order;
    score: -sum_logprob / n_tokens as float32, or what the gate tested in its place (`GateRequest.most`); outcome: None
    when no gate was asked for; logprobs: nats, float32, the terms of the sum in its order, or none where the lane knows
    the sum alone. wait_s: seconds since the verdict was asked for in which the sequence was in no running step; None
    where the lane does not tell."""

    sum_logprob: float
    n_tokens: int
    score: float
    outcome: GateOutcome | None = None
    logprobs: tuple[float, ...] = ()
    wait_s: float | None = field(default=None, compare=False)
