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
    """For a place that cannot be written to before any work was done."""
    mend = "free some space, or choose another --out" if error.errno in FULL else "choose another --out"
    return InputError(f"cannot write to {path}: {error.strerror or error}; {mend}")


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` when all is written and on the device.

    Raises `OSError` with the name of `path`; what stood there stands then.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise named(error, path) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write text so that the file is there whole or not at all. `OSError` as `atomically`."""
    with atomically(path) as partial:
        partial.write_text(text, encoding="utf-8")
