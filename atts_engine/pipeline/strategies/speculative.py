"""The target's own chains, verified in place of written: the draft proposes, and nothing is lost."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import replace

from atts_engine.pipeline.events import Solution
from atts_engine.pipeline.settings.speculative import Speculative
from atts_engine.pipeline.single import unwritten
from atts_engine.pipeline.speculative import run_speculative, verifier_of
from atts_engine.pipeline.strategies.work import Work
from atts_engine.pipeline.writer import Prompts


async def propose_and_verify(work: Work, settings: Speculative) -> Solution:
    pair = work.pair
    verifier = verifier_of(pair.target, pair.tongues)
    own = replace(work, prompts=Prompts(work.prompts.target, work.prompts.target))
    async with AsyncExitStack() as stack:
        try:
            drafts = await own.forks(stack, "draft", len(work.numbers))
            targets = await own.forks(stack, "target", len(work.numbers))
        except TimeoutError:
            runs = [unwritten(own.spec(c)) for c in work.numbers]
        else:
            runs = [
                run_speculative(own.spec(c), pair.draft, d, verifier, t, settings.proposal_tokens)
                for c, d, t in zip(work.numbers, drafts, targets, strict=True)
            ]
        return work.solution(await work.write(runs))
