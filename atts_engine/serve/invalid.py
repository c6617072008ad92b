"""What is wrong with a request's body, in a caller's words: the field, what it must be, and what it was."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from atts_engine.serve.requests import CANNOT, FIELDS

_KINDS = {
    "string_type": "a text",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}
_RULES = {
    "greater_than_equal": "must be {ge} or more",
    "greater_than": "must be more than {gt}",
    "less_than_equal": "must be {le} or less",
    "less_than": "must be less than {lt}",
    "finite_number": "must be a finite number",
    "literal_error": "must be {expected}",
    "string_too_long": "must have {max_length} characters or fewer",
    "too_long": "must have {max_length} entries or fewer, not {actual_length}",
    "string_too_short": "must not be empty",
    "too_short": "must not be empty",
    "none_required": CANNOT,
}
_SHOWN = 40
"""Characters of a value that are quoted."""


def explain(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """(message, field) of pydantic's errors; the field is None where the body as a whole is meant."""
    # Where a value may be of several kinds each says what it misses; the one that got furthest was meant.
    first = max(errors, key=lambda error: (len(_path(error)), error["type"] not in _KINDS))
    field = ".".join(map(str, _path(first)))
    if first["type"] == "json_invalid":
        return f"the body is no JSON: {first['ctx']['error']} at character {first['loc'][-1]}", None
    if not field:
        empty = first["type"] == "missing"
        return f"the body {'is empty: send' if empty else 'must be'} a JSON object", None
    if first["type"] in _KINDS:
        alike = [_KINDS[e["type"]] for e in errors if e["type"] in _KINDS and _path(e) == _path(first)]
        return f"{field}: must be {' or '.join(dict.fromkeys(alike))}{_given(first)}", field
    return f"{field}: {_broken(first)}", field


def _broken(error: Mapping[str, Any]) -> str:
    """What a value of the right kind does not keep to."""
    kind, facts = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        name = str(error["loc"][-1])
        meant = get_close_matches(name, FIELDS - {name}, n=1, cutoff=0.8)
        return "this field is not known here" + (f"; is {meant[0]} meant?" if meant else "; leave it out")
    if kind == "missing":
        return "is missing"
    if kind == "too_long" and not facts["max_length"]:
        return CANNOT
    if kind in _RULES:
        rule = _RULES[kind].format(**{name: _plain(value) for name, value in facts.items()})
        return rule if rule == CANNOT else rule + _given(error)
    return str(error["msg"]).removeprefix("Value error, ")


def _path(error: Mapping[str, Any]) -> list[str | int]:
    """To the field, less the names of the kinds that it may be of."""
    parts: Iterable[str | int] = () if error["type"] == "json_invalid" else error["loc"][1:]
    return [part for part in parts if isinstance(part, int) or part.isidentifier()]


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _given(error: Mapping[str, Any]) -> str:
    """A short value is told; a long one its sender knows."""
    value = error.get("input")
    if isinstance(value, bool | int | float) or (isinstance(value, str) and 0 < len(value) <= _SHOWN):
        return f", not {json.dumps(value)[: 2 * _SHOWN]}"
    return ""
