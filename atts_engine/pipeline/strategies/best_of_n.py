"""Best of N: the answer of the chain that scores highest."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack

from atts_engine.pipeline.events import Solution
from atts_engine.pipeline.settings.sampling import BestOfN
from atts_engine.pipeline.single import Body, Solo, whole
from atts_engine.pipeline.strategies.likelihood import LIKELIHOOD, with_likelihood_under, with_own_likelihood
from atts_engine.pipeline.strategies.rounds import all_at_once, answers_of, held_prompt, in_rounds, why
from atts_engine.pipeline.strategies.self_check import CONFIDENCE, with_confidence
from atts_engine.pipeline.strategies.work import Work

REWARD = "reward"
"""Key of `Chain.extra`: what the task's checker says of the whole text."""


async def best_of_n(work: Work, settings: BestOfN) -> Solution:
    """The votes are the best score of each answer: exp(mean log-likelihood), the reward, or the confidence. A chain
    that could not be scored is not chosen."""
    async with AsyncExitStack() as stack:
        body = await _scoring(work, settings, stack)
        chains = await in_rounds(work, settings.author, all_at_once(work), body)
    key = {"nll": LIKELIHOOD, "reward": REWARD, "p-true": CONFIDENCE}[settings.score]
    scores = [chain.extra.get(key) for chain in chains]
    return work.solution(chains, best(answers_of(work, chains), scores), stopped=why(work, chains, None))


async def _scoring(work: Work, settings: BestOfN, stack: AsyncExitStack) -> Body:
    if settings.score == "reward":
        return _rewarded(work)
    if settings.score == "p-true":
        return with_confidence(work, settings)
    if settings.author == "target":
        return with_own_likelihood
    try:
        root = await stack.enter_async_context(held_prompt(work, "target"))
    except TimeoutError:
        return whole  # which will not be written either
    return with_likelihood_under(work.pair.target, root)


def _rewarded(work: Work) -> Body:
    async def body(solo: Solo) -> str:
        finish = await whole(solo)
        solo.extra[REWARD] = work.task.reward(work.problem, "", solo.writer.text)
        return finish

    return body


def best(answers: Sequence[str | None], scores: Sequence[float | None]) -> dict[str, float]:
    """The highest score of each answer, in order of first appearance."""
    found: dict[str, float] = {}
    for answer, score in zip(answers, scores, strict=True):
        if answer is not None and score is not None:
            found[answer] = max(score, found.get(answer, score))
    return found
