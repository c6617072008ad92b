"""The interface of everything that chooses what to try next, and two controls that any proposer should beat."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from atts_engine.errors import InputError
from atts_engine.evaluation.tuning.space import NAMES, Configuration, Space
from atts_engine.evaluation.tuning.trial import Trial

MAX_GRID = 1_000_000


@dataclass(frozen=True, slots=True)
class Proposal:
    """configuration: None where nothing that could be run was named; the others as in `Trial`."""

    configuration: Configuration | None
    insights: tuple[str, ...] = ()
    reason: str | None = None
    complaints: tuple[str, ...] = ()


class Proposer(Protocol):
    """Chooses the next configuration from the history alone, so a resumed study goes on as if it had never stopped."""

    def propose(self, history: Sequence[Trial]) -> Proposal | None:
        """What to try after `history`; None when there is nothing left."""
        ...


def seeded(seed: int, number: int) -> random.Random:
    """The random stream of trial `number`: it does not depend on the process that draws from it."""
    return random.Random(f"tune/{seed}/{number}")


@dataclass(frozen=True, slots=True)
class RandomSearch:
    """Every configuration drawn by itself."""

    space: Space
    seed: int

    def propose(self, history: Sequence[Trial]) -> Proposal:
        """A random configuration, whatever happened before."""
        return Proposal(self.space.draw(seeded(self.seed, len(history))))


class GridSearch:
    """All combinations of a few levels of every range and all values of every choice, in random order.

    levels: of a range. Ends when every combination was proposed. `InputError` for more of them than anybody can run.
    """

    def __init__(self, space: Space, seed: int, levels: int = 3) -> None:
        self._space = space
        axes = [space.dimensions[name].levels(levels) for name in NAMES]
        if (size := math.prod(map(len, axes))) > MAX_GRID:
            raise InputError(f"a grid of {size:,} configurations is too large: take fewer levels or narrower ranges")
        self._points = list(itertools.product(*axes))
        random.Random(f"tune/{seed}").shuffle(self._points)

    def propose(self, history: Sequence[Trial]) -> Proposal | None:
        """The next combination."""
        if len(history) >= len(self._points):
            return None
        return Proposal(self._space.configuration(dict(zip(NAMES, self._points[len(history)], strict=True))))
