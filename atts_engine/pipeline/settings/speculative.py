"""Settings of token-level speculative decoding."""

from __future__ import annotations

from dataclasses import dataclass

from atts_engine.pipeline.settings.base import Settings, check_kinds, check_least


@dataclass(frozen=True, slots=True)
class Speculative(Settings):
    """Speculative decoding (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318) with common noise
    (Daliri et al., arXiv 2408.07978): the chains of the strategy "target", token for token; the draft proposes
    `proposal_tokens` at a time."""

    proposal_tokens: int = 5

    def __post_init__(self) -> None:
        check_kinds(self)
        check_least(self, "proposal_tokens", 1)
