"""The file of a tuning table: its schema, where it is found, and how it takes effect."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from atts_engine.errors import InputError
from atts_engine.ops import dispatch

SCHEMA = 1
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_SHIPPED = Path(__file__).parent
_FIELDS = {"schema", "device", "date", "versions", "implementations", "entries"}
_ENTRY_FIELDS = {"when", "config", "time_us", "alternatives"}


@dataclass(frozen=True, slots=True)
class Entry:
    """One choice of a kernel. bounds[size] = (low, high), both included; alternatives: (config, time) of the others."""

    dtype: str
    bounds: Mapping[str, tuple[int, int]]
    config: Mapping[str, int]
    time_us: float
    alternatives: tuple[tuple[Mapping[str, int], float], ...] = ()


@dataclass(frozen=True, slots=True)
class Table:
    """What was measured on a device. implementations: by op, which one its CUDA tensors run by themselves."""

    device: str
    date: str
    versions: Mapping[str, str]
    entries: Mapping[str, tuple[Entry, ...]] = field(default_factory=dict)
    implementations: Mapping[str, str] = field(default_factory=dict)


class _InForce:
    """The table that kernels and dispatch follow, and the file it came from. The process's own."""

    table: Table | None = None
    path: Path | None = None


def file_name(device: str) -> str:
    """ "NVIDIA H100 80GB HBM3" -> "nvidia_h100_80gb_hbm3.json"."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_") + ".json"


def find(device: str, folder: Path | None = None) -> Path | None:
    """The file of a device: the user's, else the one that comes with the package, else None.

    folder: the user's; None: ~/.cache/atts/tuning.
    """
    users = Path.home() / ".cache" / "atts" / "tuning" if folder is None else folder
    places = (place / file_name(device) for place in (users, _SHIPPED))
    return next((path for path in places if path.is_file()), None)


def put_in_force(table: Table | None, path: Path | None = None) -> None:
    """Let kernels and dispatch follow a table from here on, in the whole process; None: the defaults again."""
    import atts_triton.tuning as kernels

    entries = {} if table is None else table.entries
    kernels.set_table(
        {
            kernel: tuple(kernels.Choice(DTYPES[e.dtype], dict(e.bounds), dict(e.config)) for e in choices)
            for kernel, choices in entries.items()
        }
    )
    dispatch.prefer({} if table is None else table.implementations)
    _InForce.table, _InForce.path = table, path


def in_force() -> tuple[Table | None, Path | None]:
    """The table in force and its file."""
    return _InForce.table, _InForce.path


def load(path: Path | str) -> Table:
    """Read and check a file. Raises InputError, in one line that names file and field, for what is not a table."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: no tuning table ({error})") from error
    try:
        return _parsed(found)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def save(table: Table, path: Path) -> None:
    """Write the file that `load` reads."""
    found = {
        "schema": SCHEMA,
        "device": table.device,
        "date": table.date,
        "versions": dict(table.versions),
        "implementations": dict(table.implementations),
        "entries": {kernel: [_written(entry) for entry in entries] for kernel, entries in table.entries.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def merged(old: Table | None, device: str, entries: Mapping[str, Sequence[Entry]]) -> Table:
    """Entries measured now on `device`, before those of an older table that are for other sizes or dtypes."""
    if old is not None and old.device != device:
        raise InputError(f"that file holds a table of {old.device}, and this machine has {device}: name another one")

    def subject(entry: Entry) -> tuple[object, ...]:
        return entry.dtype, *(entry.bounds.get(name) for name in ("V", "H"))

    found = {} if old is None else dict(old.entries)
    for kernel, new in entries.items():
        measured = {subject(entry) for entry in new}
        found[kernel] = (*new, *(e for e in found.get(kernel, ()) if subject(e) not in measured))
    return Table(
        device=device,
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        versions={"torch": torch.__version__, "triton": metadata.version("triton")},
        entries=found,
        implementations={} if old is None else old.implementations,
    )


def _written(entry: Entry) -> dict[str, Any]:
    others = [{"config": dict(config), "time_us": time} for config, time in entry.alternatives]
    bounds = {name: list(bound) for name, bound in entry.bounds.items()}
    when = {"dtype": entry.dtype, **bounds}
    return {"when": when, "config": dict(entry.config), "time_us": entry.time_us, "alternatives": others}


def _parsed(found: object) -> Table:
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise InputError(f"schema must be {SCHEMA}")
    unknown = set(found) - _FIELDS
    if unknown or not _FIELDS - {"implementations"} <= set(found):
        raise InputError(f"a table has the fields {', '.join(sorted(_FIELDS))}, not {', '.join(sorted(found))}")
    entries = found["entries"]
    if not isinstance(entries, dict) or not all(isinstance(listed, list) for listed in entries.values()):
        raise InputError("entries must hold a list for each kernel")
    implementations = found.get("implementations", {})
    for op, impl in implementations.items():
        if op not in dispatch.OPS or impl not in dispatch.IMPLEMENTATIONS:
            raise InputError(f"implementations: {op!r} cannot be {impl!r}")
    parsed = {
        kernel: tuple(_entry(kernel, index, entry) for index, entry in enumerate(listed))
        for kernel, listed in entries.items()
    }
    return Table(str(found["device"]), str(found["date"]), dict(found["versions"]), parsed, dict(implementations))


def _entry(kernel: str, index: int, found: object) -> Entry:
    from atts_triton.tuning import SIZES, TUNABLE

    where = f"entries.{kernel}[{index}]"
    if kernel not in TUNABLE:
        raise InputError(f"{where}: no kernel {kernel!r} can be tuned; there are {', '.join(TUNABLE)}")
    if not isinstance(found, dict) or set(found) != _ENTRY_FIELDS:
        raise InputError(f"{where} must have the fields {', '.join(sorted(_ENTRY_FIELDS))}")
    when = found["when"]
    if not isinstance(when, dict) or when.get("dtype") not in DTYPES:
        raise InputError(f"{where}.when.dtype must be one of {', '.join(DTYPES)}")
    bounds = {name: bound for name, bound in when.items() if name != "dtype"}
    for name, bound in bounds.items():
        ordered = isinstance(bound, list) and len(bound) == 2 and all(type(n) is int for n in bound)
        if name not in SIZES[kernel] or not ordered or bound[0] > bound[1]:
            raise InputError(f"{where}.when.{name} must be [low, high] of one of {', '.join(SIZES[kernel])}")
    others = found["alternatives"]
    if not isinstance(others, list) or not all(isinstance(o, dict) and set(o) == {"config", "time_us"} for o in others):
        raise InputError(f"{where}.alternatives must hold objects with config and time_us")
    return Entry(
        when["dtype"],
        {name: (bound[0], bound[1]) for name, bound in bounds.items()},
        _config(kernel, where, found["config"]),
        _time(where, found["time_us"]),
        tuple((_config(kernel, where, other["config"]), _time(where, other["time_us"])) for other in others),
    )


def _config(kernel: str, where: str, config: object) -> dict[str, int]:
    from atts_triton.tuning import TUNABLE

    if not isinstance(config, dict):
        raise InputError(f"{where}.config must be an object")
    for name, value in config.items():
        if name not in TUNABLE[kernel]:
            raise InputError(
                f"{where}: a table may not choose {name} of {kernel}, only {', '.join(TUNABLE[kernel])}: "
                "the bits of its results must not depend on a table"
            )
        if value not in TUNABLE[kernel][name]:
            raise InputError(f"{where}: {name} must be one of {TUNABLE[kernel][name]}, not {value!r}")
    return config


def _time(where: str, time: object) -> float:
    if not isinstance(time, int | float) or isinstance(time, bool) or not time > 0:
        raise InputError(f"{where}.time_us must be a positive number, not {time!r}")
    return float(time)
