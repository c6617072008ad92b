"""Early verdicts: stop as soon as a set of labels lies on one side of the takeover threshold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from atts_engine.conformal.errors import CalibrationError

Side = Literal["keep", "takeover", "undecided"]


@dataclass(frozen=True, slots=True)
class EarlyVerdict:
    """verdict: `undecided` where no prefix settled it and the whole span must be scored; prefix: index of the prefix
    that settled it, None where none did."""

    verdict: Side
    prefix: int | None


def side(lower: int, upper: int, takeover_from: int) -> Side:
    """`takeover` if all labels lower .. upper are takeover_from or more, `keep` if all are less, else `undecided`.
    `CalibrationError` if lower > upper."""
    if lower > upper:
        raise CalibrationError(f"an interval of labels must not be empty, not {lower} .. {upper}")
    if lower >= takeover_from:
        return "takeover"
    return "keep" if upper < takeover_from else "undecided"


def early_verdict(lower: npt.ArrayLike, upper: npt.ArrayLike, takeover_from: int) -> EarlyVerdict:
    """The verdict of the first of a span's prefixes whose set `lower[P] .. upper[P]` settles it, prefixes in order.

    Where the sets of all prefixes hold the label at the same time with probability 1 - alpha (`OrdinalSets.fit` with
    spans), a settled verdict is the full span's with at least that probability; with sets calibrated prefix by prefix
    it is not, since the stopping prefix is chosen by looking. `CalibrationError` if the two differ in shape.
    """
    lowers, uppers = np.asarray(lower), np.asarray(upper)
    if lowers.ndim != 1 or lowers.shape != uppers.shape:
        raise CalibrationError(
            f"lower and upper must both have shape [P], not {list(lowers.shape)}, {list(uppers.shape)}"
        )
    for prefix, ends in enumerate(zip(lowers.tolist(), uppers.tolist())):
        found = side(*ends, takeover_from)
        if found != "undecided":
            return EarlyVerdict(found, prefix)
    return EarlyVerdict("undecided", None)
