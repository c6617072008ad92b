"""The author's own confidence in a chain: the probability that it says yes when asked whether the answer is correct."""

from __future__ import annotations

import math

from atts_engine.pipeline.settings.sampling import SelfCheck
from atts_engine.pipeline.single import Body, Solo
from atts_engine.pipeline.strategies.wording import spelling
from atts_engine.pipeline.strategies.work import Work

CONFIDENCE = "confidence"
"""Key of `Chain.extra`: P(yes), or null for a chain without an answer, of which nothing was asked."""
WORDS = ("\n\nIs the answer correct? (Yes/No) ", "Yes")
SMALL_WORDS = ("?", "!")
"""The same for the 48 tokens of the built-in pair: no training text has a "?" behind a box, or any "!"."""


def with_confidence(work: Work, settings: SelfCheck) -> Body:
    """Write a chain and ask of it. `InputError` where the author's tokenizer spells neither set of words."""
    own = work.pair.tongues.draft if settings.author == "draft" else work.pair.tongues.target
    choices = [(settings.question or q, settings.yes or y) for q, y in (WORDS, SMALL_WORDS)]
    question, yes = spelling(own, choices, "the options question and yes")

    async def body(solo: Solo) -> str:
        finish = await solo.write(solo.room, solo.sampling())
        solo.extra[CONFIDENCE] = None
        if solo.writer.answered_since(0):
            if solo.ended():
                # The question goes on with the text; behind its end mark nothing was ever trained.
                await solo.lane.truncate(solo.seq, solo.seq.length - 1)
            await solo.lane.append(solo.seq, question)
            await solo.lane.append(solo.seq, yes, score=True)
            result = await solo.lane.verdict(solo.seq, None)
            # A log-probability in float32 may lie a hair above 0.
            solo.extra[CONFIDENCE] = math.exp(min(0.0, result.sum_logprob))
        return finish

    return body
