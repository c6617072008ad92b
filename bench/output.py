"""Where a benchmark writes, said before it begins."""

from __future__ import annotations

import argparse
from pathlib import Path

from atts_engine.errors import InputError
from atts_engine.evaluation.files import check_file


def out_file(text: str) -> Path:
    """A file that can be written, as a type of argparse: a benchmark of minutes must not fail at its last line."""
    try:
        check_file(Path(text), "the file")
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return Path(text)
