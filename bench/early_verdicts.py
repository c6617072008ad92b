"""How early a span's verdict can be told, and how often that changes it: every set method on recorded traces.

    python -m bench.early_verdicts --traces FILE.jsonl ... [--alpha 0.4] [--miscoverage 0.1] [--json FILE]

Turns must carry `chunks`: [{"n", "score", "draft_score"}, ...], running means after each chunk, the last the whole
span. Problems, never spans, are split in three: predictors and bin edges are fitted on the first part, sets calibrated
on the second, figures taken on the third. Labels: the rank bin of the full-span score, and, where gold answers exist,
whether the chain's answer is wrong. Chains are as recorded: what an early verdict would change later is not played out.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from atts_engine.conformal import CalibrationError
from atts_engine.conformal.ordinal import (
    SET_METHODS,
    PrefixTable,
    RankBins,
    belief_intervals,
    early_verdict,
    make_predictor,
    make_sets,
)
from atts_engine.errors import InputError
from atts_engine.evaluation.files import check_file, write_text
from atts_engine.evaluation.measures import bootstrap
from bench.early_spans import Floats, Ints, Rows, Span, read_spans, rows_of, split, turn_groups
from bench.provenance import provenance

MIN_CELL = 30
"""Rows that a prefix needs for fitting and for calibrating; with fewer it settles nothing."""
SAVED = ("target_tokens_not_verified", "draft_tokens_not_written")
MODES = {
    "spans": "sets calibrated for all prefixes of a span at once",
    "prefix": "sets calibrated prefix by prefix",
    "none": "not calibrated, for comparison",
}


class Study:
    """One kind of label. parts: fitting, calibration and test rows. A prefix whose predictor or calibration would have
    fewer than MIN_CELL rows is given the set of all labels."""

    def __init__(self, parts: Sequence[Rows], n_classes: int, miscoverage: float) -> None:
        self.fit, self.calibration, self.test = parts
        self.n_classes, self.miscoverage = n_classes, miscoverage
        self.cells = [
            cell
            for cell in np.unique(self.fit.cell, axis=0)
            if min(self.fit.of(cell).sum(), self.calibration.of(cell).sum()) >= MIN_CELL
        ]
        self._known: dict[str, tuple[Floats, Floats]] = {}

    def intervals(self) -> Iterator[tuple[str, str, tuple[Ints, Ints]]]:
        """(mode, method, (lower, upper)) of every test row."""
        for mode in ("spans", "prefix"):
            for name in SET_METHODS:
                yield mode, name, self._calibrated(name, mode)
        belief, top = self._all_labels(), self._all_labels()
        for cell in self.cells:
            rows, here = self.fit.of(cell), self.test.of(cell)
            counts = PrefixTable().fit(self.fit.features[rows], self.fit.label[rows], self.n_classes)
            evidence = counts.evidence(self.test.features[here])
            belief[0][here], belief[1][here] = belief_intervals(evidence, 1.0 - self.miscoverage)
            top[0][here] = top[1][here] = self._probabilities("logistic")[1][here].argmax(axis=1)
        yield "none", "belief", belief
        yield "none", "most-probable", top

    def _calibrated(self, name: str, mode: str) -> tuple[Ints, Ints]:
        calibration, test = self._probabilities("unimodal" if name == "copoc" else "logistic")
        lower, upper = self._all_labels()
        pools = [[cell] for cell in self.cells]
        if mode == "spans":
            pools = [[c for c in self.cells if c[0] == g] for g in sorted({int(c[0]) for c in self.cells})]
        for pool in pools:
            known = np.any([self.calibration.of(cell) for cell in pool], axis=0)
            here = np.any([self.test.of(cell) for cell in pool], axis=0)
            sets = make_sets(name, self.miscoverage)
            sets.fit(calibration[known], self.calibration.label[known], self.calibration.span[known])
            lower[here], upper[here] = sets.predict(test[here])
        return lower, upper

    def _probabilities(self, predictor: str) -> tuple[Floats, Floats]:
        """Of the calibration and test rows `[R, K]`, each cell by its own predictor; uniform elsewhere."""
        if predictor not in self._known:
            parts = self.calibration, self.test
            found = [np.full((len(part.span), self.n_classes), 1.0 / self.n_classes) for part in parts]
            for cell in self.cells:
                rows = self.fit.of(cell)
                model = make_predictor(predictor).fit(self.fit.features[rows], self.fit.label[rows], self.n_classes)
                for part, f in zip(parts, found):
                    f[part.of(cell)] = model.predict(part.features[part.of(cell)])
            self._known[predictor] = found[0], found[1]
        return self._known[predictor]

    def _all_labels(self) -> tuple[Ints, Ints]:
        n = len(self.test.span)
        return np.zeros(n, dtype=np.int64), np.full(n, self.n_classes - 1, dtype=np.int64)


def figures(
    spans: Sequence[Span], rows: Rows, ends: tuple[Ints, Ints], takeover_from: int, full: Sequence[bool], sees: str
) -> dict[str, Any]:
    """Of one method on the test spans; full: which are taken over when scored whole. Shares are of all test spans and
    of all their tokens, spans of one chunk included."""
    lower, upper = ends
    covered = (lower <= rows.label) & (rows.label <= upper)
    first = np.searchsorted(rows.span, np.arange(len(spans) + 1))
    settled, not_verified, not_written, everywhere = 0, 0, 0, 0
    changed: dict[str, list[bool]] = {}
    for i, span in enumerate(spans):
        here = slice(int(first[i]), int(first[i + 1]))
        everywhere += bool(covered[here].all())
        found = early_verdict(lower[here], upper[here], takeover_from)
        differs = found.prefix is not None and (found.verdict == "takeover") != full[i]
        changed.setdefault(span.problem, []).append(differs)
        if found.prefix is None:
            continue
        settled += 1
        read = span.n[found.prefix]
        not_verified += span.n[-1] - (read if sees == "both" else 0)
        not_written += span.n[-1] - read if found.verdict == "takeover" else 0
    tokens = sum(span.n[-1] for span in spans)
    wrong = sum(map(sum, changed.values()))
    by_problem = bootstrap([sum(flags) / len(flags) for flags in changed.values()], resamples=2000)
    return {
        "coverage": float(covered.mean()),
        "coverage_at_every_prefix": everywhere / len(spans),
        "mean_set_size": float((upper - lower + 1).mean()),
        "settled_early": settled / len(spans),
        "verdicts_changed": wrong / len(spans),
        "verdicts_changed_of_settled": wrong / settled if settled else None,
        "verdicts_changed_by_problem": {"mean": by_problem.mean, "low": by_problem.low, "high": by_problem.high},
        "target_tokens_not_verified": not_verified,
        "target_tokens_not_verified_share": not_verified / tokens,
        "draft_tokens_not_written": not_written,
        "draft_tokens_not_written_share": not_written / tokens,
    }


def study(
    spans: Sequence[Span], *, alpha: float, miscoverage: float, bins: int, seed: int, sees: str
) -> dict[str, Any]:
    """{"parts", "turn_groups", "labels": {"score", "wrong"}}: for each kind of label, {mode: {method: `figures`}}.

    `InputError` where there are too few problems or no prefixes; `CalibrationError` for levels outside (0, 1) and too
    few spans to set bin edges.
    """
    if not 0.0 < miscoverage < 1.0:
        raise InputError(f"miscoverage must lie strictly between 0 and 1, not {miscoverage}")
    parts = split(spans, seed)
    groups = turn_groups(parts)
    edges = {
        group: RankBins.fit([s.score[-1] for s in parts[0] if groups[s.turn] == group], alpha, bins)
        for group in sorted(set(groups.values()))
    }

    def bin_of(span: Span) -> int:
        return int(edges[groups[span.turn]].labels([span.score[-1]])[0])

    takeover_from = edges[0].takeover_from
    found: dict[str, Any] = {}
    for kind in ("score", "wrong"):
        held = [[s for s in part if kind == "score" or s.wrong is not None] for part in parts]
        if not all(held):
            continue
        classes, threshold = (bins, takeover_from) if kind == "score" else (2, 1)
        labels = [[bin_of(s) if kind == "score" else int(s.wrong is True) for s in part] for part in held]
        rows = [rows_of(part, y, groups, sees) for part, y in zip(held, labels)]
        if not len(rows[2].span):
            raise InputError(
                "no test span has a chunk before its last: record the traces with a smaller --chunk-tokens"
            )
        full = [bin_of(span) >= takeover_from for span in held[2]]
        found[kind] = {"test_spans": len(full), "takeover_share": sum(full) / len(full), "classes": classes}
        found[kind] |= {mode: {} for mode in MODES}
        for mode, name, ends in Study(rows, classes, miscoverage).intervals():
            found[kind][mode][name] = figures(held[2], rows[2], ends, threshold, full, sees)
    counts = [{"problems": len({span.problem for span in part}), "spans": len(part)} for part in parts]
    named = dict(zip(("fitting", "calibration", "test"), counts))
    return {"parts": named, "turn_groups": len(edges), "labels": found}


def table(record: dict[str, Any]) -> str:
    """The figures as Markdown, one table for each kind of label and each way of calibrating."""
    kinds = {"score": "rank bin of the full-span score", "wrong": "wrong answer of the chain"}
    lines = []
    for kind, cell in record["labels"].items():
        lines.append(
            f"## Label: {kinds[kind]} ({cell['classes']} classes, {cell['test_spans']} test spans, "
            f"{cell['takeover_share']:.1%} taken over when scored whole)\n"
        )
        for mode, says in MODES.items():
            lines.append(f"{says}:\n")
            lines.append("| method | covered | at every prefix | set size | settled | changed (95%) | target | draft |")
            lines.append("|---|---|---|---|---|---|---|---|")
            for name, f in cell[mode].items():
                mean, low, high = f["verdicts_changed_by_problem"].values()
                row = [name, f"{f['coverage']:.1%}", f"{f['coverage_at_every_prefix']:.1%}"]
                row += [
                    f"{f['mean_set_size']:.2f}",
                    f"{f['settled_early']:.1%}",
                    f"{mean:.1%} ({low:.1%} to {high:.1%})",
                ]
                row += [f"{f[tokens + '_share']:.1%}" for tokens in SAVED]
                lines.append("| " + " | ".join(row) + " |")
            lines.append("")
    lines.append("target: tokens not verified; draft: tokens not written; both of all drafted tokens.")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, nargs="+", required=True, help="trace files of one pair of models")
    parser.add_argument("--alpha", type=float, default=0.4, help="nominal takeover rate (default: %(default)s)")
    parser.add_argument("--miscoverage", type=float, default=0.1, help="of the sets (default: %(default)s)")
    parser.add_argument("--bins", type=int, default=5, help="ordinal labels of the score (default: %(default)s)")
    parser.add_argument("--sees", choices=("both", "draft"), default="both", help="scores that the predictor sees")
    parser.add_argument("--seed", type=int, default=0, help="of the split (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures here, e.g. bench/results/early_verdicts.json")
    given = parser.parse_args(arguments)
    settings = {k: getattr(given, k) for k in ("alpha", "miscoverage", "bins", "seed", "sees")}
    try:
        if given.json is not None:
            check_file(given.json, "--json")
        record = study(read_spans(given.traces), **settings)
        print(table(record))
        if given.json is not None:
            words = sys.argv[1:] if arguments is None else arguments
            # A reader has the same file elsewhere: only its folder's and its own name are kept.
            named = ["/".join(Path(w).parts[-2:]) if Path(w).is_absolute() else w for w in words]
            command = ["python", "-m", "bench.early_verdicts", *named]
            _write(given.json, {"provenance": provenance(shlex.join(command)), "settings": settings} | record)
    except (InputError, CalibrationError) as error:
        print(f"early_verdicts: error: {error}", file=sys.stderr)
        return 2
    return 0


def _write(path: Path, record: dict[str, Any]) -> None:
    try:
        write_text(path, json.dumps(record, indent=1) + "\n")
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error
    print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
