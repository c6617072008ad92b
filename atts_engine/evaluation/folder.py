"""The folder of a run: settings, decision log, chains as they end, summary. A killed run is taken up from it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from atts_engine.errors import InputError
from atts_engine.evaluation.decisions import decision_to_json, read_decisions
from atts_engine.evaluation.jsonl import JsonlWriter
from atts_engine.evaluation.solutions import SavedSolution, read_solutions, solution_to_json
from atts_engine.evaluation.traces import chain_to_json, read_chains
from atts_engine.pipeline.records import Chain, Decision


@dataclass(frozen=True, slots=True)
class Restored:
    """What an earlier, interrupted run left: nothing of either where the folder is new."""

    chains: tuple[Chain, ...] = ()
    decisions: tuple[Decision, ...] = ()
    solutions: tuple[SavedSolution, ...] = ()


class RunFolder:
    """Writes one run.

    decisions.jsonl is at any time a prefix of the decisions in the order in which they were made, so a calibration
    restored from it is one that the run really had. A chain's line comes after the lines of its decisions, and the line
    of a problem's answer in solutions.jsonl after those of its chains.
    """

    def __init__(self, path: Path, restored: Restored) -> None:
        self.path = path
        self.restored = restored
        self._saved = {(c.problem_id, c.chain) for c in restored.chains}
        last = restored.decisions[-1] if restored.decisions else None
        self._next_seq = last.decision_seq + 1 if last else 0
        self._batch = last.batch if last else -1
        self._engine_batch: int | None = None
        self._decisions = JsonlWriter(path / "decisions.jsonl", append=True)
        self._chains = JsonlWriter(path / "chains.jsonl", append=True)
        self._solutions = JsonlWriter(path / "solutions.jsonl", append=True)

    @property
    def saved_chains(self) -> int:
        """Chains that are on disk."""
        return len(self._saved)

    @classmethod
    def open(cls, path: str | os.PathLike[str], settings: dict[str, Any], *, resume: bool) -> RunFolder:
        """Make the folder, or take up the run it holds.

        `InputError`: it cannot be written; it holds a run and `resume` is off; it was made with other settings, which
        are named.
        """
        folder = Path(path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(13, "Permission denied")
            restored = _restore(folder, settings, resume)
            write_json(folder / "settings.json", settings)
        except OSError as error:
            raise InputError(f"cannot write to {folder}: {error.strerror or error}; choose another --out") from error
        return cls(folder, restored)

    def add_decision(self, decision: Decision) -> None:
        """Log the next decision. An engine counts from its own beginning, the log from the run's, across resumes."""
        if decision.batch != self._engine_batch:
            self._engine_batch = decision.batch
            self._batch += 1
        self._decisions.write(decision_to_json(replace(decision, decision_seq=self._next_seq, batch=self._batch)))
        self._next_seq += 1

    def add_chain(self, chain: Chain) -> None:
        """Save a chain that has ended. One that an earlier run has saved already is left as it was."""
        key = (chain.problem_id, chain.chain)
        if key not in self._saved:
            self._chains.write(chain_to_json(chain))
            self._saved.add(key)

    def add_solution(self, solution: SavedSolution) -> None:
        """Save the answer of a problem whose chains have all been saved."""
        self._solutions.write(solution_to_json(solution))

    def decisions(self) -> tuple[Decision, ...]:
        """The decision log so far."""
        return tuple(read_decisions(self.path / "decisions.jsonl", allow_torn_tail=True))

    def close(self) -> None:
        """Close the files; all that was added is in them already."""
        self._decisions.close()
        self._chains.close()
        self._solutions.close()


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write JSON so that the file is there whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text so that the file is there whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """One "name: was X, is Y" for each setting that differs, nested names joined by dots."""
    found = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name}: was {json.dumps(old)}, is {json.dumps(new)}")
    return found


def check_resumed(folder: Path, settings: dict[str, Any], *, resume: bool) -> None:
    """Whether what `folder` holds may be gone on with: `InputError` where `resume` is off, and where it was made with
    other settings, which are named."""
    if not resume:
        raise InputError(f"{folder} already holds a run: add --resume to go on with it, or choose another --out")
    try:
        before = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{folder} holds a run but no settings.json, so it cannot be resumed: choose another --out"
        ) from None
    except ValueError as error:
        raise InputError(f"{folder / 'settings.json'} is not valid JSON ({error}): choose another --out") from error
    if found := differences(before, settings):
        raise InputError(
            f"{folder} was made with other settings ({'; '.join(found)}): repeat them, or choose another --out"
        )


def _restore(folder: Path, settings: dict[str, Any], resume: bool) -> Restored:
    chains, decisions, solutions = (folder / f"{name}.jsonl" for name in ("chains", "decisions", "solutions"))
    held = chains.exists() and chains.stat().st_size > 0 or decisions.exists() and decisions.stat().st_size > 0
    if not held:
        return Restored()
    check_resumed(folder, settings, resume=resume)
    for file in (chains, decisions, solutions):
        # A kill can cut a line in the middle of a character, so the torn tail goes before anything is decoded.
        JsonlWriter(file, append=True).close()
    return Restored(
        tuple(read_chains(chains, allow_torn_tail=True)),
        tuple(read_decisions(decisions)),
        tuple(read_solutions(solutions)),
    )
