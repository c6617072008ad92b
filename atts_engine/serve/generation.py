"""From the engine's events to what the choices of an answer gain: `Delta`s, of plain requests and of ATTS alike."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from atts_engine.config import ATTSParams
from atts_engine.conformal import Calibrator
from atts_engine.engine import AsyncEngine
from atts_engine.errors import ChainError
from atts_engine.pipeline import (
    Chain,
    ChainEvent,
    Problem,
    Prompts,
    Solution,
    SolutionEvent,
    TokensEvent,
    VerdictEvent,
)
from atts_engine.runtime import Alternatives, SamplingParams
from atts_engine.serve.replies import AttsChunk, ChainSummary, Piece, Verdict, Vote

LEAD = 0
"""The chain whose text is streamed: known before any is written, so a stream is never taken back."""

LEVEL_ONE = float(1 << 32)


@dataclass(frozen=True, slots=True)
class Delta:
    """What choice `index` gains. finish: OpenAI's finish_reason, on its last delta only; stop_reason: what ended it in
    the engine's own words. n_tokens: that the text is made of; tokens: their ids where they are known; logprobs,
    alternatives: of each, where they were asked for (`TokenChunk`)."""

    index: int
    text: str
    n_tokens: int = 0
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    alternatives: tuple[Alternatives, ...] = ()
    finish: str | None = None
    stop_reason: str | None = None
    atts: AttsChunk | None = None


@dataclass(slots=True)
class Counts:
    """Tokens of a request so far, by who wrote them. on_written: told of each addition."""

    prompt: int = 0
    draft: int = 0
    target: int = 0
    on_written: Callable[[str, int], None] | None = None

    def wrote(self, author: str, n: int) -> None:
        """author: "draft" or "target"."""
        if author == "draft":
            self.draft += n
        else:
            self.target += n
        if self.on_written is not None:
            self.on_written(author, n)

    @property
    def completion(self) -> int:
        return self.draft + self.target


@dataclass(frozen=True, slots=True)
class PlainPrompt:
    """Samples of one prompt by the target alone; they are the choices from `first` on."""

    ids: tuple[int, ...]
    samplings: tuple[SamplingParams, ...]
    max_tokens: int
    first: int


async def plain_deltas(
    engine: AsyncEngine,
    prompts: Sequence[PlainPrompt],
    counts: Counts,
    *,
    priority: int,
    deadline_s: float | None,
    chunk_tokens: int | None,
) -> AsyncGenerator[Delta, None]:
    """The target's text. chunk_tokens: that a delta holds at most; None: as the lane likes."""

    async def of(prompt: PlainPrompt) -> AsyncGenerator[Delta, None]:
        stream = engine.complete(
            prompt.ids,
            prompt.samplings,
            prompt.max_tokens,
            priority=priority,
            deadline_s=deadline_s,
            chunk_tokens=chunk_tokens,
        )
        async with aclosing(stream) as events:
            async for event in events:
                counts.wrote("target", len(event.tokens))
                yield Delta(
                    prompt.first + event.index,
                    event.text,
                    len(event.tokens),
                    event.tokens,
                    event.logprobs,
                    event.alternatives,
                    "length" if event.finish == "deadline" else event.finish,
                    event.stop if event.finish != "deadline" else "deadline",
                )

    async with aclosing(_merge([of(prompt) for prompt in prompts])) as deltas:
        async for delta in deltas:
            yield delta


async def _merge(streams: Sequence[AsyncGenerator[Delta, None]]) -> AsyncGenerator[Delta, None]:
    """Items of all streams as they come; the first failure ends all."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for delta in only:
                yield delta
        return
    arrived: asyncio.Queue[Delta | Exception | None] = asyncio.Queue()

    async def pump(stream: AsyncGenerator[Delta, None]) -> None:
        try:
            async with aclosing(stream) as deltas:
                async for delta in deltas:
                    arrived.put_nowait(delta)
        except Exception as error:
            arrived.put_nowait(error)
        else:
            arrived.put_nowait(None)

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    running = len(tasks)
    try:
        while running:
            item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(frozen=True, slots=True)
class AttsJob:
    """Chains of one request. streamed: the leading chain's text as it is written, else the voted one's at the end.
    verdicts: tell those of all chains, not of the leading one alone. on_verdict, on_chain: called with each
    verdict and the alpha that was asked for, and with each chain that has ended."""

    id: str
    prompts: Prompts
    params: ATTSParams
    calibrator: Calibrator | None
    streamed: bool
    verdicts: bool
    on_verdict: Callable[[VerdictEvent, float], None]
    on_chain: Callable[[Chain], None]
    said: list[Verdict] = field(default_factory=list)


async def atts_deltas(
    engine: AsyncEngine, job: AttsJob, counts: Counts, *, priority: int, deadline_s: float | None
) -> AsyncGenerator[Delta, None]:
    """Draft and target together. The one choice ends with the vote; where the streamed chain's answer is another, a
    last paragraph boxes the voted one, so that the last box of the text is the answer whoever reads it.

    Raises `ChainError` when every chain has failed.
    """
    lead = _LeadText(job.params.takeover == "replace")
    problem = Problem(job.id, "", stream="serve")
    stream = engine.generate(
        problem,
        job.params,
        calibrator=job.calibrator,
        priority=priority,
        deadline_s=deadline_s,
        prompts=job.prompts,
    )
    async with aclosing(stream) as events:
        async for event in events:
            match event:
                case TokensEvent():
                    counts.wrote(event.author, event.n_tokens)
                    if event.chain == LEAD and not job.streamed:
                        # Told for the clocks alone; the text comes with the vote.
                        yield Delta(0, "", event.n_tokens)
                    elif event.chain == LEAD and (delta := lead.tokens(event)) is not None:
                        yield delta
                case VerdictEvent():
                    job.on_verdict(event, job.params.alpha)
                    verdict = _verdict(event)
                    job.said.append(verdict)
                    if job.streamed and event.chain == LEAD and (delta := lead.verdict(event)) is not None:
                        yield delta
                    if job.streamed and (job.verdicts or event.chain == LEAD):
                        yield Delta(0, "", atts=AttsChunk(verdict=verdict))
                case SolutionEvent():
                    for delta in _ending(job, event.solution):
                        yield delta
                case ChainEvent():
                    job.on_chain(event.chain)


class _LeadText:
    """Text of the leading chain as far as it stands. A draft span that may be replaced is held until its verdict."""

    def __init__(self, replaces: bool) -> None:
        self._replaces = replaces
        self._held: list[TokensEvent] = []

    def tokens(self, event: TokensEvent) -> Delta | None:
        if self._replaces and event.author == "draft":
            self._held.append(event)
            return None
        return _text_delta(event, event.text, event.n_tokens)

    def verdict(self, event: VerdictEvent) -> Delta | None:
        held, self._held = self._held, []
        if not held or event.takeover:
            return None
        return _text_delta(held[0], "".join(e.text for e in held), sum(e.n_tokens for e in held))


def _text_delta(event: TokensEvent, text: str, n_tokens: int) -> Delta:
    piece = Piece(chain=event.chain, turn=event.turn, author="draft" if event.author == "draft" else "target")
    return Delta(0, text, n_tokens, atts=AttsChunk(piece=piece))


def _verdict(event: VerdictEvent) -> Verdict:
    level = None if event.decision is None else event.decision.level / LEVEL_ONE
    return Verdict(
        chain=event.chain,
        turn=event.turn,
        score=event.score,
        p_value=event.p_value,
        level=level,
        takeover=event.takeover,
    )


def _ending(job: AttsJob, solution: Solution) -> list[Delta]:
    chains = solution.chains
    if all(chain.error is not None for chain in chains):
        raise ChainError(f"every chain has failed; the first: {chains[0].error}")
    spoken = next(
        (c for c in chains if solution.answer is not None and c.final_answer == solution.answer), chains[LEAD]
    )
    shown = chains[LEAD] if job.streamed else spoken
    replaces = job.params.takeover == "replace"
    vote = Vote(
        answer=solution.answer,
        votes=solution.votes,
        chain=spoken.chain,
        text=None if spoken is shown else chain_text(spoken, replaces),
        chains=[_summary(c) for c in chains],
        verdicts=sorted(job.said, key=lambda v: (v.chain, v.turn)) if job.verdicts else None,
    )
    deltas = []
    if not job.streamed:
        deltas.append(Delta(0, chain_text(shown, replaces)))
    elif solution.answer is not None and shown.final_answer != solution.answer:
        piece = Piece(chain=spoken.chain, turn=len(spoken.turns), author="vote")
        deltas.append(Delta(0, f"\n\n\\boxed{{{solution.answer}}}", atts=AttsChunk(piece=piece)))
    finish = "stop" if shown.finish in ("answer", "stop") else "length"
    deltas.append(Delta(0, "", finish=finish, stop_reason=shown.finish, atts=AttsChunk(vote=vote)))
    return deltas


def chain_text(chain: Chain, replaces: bool) -> str:
    """What a chain says; a span that was replaced is no part of it."""
    return "".join(
        (turn.target or "") if turn.takeover and replaces else turn.draft + (turn.target or "") for turn in chain.turns
    )


def _summary(chain: Chain) -> ChainSummary:
    return ChainSummary(
        chain=chain.chain,
        answer=chain.final_answer,
        finish=chain.finish,
        error=chain.error,
        turns=len(chain.turns),
        takeovers=sum(turn.takeover for turn in chain.turns),
        draft_tokens=chain.draft_tokens,
        target_tokens=chain.target_tokens,
    )
