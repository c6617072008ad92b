"""Final answers in a chain's text: the last balanced `\\boxed{...}`."""

from __future__ import annotations

from typing import NamedTuple

_OPEN = "\\boxed{"


class Boxed(NamedTuple):
    """The content of a box and the index in the text just after its closing brace."""

    content: str
    end: int


def last_boxed(text: str) -> Boxed | None:
    """The last box of `text` whose braces balance (escaped braces `\\{ \\}` do not count), or None."""
    start = text.rfind(_OPEN)
    while start >= 0:
        depth, i = 1, start + len(_OPEN)
        while i < len(text):
            c = text[i]
            if c == "\\":
                i += 2
                continue
            depth += (c == "{") - (c == "}")
            if depth == 0:
                return Boxed(text[start + len(_OPEN) : i].strip(), i + 1)
            i += 1
        start = text.rfind(_OPEN, 0, start)
    return None


def find_answer(text: str) -> str | None:
    """Content of the last balanced box, or None. A later box replaces an earlier one: chains may correct themselves."""
    box = last_boxed(text)
    return box.content if box is not None else None
