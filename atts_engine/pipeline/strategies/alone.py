"""One model alone writes every chain: what the target costs and reaches, and what the draft does."""

from __future__ import annotations

from contextlib import AsyncExitStack

from atts_engine.pipeline.events import Solution
from atts_engine.pipeline.settings import Alone
from atts_engine.pipeline.single import run_single, unwritten
from atts_engine.pipeline.strategies.work import Work


async def write_alone(work: Work, settings: Alone) -> Solution:
    async with AsyncExitStack() as stack:
        lane, _ = work.lane(settings.author)
        try:
            seqs = await work.forks(stack, settings.author, len(work.numbers))
        except TimeoutError:
            runs = [unwritten(work.spec(c)) for c in work.numbers]
        else:
            runs = [run_single(work.spec(c), lane, s, settings.author) for c, s in zip(work.numbers, seqs, strict=True)]
        return work.solution(await work.write(runs))
