"""DeepConf: chains that turn unsure are stopped, and the others vote by how sure they were."""

from __future__ import annotations

from collections.abc import Sequence

from atts_engine.pipeline.events import Solution
from atts_engine.pipeline.records import Chain
from atts_engine.pipeline.settings.sampling import DeepConf
from atts_engine.pipeline.single import Solo
from atts_engine.pipeline.strategies.groups import GroupConfidence, bar_of, share_of_leader
from atts_engine.pipeline.strategies.rounds import answers_of, in_rounds, why
from atts_engine.pipeline.strategies.work import Work
from atts_engine.pipeline.voting import weigh
from atts_engine.runtime.records import TokenChunk

GROUP_CONFIDENCE = "group_confidence"
"""Key of `Chain.extra`: the lowest mean confidence of a group of tokens; null for a chain without a token."""


async def deep_confidence(work: Work, settings: DeepConf) -> Solution:
    """The bar is set by the warm-up chains, in number order; chains below it have no vote, warm-up chains included."""

    def bar(chains: Sequence[Chain]) -> float | None:
        if len(chains) < settings.warmup:
            return None
        first = [chain.extra[GROUP_CONFIDENCE] for chain in chains[: settings.warmup] if _sure(chain)]
        return bar_of(first, settings.keep) if first else None

    def votes(chains: Sequence[Chain]) -> dict[str, float]:
        least = bar(chains)
        weights = [_weight(chain, least) for chain in chains]
        return {answer: weight for answer, weight in weigh(answers_of(work, chains), weights).items() if weight > 0.0}

    def more(chains: Sequence[Chain]) -> int:
        if len(chains) < settings.warmup:
            return settings.warmup
        reached = share_of_leader(votes(chains).values()) >= settings.consensus
        return 0 if reached else settings.wave

    chains: list[Chain] = []

    async def body(solo: Solo) -> str:
        group = GroupConfidence(settings.group, bar(chains))

        def cut(chunk: TokenChunk) -> int | None:
            before = group.tokens
            group.add(chunk.confidences)
            return None if group.below is None else group.below - before

        try:
            return await solo.write(solo.room, solo.sampling(confidence=settings.top), cut)
        finally:
            solo.extra[GROUP_CONFIDENCE] = group.lowest

    await in_rounds(work, settings.author, more, body, chains)
    reason = "consensus" if len(chains) >= settings.warmup and more(chains) == 0 else None
    return work.solution(
        chains, votes(chains), stopped=why(work, chains, reason), bar=bar(chains), cut=sum(map(_cut, chains))
    )


def _sure(chain: Chain) -> bool:
    return chain.error is None and chain.extra.get(GROUP_CONFIDENCE) is not None


def _cut(chain: Chain) -> bool:
    return chain.finish == "stopped"


def _weight(chain: Chain, least: float | None) -> float:
    if not _sure(chain) or _cut(chain):
        return 0.0
    confidence: float = chain.extra[GROUP_CONFIDENCE]
    return confidence if least is None or confidence >= least else 0.0
