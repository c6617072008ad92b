"""Calibration on disk: `.npz` without pickle, with a JSON record of the conditions it holds under."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
import zlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from atts_engine.conformal.errors import StateError
from atts_engine.conformal.store import RingStore

FORMAT = "atts-calibration/1"
_ARRAYS = ("ring", "size", "head")


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


def content_hash(store: RingStore, calibrator: str, meta: Meta) -> str:
    """sha256 (hex) over the valid scores, their order and the metadata."""
    digest = hashlib.sha256()
    record = {"format": FORMAT, "calibrator": calibrator, "capacity": store.capacity, **asdict(meta)}
    digest.update(json.dumps(record, sort_keys=True).encode())
    digest.update(np.ascontiguousarray(store.size, dtype="<i8").tobytes())
    digest.update(np.ascontiguousarray(store.head, dtype="<i8").tobytes())
    for key, n in enumerate(store.size):
        digest.update(np.ascontiguousarray(store.ring[key, :n], dtype="<f4").tobytes())
    return digest.hexdigest()


def save_state(path: str | os.PathLike[str], store: RingStore, calibrator: str, meta: Meta) -> None:
    """Write the store and its metadata. The file appears whole or not at all; `OSError` as the system gives
    it."""
    path = Path(path)
    record = {"format": FORMAT, "calibrator": calibrator, **asdict(meta)}
    record["sha256"] = content_hash(store, calibrator, meta)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            np.savez_compressed(
                file, ring=store.ring, size=store.size, head=store.head, meta=np.array(json.dumps(record))
            )
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_state(path: str | os.PathLike[str], expect: Meta | None = None) -> tuple[RingStore, str, Meta]:
    """(store, calibrator's name, metadata). `StateError` for a file that is missing, corrupt or foreign, and
    for one whose metadata differs from `expect`, naming each field that differs."""
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in (*_ARRAYS, "meta") if name not in getattr(file, "files", ())]
            if missing:
                raise StateError(f"{path} is not a calibration file: it holds no {', '.join(missing)}")
            record: dict[str, Any] = json.loads(str(file["meta"]))
            ring, size, head = (file[name] for name in _ARRAYS)
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
        raise StateError(f"{path} is not a calibration file of format {FORMAT}")
    store = _checked_store(path, ring, size, head)
    meta = Meta(**{f.name: record.get(f.name) for f in fields(Meta)})
    name = str(record.get("calibrator"))
    if record.get("sha256") != content_hash(store, name, meta):
        raise StateError(f"{path} is corrupt: its contents do not match their sha256")
    if expect is not None and (differences := meta.differences(expect)):
        raise StateError(f"calibration {path} was made under other conditions ({'; '.join(differences)})")
    return store, name, meta


def _checked_store(path: str | os.PathLike[str], ring: Any, size: Any, head: Any) -> RingStore:
    """A store from arrays that came from a file, with every index in range and every score finite."""
    typed = ring.dtype == np.float32 and size.dtype == np.int64 and head.dtype == np.int64
    if not typed or ring.ndim != 2 or 0 in ring.shape or size.shape != ring.shape[:1] or head.shape != size.shape:
        raise StateError(f"{path} is corrupt: its arrays have the wrong shapes or types")
    capacity = ring.shape[1]
    if ((size < 0) | (size > capacity) | (head < 0) | (head >= capacity)).any():
        raise StateError(f"{path} is corrupt: a size or head lies outside its ring")
    if not all(np.isfinite(ring[key, :n]).all() for key, n in enumerate(size)):
        raise StateError(f"{path} is corrupt: it holds a score that is not finite")
    store = RingStore(1, 1)
    store.ring, store.size, store.head = ring, size, head
    return store
