"""The rule of the paper's published code, for comparison only."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from atts_engine.conformal.errors import CalibrationError, ScoreError
from atts_engine.conformal.pvalue import level_of


class ReferenceATTS:
    """Take over iff mean(calibration < ppl) >= 1 - alpha, on perplexities in float64, with one fixed
    calibration.

    No +1 term, so with m calibration draws of the same law the rate is above alpha: (B + 1) / (m + 1) where B
    = alpha * m. One calibration (of turn 0) serves all turns. Both are kept, as this class reproduces
    recorded runs.
    """

    name = "reference"

    def __init__(self, calibration: npt.ArrayLike, alpha: float) -> None:
        level_of(alpha)
        values = np.asarray(calibration, dtype=np.float64).ravel()
        if values.size == 0:
            raise CalibrationError("the reference calibrator needs a calibration array that is not empty")
        if not np.isfinite(values).all():
            raise CalibrationError("the calibration array holds a value that is not finite")
        self.alpha = alpha
        self._sorted = np.sort(values)

    def percentile(self, ppl: float) -> float:
        """mean(calibration < ppl), float64. `ScoreError` for NaN or infinity."""
        if not np.isfinite(ppl):
            raise ScoreError(f"a perplexity must be finite, not {ppl}")
        return int(np.searchsorted(self._sorted, ppl, side="left")) / self._sorted.size

    def takeover(self, ppl: float) -> bool:
        """percentile >= 1 - alpha, compared in float64 as the published code does."""
        return self.percentile(ppl) >= 1 - self.alpha
