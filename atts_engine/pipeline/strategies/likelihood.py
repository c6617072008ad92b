"""How likely a whole chain is: the geometric mean probability per token, under its author or under the target."""

from __future__ import annotations

import math

from atts_engine.backends import Lane, Seq
from atts_engine.pipeline.single import Body, Solo

LIKELIHOOD = "likelihood"
"""Key of `Chain.extra`: exp(mean log-probability of the chain's tokens), at temperature 1 and before any filter."""


async def with_own_likelihood(solo: Solo) -> str:
    """Write a chain and note how likely its author finds it."""
    try:
        return await solo.write(solo.room, solo.sampling(logprobs=True))
    finally:
        logprobs = solo.span.logprobs
        if logprobs:
            solo.extra[LIKELIHOOD] = math.exp(sum(logprobs) / len(logprobs))


def with_likelihood_under(target: Lane, root: Seq) -> Body:
    """Write a chain, then have the target read all of it. root: holds the prompt on the target's lane."""

    async def body(solo: Solo) -> str:
        finish = await solo.write(solo.room, solo.sampling())
        ids = [*solo.given, *solo.rest()]
        (reader,) = await target.fork(root, 1)
        try:
            await target.append(reader, ids, score=True)
            result = await target.verdict(reader, None)
        finally:
            await target.close(reader)
        solo.extra[LIKELIHOOD] = math.exp(result.sum_logprob / result.n_tokens)
        return finish

    return body
