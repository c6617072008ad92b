"""Tables and figures for people: rich on a terminal where it is installed, plain columns elsewhere."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from atts_engine.errors import InputError
from atts_engine.evaluation.files import check_file, named, write_text


@dataclass(frozen=True, slots=True)
class Table:
    """A table of strings; `left` columns are left-aligned, the others right-aligned."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1
    note: str | None = None


def is_live(stream: TextIO, plain: bool = False) -> bool:
    """Whether `stream` can show colours and a moving display."""
    if plain or not stream.isatty() or os.environ.get("TERM") == "dumb":
        return False
    return importlib.util.find_spec("rich") is not None


def show(table: Table, stream: TextIO, plain: bool = False) -> None:
    """Write the table to `stream`."""
    if is_live(stream, plain):
        _show_rich(table, stream)
    else:
        stream.write(plain_table(table))


def plain_table(table: Table) -> str:
    """The table as aligned text without control codes, each line ended by a newline."""
    widths = [max(len(row[i]) for row in (table.columns, *table.rows)) for i in range(len(table.columns))]

    def line(cells: Sequence[str]) -> str:
        aligned = (
            c.ljust(w) if i < table.left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(aligned).rstrip()

    lines = [table.title]
    if any(table.columns):
        lines += [line(table.columns), "  ".join("-" * w for w in widths)]
    lines += [line(row) for row in table.rows]
    if table.note:
        lines.append(table.note)
    return "\n".join(lines) + "\n"


def _show_rich(table: Table, stream: TextIO) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    grid = RichTable(
        title=Text(table.title, style="bold"),
        box=box.SIMPLE_HEAD,
        title_justify="left",
        pad_edge=False,
        show_header=any(table.columns),
    )
    for i, column in enumerate(table.columns):
        grid.add_column(Text(column), justify="left" if i < table.left else "right")
    for row in table.rows:
        grid.add_row(*(Text(cell) for cell in row))
    console = Console(file=stream)
    console.print(grid)
    if table.note:
        console.print(Text(table.note, style="dim"))


def human_stream(json_target: str | None) -> TextIO:
    """Where people read: stdout, or stderr when stdout carries the JSON (`--json -`)."""
    return sys.stderr if json_target == "-" else sys.stdout


def check_json_target(json_target: str | None) -> None:
    """Raise InputError before any work when the file of --json could not be written."""
    if json_target in (None, "-"):
        return
    path = Path(str(json_target))
    if not _is_stream(path):
        check_file(path, "--json")
    elif not os.access(path, os.W_OK):
        raise InputError(f"--json {path}: no permission to write there")


def write_json(figures: dict[str, Any], json_target: str | None) -> None:
    """Write the figures where --json said, if it was given."""
    if json_target is None:
        return
    text = json.dumps(figures, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if json_target == "-":
        sys.stdout.write(text)
    else:
        path = Path(json_target)
        if _is_stream(path):
            try:
                path.write_text(text, encoding="utf-8")
            except OSError as error:
                raise named(error, path) from error
        else:
            write_text(path, text)


def _is_stream(path: Path) -> bool:
    """A device or a pipe, which cannot be replaced."""
    return path.exists() and not path.is_file() and not path.is_dir()


def percent(value: float | None, digits: int = 1) -> str:
    """0.4137 -> "41.4%"; None -> "-"."""
    return "-" if value is None else f"{100 * value:.{digits}f}%"


def rounded(value: float) -> str:
    """Three digits, or all that stand before the point: 0.6 -> "0.600", 12345.6 -> "12,346"."""
    return f"{value:,.0f}" if abs(value) >= 100 or value == 0 else f"{value:#.3g}"


def count(value: float | None) -> str:
    """12345 -> "12,345"; None -> "-"."""
    return "-" if value is None else f"{value:,.0f}"


def seconds(value: float | None) -> str:
    """Seconds for people: "0.8 s", "42 s", "3 min 05 s"; None -> "-"."""
    if value is None:
        return "-"
    if value < 10:
        return f"{value:.1f} s"
    if value < 120:
        return f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
