"""The conformal test in integers, so that host, device and oracle agree to the bit.

A score is nonconformity: higher is worse, so the p-value takes the right tail. With
`greater` = #{calibration > score}, `ties` = #{calibration == score} and `n` calibration scores,

    p = (greater + U * (1 + ties)) / (n + 1),        U uniform on (0, 1]

is exactly uniform when score and calibration are exchangeable (Vovk, Gammerman, Shafer, "Algorithmic
Learning in a Random World", 2005, section 2.3). U = 1 gives the plain p-value
(1 + #{calibration >= score}) / (n + 1), which is never too small. U and alpha are carried as multiples of 2**-32.
"""

from __future__ import annotations

import math
from fractions import Fraction

from atts_engine.conformal.errors import CalibrationError

LEVEL_ONE = 1 << 32
"""The integer that stands for 1 in a level or a uniform."""


def level_of(alpha: float) -> int:
    """ceil(alpha * 2**32), taken on the exact value of the float. `CalibrationError` unless 0 < alpha < 1.

    Rounding up mends decimals whose float lies just below them: with alpha = 0.3 and n + 1 = 10, p = 3/10 is
    a takeover.
    """
    if not 0.0 < alpha < 1.0:
        raise CalibrationError(f"alpha must lie strictly between 0 and 1, not {alpha}")
    return math.ceil(Fraction(alpha) * LEVEL_ONE)


def check_uniform(u: int) -> int:
    """`u` itself if it lies in 1 .. 2**32 (2**32: the plain p-value); otherwise `CalibrationError`."""
    if not 1 <= u <= LEVEL_ONE:
        raise CalibrationError(f"u must lie in 1 .. 2**32, not {u}")
    return u


def decide(greater: int, ties: int, n: int, level: int, u: int) -> bool:
    """Takeover iff p <= alpha, as greater * 2**32 + u * (1 + ties) <= level * (n + 1)."""
    return greater * LEVEL_ONE + u * (1 + ties) <= level * (n + 1)


def p_value(greater: int, ties: int, n: int, u: int) -> float:
    """(greater + (u / 2**32) * (1 + ties)) / (n + 1) in float64, rounded in this order on every device."""
    return (greater + (u / LEVEL_ONE) * (1 + ties)) / (n + 1)
