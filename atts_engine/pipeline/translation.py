"""What one lane writes, as text and as tokens of the other lane.

With one tokenizer ids pass as they are. With two, text is the common form: each lane keeps its own ids, and the other
lane is given ids of text up to a *stable boundary* alone, where no later text can change them. What is behind the
boundary at the end of a span waits for the next span, and is given over when the other lane is to go on from there.
Bytes of a character that is not whole have no text: tokens that hold only such are taken back where the writer changes
(one that also holds text stays, and its lane sees a character that was never ended).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

from atts_engine.errors import ChainError, InputError


class TextStream(Protocol):
    """Token ids into text as they come; see `models.detokenizer.Detokenizer`."""

    @property
    def settled(self) -> bool: ...

    def push(self, ids: Sequence[int]) -> str: ...

    def flush(self) -> str: ...

    def settle(self) -> str: ...

    def copy(self) -> Self: ...


class TokenStream(Protocol):
    """Text into final token ids as it comes; see `models.encoder.StableEncoder`."""

    @property
    def waiting(self) -> str: ...

    def push(self, text: str) -> list[int]: ...

    def flush(self) -> list[int]: ...

    def copy(self) -> Self: ...


class Codec(Protocol):
    """Text of token ids, specials left out, and ids of a whole text."""

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str: ...

    def encode(self, text: str) -> list[int]:
        """`InputError` where the vocabulary cannot spell it."""
        ...

    def detokenizer(self, skip_special: bool = True) -> TextStream: ...


class TwoWayCodec(Codec, Protocol):
    """What a tokenizer must be able to do beside one of another kind."""

    def encoder(self) -> TokenStream: ...


@dataclass(frozen=True, slots=True)
class Words:
    """How one lane spells: its codec, the ids that end a text there, and the one that it writes for that itself."""

    codec: Codec
    ends: frozenset[int]
    eos: int | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """text: what the tokens say as far as it cannot change any more; ids: tokens for the other lane; n_bytes: length in
    UTF-8 of the text that `ids` spell."""

    text: str
    ids: tuple[int, ...]
    n_bytes: int


class Translation(Protocol):
    """One direction of one chain: tokens of the lane that writes into tokens of the lane that follows."""

    end_ids: int
    """Tokens given over for the mark that ended the text; 0 until there was one."""

    def push(self, ids: Sequence[int]) -> Piece: ...

    def flush(self) -> Piece:
        """All text that waits, as if nothing followed it. The writer goes on."""
        ...

    def end(self) -> Piece:
        """As `flush`, for the other lane is the next to write; see `take_broken`."""
        ...

    def take_broken(self) -> int:
        """Tokens at the writer's end that have no text of their own, because their character is not whole. They are
        forgotten here: the caller takes them back on the writer's lane."""
        ...

    def copy(self) -> Self: ...


class SameTokens:
    """One tokenizer: nothing waits and nothing is re-encoded. One object serves both directions, so that a character
    may be begun by one lane and ended by the other."""

    def __init__(self, words: Words) -> None:
        self._ends = words.ends
        self._text = words.codec.detokenizer()
        self.end_ids = 0

    def push(self, ids: Sequence[int]) -> Piece:
        said = [i for i in ids if i not in self._ends]
        text = self._text.push(said)
        self.end_ids = int(bool(ids) and ids[-1] in self._ends)
        return Piece(text, tuple(ids), len(_utf8(text)))

    def flush(self) -> Piece:
        return Piece("", (), 0)

    def end(self) -> Piece:
        return self.flush()

    def take_broken(self) -> int:
        return 0

    def copy(self) -> SameTokens:
        other = SameTokens.__new__(SameTokens)
        other._ends, other._text, other.end_ids = self._ends, self._text.copy(), self.end_ids
        return other


class OtherTokens:
    """Two tokenizers. prompt: the writing lane's, for the text of its first token is that of a continuation.

    Raises `ChainError` for text that the reader's vocabulary cannot spell.
    """

    def __init__(self, writer: Words, reader: Words, encoder: TokenStream, prompt: Sequence[int]) -> None:
        self._ends = writer.ends
        self._eos = reader.eos
        self._text = writer.codec.detokenizer()
        self._text.push(prompt)
        self._text.settle()
        self._encoder = encoder
        self._waiting_bytes = 0
        self._broken = 0
        self.end_ids = 0

    def push(self, ids: Sequence[int]) -> Piece:
        text, ended = "", False
        for i in ids:
            if i in self._ends:
                ended = True
                continue
            new = self._text.push([i])
            # A token may end one character and begin another, as " " and the first bytes of an emoji: it stays.
            self._broken = 0 if new or self._text.settled else self._broken + 1
            text += new
        given, n_bytes = self._encode(text, flush=ended)
        self.end_ids = int(ended and self._eos is not None)
        if ended and self._eos is not None:
            given = (*given, self._eos)
        return Piece(text, given, n_bytes)

    def flush(self) -> Piece:
        return Piece("", *self._encode("", flush=True))

    def end(self) -> Piece:
        text = self._text.settle()
        if text:
            self._broken = 0
        given, n_bytes = self._encode(text, flush=True)
        return Piece(text, given, n_bytes)

    def take_broken(self) -> int:
        broken, self._broken = self._broken, 0
        return broken

    def copy(self) -> OtherTokens:
        other = OtherTokens.__new__(OtherTokens)
        other.__dict__.update(self.__dict__)
        other._text, other._encoder = self._text.copy(), self._encoder.copy()
        return other

    def _encode(self, text: str, flush: bool) -> tuple[tuple[int, ...], int]:
        self._waiting_bytes += len(_utf8(text))
        try:
            ids = self._encoder.push(text)
            if flush:
                ids = ids + self._encoder.flush()
        except InputError as error:
            raise ChainError(f"the other lane cannot take over what was written: {error}") from error
        waiting = len(_utf8(self._encoder.waiting))
        given, self._waiting_bytes = self._waiting_bytes - waiting, waiting
        return tuple(ids), given


@dataclass(frozen=True, slots=True)
class Tongues:
    """The words of both lanes. codecs: draft's and target's where they differ."""

    draft: Words
    target: Words
    codecs: tuple[TwoWayCodec, TwoWayCodec] | None = None

    def translations(
        self, draft_prompt: Sequence[int], target_prompt: Sequence[int]
    ) -> tuple[Translation, Translation]:
        """(draft to target, target to draft) of a new chain."""
        if self.codecs is None:
            same = SameTokens(self.target)
            return same, same
        draft, target = self.codecs
        return (
            OtherTokens(self.draft, self.target, target.encoder(), draft_prompt),
            OtherTokens(self.target, self.draft, draft.encoder(), target_prompt),
        )


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
