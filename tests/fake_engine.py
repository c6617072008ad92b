"""An engine without models: a chain depends on (seed, problem, chain) alone; verdicts go through a real calibrator."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import AsyncGenerator, Callable, Sequence

import numpy as np

from atts_engine.conformal import Calibrator
from atts_engine.pipeline import (
    ATTSParams,
    Chain,
    ChainEvent,
    Decision,
    Event,
    Problem,
    Solution,
    SolutionEvent,
    Task,
    TokensEvent,
    Turn,
    VerdictEvent,
)
from atts_engine.pipeline.streams import gate_uniform


class Died(Exception):
    """Stands for a kill in the middle of a run."""


class FakeEngine:
    """`dies_after`: number of ended chains after which every problem raises `Died`."""

    def __init__(self, dies_after: int | None = None) -> None:
        self.in_flight = 0
        self.most_in_flight = 0
        self.written: list[tuple[str, int]] = []
        self._dies_after = dies_after
        self._listeners: list[Callable[[Decision], None]] = []
        self._seq = 0

    def add_decision_listener(self, listener: Callable[[Decision], None]) -> Callable[[], None]:
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    async def generate(
        self,
        problem: Problem,
        params: ATTSParams,
        *,
        calibrator: Calibrator | None = None,
        chains: Sequence[int] | None = None,
        task: Task | None = None,
    ) -> AsyncGenerator[Event, None]:
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        ended = []
        try:
            for number in range(params.chains) if chains is None else chains:
                async for event in self._chain(problem, number, params, calibrator):
                    yield event
                    if isinstance(event, ChainEvent):
                        ended.append(event.chain)
            yield SolutionEvent(Solution(problem.id, None, {}, tuple(ended), 0.0))
        finally:
            self.in_flight -= 1

    async def _chain(
        self, problem: Problem, number: int, params: ATTSParams, calibrator: Calibrator | None
    ) -> AsyncGenerator[Event, None]:
        rng = random.Random(f"{params.seed}/{problem.id}/{number}")
        turns = []
        for turn in range(rng.randint(1, 3)):
            await asyncio.sleep(0)
            score = float(np.float32(rng.expovariate(1.0)))
            text = f"step {turn} <b>&"
            yield TokensEvent(problem.id, number, turn, "draft", text, 3)
            decision = None
            if calibrator is not None:
                decision = self._decide(problem, number, turn, score, params, calibrator)
            takeover = decision is not None and decision.verdict == "takeover"
            p = None if decision is None else decision.p_value
            yield VerdictEvent(problem.id, number, turn, score, p, takeover, decision)
            if takeover:
                yield TokensEvent(problem.id, number, turn, "target", "fixed", 2)
            turns.append(
                Turn(
                    turn=turn,
                    draft=text,
                    draft_tokens=3,
                    score=score,
                    ppl=math.exp(score),
                    p_value=p,
                    takeover=takeover,
                    target="fixed" if takeover else None,
                    target_tokens=2 * takeover,
                    t_draft=turn + 0.2,
                    t_verdict=turn + 0.3,
                    t_target=(turn + 0.9) * takeover,
                )
            )
        if self._dies_after is not None and len(self.written) >= self._dies_after:
            raise Died
        self.written.append((problem.id, number))
        answer = problem.answer if rng.random() < 0.6 else rng.choice(["7", None])
        yield ChainEvent(
            Chain(
                problem.id,
                problem.index,
                number,
                problem.answer,
                answer,
                float(len(turns)),
                tuple(turns),
                params.strategy,
            )
        )

    def _decide(
        self, problem: Problem, number: int, turn: int, score: float, params: ATTSParams, calibrator: Calibrator
    ) -> Decision:
        key = calibrator.key_of(turn)
        u = gate_uniform(params.seed, problem.id, number, turn)
        ruling = calibrator.decide(score, key, u, problem.id)
        seen, level = ruling.assessment, ruling.level
        decision = Decision(
            decision_seq=self._seq, batch=self._seq, problem=problem.id, chain=number, turn=turn, key=key, score=score,
            n=seen.n, count=seen.greater + seen.ties, ties=seen.ties, k=level * (seen.n + 1), level=level, u=u,
            p_value=seen.p_value, verdict="takeover" if ruling.takeover else "keep", threshold=ruling.threshold,
        )  # fmt: skip
        self._seq += 1
        calibrator.observe(score, key, ruling.takeover, problem.id, seen.p_value)
        for listener in self._listeners:
            listener(decision)
        return decision


class Silent:
    """An observer that only remembers which problems were finished, and which of them were restored."""

    def __init__(self) -> None:
        self.ended: list[tuple[str, bool]] = []

    def started(self, problem: Problem) -> None:
        return None

    def event(self, event: Event) -> None:
        return None

    def finished(self, problem: Problem, chains: Sequence[Chain], *, restored: bool) -> None:
        self.ended.append((problem.id, restored))

    def tick(self) -> None:
        return None


def some_problems(n: int) -> tuple[Problem, ...]:
    return tuple(Problem(f"p{i}", f"what is {i}?", str(i), i) for i in range(n))
