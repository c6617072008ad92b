"""Control of a loss that is known late, such as an answer that turns out to be wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from atts_engine.conformal.errors import CalibrationError
from atts_engine.conformal.pvalue import LEVEL_ONE, level_of


class ConformalRiskControl:
    """The least lambda of a grid whose calibrated risk stays below alpha:

        lambda^ = inf{lambda: (sum_i L_i(lambda) + L_max) / (n + 1) <= alpha}.

    L_i(lambda) is the loss of item i had it been decided with lambda: in [0, max_loss], not increasing in lambda, and
    at most alpha at the last lambda of the grid (for a loss of correctness: count what the drafts lose against the
    target, so that taking over everything loses nothing).

    Guarantee: E L_{n+1}(lambda^) <= alpha if the items are exchangeable, and >= alpha - 2 max_loss / (n + 1) if the
    losses are independent and without common jumps. In expectation over items and calibration, not for one problem
    or one calibration. Source: Angelopoulos, Bates, Fisch, Lei, Schuster, "Conformal Risk Control" (2208.02814),
    theorems 1 and 2.

    Delay: items that have begun and whose loss is unknown count as max_loss. lambda^ is then never below what it
    will be once their losses are known, so the guarantee holds though hard items are late. `observe` takes losses in
    any order and comes to the same state to the bit: they are summed as integers, in units of max_loss * 2**-32,
    rounded up.
    """

    def __init__(self, alpha: float, grid: npt.ArrayLike, max_loss: float = 1.0) -> None:
        if not (np.isfinite(max_loss) and max_loss > 0.0):
            raise CalibrationError(f"the largest loss must be finite and above 0, not {max_loss}")
        if not 0.0 < alpha < max_loss:
            raise CalibrationError(f"alpha must lie strictly between 0 and the largest loss {max_loss}, not {alpha}")
        values = np.asarray(grid, dtype=np.float64)
        if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all() or (np.diff(values) <= 0.0).any():
            raise CalibrationError("the grid must be a vector of finite lambdas in increasing order, at least one")
        self.alpha = alpha
        self.max_loss = float(max_loss)
        self.grid: npt.NDArray[np.float64] = values.copy()
        self.n = 0
        self.pending = 0
        self._level = level_of(alpha / max_loss)
        self._sums: npt.NDArray[np.int64] = np.zeros(values.size, dtype=np.int64)

    def begin(self) -> None:
        """An item has begun whose loss will be told by `observe`. Until then it counts as max_loss."""
        self.pending += 1

    def withdraw(self) -> None:
        """An item that had begun will have no loss (cancelled, for a reason that has nothing to do with its loss).
        `CalibrationError` if none is pending."""
        if self.pending == 0:
            raise CalibrationError("no item is pending: begin() one before it is withdrawn")
        self.pending -= 1

    def observe(self, losses: npt.ArrayLike) -> None:
        """Learn the losses of one item at every lambda of the grid (float[G]); one pending item less, if any is.

        `CalibrationError` unless they are finite, in [0, max_loss], not increasing, and at most alpha at the end.
        """
        curve = np.asarray(losses, dtype=np.float64)
        if curve.shape != self.grid.shape:
            raise CalibrationError(f"losses must have the grid's shape {self.grid.shape}, not {curve.shape}")
        if not ((curve >= 0.0) & (curve <= self.max_loss)).all():
            raise CalibrationError(f"losses must lie in 0 .. {self.max_loss}")
        if (np.diff(curve) > 0.0).any():
            raise CalibrationError("losses must not increase with lambda")
        if curve[-1] > self.alpha:
            raise CalibrationError(
                f"the loss at the last lambda is {curve[-1]}, above alpha = {self.alpha}: no lambda could control it"
            )
        self._sums += np.ceil(curve / self.max_loss * LEVEL_ONE).astype(np.int64)
        self.n += 1
        self.pending = max(self.pending - 1, 0)

    @property
    def index(self) -> int:
        """Place of lambda^ in the grid: the last one while no lambda is known to be safe (with fewer than
        max_loss / alpha - 1 items, always)."""
        safe = self._sums + (self.pending + 1) * LEVEL_ONE <= self._level * (self.n + self.pending + 1)
        return int(np.argmax(safe)) if safe.any() else self.grid.size - 1

    @property
    def value(self) -> float:
        """lambda^."""
        return float(self.grid[self.index])

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Arrays that `from_state` goes on from: settings float64[2] (alpha, max_loss), grid float64[G], sums
        int64[G], counts int64[2] (n, pending)."""
        return {
            "settings": np.array([self.alpha, self.max_loss]),
            "grid": self.grid.copy(),
            "sums": self._sums.copy(),
            "counts": np.array([self.n, self.pending], dtype=np.int64),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, npt.NDArray[Any]]) -> Self:
        """The control that `state` was taken of. `CalibrationError` if an array is missing or cannot be right."""
        missing = [name for name in ("settings", "grid", "sums", "counts") if name not in state]
        if missing:
            raise CalibrationError(f"a risk control's state lacks {', '.join(missing)}")
        if state["settings"].shape != (2,) or state["counts"].shape != (2,):
            raise CalibrationError("a risk control's state needs settings[2] and counts[2]")
        alpha, max_loss = state["settings"].tolist()
        control = cls(alpha, state["grid"], max_loss)
        sums = np.asarray(state["sums"])
        n, pending = (int(x) for x in state["counts"])
        if sums.shape != control.grid.shape or sums.dtype != np.int64 or min(n, pending) < 0:
            raise CalibrationError("a risk control's state needs int64 sums of the grid's shape, and counts from 0 on")
        if (sums < 0).any() or (sums > n * LEVEL_ONE).any() or (np.diff(sums) > 0).any():
            raise CalibrationError("a risk control's state holds sums that no losses can have")
        control._sums, control.n, control.pending = sums.copy(), n, pending
        return control
