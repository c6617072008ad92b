"""The span that a lane is writing on a sequence. Touched by the scheduler thread only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from atts_engine.runtime.commands import Decode, Propose
from atts_engine.runtime.records import Alternatives, Proposal, TokenChunk


class Decodes(Protocol):
    """Text of token ids."""

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str: ...


@dataclass(slots=True)
class DecodeState:
    """Progress of the command at the head of a sequence that has it written on."""

    command: Decode | Propose
    limit: int
    """Tokens it may produce: `max_tokens`, or fewer where the context ends."""
    produced: int = 0
    proposed: int = 0
    """Tokens at the end of the sequence that were proposed, and that the lane has yet to draw for itself."""
    accepted: int = 0
    """Proposed tokens that it drew as well."""
    in_flight: bool = False
    """A step in flight draws for a proposal. No other is launched meanwhile: its rows may be for nobody."""
    buffer: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    alternatives: list[Alternatives] = field(default_factory=list)
    """All three of the tokens in `buffer`, where they are asked for."""
    recent: list[int] = field(default_factory=list)
    """The last tokens of the span, as far back as a stop string can reach."""

    @property
    def proposal(self) -> bool:
        return isinstance(self.command, Propose)

    def take(
        self,
        token: int,
        logprob: float | None,
        confidence: float | None,
        alternatives: Alternatives | None,
        eos: frozenset[int],
        tokenizer: Decodes,
    ) -> str | None:
        """The span's next token. Returns how the span ends with it; None: it does not."""
        self.produced += 1
        self.buffer.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        if confidence is not None:
            self.confidences.append(confidence)
        if alternatives is not None:
            self.alternatives.append(alternatives)
        sampling = self.command.sampling
        ends = token in sampling.stop_token_ids or (token in eos and not sampling.ignore_eos)
        if ends or (sampling.stop and self._hit_stop_string(token, tokenizer)):
            return "stop"
        return "length" if self.produced >= self.limit else None

    def hand_over(self, finish: str | None = None, wait_s: float | None = None) -> TokenChunk:
        """The tokens since the last chunk."""
        told = tuple(self.logprobs), wait_s, tuple(self.confidences), tuple(self.alternatives)
        chunk = TokenChunk(tuple(self.buffer), finish, *told)
        for held in (self.buffer, self.logprobs, self.confidences, self.alternatives):
            held.clear()
        return chunk

    def outcome(self, finish: str | None, wait_s: float) -> Proposal:
        """What became of the proposal."""
        return Proposal(tuple(self.buffer), self.accepted, finish, tuple(self.logprobs), wait_s)

    def _hit_stop_string(self, token: int, tokenizer: Decodes) -> bool:
        # A stop string can begin before this token but must end in it, so the last few tokens' text is enough:
        # every token holds at least one byte except specials, which hold none of a stop string.
        stops = self.command.sampling.stop
        reach = max(len(s.encode()) for s in stops) + 1
        self.recent.append(token)
        del self.recent[:-reach]
        text = tokenizer.decode(self.recent)
        return any(s in text for s in stops)
