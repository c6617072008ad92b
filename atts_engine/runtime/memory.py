"""How many tokens of KV each lane of an engine can hold in the memory that is there."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch

from atts_engine.errors import InputError
from atts_engine.models import Model

FRACTION = {"cuda": 0.85, "cpu": 0.25}
"""Share of a device's free memory that its KV pools take when nothing else is said: a GPU keeps room for activations
and graphs, a host for everybody else on it."""

_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def kv_bytes_per_token(model: Model) -> int:
    """Bytes of KV one token takes: 2 x layers x kv_heads x head_dim x bytes of the dtype."""
    c = model.config
    return 2 * c.num_layers * c.num_kv_heads * c.head_dim * model.decoder.lm_head.dtype.itemsize


def available_bytes(device: torch.device) -> int:
    """Memory of the device that nobody uses: of a GPU what the driver says is free, of the host what it can give
    without swapping, or what is left of the container's limit where that is less."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([_host_bytes(), *_container_bytes()])


def pool_tokens(
    devices: Sequence[torch.device], token_bytes: Sequence[int], free: Sequence[int], fraction: float | None
) -> list[int]:
    """Tokens that the KV pool of each lane holds.

    devices, token_bytes, free: of each lane, where it is, the bytes of KV a token takes, and the bytes free there with
    all weights loaded. fraction: of the free memory, for all pools on a device together; None: `FRACTION`. Lanes on one
    device hold the same number of tokens, as each chain has its text in both: so memory is split by bytes per token.
    """
    together: defaultdict[str, int] = defaultdict(int)
    for device, size in zip(devices, token_bytes, strict=True):
        together[_name(device)] += size
    tokens = []
    for device, here in zip(devices, free, strict=True):
        share = FRACTION[device.type] if fraction is None else fraction
        fits = int(here * share) // together[_name(device)]
        if fits < 1:
            raise InputError(
                f"{share:g} of the {here >> 20} MiB free on {device} hold no token of KV: raise kv_memory_fraction or "
                "choose a smaller model"
            )
        tokens.append(fits)
    return tokens


def _name(device: torch.device) -> str:
    """The same for "cuda" and "cuda:0" where that is the current one."""
    index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index
    return f"{device.type}:{index or 0}"


def _host_bytes() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    # Not Linux: what is installed, as what is free cannot be asked for without another package.
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _container_bytes() -> list[int]:
    left = []
    for limit, used in _CGROUPS:
        if Path(limit).exists() and Path(used).exists() and (text := Path(limit).read_text().strip()) != "max":
            left.append(max(0, int(text) - int(Path(used).read_text())))
    return left
