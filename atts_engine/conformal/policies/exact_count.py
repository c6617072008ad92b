"""Exact counts without a barrier: sequential selection with conformal p-values."""

from __future__ import annotations

from dataclasses import dataclass

from atts_engine.conformal.errors import CalibrationError
from atts_engine.conformal.policies.base import check_turn, exact_alpha
from atts_engine.conformal.policies.thresholds import OptimalThresholds
from atts_engine.conformal.pvalue import LEVEL_ONE


@dataclass(slots=True)
class _Turn:
    """One open turn of a problem. left: announced spans not judged yet; quota: how many of them will be taken over."""

    decided: int = 0
    taken: int = 0
    left: int = 0
    quota: int = 0


class ExactCount:
    """Of r announced spans exactly b are taken over, one by one, at the level b / r of what is left.

    That is Algorithm S (Knuth, "The Art of Computer Programming", volume 2, 3.4.2) with a conformal p-value for its
    uniform: b / r is 0 once the quota is spent and 1 once it needs every span left, so the count holds for any
    p-values; with independent uniform ones each span is taken over with probability B / m whatever its place.
    `optimal` puts the thresholds of Derman, Lieberman and Ross in the place of b / r.

    Credit. Every verdict adds 1 - alpha (takeover) or -alpha to its turn's balance; the balances are exact, in
    units of 1 / q for alpha = p / q. Let F_t be the balance of turns 0 .. t with every announced span counted as
    its quota has it, and F that of all turns. A quota is set when its turn's spans are announced and moves only
    when that announcement does. A span that nobody announced is tested at alpha - F_t unless one verdict would
    break a law: then the other is forced. Laws, for any p-values:

    1. |F| <= 1 after every call, however many turns of the problem run at once and in whichever order their
       verdicts come. So |#takeovers - alpha * #decided| <= 1 wherever no announced span is outstanding.
    2. |F_t| <= 1 for each turn t as long as turns begin in their order and no more than two are open (begun, not
       ended) at a time. With three, no selector can promise that: at alpha = 2/5 an adversary forces 6/5.
    3. |F_t| <= 1/2 if all spans of the turns 0 .. t were announced before they were judged, and each turn's first
       span after the turn before had ended.

    They need `serial` use and announcements that come true: a span announced that never comes may leave a balance
    beyond the bound, which later verdicts work off.
    """

    serial = True

    def __init__(self, alpha: float, *, optimal: bool = False) -> None:
        self.name = "exact-count-dlr" if optimal else "exact-count"
        self.alpha = exact_alpha(alpha)
        self._p, self._q = self.alpha.numerator, self.alpha.denominator
        self._problems: dict[str, _Problem] = {}
        self._thresholds = OptimalThresholds() if optimal else None

    def level(self, problem: str, turn: int, own: int) -> int:
        """Level of the next decision; the calibrator's `own` is not used."""
        state = self._problems.get(problem) or _Problem(self._p, self._q)
        left, quota = state.ahead(turn)
        if left == 0:
            return state.lone_level(turn)
        if quota in (0, left):
            return LEVEL_ONE if quota else 0
        if self._thresholds is not None:
            return self._thresholds.level(left, quota)
        return -(-quota * LEVEL_ONE // left)

    def expect(self, problem: str, turn: int, arrivals: int) -> None:
        """Announce spans. `CalibrationError` if more than `arrivals` were judged already."""
        self._known(problem).announce(turn, arrivals)

    def decided(self, problem: str, turn: int, takeover: bool) -> None:
        self._known(problem).decided(turn, takeover)

    def turn_ended(self, problem: str, turn: int) -> None:
        self._known(problem).end(turn)

    def leave(self, problem: str) -> None:
        self._problems.pop(problem, None)

    def balance(self, problem: str) -> float:
        """#takeovers - alpha * #decided of the problem so far, all turns together."""
        return self._problems[problem].balance() / self._q if problem in self._problems else 0.0

    def _known(self, problem: str) -> _Problem:
        if problem not in self._problems:
            self._problems[problem] = _Problem(self._p, self._q)
        return self._problems[problem]


class _Problem:
    """The balances of one problem, in units of 1 / q."""

    def __init__(self, p: int, q: int) -> None:
        self.p, self.q = p, q
        self.closed = 0
        self.ended: set[int] = set()
        self.turns: dict[int, _Turn] = {}

    def ahead(self, turn: int) -> tuple[int, int]:
        """(announced spans left, quota) of a turn."""
        self._check(turn)
        state = self.turns.get(turn)
        return (0, 0) if state is None else (state.left, state.quota)

    def lone_level(self, turn: int) -> int:
        """Level of a span that was not announced."""
        room = self._room(turn)
        take, keep = room.breach(self.q - self.p), room.breach(-self.p)
        if take != keep:
            return LEVEL_ONE if take < keep else 0
        share = min(max(self.p - room.own, 0), self.q)
        return -(-share * LEVEL_ONE // self.q)

    def announce(self, turn: int, arrivals: int) -> None:
        """Set how many spans are left of a turn, and the quota among them that the laws allow and that brings the
        balance of turns 0 .. turn nearest to 0."""
        state = self._open(turn)
        if arrivals < state.decided:
            raise CalibrationError(f"turn {turn} cannot expect {arrivals} spans: {state.decided} were judged already")
        state.left, state.quota = arrivals - state.decided, 0
        room = self._room(turn)
        # Every quota that keeps |F| <= 1 lies in low .. high. Where a broken promise left none of them, the range
        # shrinks to the feasible quota nearest to it.
        low, high = (-self.q - room.total) // self.q, (self.q - room.total) // self.q + 1
        quotas = range(min(max(low, 0), state.left), max(min(high, state.left), 0) + 1)
        state.quota = min(quotas, key=lambda b: (*room.breach(self.q * b), abs(room.own + self.q * b), b))

    def decided(self, turn: int, takeover: bool) -> None:
        state = self._open(turn)
        state.decided += 1
        state.taken += takeover
        if state.left:
            state.left -= 1
            # A verdict beyond the quota (not serial) must not leave a quota that cannot be met.
            state.quota = min(max(state.quota - takeover, 0), state.left)

    def end(self, turn: int) -> None:
        self._check(turn)
        state = self.turns.pop(turn, None)
        self.ended.add(turn)
        if state is not None:
            self.closed += self.q * state.taken - self.p * state.decided

    def balance(self) -> int:
        """q * #takeovers - p * #decided."""
        return self.closed + sum(self.q * s.taken - self.p * s.decided for s in self.turns.values())

    def _check(self, turn: int) -> None:
        if check_turn(turn) in self.ended:
            raise CalibrationError(f"turn {turn} has ended: no more of its spans can be judged")

    def _open(self, turn: int) -> _Turn:
        self._check(turn)
        if turn not in self.turns:
            self.turns[turn] = _Turn()
        return self.turns[turn]

    def _room(self, turn: int) -> _Room:
        """What a change of this turn's balance has to heed."""
        before: list[int] = []
        own = total = self.closed
        for t in sorted(self.turns):
            s = self.turns[t]
            total += self.q * (s.taken + s.quota) - self.p * (s.decided + s.left)
            if t < turn:
                before.append(total)
            if t <= turn:
                own = total
        return _Room(self.q, own, total, tuple(before))


@dataclass(frozen=True, slots=True)
class _Room:
    """own: F_t of the turn; total: F; before: F_s of each open turn s < t. All in units of 1 / one."""

    one: int
    own: int
    total: int
    before: tuple[int, ...]

    def breach(self, shift: int) -> tuple[int, int]:
        """How far law 1 would be broken by adding `shift` to this turn's balance, and how far turns would lie more
        than 1 apart.

        Law 2 rests on that distance: a verdict moves all later turns too, and balances that are no further than 1
        apart can be moved together without any of them leaving -1 .. 1, by a takeover or else without one.
        """
        apart = max((abs(self.own + shift - s) for s in self.before), default=0)
        return max(abs(self.total + shift) - self.one, 0), max(apart - self.one, 0)
