"""What is known here of a model that a server has: its tokenizer above all, for token ids are what crosses the wire."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from atts_engine.backends.remote.address import Address
from atts_engine.backends.remote.server import Served
from atts_engine.errors import InputError
from atts_engine.models import Tokenizer, describe, resolve

PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "x = 3.14159; y = x**2 + 10_000 - 7 / 42",
    "def f(a, b):\n    return {'k': [a, b]}\n\n\tindented\n",
    "  two  spaces   three    four",
    "naïve café, 数学の問題, эмоджи 🙂🙃 and \\boxed{½}",
    "a = 85; b = a-43; c = b*3",
)
"""Texts that tokenizers of different families, or versions, cut differently."""
ADDED = 32
"""Added tokens that are looked at."""


@dataclass(frozen=True, slots=True)
class RemoteModel:
    """name: its address; context: tokens that a sequence may have. fingerprint: that of `load_model` where the server's
    files can be read here, so that a calibration fits lanes of either kind; else of the names and the tokenizer."""

    name: str
    tokenizer: Tokenizer
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    context: int
    fingerprint: str

    @classmethod
    def of(cls, address: Address, text: str, served: Served, tokenizer: str | None) -> RemoteModel:
        """text: the address as it was given; tokenizer: a model's name to read it from, None: the folder that the
        server names. `InputError` where that is not here."""
        own = _here(served.root)
        source = resolve(tokenizer) if tokenizer is not None else _here(served.tokenizer) or own
        if source is None:
            raise InputError(
                f"{text}: the server's tokenizer is {served.tokenizer or served.root}, which is not on this machine; "
                "name a folder that has it with --draft-tokenizer or --target-tokenizer"
            )
        found = describe(source)
        fingerprint = None if own is None else describe(own).fingerprint
        if fingerprint is None:
            parts = (address.kind, served.name, served.root or "", found.tokenizer.fingerprint)
            fingerprint = hashlib.sha256("\x1f".join(parts).encode()).hexdigest()
        return cls(text, found.tokenizer, found.vocab_size, found.eos_token_ids, served.context, fingerprint)


def _here(name: str | None) -> Path | None:
    """A model's folder or file as the server names it, if it can be read on this machine."""
    if name is None:
        return None
    path = Path(name)
    readable = (path / "tokenizer.json").is_file() or (path.is_file() and path.suffix == ".gguf")
    return path if readable else None


async def check_tokenizer(model: RemoteModel, encode: Callable[[str], Awaitable[list[int]]]) -> None:
    """Whether the server cuts texts as the tokenizer here does. `InputError` with the first text that it does not."""
    # What is one token wherever it stands is told to a tokenizer beside its vocabulary, and easily differs.
    added = (f"1{token} 2" for token in model.tokenizer.added_tokens[:ADDED])
    for text in (*PROBES, *added):
        try:
            own = model.tokenizer.encode(text)
        except InputError:
            # A vocabulary that cannot spell everything.
            continue
        its = await encode(text)
        if own != its:
            raise InputError(
                f"{model.name}: the server's tokenizer is another: {text!r} is {its} there and {own} here; name the "
                "right one with --draft-tokenizer or --target-tokenizer"
            )
