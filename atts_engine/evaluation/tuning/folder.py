"""The folder of a study: settings, and trials.jsonl, to which every trial is appended as it ends."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from atts_engine.errors import InputError
from atts_engine.evaluation.files import cannot_write
from atts_engine.evaluation.folder import differences, write_json
from atts_engine.evaluation.jsonl import JsonlWriter, read_lines
from atts_engine.evaluation.tuning.space import Space
from atts_engine.evaluation.tuning.trial import Trial


class StudyFolder:
    """trials: what an earlier process left, and what was added since. Use as a context manager or call `close`."""

    def __init__(self, path: Path, trials: list[Trial]) -> None:
        self.path = path
        self.trials = trials
        self.restored = len(trials)
        self._file = JsonlWriter(path / "trials.jsonl", append=True)

    @classmethod
    def open(cls, path: str | os.PathLike[str], settings: dict[str, Any], space: Space, *, resume: bool) -> StudyFolder:
        """Make the folder, or take up the study it holds.

        `InputError`: it cannot be written; it holds a study and `resume` is off; it was made with other settings, which
        are named; its history is damaged.
        """
        folder = Path(path)
        file = folder / "trials.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(13, "Permission denied")
            trials: list[Trial] = []
            if file.exists() and file.stat().st_size > 0:
                _check_settings(folder, settings, resume)
                # A kill can cut a line in the middle of a character, so the torn tail goes before anything is decoded.
                JsonlWriter(file, append=True).close()
                trials = _read(file, space)
            write_json(folder / "settings.json", settings)
        except OSError as error:
            raise cannot_write(folder, error) from error
        return cls(folder, trials)

    def add(self, trial: Trial) -> None:
        """Save a trial that has ended."""
        self._file.write(trial.as_json())
        self.trials.append(trial)

    def close(self) -> None:
        """Close the file; all that was added is in it already."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _check_settings(folder: Path, settings: dict[str, Any], resume: bool) -> None:
    if not resume:
        raise InputError(f"{folder} already holds a study: add --resume to go on with it, or choose another --out")
    file = folder / "settings.json"
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder} holds trials but no settings.json: choose another --out") from None
    except ValueError as error:
        raise InputError(f"{file} is not valid JSON ({error}): choose another --out") from error
    if found := differences(before, settings):
        raise InputError(
            f"{folder} was made with other settings ({'; '.join(found)}): repeat them, or choose another --out"
        )


def _read(file: Path, space: Space) -> list[Trial]:
    trials: list[Trial] = []
    for line in read_lines(file):
        trial = Trial.from_json(line, space)
        if trial.number != len(trials) + 1:
            raise line.error(f"trial {trial.number} stands where trial {len(trials) + 1} should be")
        trials.append(trial)
    return trials
