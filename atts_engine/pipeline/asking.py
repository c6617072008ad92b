"""Questions to a model behind what one of its sequences holds, answered by one of a few given texts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from atts_engine.backends import Lane, Seq
from atts_engine.errors import InputError
from atts_engine.pipeline.translation import Codec


class Reading(NamedTuple):
    """logprobs: of each answer as a whole behind the question, nats, in their order; read: tokens that the model was
    given for the question and its answers."""

    logprobs: tuple[float, ...]
    read: int


class Question:
    """A text and its possible answers, as one model spells them.

    The answers are read off their log-probabilities, so the model never says anything else. Raises `InputError` where
    the vocabulary cannot spell one of the texts or cannot tell the answers apart.
    """

    def __init__(self, codec: Codec, text: str, answers: Sequence[str]) -> None:
        spelled = [tuple(codec.encode(text + answer)) for answer in answers]
        common = 0
        # An answer's first token may hold the end of the question, as " 7" does.
        while all(common < len(ids) for ids in spelled) and len({ids[common] for ids in spelled}) == 1:
            common += 1
        self._asked = spelled[0][:common]
        self._answers = [ids[common:] for ids in spelled]
        if len(set(spelled)) < len(spelled) or not all(self._answers):
            raise InputError(f"the answers {', '.join(map(repr, answers))} are not told apart by their tokens")

    async def ask(self, lane: Lane, seq: Seq, *, end_ids: int = 0, waiting: Sequence[int] = ()) -> Reading:
        """Ask on forks of the sequence, which stays as it is; every fork is closed.

        end_ids: tokens at its end that mark the end of the text, left out for the question; waiting: tokens of text
        that it does not hold yet.
        """
        given = (*waiting, *self._asked)
        (asked,) = await lane.fork(seq, 1)
        try:
            if end_ids:
                await lane.truncate(asked, asked.length - end_ids)
            if given:
                await lane.append(asked, given)
            forks = await lane.fork(asked, len(self._answers))
            try:
                reads = [_logprob(lane, fork, ids) for fork, ids in zip(forks, self._answers, strict=True)]
                return Reading(tuple(await asyncio.gather(*reads)), len(given) + sum(map(len, self._answers)))
            finally:
                for fork in forks:
                    await lane.close(fork)
        finally:
            await lane.close(asked)


async def _logprob(lane: Lane, seq: Seq, ids: Sequence[int]) -> float:
    await lane.append(seq, ids, score=True)
    return (await lane.verdict(seq, None)).sum_logprob
