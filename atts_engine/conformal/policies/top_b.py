"""The synchronous oracle."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from atts_engine.conformal.errors import CalibrationError, ScoreError
from atts_engine.conformal.policies.base import check_turn, exact_alpha


class TopB:
    """The B worst of all spans of a problem's turn, chosen once all of them are known: no selection ranks better at
    this count, and it costs a barrier per turn.

    B is the number that brings the problem's balance #takeovers - alpha * #decided nearest to 0, so that the
    balance stays within 1/2 after every turn; its arithmetic is exact.
    """

    name = "top-b"
    serial = True

    def __init__(self, alpha: float) -> None:
        self.alpha = exact_alpha(alpha)
        self._balance: dict[str, Fraction] = {}

    def choose(self, problem: str, turn: int, scores: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """bool[m]: which of the turn's spans are taken over, given their scores (float[m], higher is worse; of equal
        ones the first). `ScoreError` for NaN or infinity."""
        check_turn(turn)
        values = np.asarray(scores, dtype=np.float64)
        if values.ndim != 1:
            raise CalibrationError(f"scores of one turn must be a vector, not of shape {values.shape}")
        if not np.isfinite(values).all():
            raise ScoreError(f"turn {turn} of problem {problem} has a score that is not finite")
        before = self._balance.get(problem, Fraction(0)) - self.alpha * values.size
        budget = math.ceil(-before - Fraction(1, 2))
        self._balance[problem] = before + budget
        chosen = np.zeros(values.size, dtype=np.bool_)
        chosen[np.argsort(-values, kind="stable")[:budget]] = True
        return chosen

    def leave(self, problem: str) -> None:
        """The problem is over: its credit is dropped."""
        self._balance.pop(problem, None)
