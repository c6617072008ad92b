"""A folder in the Hugging Face layout: model.safetensors, or shards under model.safetensors.index.json."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from atts_engine.errors import InputError
from atts_engine.models.config import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def has_weights(folder: Path) -> bool:
    """Whether there are safetensors files of a model in it."""
    return (folder / SINGLE).is_file() or (folder / INDEX).is_file()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, sorted by name."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        return sorted({folder / shard for shard in _weight_map(folder).values()})
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise InputError(
            f"{folder} holds pickled weights only, which run code when read; convert them to safetensors first"
        )
    raise InputError(f"{folder} holds neither {SINGLE} nor {INDEX}")


def _weight_map(folder: Path) -> dict[str, str]:
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{folder / INDEX} has no weight_map")
    for shard in weight_map.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise InputError(f"{folder / INDEX} names a shard {shard!r} outside its folder")
    return weight_map


class SafetensorsSource:
    """TensorSource over mapped files: a tensor is paged in when it is read and can be dropped once copied."""

    def __init__(self, folder: Path) -> None:
        self.where = str(folder)
        self._handles = {path: _open(path) for path in weight_files(folder)}
        self._file_of = {name: path for path, handle in self._handles.items() for name in handle.keys()}
        if not (folder / SINGLE).is_file():
            promised = _weight_map(folder)
            lost = sorted(name for name, shard in promised.items() if self._file_of.get(name) != folder / shard)
            if lost:
                raise InputError(f"{folder / promised[lost[0]]} does not hold {lost[0]}, which {INDEX} promises")

    def names(self) -> frozenset[str]:
        return frozenset(self._file_of)

    def read(self, name: str) -> torch.Tensor:
        path = self._file_of[name]
        try:
            tensor: torch.Tensor = self._handles[path].get_tensor(name)
            return tensor
        except SafetensorError as error:
            raise InputError(f"{path}: {name} cannot be read: {error}") from error


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a complete safetensors file: {error}") from error
