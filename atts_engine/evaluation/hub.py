"""Problem sets of the Hugging Face hub, read with the package `datasets`: which rows, which columns, which answers."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from atts_engine.errors import InputError
from atts_engine.evaluation.registers import last_boxed
from atts_engine.pipeline.records import Problem

QUESTIONS = ("problem", "question", "prompt")
ANSWERS = ("answer", "final_answer", "expected_answer", "solution")
"""Columns of MATH-500, GSM8K, AMC23, AIME24, AIME25 and OlympiadBench as they are on the hub, compared without case;
the first that a set has is taken. A `solution` is a worked one, whose last box is the answer."""

_REFERENCE = re.compile(r"(?P<name>[^:/\s]+(?:/[^:/\s]+)?)(?::(?P<config>[^:/\s]*))?(?:/(?P<split>[^:/\s]+))?")


@dataclass(frozen=True, slots=True)
class Reference:
    """`NAME[:CONFIG][/SPLIT]`; NAME is `owner/set`, or a bare `set`, which needs `:CONFIG` or `:` before a split."""

    name: str
    config: str | None
    split: str | None

    @classmethod
    def of(cls, text: str) -> Reference:
        match = _REFERENCE.fullmatch(text)
        if match is None:
            raise InputError(f"--dataset must be NAME[:CONFIG][/SPLIT], such as openai/gsm8k:main/test, not {text!r}")
        return cls(match["name"], match["config"] or None, match["split"])


def problems(
    reference: str, *, question: str | None = None, answer: str | None = None, limit: int | None = None
) -> tuple[Problem, ...]:
    """The problems of a set on the hub, or of a local folder `owner/set`; where no split is named, `test`, or else
    the only one.

    question, answer: columns, where the usual ones (`QUESTIONS`, `ANSWERS`) are not meant. `InputError`: `datasets` is
    not installed, the set cannot be had, a column is missing, an answer cannot be read.
    """
    if importlib.util.find_spec("datasets") is None:
        raise InputError("--dataset needs the package datasets: pip install 'atts-engine[datasets]'")
    import datasets

    wanted = Reference.of(reference)
    try:
        split = wanted.split or _split(wanted, datasets.get_dataset_split_names(wanted.name, wanted.config))
        rows = datasets.load_dataset(wanted.name, wanted.config, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        # The package raises its own kinds of these for no network, no such set, no such configuration, no such split.
        reason = " ".join(str(error).split())
        raise InputError(f"the data set {reference} cannot be loaded: {reason[:300]}") from error
    return of_rows(rows, rows.column_names, wanted.name, question=question, answer=answer, limit=limit)


def of_rows(
    rows: Iterable[Mapping[str, Any]],
    columns: Sequence[str],
    name: str,
    *,
    question: str | None = None,
    answer: str | None = None,
    limit: int | None = None,
) -> tuple[Problem, ...]:
    """The first `limit` rows as problems; ids are the set's name (without its owner) and the row's number."""
    asked = _column(columns, question, QUESTIONS, "question", name)
    told = _column(columns, answer, ANSWERS, "answer", name)
    short = name.rpartition("/")[2].lower()
    found: list[Problem] = []
    for number, row in enumerate(rows):
        if limit is not None and number == limit:
            break
        text = row[asked]
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{name}, row {number}: column {asked!r} must be a text that is not empty, not {text!r}")
        gold = gold_answer(row[told], worked=told.lower() == "solution")
        if gold is None:
            raise InputError(f"{name}, row {number}: no answer in column {told!r}: name another by --answer-field")
        found.append(Problem(f"{short}-{number:04d}", text, gold, number))
    if not found:
        raise InputError(f"the data set {name} holds no problems")
    return tuple(found)


def gold_answer(value: Any, *, worked: bool = False) -> str | None:
    """The final answer in a cell; None where there is none.

    A number is its own text. A list (OlympiadBench) holds the parts of one answer. A text is what follows its last
    `####` (GSM8K), or with `worked` the content of its last box, or all of it.
    """
    if isinstance(value, list | tuple):
        parts = [part for part in (gold_answer(item) for item in value) if part is not None]
        return ", ".join(parts) if len(parts) == len(value) > 0 else None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value) if math.isfinite(value) else None
    if not isinstance(value, str):
        return None
    _, mark, last = value.rpartition("####")
    text = last if mark else last_boxed(value) if worked else value
    return text.strip() or None if text is not None else None


def _split(wanted: Reference, names: Sequence[str]) -> str:
    if "test" in names:
        return "test"
    if len(names) == 1:
        return names[0]
    raise InputError(f"{wanted.name} has the splits {', '.join(names)}: name one, as in {wanted.name}/{names[0]}")


def _column(columns: Sequence[str], named: str | None, usual: Sequence[str], what: str, name: str) -> str:
    known = {column.lower(): column for column in reversed(columns)}
    if named is not None:
        if named not in columns:
            raise InputError(f"{name} has no column {named!r}; it has {', '.join(columns)}")
        return named
    for candidate in usual:
        if candidate in known:
            return known[candidate]
    raise InputError(
        f"no column of {name} is known as the {what} (it has {', '.join(columns)}): name it by --{what}-field"
    )
