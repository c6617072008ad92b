"""Settings of the server, checked when they are made."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from atts_engine.config import ATTSParams
from atts_engine.errors import InputError

_COUNTS = ("max_chains", "max_queued_tokens", "reserve_tokens", "max_body_bytes", "max_choices", "stream_tokens")


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """What the server allows and what it does where a request says nothing.

    model: the name that requests call the pair by. params: of requests with `atts`, field by field where they leave one
    out. max_chains, max_queued_tokens: open at a time, in each lane, over all requests; a request beyond is refused
    with 503 (plain requests count a chain for each choice; tokens are what a request may hold at most, prompts
    included). None: four times the lane's KV pool, or max_chains whole contexts where the lane is on a server.
    reserve_tokens: counted for an answer, or a chain, whose request names no limit; None: the moving mean of such
    answers, and of such chains. max_choices: of one plain request. max_body_bytes: of a request's body. stream_tokens:
    of a plain request, that a chunk of its stream holds at most. timeout_s: seconds after which a request ends with
    what it has; None: never. key_digests: sha256 of the bearer keys, one of which every request must bring; none: no
    key is asked for. allowed_origins: web pages that browsers let use the server (CORS), "*" for all. log_prompts:
    prompts into the log too. measure_rates: take about a second at the start to measure what the devices reach, for
    T_c, T_m and r.
    Raises `InputError` for a value outside its range.
    """

    model: str
    params: ATTSParams = field(default_factory=ATTSParams)
    max_chains: int = 256
    max_queued_tokens: int | None = None
    reserve_tokens: int | None = None
    max_choices: int = 64
    max_body_bytes: int = 4 << 20
    stream_tokens: int = 1
    timeout_s: float | None = None
    key_digests: tuple[bytes, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    log_prompts: bool = False
    measure_rates: bool = True

    def __post_init__(self) -> None:
        if not self.model:
            raise InputError("the served model needs a name")
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be 1 or more, not {value}")
        if self.timeout_s is not None and not self.timeout_s > 0.0:
            raise InputError(f"timeout_s must be more than 0 seconds, not {self.timeout_s}")


def key_digest(key: str) -> bytes:
    """What is kept of a bearer key; all have one length, which a comparison may show."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def read_keys(path: str | Path) -> tuple[bytes, ...]:
    """Digests of the keys in a file, one a line; blank lines and lines that begin with # are passed over. `InputError`
    for a file without a key."""
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: keys must be text in UTF-8, one a line") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise InputError(f"{path}: no key in this file; write one a line")
    return tuple(key_digest(key) for key in keys)
