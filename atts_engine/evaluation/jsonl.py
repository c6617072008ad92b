"""JSON lines, plain or gzipped: reading with the line number in every error, writing so that a killed run
loses at most a line."""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import suppress
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from atts_engine.errors import InputError
from atts_engine.evaluation.files import cannot_write, named


class Line:
    """One JSON object of a file, with typed access to its fields. Errors are `InputError` with file and line
    number."""

    __slots__ = ("fields", "where")

    def __init__(self, fields: dict[str, Any], where: str) -> None:
        self.fields = fields
        self.where = where

    def error(self, message: str) -> InputError:
        return InputError(f"{self.where}: {message}")

    def text(self, name: str) -> str:
        value = self.optional_text(name)
        if value is None:
            raise self.error(f"field {name!r} is missing")
        return value

    def optional_text(self, name: str) -> str | None:
        """A string; a number is taken as its own text, since ids and answers are often written as numbers."""
        value = self.fields.get(name)
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        raise self.error(f"field {name!r} must be a string, not {value!r}")

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.fields.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(f"field {name!r} must be an integer, not {value!r}")
        return value

    def flag(self, name: str, default: bool | None = None) -> bool:
        value = self.fields.get(name, default)
        if not isinstance(value, bool):
            raise self.error(f"field {name!r} must be true or false, not {value!r}")
        return value

    def optional_number(self, name: str) -> float | None:
        value = self.fields.get(name)
        if value is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.error(f"field {name!r} must be a number, not {value!r}")
        number = float(value)
        if number - number != 0.0:
            raise self.error(f"field {name!r} must be finite, not {number}")
        return number

    def number(self, name: str, default: float | None = None) -> float:
        value = self.optional_number(name)
        value = default if value is None else value
        if value is None:
            raise self.error(f"field {name!r} is missing")
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of integers; empty where the field is missing."""
        value = self.fields.get(name, [])
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise self.error(f"field {name!r} must be a list of integers, not {value!r}")
        return tuple(value)

    def objects(self, name: str) -> list[Line]:
        value = self.fields.get(name)
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self.error(f"field {name!r} must be a list of objects")
        return [Line(item, f"{self.where}, {name}[{i}]") for i, item in enumerate(value)]


def read_lines(path: str | os.PathLike[str], *, allow_torn_tail: bool = False) -> Iterator[Line]:
    """The objects of a `.jsonl` or `.jsonl.gz` file; blank lines are skipped.

    allow_torn_tail: drop a last line without its newline, which is what a killed run leaves. `InputError` for
    a file that cannot be read and for a line that is not a JSON object.
    """
    path = Path(path)
    try:
        with _open_text(path) as file:
            for number, raw in enumerate(file, start=1):
                if not raw.strip() or (allow_torn_tail and not raw.endswith("\n")):
                    continue
                yield _parse(raw, f"{path}, line {number}")
    except FileNotFoundError as error:
        raise InputError(f"no such file: {path}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be read: {reason}") from error


def _parse(raw: str, where: str) -> Line:
    try:
        value = json.loads(raw)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: must be a JSON object, not {type(value).__name__}")
    return Line(value, where)


def _open_text(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _open_to_append(path: Path) -> FileIO:
    return FileIO(path, "ab")


class JsonlWriter:
    """Appends one object a line, each with one write to the system: a killed process leaves whole lines and at most one
    torn one, a full disk whole lines alone.

    append: keep what the file holds, less a torn last line; otherwise the file is begun anew. The file is locked until
    `close`: two processes that appended to one file would mix their runs. `InputError` if the file cannot be written,
    or another writer has it. Use as a context manager or call `close`.
    """

    def __init__(self, path: str | os.PathLike[str], *, append: bool = False) -> None:
        self.path = Path(path)
        try:
            self._file = _open_to_append(self.path)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if append:
                _drop_torn_tail(self.path)
            else:
                self._file.truncate(0)
        except BlockingIOError as error:
            self._file.close()
            raise InputError(f"{self.path} is being written by another process: wait for it, or end it") from error
        except OSError as error:
            self._file.close()
            raise cannot_write(self.path, error) from error

    def write(self, record: dict[str, Any]) -> None:
        """One line. `ValueError` for NaN or infinity, which are not JSON; `OSError` with the file's name for a line
        that could not be written whole, of which nothing is left."""
        line = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()
        size = os.fstat(self._file.fileno()).st_size
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(size)
            raise named(error, self.path) from error

    def sync(self) -> None:
        """Have all lines on the device. Some file systems tell only now that they are full: `OSError` as `write`."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise named(error, self.path) from error

    def close(self) -> None:
        """`OSError` as `sync`; the file is closed in any case."""
        if self._file.closed:
            return
        try:
            self.sync()
        finally:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _drop_torn_tail(path: Path) -> None:
    """Cut the file after its last newline."""
    with path.open("r+b") as file:
        at = end = file.seek(0, os.SEEK_END)
        while at > 0:
            start = max(0, at - 65536)
            file.seek(start)
            newline = file.read(at - start).rfind(b"\n")
            if newline >= 0:
                at = start + newline + 1
                break
            at = start
        if at < end:
            file.truncate(at)
