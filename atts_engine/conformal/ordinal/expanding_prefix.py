"""Per-class thresholds at each prefix."""

from __future__ import annotations

from typing import Self

import numpy as np
import numpy.typing as npt

from atts_engine.conformal.errors import CalibrationError
from atts_engine.conformal.ordinal.checks import Bools, Floats, Ints, check_labels, check_probabilities, hull
from atts_engine.conformal.ordinal.fixed_sequence import FixedSequence
from atts_engine.conformal.pvalue import level_of


class ExpandingPrefix:
    """A threshold for every (prefix, class): a label is kept if its probability passes its own.

    `prefix` int[N] numbers the prefixes; None puts all rows into one. Guarantee: for exchangeable rows of a prefix,
    P(label in set | label) >= 1 - alpha at every prefix for every class; given iid continuous calibration the share
    rejected in a cell is Beta(r, n + 1 - r) (`rejection_law`). That is per prefix: a verdict that may stop at any of
    them needs `spans` and one prefix. A class without calibration at a prefix is never rejected there. Widened to
    intervals the sets are those of the class-specific `FixedSequence`, fitted per prefix. Source: ConE-AFC, IEEE Access
    2024, 10.1109/ACCESS.2024.3492348 (read in a summary; thresholds as in conformal prediction by class).
    """

    def __init__(self, alpha: float) -> None:
        level_of(alpha)
        self.alpha = alpha
        self._cells: dict[int, FixedSequence] = {}
        self._n_classes = 0

    def fit(
        self,
        probabilities: npt.ArrayLike,
        labels: npt.ArrayLike,
        spans: npt.ArrayLike | None = None,
        *,
        prefix: npt.ArrayLike | None = None,
    ) -> Self:
        f = check_probabilities(probabilities)
        y = check_labels(labels, *f.shape)
        at = _prefixes(prefix, len(f))
        ids = None if spans is None else np.asarray(spans)
        if ids is not None and ids.shape != y.shape:
            raise CalibrationError(f"spans must have shape [{len(y)}], one for each row, not {list(ids.shape)}")
        self._cells = {
            int(p): FixedSequence(self.alpha, per_class=True).fit(
                f[at == p], y[at == p], None if ids is None else ids[at == p]
            )
            for p in np.unique(at)
        }
        self._n_classes = f.shape[1]
        return self

    def predict(self, probabilities: npt.ArrayLike, *, prefix: npt.ArrayLike | None = None) -> tuple[Ints, Ints]:
        f = check_probabilities(probabilities, self._n_classes or None)
        return hull(self.members(f, prefix=prefix), f.argmax(axis=1))

    def members(self, probabilities: Floats, *, prefix: npt.ArrayLike | None = None) -> Bools:
        """`[N, K]`: which labels pass their own threshold; may be empty, may have gaps."""
        kept = np.zeros(probabilities.shape, dtype=np.bool_)
        at = _prefixes(prefix, len(probabilities))
        for p in np.unique(at):
            kept[at == p] = self.cell(int(p)).accepted(probabilities[at == p])
        return kept

    def rejection_law(self, label: int, prefix: int = 0) -> tuple[int, int]:
        """(r, n + 1 - r) of the Beta law of the cell; r = 0: never rejected."""
        return self.cell(prefix).rejection_law(label)

    def cell(self, prefix: int) -> FixedSequence:
        """The tests of one prefix; `CalibrationError` where the prefix was not calibrated."""
        if prefix not in self._cells:
            known = ", ".join(map(str, self._cells)) or "none: call fit first"
            raise CalibrationError(f"prefix {prefix} was not calibrated (calibrated: {known})")
        return self._cells[prefix]


def _prefixes(prefix: npt.ArrayLike | None, n: int) -> Ints:
    at = np.zeros(n, dtype=np.int64) if prefix is None else np.asarray(prefix)
    if at.shape != (n,) or not np.issubdtype(at.dtype, np.integer):
        raise CalibrationError(f"prefix must be integers of shape [{n}], not {at.dtype} {list(at.shape)}")
    return at.astype(np.int64)
