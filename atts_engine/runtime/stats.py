"""What a lane counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class LaneStats:
    """Counters since the lane began. Tokens are forward passes of one token; busy_s is wall time inside steps.
    preemptions: of which preemptions_swap moved the sequence's KV to host memory and preemptions_recompute dropped it.
    discarded_rows: forward passes of one token, not in computed_tokens, that were launched before the host knew that
    their sequence had ended.
    proposed_tokens: given to this lane to be verified, of which accepted_tokens were what it drew itself.
    rejected_rows: of computed_tokens, those of a proposal behind the first token that was not, or behind the end of
    the span.

    computed_tokens = distinct_tokens + recomputed_tokens + repeated_tokens. distinct_tokens: tokens forwarded for the
    first time in their sequence, where forks share what their parent has computed (all but its last token).
    recomputed_tokens: forwarded again since a preemption dropped their KV. repeated_tokens: forwarded again since a
    truncate made them the last of their sequence, one each. rolled_back_tokens: computed, then taken back by a
    truncate.
    """

    steps: int = 0
    computed_tokens: int = 0
    distinct_tokens: int = 0
    recomputed_tokens: int = 0
    repeated_tokens: int = 0
    rolled_back_tokens: int = 0
    scored_tokens: int = 0
    sampled_tokens: int = 0
    preemptions: int = 0
    preemptions_swap: int = 0
    preemptions_recompute: int = 0
    swapped_out_pages: int = 0
    swapped_in_pages: int = 0
    discarded_rows: int = 0
    proposed_tokens: int = 0
    accepted_tokens: int = 0
    rejected_rows: int = 0
    busy_s: float = 0.0
