"""What asyncio asks of a lane. Commands of one sequence are carried out in the order they were given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from atts_engine.conformal import GateRequest
from atts_engine.runtime.records import SamplingParams, TokenChunk

Reply = Callable[[Any, BaseException | None], None]
"""Called once on the scheduler thread with (value, error)."""


@dataclass(frozen=True, slots=True)
class Append:
    tokens: tuple[int, ...]
    score: bool
    reply: Reply


@dataclass(frozen=True, slots=True)
class Decode:
    max_tokens: int
    sampling: SamplingParams
    chunk_tokens: int
    emit: Callable[[TokenChunk], None]
    reply: Reply


@dataclass(frozen=True, slots=True)
class Propose:
    """See `backends.protocol.Verifier.propose`; answered with a `Proposal`."""

    tokens: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams
    written: int
    """Tokens at the end of the sequence that belong to the span already."""
    reply: Reply


@dataclass(frozen=True, slots=True)
class Verdict:
    gate: GateRequest | None
    reply: Reply


@dataclass(frozen=True, slots=True)
class Scored:
    wait: bool
    reply: Reply


@dataclass(frozen=True, slots=True)
class Fork:
    ids: tuple[int, ...]
    """Ids of the new sequences, chosen by the caller."""
    reply: Reply


@dataclass(frozen=True, slots=True)
class Truncate:
    length: int
    reply: Reply


Command = Append | Decode | Propose | Verdict | Scored | Fork | Truncate
