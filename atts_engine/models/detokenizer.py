"""Token ids into text as they arrive: only text that later ids cannot change."""

from __future__ import annotations

import codecs
import copy
from collections.abc import Mapping, Sequence
from typing import Protocol


class Detokenizer(Protocol):
    """One per stream. The pushed texts and the flushed one, joined, are the text of all ids decoded at
    once."""

    @property
    def settled(self) -> bool:
        """Whether the ids pushed so far have given all their text: none of them waits for others."""
        ...

    def push(self, ids: Sequence[int]) -> str: ...

    def flush(self) -> str: ...

    def settle(self) -> str:
        """Text of the ids that wait, where they are whole characters; else they are forgotten. The stream goes on."""
        ...

    def copy(self) -> Detokenizer:
        """A stream of its own that has seen the same ids."""
        ...


class ByteLevelVocabulary:
    """Bytes of each token of a byte-level BPE (GPT-2's printable alphabet undone)."""

    def __init__(self, tokens: Mapping[int, str], special_ids: frozenset[int]) -> None:
        self._tokens = tokens
        self.special_ids = special_ids
        self.byte_of = byte_alphabet()

    def bytes_of(self, token_id: int) -> bytes:
        token = self._tokens.get(token_id, "")
        try:
            return bytes(self.byte_of[character] for character in token)
        except KeyError:
            # An added token written in plain characters stands for itself, as a whole.
            return token.encode("utf-8")


def byte_alphabet() -> dict[str, int]:
    """GPT-2's map of printable characters to the 256 bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(hidden)}


class ByteLevelDetokenizer:
    """Exact: tokens are byte strings, and an unfinished UTF-8 character waits for its other bytes."""

    def __init__(self, vocabulary: ByteLevelVocabulary, skip_special: bool = True) -> None:
        self._vocabulary = vocabulary
        self._skip = vocabulary.special_ids if skip_special else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    @property
    def settled(self) -> bool:
        return not self._decoder.getstate()[0]

    def copy(self) -> ByteLevelDetokenizer:
        other = copy.copy(self)
        other._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        other._decoder.setstate(self._decoder.getstate())
        return other

    def push(self, ids: Sequence[int]) -> str:
        return self._decoder.decode(b"".join(self._vocabulary.bytes_of(i) for i in ids if i not in self._skip))

    def settle(self) -> str:
        self._decoder.reset()
        return ""

    def flush(self) -> str:
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


class TextDecoder(Protocol):
    """What a WindowDetokenizer asks of a tokenizer."""

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str: ...


class WindowDetokenizer:
    """For vocabularies whose tokens are characters, perhaps with single bytes as a last resort
    (SentencePiece's byte fallback).

    A run of byte tokens waits for the token after it: one bad byte changes the text of the whole run.
    Decoding starts one token back, because only the first token of a text loses its leading space. kept_ids:
    ids that have a text at all.
    """

    def __init__(self, tokenizer: TextDecoder, kept_ids: frozenset[int], byte_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._kept_ids = kept_ids
        self._byte_ids = byte_ids
        self._context: list[int] = []
        self._waiting: list[int] = []

    @property
    def settled(self) -> bool:
        return not self._waiting

    def copy(self) -> WindowDetokenizer:
        other = copy.copy(self)
        other._context, other._waiting = list(self._context), list(self._waiting)
        return other

    def push(self, ids: Sequence[int]) -> str:
        self._waiting += [i for i in ids if i in self._kept_ids]
        ready = len(self._waiting)
        while ready and self._waiting[ready - 1] in self._byte_ids:
            ready -= 1
        return self._take(ready)

    def settle(self) -> str:
        context, waiting = self._context, self._waiting
        text = self._take(len(waiting))
        if "\ufffd" in text:
            self._context, text = context, ""
        return text

    def flush(self) -> str:
        text = self._take(len(self._waiting))
        self._context = []
        return text

    def _take(self, count: int) -> str:
        if count == 0:
            return ""
        known = self._tokenizer.decode(self._context, skip_special=False)
        text = self._tokenizer.decode(self._context + self._waiting[:count], skip_special=False)
        self._context, self._waiting = self._waiting[count - 1 : count], self._waiting[count:]
        return text[len(known) :]
