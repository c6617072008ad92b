"""Calibration on disk: `.npz` without pickle, with a JSON record of the conditions it holds under."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from atts_engine.conformal.errors import StateError
from atts_engine.conformal.store import RingStore

FORMAT = "atts-calibration/2"


@dataclass(frozen=True, slots=True)
class Meta:
    """The conditions under which scores were gathered. Scores gathered under others are not exchangeable with
    them.

    draft, target: fingerprints of the models; prompt: hash of the prompt template; draft_tokens: K_d;
    temperature: the draft's; score: definition of the score; alpha, keys: of the calibrator, filled in when
    it is saved. A field that is None in an expectation is not compared.
    """

    draft: str | None = None
    target: str | None = None
    prompt: str | None = None
    draft_tokens: int | None = None
    temperature: float | None = None
    score: str | None = "mean-nll"
    alpha: float | None = None
    keys: int | None = None

    def differences(self, expect: Meta) -> list[str]:
        """One "field: is X, expected Y" for each field that `expect` names and that differs."""
        found = []
        for f in fields(self):
            have, want = getattr(self, f.name), getattr(expect, f.name)
            if want is not None and have != want:
                found.append(f"{f.name}: is {have!r}, expected {want!r}")
        return found


@dataclass(frozen=True, slots=True)
class State:
    """What a calibration file holds: the calibrator's name, its options, its arrays and its conditions."""

    calibrator: str
    options: dict[str, Any]
    arrays: dict[str, npt.NDArray[Any]]
    meta: Meta


def content_hash(state: State) -> str:
    """sha256 (hex) over the arrays, their names, types and shapes, and the record."""
    digest = hashlib.sha256(json.dumps(_record(state), sort_keys=True).encode())
    for name, array in sorted(state.arrays.items()):
        little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        digest.update(f"{name} {little.dtype.str} {little.shape}".encode())
        digest.update(little.tobytes())
    return digest.hexdigest()


def _record(state: State) -> dict[str, Any]:
    return {"format": FORMAT, "calibrator": state.calibrator, "options": state.options, **asdict(state.meta)}


def save_state(
    path: str | os.PathLike[str],
    calibrator: str,
    options: dict[str, Any],
    arrays: dict[str, npt.NDArray[Any]],
    meta: Meta,
) -> None:
    """Write a state. The file appears whole or not at all, a symbolic link's at its end; `OSError` with the file's name
    where it cannot, and where a device, a pipe or a folder stands there."""
    real = Path(os.path.realpath(path))
    if real.exists() and not real.is_file():
        raise OSError(errno.EEXIST, "a device, a pipe or a folder stands there", str(path))
    state = State(calibrator, options, arrays, meta)
    record = _record(state) | {"sha256": content_hash(state)}
    partial = real.with_name(f".{real.name}.{os.getpid()}.partial")
    # A zip file that is closed on a full disk raises what hides the disk's own error.
    packed = io.BytesIO()
    np.savez_compressed(packed, allow_pickle=False, meta=np.array(json.dumps(record)), **arrays)
    try:
        with partial.open("wb") as file:
            file.write(packed.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(real)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def load_state(path: str | os.PathLike[str], expect: Meta | None = None) -> State:
    """The state in the file. `StateError` for one that is missing, corrupt or foreign, and for one whose
    metadata differs from `expect`, naming each field that differs."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if "meta" not in getattr(file, "files", ()):
                raise StateError(f"{path} is not a calibration file: it holds no meta")
            record: dict[str, Any] = json.loads(str(file["meta"]))
            arrays = {name: file[name] for name in file.files if name != "meta"}
    except FileNotFoundError as error:
        raise StateError(f"no calibration file at {path}") from error
    except StateError:
        raise
    except (
        OSError,
        ValueError,
        EOFError,
        AttributeError,
        TypeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise StateError(f"{path} is not a calibration file, or is corrupt ({error})".replace("\n", " ")) from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise StateError(f"{path} is not a calibration file of format {FORMAT}; make it anew with atts calibrate")
    options = record.get("options")
    if not isinstance(options, dict):
        raise StateError(f"{path} is corrupt: its options are not an object")
    meta = Meta(**{f.name: record.get(f.name) for f in fields(Meta)})
    state = State(str(record.get("calibrator")), options, arrays, meta)
    if record.get("sha256") != content_hash(state):
        raise StateError(f"{path} is corrupt: its contents do not match their sha256")
    if expect is not None and (differences := meta.differences(expect)):
        raise StateError(f"calibration {path} was made under other conditions ({'; '.join(differences)})")
    return state


def store_arrays(store: RingStore) -> dict[str, npt.NDArray[Any]]:
    """ring, size and head of a store; what is not valid in the ring is zero."""
    valid = np.arange(store.capacity) < store.size[:, None]
    return {"ring": np.where(valid, store.ring, np.float32(0)), "size": store.size, "head": store.head}


def checked_store(arrays: Mapping[str, npt.NDArray[Any]], keys: int, capacity: int) -> RingStore:
    """A store from arrays that came from a file, with every index in range and every score finite; `ValueError` or
    `KeyError` otherwise."""
    ring, size, head = arrays["ring"], arrays["size"], arrays["head"]
    typed = ring.dtype == np.float32 and size.dtype == np.int64 and head.dtype == np.int64
    if not typed or ring.shape != (keys, capacity) or size.shape != (keys,) or head.shape != (keys,):
        raise ValueError("its arrays have the wrong shapes or types")
    if ((size < 0) | (size > capacity) | (head < 0) | (head >= capacity)).any():
        raise ValueError("a size or head lies outside its ring")
    if not all(np.isfinite(ring[key, :n]).all() for key, n in enumerate(size)):
        raise ValueError("it holds a score that is not finite")
    return RingStore.of(ring.copy(), size.copy(), head.copy())
