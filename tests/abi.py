"""The structs of csrc/include/atts/atts.h for ctypes, read from the header itself."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import torch

_HEADER = Path(__file__).resolve().parent.parent / "csrc" / "include" / "atts" / "atts.h"
_TEXT = re.sub(r"/\*.*?\*/", "", _HEADER.read_text(), flags=re.DOTALL)
_KINDS = {
    "uint64_t": ctypes.c_uint64, "int64_t": ctypes.c_int64, "int32_t": ctypes.c_int32, "float": ctypes.c_float,
}  # fmt: skip
STATUS = {name: int(value) for name, value in re.findall(r"ATTS_((?:ERROR_\w+|OK)) = (\d+)", _TEXT)}
"""Codes by the name behind ATTS_."""
DTYPES = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}


def _fields(body: str) -> list[tuple[str, type]]:
    fields: list[tuple[str, type]] = []
    for line in filter(None, (part.strip() for part in body.split(";"))):
        kind, names = re.fullmatch(r"(?:const )?(\w+)(\*? .*)", line.replace("\n", " "), re.DOTALL).groups()  # type: ignore[union-attr]
        pointer = names.startswith("*")
        fields += [
            (name.strip(), ctypes.c_void_p if pointer else _KINDS[kind]) for name in names.lstrip("* ").split(",")
        ]
    return fields


STRUCTS: dict[str, type[ctypes.Structure]] = {
    name.removesuffix("_params"): type(name, (ctypes.Structure,), {"_fields_": _fields(body)})
    for body, name in re.findall(r"typedef struct \w+ \{([^}]*)\} atts_(\w+);", _TEXT)
}
"""By the entry point's name: STRUCTS["gate"] is atts_gate_params. Others by their own: STRUCTS["decoder_layer"]."""


def params(op: str, **fields: torch.Tensor | int | float | None) -> ctypes.Structure:
    """A struct with its size set, tensors as their addresses, and 0 in what is not named. It keeps these alive."""
    kind = STRUCTS[op]
    made = kind(struct_size=ctypes.sizeof(kind))
    for name, value in fields.items():
        setattr(made, name, value.data_ptr() if isinstance(value, torch.Tensor) else value)
    made.tensors = fields  # type: ignore[attr-defined]
    return made


FUNCTIONS = sorted(re.findall(r"^ATTS_API [\w\s*]+?(\w+)\(", _TEXT, re.MULTILINE))
"""Every function that the header declares."""
OPERATIONS = dict(
    re.findall(r"ATTS_API int atts_(\w+)\(const atts_(\w+)_params\* params(?:, void\* stream)?\);", _TEXT)
)
"""Of each form of an op, as in "gate_cpu" and "gate", the op."""
VERSION = tuple(int(n) for n in re.findall(r"#define ATTS_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", _TEXT))
"""Major, minor and patch."""
