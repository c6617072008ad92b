"""Text into token ids as it arrives: only ids that later text cannot change.

An id is given out once it lies before a *stable boundary*: a place where the segmentation of the text before it is the
same whatever follows. Two kinds of tokenizers, two rules.

With a pre-tokenizer that splits, the model sees one piece at a time, so the ids of a piece are final as soon as its two
ends are. Patterns are matched from left to right, so a piece's end is final once everything that its match looked at is
there. A match is a chain of runs (`\\p{L}+`) and of single characters or literals. A run looks one character past its
end; a literal may look as far as it is long: after `'` it matters whether `ll` comes, so that not only the last piece
but the last two can still change. `reach` bounds this by the longest alternative of the pattern, each run counted once.
Runs of white space alone are looked through to their end (`\\s*[\\r\\n]+` and `\\s+(?!\\S)` give characters back), so
no boundary within or after a white-space run counts before `reach` characters have followed the run. Added tokens are
found by their full text, which adds the longest of them to the reach. Composition (NFC) changes at most the last base
character and its marks, so a boundary is moved in front of those too.

Without one (SentencePiece's BPE) the whole text is one piece. Every result of a merge is in the vocabulary, so where no
token holds the characters a, b side by side no merge ever crosses a|b, and the two sides are encoded independently.

What these rules take for granted of a pattern (no look-behind, no run given back but white space) is checked as text
arrives: each encoding begins with text that was given out before, and must give the same ids for it again.
"""

from __future__ import annotations

import copy
import json
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

import tokenizers

from atts_engine.errors import InputError
from atts_engine.models.detokenizer import byte_alphabet
from atts_engine.models.regex_reach import regex_reach

_META = "\u2581"
_CONTRACTION = 3  # characters of the longest literal in GPT-2's pattern, `'ll`


@dataclass(frozen=True, slots=True)
class EncodingRules:
    """How one tokenizer's text is cut. Made once, shared by all streams.

    backend: encodes special tokens that are written out as the plain text that they are: what one model writes must
    not become a control token of another. reach: see above, characters. pairs: characters (bytes of a byte-level
    tokenizer) that stand side by side in a token, where there is no pre-tokenizer; None where there is.
    marks_start: a text's first token is another than in mid-text (SentencePiece's dummy prefix).
    """

    backend: tokenizers.Tokenizer
    reach: int
    pairs: frozenset[tuple[str, str]] | None
    byte_level: bool
    marks_start: bool
    missing_bytes: frozenset[int]
    unknown_id: int | None

    @classmethod
    def of(cls, backend: tokenizers.Tokenizer, missing_bytes: frozenset[int], unknown_id: int | None) -> EncodingRules:
        """Raises `InputError` for a tokenizer whose normalizer leaves no boundary to rely on."""
        state = json.loads(backend.to_str())
        # It trims offsets, which are all we cut by, and adds tokens that belong to a whole text.
        state["post_processor"] = None
        own = tokenizers.Tokenizer.from_str(json.dumps(state))
        own.encode_special_tokens = True
        steps = [*_parts(state["normalizer"], "normalizers"), *_parts(state["pre_tokenizer"], "pretokenizers")]
        plain = [t["content"] for t in state["added_tokens"] if not t["special"]]
        byte_level = any(step["type"] == "ByteLevel" for step in steps)
        splits = any(_splits(step) for step in steps)
        if not splits and (strange := sorted({s["type"] for s in steps} - _TRANSPARENT)):
            raise InputError(f"a tokenizer with {strange[0]} and no pre-tokenizer cannot be fed text piece by piece")
        return cls(
            own,
            reach=1 + sum(_reach(step) for step in steps) + max(map(len, plain), default=0),
            pairs=None if splits else _pairs(own.get_vocab(with_added_tokens=False), plain),
            byte_level=byte_level,
            marks_start=any(_marks_start(step) for step in steps),
            missing_bytes=missing_bytes,
            unknown_id=unknown_id,
        )

    def limit(self, text: str) -> int:
        """No boundary of `text` after this index is final."""
        at = len(text) - self.reach
        while at > 0 and (text[at - 1].isspace() or _composes(text[at])):
            at -= 1
        return max(at, 0)

    def lead(self, text: str) -> str:
        """A text to put in front, so that `text` is encoded as the continuation that it is."""
        if not self.marks_start or not text:
            return ""
        return "0" if text[0].isspace() else "\n"

    def seam(self, text: str, at: int, words: tuple[int | None, int | None]) -> bool:
        """Whether text[:at] and text[at:] are encoded independently; words: pieces of the tokens at either side."""
        if self.pairs is None:
            return words[0] != words[1]
        left, right = text[at - 1], text[at]
        if self.byte_level:
            return (_byte_symbol(left, -1), _byte_symbol(right, 0)) not in self.pairs
        return (left.replace(" ", _META), right.replace(" ", _META)) not in self.pairs

    def check_spelled(self, encoding: tokenizers.Encoding, first: int, end: int, text: str, span: range) -> None:
        """`InputError` where tokens first .. end - 1 do not spell the characters `span` of `text`."""
        part = text[span.start : span.stop]
        if self.drops(encoding, text) or self.unknown_id in encoding.ids[first:end]:
            raise InputError(f"the tokenizer has no token for {self._unspelled(part)!r}")
        if self.byte_level:
            for character in part if self.missing_bytes else "":
                if not self.missing_bytes.isdisjoint(character.encode("utf-8", "surrogatepass")):
                    raise InputError(f"the tokenizer cannot spell {character!r} (U+{ord(character):04X})")

    def drops(self, encoding: tokenizers.Encoding, text: str) -> bool:
        """Whether the backend left out a character. One without an unknown token does so without a word, and all that
        follows moves up in its offsets. A byte-level one has its own check; composition shortens its offsets too."""
        return not self.byte_level and max((end for _, end in encoding.offsets), default=0) < len(text)

    def _unspelled(self, part: str) -> str:
        """The first character of `part` that has no token of its own, to be named; `part` where each has one."""
        for character in part:
            ids = self.backend.encode(character, add_special_tokens=False).ids
            if not ids or self.unknown_id in ids:
                return character
        return part


class StableEncoder:
    """One stream: the ids pushed and flushed, joined, are those of the whole text given at once, as the continuation of
    another text. Raises `InputError` for text that the vocabulary cannot spell."""

    def __init__(self, rules: EncodingRules) -> None:
        self._rules = rules
        self._text = ""  # from the boundary before the last one on
        self._given = 0  # characters of it whose ids were given out
        self._context: list[int] = []  # these ids

    @property
    def waiting(self) -> str:
        """Text whose ids are not final."""
        return self._text[self._given :]

    def push(self, text: str) -> list[int]:
        self._text += text
        return self._give(final=False) if text else []

    def flush(self) -> list[int]:
        """Ids of the text that waits, as if nothing followed it. What is pushed after it begins a stream of its own."""
        ids = self._give(final=True) if self.waiting else []
        self._text, self._given, self._context = "", 0, []
        return ids

    def copy(self) -> Self:
        return copy.copy(self)

    def _give(self, final: bool) -> list[int]:
        rules = self._rules
        lead = rules.lead(self._text)
        text = lead + self._text
        encoding = rules.backend.encode(text, add_special_tokens=False)
        given = len(lead) + self._given
        cuts = dict(_cuts(encoding.offsets)) | {len(text): len(encoding.ids)}
        begin, first = cuts.get(len(lead)), cuts.get(given)
        if begin is None or first is None or encoding.ids[begin:first] != self._context:
            raise InputError(f"the tokenizer's segmentation of {self._text[: self._given]!r} depends on what follows")
        end = len(text)
        if not final and rules.drops(encoding, text):
            # What follows may still make a token of it, as of the first characters of an added one.
            return []
        if not final:
            limit, words = rules.limit(text), encoding.word_ids
            end = max(
                (
                    at
                    for at, i in cuts.items()
                    if given < at <= limit and rules.seam(text, at, (words[i - 1], words[i]))
                ),
                default=given,
            )
        fresh = encoding.ids[first : cuts[end]]
        rules.check_spelled(encoding, first, cuts[end], text, range(given, end))
        if end > given:
            self._text, self._given, self._context = text[given:], end - given, fresh
        return fresh


def _cuts(offsets: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """(index into the text, token) of every place between two tokens that no token covers. Tokens that hold bytes of
    one character share its offsets."""
    starts = [start for start, _ in offsets]
    for i in range(len(offsets) - 2, -1, -1):
        starts[i] = min(starts[i], starts[i + 1])
    reached = 0
    for i, (_, end) in enumerate(offsets):
        if reached <= starts[i] and (i == 0 or starts[i] > 0):
            yield starts[i], i
        reached = max(reached, end)


def _parts(step: Mapping[str, Any] | None, children: str) -> list[Mapping[str, Any]]:
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [part for child in step[children] for part in _parts(child, children)]
    return [step]


_TRANSPARENT = {"Prepend", "Replace", "Metaspace", "ByteLevel"}
_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Prepend", "Replace", "Strip", "StripAccents", "Lowercase", "Nmt",
                "Precompiled", "BertNormalizer"}  # fmt: skip


def _splits(step: Mapping[str, Any]) -> bool:
    if step["type"] == "ByteLevel":
        # As a normalizer it has no such field.
        return bool(step.get("use_regex", False))
    if step["type"] == "Metaspace":
        return bool(step.get("split", True))
    return step["type"] not in _NORMALIZERS


def _reach(step: Mapping[str, Any]) -> int:
    pattern = step.get("pattern")
    if isinstance(pattern, Mapping):
        return regex_reach(pattern["Regex"]) if "Regex" in pattern else len(pattern["String"])
    return _CONTRACTION if step["type"] == "ByteLevel" and _splits(step) else 1


def _marks_start(step: Mapping[str, Any]) -> bool:
    if step["type"] == "Metaspace":
        return bool(step.get("prepend_scheme", "always") != "never")
    return step["type"] == "Prepend" or bool(step.get("add_prefix_space", False))


def _pairs(vocabulary: Mapping[str, int], added: Sequence[str]) -> frozenset[tuple[str, str]]:
    return frozenset(pair for token in (*vocabulary, *added) for pair in pairwise(token.replace(" ", _META)))


def _composes(character: str) -> bool:
    """Whether it may join the character before it: a mark, or a vowel or final consonant of Hangul."""
    return unicodedata.category(character).startswith("M") or "\u1160" <= character <= "\u11ff"


_SYMBOL_OF = {byte: symbol for symbol, byte in byte_alphabet().items()}


def _byte_symbol(character: str, index: int) -> str:
    return _SYMBOL_OF[character.encode("utf-8", "surrogatepass")[index]]
