"""The decision log of a run folder, decided again from where the run began."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from atts_engine.conformal import Calibrator, ColdStart, load_calibrator, make_calibrator
from atts_engine.errors import InputError
from atts_engine.evaluation.decisions import check_log, read_decisions
from atts_engine.evaluation.folder import Restored
from atts_engine.evaluation.traces import read_chains

_NAME = "name a folder of `atts run --out`, or DIR/STRATEGY of `atts eval --out DIR`"


def log_figures(folder: str | os.PathLike[str], calibration: str | None = None) -> dict[str, Any]:
    """What comes of a run's log, keys as `atts replay --log --json` prints them.

    calibration: the file that the run began with, where it had one. decisions: all in the log; discarded: those that a
    later one discards, or would when the run goes on; in_force: the others, and rate, the takeovers among them.
    difference: the first decision that does not come out as recorded, None where all do. `InputError` for a folder that
    holds no run with a calibration, for a file that the run did not begin with, and as `check_log`.
    """
    path = Path(folder)
    settings = _settings(path)
    decisions = read_decisions(path / "decisions.jsonl", allow_torn_tail=True)
    if not decisions:
        raise InputError(f"{path / 'decisions.jsonl'} holds no decisions: the run decided nothing by a calibration")
    difference = check_log(decisions, _start(path, settings, calibration))
    kept = Restored(tuple(read_chains(path / "chains.jsonl", allow_torn_tail=True)), tuple(decisions)).in_force
    return {
        "log": str(path),
        "calibrator": settings["calibration"]["calibrator"],
        "alpha": settings["params"]["alpha"],
        "decisions": len(decisions),
        "in_force": len(kept),
        "discarded": len(decisions) - len(kept),
        "resumes_that_discarded": sum(bool(d.discards) for d in decisions),
        "rate": sum(d.verdict == "takeover" for d in kept) / len(kept) if kept else None,
        "difference": None if difference is None else asdict(difference),
    }


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "settings.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; {_NAME}") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(settings, dict) or settings.get("format") != "atts-run/1":
        raise InputError(f"{path} is not of a run; {_NAME}")
    return settings


def _start(folder: Path, settings: dict[str, Any], calibration: str | None) -> Calibrator:
    """The calibrator as it stood before the run's first decision."""
    made = settings["calibration"]
    if "start_sha256" not in made:
        raise InputError(f"{folder} does not tell which calibration it began with: its log cannot be decided again")
    digest, alpha = made["start_sha256"], settings["params"]["alpha"]
    if digest is None:
        if calibration is not None:
            raise InputError(f"{folder} began without a calibration: leave --calibration out")
        cold = None if made["cold_start"] is None else ColdStart(*made["cold_start"])
        return make_calibrator(made["calibrator"], alpha, cold=cold)
    if calibration is None:
        raise InputError(f"{folder} began with a saved calibration: name it by --calibration FILE")
    found = load_calibrator(calibration, frozen=made["frozen"])
    if hashlib.sha256(Path(calibration).read_bytes()).hexdigest() != digest:
        raise InputError(f"{calibration} is not the calibration that {folder} began with: its contents differ")
    return found
