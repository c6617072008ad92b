"""Gates that decide without calibration scores: by a fixed threshold, or by rank among a problem's chains."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace

from atts_engine.backends import Lane, Seq
from atts_engine.pipeline.gate import Appraisal, Judged, Place, appraised


class _Unannounced:
    """Of a gate that needs not be told of the chains' lives, and settles nothing before a span is whole."""

    def begin(self, problem_id: str, chains: Sequence[int]) -> None:
        return None

    def enter(self, place: Place) -> None:
        return None

    def settled(self, place: Place, seed: int, logprobs: Sequence[float], most: int) -> int | None:
        return None

    def leave(self, place: Place) -> None:
        return None

    def end(self, problem_id: str) -> None:
        return None


class ThresholdGate(_Unannounced):
    """A takeover wherever the score is above `worst`, as SpecReason (arXiv 2504.07891) and RSD (arXiv 2501.19324)
    decide. Nothing is learnt, and no rate is promised."""

    def __init__(self, worst: float) -> None:
        self._worst = worst

    async def ask(
        self,
        lane: Lane,
        seq: Seq,
        place: Place,
        seed: int,
        most: int | None = None,
        *,
        appraisal: Appraisal | None = None,
    ) -> Judged:
        result = await lane.verdict(seq, None)
        tested = None if appraisal is None else await appraised(appraisal, result)
        return Judged(
            result.score,
            (result.score if tested is None else tested) > self._worst,
            logprobs=result.logprobs,
            wait_s=result.wait_s,
            sum_logprob=result.sum_logprob,
            tested=tested,
        )


class RankingGate(_Unannounced):
    """The synchronous baseline: all chains of a problem wait for each other, softmax(-score) ranks them, and the
    lowest-ranked alpha of them are taken over. What rounding leaves over is carried to the next turn, so that the
    rate comes to alpha."""

    def __init__(self, chains: Iterable[int], alpha: float) -> None:
        self._alpha = alpha
        self._present = set(chains)
        self._asked: dict[int, tuple[float, asyncio.Future[Judged]]] = {}
        self._credit = 0.0

    async def ask(
        self,
        lane: Lane,
        seq: Seq,
        place: Place,
        seed: int,
        most: int | None = None,
        *,
        appraisal: Appraisal | None = None,
    ) -> Judged:
        result = await lane.verdict(seq, None)
        tested = None if appraisal is None else await appraised(appraisal, result)
        answer: asyncio.Future[Judged] = asyncio.get_running_loop().create_future()
        self._asked[place.chain] = (result.score if tested is None else tested, answer)
        began = time.perf_counter()
        self._rank_when_all_are_here()
        judged = await answer
        waited = None if result.wait_s is None else result.wait_s + time.perf_counter() - began
        return replace(
            judged,
            score=result.score,
            logprobs=result.logprobs,
            wait_s=waited,
            sum_logprob=result.sum_logprob,
            tested=tested,
        )

    def leave(self, place: Place) -> None:
        self._present.discard(place.chain)
        self._asked.pop(place.chain, None)
        self._rank_when_all_are_here()

    def _rank_when_all_are_here(self) -> None:
        if not self._asked or set(self._asked) != self._present:
            return
        asked, self._asked = self._asked, {}
        self._credit += self._alpha * len(asked)
        budget = min(len(asked), math.floor(self._credit + 0.5))
        self._credit -= budget
        best = min(score for score, _ in asked.values())
        weights = {chain: math.exp(best - score) for chain, (score, _) in asked.items()}
        total = sum(weights.values())
        # Lowest softmax weight first; equal weights (underflow too) go by score, then by chain.
        order = sorted(asked, key=lambda c: (weights[c] / total, -asked[c][0], c))
        taken = set(order[:budget])
        for rank, chain in enumerate(order):
            score, answer = asked[chain]
            if not answer.done():
                percentile = 1.0 - (rank + 0.5) / len(order)
                answer.set_result(Judged(score, chain in taken, percentile=percentile))
