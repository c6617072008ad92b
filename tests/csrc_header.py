"""csrc/include/atts/atts.h read as data, so that tests hold for every struct and function that it declares."""

from __future__ import annotations

import ctypes
import re
from functools import cache
from pathlib import Path
from typing import Any

_HEADER = Path(__file__).resolve().parent.parent / "csrc" / "include" / "atts" / "atts.h"
_SCALARS = {
    "uint64_t": ctypes.c_uint64,
    "int64_t": ctypes.c_int64,
    "int32_t": ctypes.c_int32,
    "uint32_t": ctypes.c_uint32,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
}


@cache
def _text() -> str:
    """The header without its comments."""
    return re.sub(r"/\*.*?\*/", "", _HEADER.read_text(encoding="utf-8"), flags=re.DOTALL)


@cache
def structs() -> dict[str, type[ctypes.Structure]]:
    """The params structs by name, fields in the header's order."""
    found = {}
    for body, name in re.findall(r"typedef struct \w+ \{(.*?)\} (\w+);", _text(), flags=re.DOTALL):
        fields: list[tuple[str, Any]] = []
        for declaration in filter(None, (part.strip() for part in body.split(";"))):
            kind, names = re.fullmatch(r"((?:const )?\w+ ?\*?)\s*(\w+(?:, \w+)*)", declaration).groups()  # type: ignore[union-attr]
            c_type = ctypes.c_void_p if "*" in kind else _SCALARS[kind.strip()]
            fields += [(field, c_type) for field in names.split(", ")]
        found[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return found


def functions() -> list[str]:
    """Every function that the header declares."""
    return sorted(re.findall(r"^ATTS_API [\w\s*]+?(\w+)\(", _text(), flags=re.MULTILINE))


def operations() -> dict[str, str]:
    """Functions that take a params struct, on the host (`_cpu`) or the device, and the name of that struct."""
    return dict(re.findall(r"ATTS_API int (\w+)\(const (\w+_params)\* params(?:, void\* stream)?\);", _text()))


def constants(enum: str) -> dict[str, int]:
    """Names and values of an enum."""
    body = re.search(rf"typedef enum {enum} \{{(.*?)\}} {enum};", _text(), flags=re.DOTALL)
    assert body is not None
    return {name: int(value) for name, value in re.findall(r"(\w+) = (\d+)", body.group(1))}


def version() -> tuple[int, int, int]:
    """Major, minor and patch."""
    major, minor, patch = (int(n) for n in re.findall(r"#define ATTS_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", _text()))
    return major, minor, patch
