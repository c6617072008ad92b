"""Files that are there whole or not at all, and what is said when one cannot be written."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from atts_engine.errors import InputError

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""A full disk, a full quota, a file as large as it may be."""


def named(error: OSError, path: Path) -> OSError:
    """The same failure with the name of the file that it befell; a failed write has none of its own."""
    return OSError(error.errno, error.strerror, str(path))


def cannot_write(path: Path, error: OSError) -> InputError:
    """For a folder or file of `--out` that cannot be written to before any work was done: what is in the way."""
    mend = "free some space, or choose another --out" if error.errno in FULL else "choose another --out"
    return InputError(f"cannot write to {path}: {_obstacle(path) or error.strerror or error}; {mend}")


def check_file(path: Path, flag: str) -> None:
    """`InputError` that names `flag` where `atomically` could not write the file. It is tried, and leaves nothing."""
    real = Path(os.path.realpath(path))
    if os.path.isdir(real):
        raise InputError(f"{flag} {path}: a folder stands there; name a file")
    if os.path.islink(real):
        raise InputError(f"{flag} {path}: a symbolic link that leads nowhere; name another file")
    if _taken(real):
        raise InputError(f"{flag} {path}: a device or a pipe; name a file")
    if not os.path.isdir(real.parent):
        raise InputError(f"{flag} {path}: {_obstacle(path.parent) or f'no such folder: {path.parent}'}; make it first")
    partial = _partial(real)
    try:
        partial.touch()
        partial.unlink()
    except OSError as error:
        raise InputError(f"{flag} {path} cannot be written: {error.strerror or error}; name another file") from error


def _obstacle(path: Path) -> str | None:
    """The first part of a folder's path that no folder can be."""
    for part in (*reversed(path.parents), path):
        if os.path.islink(part) and not os.path.exists(part):
            return f"{part} is a symbolic link that leads nowhere"
        if os.path.isfile(part):
            return f"{part} is a file, not a folder"
        if os.path.exists(part) and not os.path.isdir(part):
            return f"{part} is a device or a pipe, not a folder"
    return None


def _taken(path: Path) -> bool:
    """By something that a file must not take the place of."""
    return os.path.exists(path) and not os.path.isfile(path)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` when all is written and on the device. Of a symbolic link it
    takes the place of what the link leads to.

    Raises `OSError` with the name of `path`; what stood there stands then. A device, a pipe and a folder are not
    replaced.
    """
    real = Path(os.path.realpath(path))
    if _taken(real):
        raise OSError(errno.EEXIST, "a device, a pipe or a folder stands there", str(path))
    partial = _partial(real)
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(real)
    except OSError as error:
        raise named(error, path) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write text so that the file is there whole or not at all. `OSError` as `atomically`."""
    with atomically(path) as partial:
        partial.write_text(text, encoding="utf-8")
