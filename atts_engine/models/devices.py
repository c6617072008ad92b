"""From a device's name to a device that exists."""

from __future__ import annotations

import torch

from atts_engine.errors import InputError


def resolve_device(name: str | torch.device) -> torch.device:
    """cpu, cuda (the current one) or cuda:N; cuda comes back with its number.

    Raises `InputError`, which names what there is, for any other name and for a GPU that is not there.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"no device {str(name)!r}: {_there_is()}") from error
    if device.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type != "cuda" or (device.index or 0) >= count:
        raise InputError(f"no device {str(name)!r}: {_there_is()}")
    return torch.device("cuda", device.index if device.index is not None else torch.cuda.current_device())


def _there_is() -> str:
    if not torch.cuda.is_available():
        why = "torch was built without CUDA" if torch.version.cuda is None else "torch sees no GPU"
        return f"there is only cpu ({why})"
    gpus = (f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count()))
    return f"there are cpu, {', '.join(gpus)}"
