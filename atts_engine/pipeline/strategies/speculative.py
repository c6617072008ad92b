"""The chains of the target alone, of which the draft has proposed the tokens."""

from __future__ import annotations

from contextlib import AsyncExitStack

from atts_engine.pipeline.events import Solution
from atts_engine.pipeline.settings import Speculative
from atts_engine.pipeline.single import unwritten
from atts_engine.pipeline.speculative import run_speculative, verifier_of
from atts_engine.pipeline.strategies.work import Work


async def propose_and_verify(work: Work, settings: Speculative) -> Solution:
    verifier = verifier_of(work.pair.target, work.pair.tongues)
    async with AsyncExitStack() as stack:
        try:
            # With one tokenizer the draft can read the target's prompt, and noise belongs to a position.
            drafts = await work.forks(stack, "draft", len(work.numbers), work.prompts.target)
            targets = await work.forks(stack, "target", len(work.numbers))
        except TimeoutError:
            runs = [unwritten(work.spec(c)) for c in work.numbers]
        else:
            runs = [
                run_speculative(work.spec(c), work.pair.draft, d, verifier, t, settings.proposal_tokens)
                for c, d, t in zip(work.numbers, drafts, targets, strict=True)
            ]
        return work.solution(await work.write(runs))
