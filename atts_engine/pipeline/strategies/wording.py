"""Words that strategies put behind a chain, in what the author's tokenizer can spell."""

from __future__ import annotations

from collections.abc import Sequence

from atts_engine.errors import InputError
from atts_engine.pipeline.translation import Words

Phrases = tuple[str, ...]


def spelling(words: Words, choices: Sequence[Phrases], option: str) -> tuple[tuple[int, ...], ...]:
    """Token ids of the first choice whose phrases can all be spelled. `option`: what sets the words by hand."""
    refused: InputError | None = None
    for phrases in choices:
        try:
            return tuple(tuple(words.codec.encode(phrase)) for phrase in phrases)
        except InputError as error:
            refused = error
    raise InputError(f"the author's model cannot be asked: {refused}; choose other words with {option}")
