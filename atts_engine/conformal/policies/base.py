"""What a budget policy is, and the plainest one."""

from __future__ import annotations

from fractions import Fraction
from typing import Protocol

from atts_engine.conformal.errors import CalibrationError
from atts_engine.conformal.pvalue import LEVEL_ONE


class Policy(Protocol):
    """Decides the level that one span's smoothed p-value is tested at, and learns the verdicts.

    A state machine without clock or lock. `level` only reads, so a span whose verdict never comes costs nothing.
    Where `serial` is true, the levels of one problem must be asked one after another: the verdict of one is
    told by `decided` before the next is asked. Different problems never wait for each other.
    """

    name: str
    serial: bool

    def level(self, problem: str, turn: int, own: int) -> int:
        """Level in 0 .. 2**32 of the next decision of this problem and turn (0: never, 2**32: always).

        own: the calibrator's own level for it.
        """
        ...

    def expect(self, problem: str, turn: int, arrivals: int) -> None:
        """`arrivals` spans of this problem, those already judged included, are certain to be judged at this
        turn. May be refined, up or down, until the turn ends."""
        ...

    def decided(self, problem: str, turn: int, takeover: bool) -> None:
        """The verdict of one span."""
        ...

    def turn_ended(self, problem: str, turn: int) -> None:
        """No more spans of this problem will be judged at this turn."""
        ...

    def leave(self, problem: str) -> None:
        """The problem is over: its state is dropped."""
        ...


def exact_alpha(alpha: float) -> Fraction:
    """The decimal that `alpha` prints as, so that 0.4 of 5 spans is 2 and leaves no credit. `CalibrationError`
    unless 0 < alpha < 1."""
    if not 0.0 < alpha < 1.0:
        raise CalibrationError(f"alpha must lie strictly between 0 and 1, not {alpha}")
    return Fraction(repr(float(alpha)))


def check_turn(turn: int) -> int:
    """`turn` itself if it is 0 or more; otherwise `CalibrationError`."""
    if turn < 0:
        raise CalibrationError(f"a turn must be 0 or more, not {turn}")
    return turn


class Threshold:
    """Every span at the calibrator's own level: the rate is the calibrator's, and no count is promised."""

    name = "threshold"
    serial = False

    def __init__(self, alpha: float) -> None:
        self.alpha = exact_alpha(alpha)

    def level(self, problem: str, turn: int, own: int) -> int:
        """`own`, unchanged. `CalibrationError` unless it lies in 0 .. 2**32."""
        check_turn(turn)
        if not 0 <= own <= LEVEL_ONE:
            raise CalibrationError(f"a level must lie in 0 .. 2**32, not {own}")
        return own

    def expect(self, problem: str, turn: int, arrivals: int) -> None:
        return None

    def decided(self, problem: str, turn: int, takeover: bool) -> None:
        return None

    def turn_ended(self, problem: str, turn: int) -> None:
        return None

    def leave(self, problem: str) -> None:
        return None
