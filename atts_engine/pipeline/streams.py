"""Random streams: every draw is keyed by what it is for, never by when or where it is made."""

from __future__ import annotations

import hashlib


def stream_key(seed: int, problem_id: str, chain: int, purpose: str, index: int = 0) -> int:
    """64-bit signed key of (seed, problem, chain, purpose, index).

    Purposes salt the streams apart, so draft and target never draw the same noise at one position, but where it is
    wanted (`pipeline.speculative`).
    """
    text = f"{seed}\x1f{problem_id}\x1f{chain}\x1f{purpose}\x1f{index}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def gate_uniform(seed: int, problem_id: str, chain: int, turn: int) -> int:
    """The gate's tie-breaking uniform for one verdict: an integer in 1 .. 2**32, standing for u / 2**32 in (0, 1]."""
    return 1 + (stream_key(seed, problem_id, chain, "gate", turn) & 0xFFFFFFFF)
