"""The folder of a run: settings, decision log, chains as they end, summary. A killed run is taken up from it."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from atts_engine.errors import InputError
from atts_engine.evaluation.decisions import decision_to_json, in_force, read_decisions
from atts_engine.evaluation.files import cannot_write, write_text
from atts_engine.evaluation.jsonl import JsonlWriter
from atts_engine.evaluation.solutions import SavedSolution, read_solutions, solution_to_json
from atts_engine.evaluation.traces import chain_to_json, read_chains
from atts_engine.pipeline.records import Chain, Decision


@dataclass(frozen=True, slots=True)
class Restored:
    """What an earlier, interrupted run left: nothing of any where the folder is new."""

    chains: tuple[Chain, ...] = ()
    decisions: tuple[Decision, ...] = ()
    solutions: tuple[SavedSolution, ...] = ()

    @property
    def in_force(self) -> tuple[Decision, ...]:
        """The decisions on chains that ended. All others are of chains that are written anew or were lost too often."""
        ended = {(chain.problem_id, chain.chain) for chain in self.chains if chain.turns}
        return tuple(d for d in in_force(self.decisions) if (d.problem, d.chain) in ended)

    @property
    def cut_off(self) -> tuple[int, ...]:
        """decision_seq of those that the next decision is to discard."""
        kept = {d.decision_seq for d in self.in_force}
        return tuple(d.decision_seq for d in in_force(self.decisions) if d.decision_seq not in kept)


class _Files(NamedTuple):
    decisions: JsonlWriter
    chains: JsonlWriter
    solutions: JsonlWriter


class RunFolder:
    """Writes one run.

    decisions.jsonl is at any time a prefix of the decisions in the order in which they were made, those of chains that
    were cut off among them. A chain's line comes after the lines of its decisions, and the line
    of a problem's answer in solutions.jsonl after those of its chains. Once a line could not be written none follows
    it, in any of the files, and every `add_` raises that `OSError` again.
    """

    def __init__(self, path: Path, files: _Files, restored: Restored) -> None:
        self.path = path
        self.restored = restored
        self._files = files
        self._failure: OSError | None = None
        self._saved = {(c.problem_id, c.chain) for c in restored.chains}
        last = restored.decisions[-1] if restored.decisions else None
        self._next_seq = last.decision_seq + 1 if last else 0
        self._batch = last.batch if last else -1
        self._engine_batch: int | None = None

    @property
    def saved_chains(self) -> int:
        """Chains that are on disk."""
        return len(self._saved)

    @classmethod
    def open(cls, path: str | os.PathLike[str], settings: dict[str, Any], *, resume: bool) -> RunFolder:
        """Make the folder, or take up the run it holds.

        `InputError`: it cannot be written; another process has it; it holds a run and `resume` is off; it was made
        with other settings, which are named.
        """
        folder = Path(path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if any(_size(folder / f"{name}.jsonl") for name in ("chains", "decisions")):
                check_resumed(folder, settings, resume=resume)
            with ExitStack() as stack:
                # Locked, and rid of torn lines, before anything is read.
                files = _Files(
                    *(
                        stack.enter_context(JsonlWriter(folder / f"{name}.jsonl", append=True))
                        for name in _Files._fields
                    )
                )
                restored = Restored(
                    tuple(read_chains(files.chains.path, allow_torn_tail=True)),
                    tuple(read_decisions(files.decisions.path)),
                    tuple(read_solutions(files.solutions.path)),
                )
                write_json(folder / "settings.json", settings)
                stack.pop_all()
        except OSError as error:
            raise cannot_write(folder, error) from error
        return cls(folder, files, restored)

    def add_decision(self, decision: Decision) -> None:
        """Log the next decision. An engine counts from its own beginning, the log from the run's, across resumes."""
        if decision.batch != self._engine_batch:
            self._engine_batch = decision.batch
            self._batch += 1
        numbered = replace(decision, decision_seq=self._next_seq, batch=self._batch)
        self._write(self._files.decisions, decision_to_json(numbered))
        self._next_seq += 1

    def add_chain(self, chain: Chain) -> None:
        """Save a chain that has ended. One that an earlier run has saved already is left as it was."""
        key = (chain.problem_id, chain.chain)
        if key not in self._saved:
            self._write(self._files.chains, chain_to_json(chain))
            self._saved.add(key)

    def add_solution(self, solution: SavedSolution) -> None:
        """Save the answer of a problem whose chains have all been saved."""
        self._write(self._files.solutions, solution_to_json(solution))

    def _write(self, file: JsonlWriter, record: dict[str, Any]) -> None:
        if self._failure is not None:
            raise self._failure
        try:
            file.write(record)
        except OSError as error:
            self._failure = error
            raise

    def decisions(self) -> tuple[Decision, ...]:
        """The decision log so far."""
        return tuple(read_decisions(self.path / "decisions.jsonl", allow_torn_tail=True))

    def close(self) -> None:
        """Close the files; all that was added is in them already. `OSError` where the device could not take it."""
        with ExitStack() as stack:
            for file in self._files:
                stack.callback(file.close)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write JSON so that the file is there whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


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


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
