"""Reader of the GGUF container (versions 2 and 3, little-endian).

Written out because the `gguf` package's own reader makes several numpy views per metadata string, which takes
seconds for a vocabulary, and ends in unrelated numpy errors on a truncated file. Its dequantisers are what is
used of it.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from atts_engine.errors import InputError

_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """shape: outermost dimension first (torch's order); kind: GGML type number; start: byte offset in the
    file."""

    shape: tuple[int, ...]
    kind: int
    start: int


class GGUFFile:
    """`metadata`: key -> value (strings, numbers, lists); `tensors`: name -> TensorInfo;
    `dequantised(name)`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read: {error}") from error
        try:
            self.metadata, self.tensors = _Header(self._map, path).read()
        except (struct.error, IndexError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is not a complete GGUF file: its header ends early or is damaged") from error
        self._quants = _quantisation(path)

    def dequantised(self, name: str) -> np.ndarray:
        """float32 array of the tensor's shape. InputError for a type without a dequantiser, or data beyond
        the end of the file."""
        info = self.tensors[name]
        rows, width = int(np.prod(info.shape[:-1], dtype=np.int64)), info.shape[-1]
        row_bytes = self._quants.row_bytes(info.kind, width, name)
        if info.start + rows * row_bytes > len(self._map):
            raise InputError(f"{self.path} is truncated: the data of {name} goes beyond its end")
        packed = np.frombuffer(self._map, dtype=np.uint8, count=rows * row_bytes, offset=info.start)
        return self._quants.dequantise(packed.reshape(rows, row_bytes), info.kind, name).reshape(info.shape)


class _Header:
    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def read(self) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
        if self.data[:4] != b"GGUF":
            raise InputError(f"{self.path} is not a GGUF file")
        self.at = 4
        version = self.scalar("<I")
        if version not in (2, 3):
            raise InputError(f"{self.path}: GGUF version {version} is not supported, only 2 and 3 (little-endian)")
        tensor_count, pair_count = self.scalar("<Q"), self.scalar("<Q")
        metadata: dict[str, Any] = {}
        for _ in range(pair_count):
            key = self.string()
            metadata[key] = self.value(self.scalar("<I"))
        infos = [(self.string(), *self.tensor()) for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        base = -(-self.at // alignment) * alignment
        return metadata, {name: TensorInfo(shape, kind, base + offset) for name, shape, kind, offset in infos}

    def scalar(self, layout: str) -> Any:
        (value,) = struct.unpack_from(layout, self.data, self.at)
        self.at += struct.calcsize(layout)
        return value

    def string(self) -> str:
        length = self.scalar("<Q")
        if self.at + length > len(self.data):
            raise IndexError
        self.at += length
        return self.data[self.at - length : self.at].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item, count = self.scalar("<I"), self.scalar("<Q")
            if item in _SCALARS:
                values = struct.unpack_from(f"<{count}{_SCALARS[item][1]}", self.data, self.at)
                self.at += count * struct.calcsize(_SCALARS[item])
                return list(values)
            return [self.value(item) for _ in range(count)]
        if kind not in _SCALARS:
            raise InputError(f"{self.path}: metadata of unknown type {kind}")
        return self.scalar(_SCALARS[kind])

    def tensor(self) -> tuple[tuple[int, ...], int, int]:
        dimensions = self.scalar("<I")
        shape = tuple(reversed([self.scalar("<Q") for _ in range(dimensions)]))
        return shape, self.scalar("<I"), self.scalar("<Q")


@dataclass(frozen=True, slots=True)
class _Quantisation:
    """The `gguf` package's block sizes and dequantisers."""

    path: Path
    kinds: Callable[[int], Any]
    sizes: Mapping[Any, tuple[int, int]]
    dequantiser: Callable[[np.ndarray, Any], np.ndarray]

    def row_bytes(self, kind: int, width: int, name: str) -> int:
        block, size = self.sizes[self._kind(kind, name)]
        if width % block:
            raise InputError(f"{self.path}: {name} has rows of {width}, not a multiple of its block of {block}")
        return width // block * size

    def dequantise(self, packed: np.ndarray, kind: int, name: str) -> np.ndarray:
        label = self._kind(kind, name)
        try:
            return self.dequantiser(packed, label)
        except NotImplementedError as error:
            raise InputError(
                f"{self.path}: {name} has type {label.name}, which the gguf package cannot dequantise"
            ) from error

    def _kind(self, kind: int, name: str) -> Any:
        try:
            return self.kinds(kind)
        except ValueError as error:
            raise InputError(f"{self.path}: {name} has a type {kind} that the gguf package does not know") from error


def _quantisation(path: Path) -> _Quantisation:
    try:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError as error:
        raise InputError(f"{path}: reading a GGUF file needs the gguf package: pip install gguf") from error
    return _Quantisation(path, GGMLQuantizationType, GGML_QUANT_SIZES, dequantize)
