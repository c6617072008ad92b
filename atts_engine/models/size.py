"""How many parameters a model has, read from the headers of its files: no weight is loaded."""

from __future__ import annotations

import math

from safetensors import SafetensorError, safe_open

from atts_engine.errors import InputError
from atts_engine.models.gguf_file import GGUFFile
from atts_engine.models.load import resolve
from atts_engine.models.safetensors_folder import weight_files


def parameter_count(name: str) -> int:
    """Elements of all tensors that the files of model `name` hold; tied tensors, which are stored once, count once.

    `InputError` for a model that is not there or whose files cannot be read.
    """
    path = resolve(name)
    if not path.is_dir():
        return sum(math.prod(info.shape) for info in GGUFFile(path).tensors.values())
    found = 0
    for file in weight_files(path):
        try:
            with safe_open(file, framework="pt") as tensors:
                found += sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} cannot be read: {error}") from error
    return found
