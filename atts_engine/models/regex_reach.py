"""How far a regular expression looks."""

from __future__ import annotations

import re

_CLASS_ESCAPE = re.compile(r"\\(?:[pPx]\{[^}]*\}|[pP].|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|.)", re.DOTALL)
_GROUP = re.compile(r"\((?:\?(?:<[=!]|[=!>|]|[a-zA-Z-]*:|<\w+>))?")
_QUANTIFIER = re.compile(r"(?:[*+?]|\{(\d*)(,?)(\d*)\})[?+]?")


def regex_reach(pattern: str) -> int:
    """Characters of the longest text that `pattern` matches when every unbounded repetition is taken once.

    A bound on how far past the end of a match its alternatives look, given that runs end at the first character that
    is not theirs. Knows what tokenizers' patterns use: alternatives, groups, look-ahead, classes, escapes, quantifiers.
    """
    width, end = _alternatives(pattern, 0)
    # An unbalanced ")" cannot come from a tokenizer that loaded; what is behind it is counted in full.
    return width + len(pattern) - end


def _alternatives(pattern: str, at: int) -> tuple[int, int]:
    """(width, index after them) of the alternatives up to the end or to the bracket that closes their group."""
    widest = width = 0
    while at < len(pattern) and pattern[at] != ")":
        if pattern[at] == "|":
            widest, width, at = max(widest, width), 0, at + 1
            continue
        one, at = _item(pattern, at)
        times = 1
        while (found := _QUANTIFIER.match(pattern, at)) is not None:
            low, _, high = found.groups()
            times *= max(int(low or 1), int(high or 1)) if low is not None else 1
            at = found.end()
        width += one * max(times, 1)
    return max(widest, width), at


def _item(pattern: str, at: int) -> tuple[int, int]:
    if pattern[at] == "(":
        opened = _GROUP.match(pattern, at)
        assert opened is not None
        width, end = _alternatives(pattern, opened.end())
        return width, end + 1
    if pattern[at] == "[":
        return 1, _after_class(pattern, at)
    escape = _CLASS_ESCAPE.match(pattern, at)
    return 1, escape.end() if escape is not None else at + 1


def _after_class(pattern: str, at: int) -> int:
    depth = 0
    while at < len(pattern):
        if pattern[at] == "\\":
            at += 1
        elif pattern[at] == "[":
            depth += 1
        elif pattern[at] == "]":
            depth -= 1
            if depth == 0:
                return at + 1
        at += 1
    return at
