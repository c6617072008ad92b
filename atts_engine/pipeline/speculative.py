"""Speculative decoding, token by token and without loss: the baseline in which the draft model never writes a word of
its own. It proposes a few tokens, and the target keeps those that it would have drawn itself.

Both lanes draw by the Gumbel-max trick with noise keyed by (stream key, position, token id). With one stream key for
both, the draft's token is the target's as often as their distributions agree under common noise: with probability
sum_i 1 / sum_j max(p_j / p_i, q_j / q_i), at least (1 - TV) / (1 + TV) with TV the distance in total variation (Daliri,
Musco, Suresh: Coupling without Communication and Drafter-Invariant Speculative Decoding, arXiv 2408.07978). The maximal
coupling of Leviathan et al. (arXiv 2211.17192) and Chen et al. (arXiv 2302.01318) accepts more, 1 - TV, and keeps the
target's distribution; this one keeps the target's text, whatever the draft proposes.
"""

from __future__ import annotations

from contextlib import aclosing

from atts_engine.backends import Lane, Seq, Verifier
from atts_engine.errors import ContextFull, InputError
from atts_engine.pipeline.records import Chain, Turn
from atts_engine.pipeline.translation import Tongues
from atts_engine.pipeline.writer import ChainSpec, Writer, finish_of, stream_of
from atts_engine.runtime.records import SamplingParams


def verifier_of(target: Lane, tongues: Tongues) -> Verifier:
    """The target's lane, if this pair can decode speculatively; else `InputError`."""
    if tongues.codecs is not None:
        raise InputError(
            "speculative decoding needs a pair that shares a tokenizer: the target verifies the draft's tokens one by "
            "one; choose another pair or another strategy"
        )
    if not isinstance(target, Verifier):
        raise InputError(
            "speculative decoding needs a target lane that verifies proposed tokens, which a remote server does not; "
            "run the target in this process or choose another strategy"
        )
    return target


async def run_speculative(
    spec: ChainSpec, draft: Lane, d: Seq, target: Verifier, t: Seq, proposal_tokens: int
) -> Chain:
    """The chain that `run_single` has the target write, token for token; the draft proposes `proposal_tokens` at a
    time. Both sequences are closed when it has ended.

    Both `d` and `t` hold the target's prompt: the draft guesses what the target will say, and noise belongs to a
    position. In the record the one turn's `target` is all of the text; draft_tokens counts the proposed tokens that
    were accepted, target_tokens those that the target had to supply. `Chain.extra`: proposed_tokens, accepted_tokens,
    and target_passes, the proposals that the target answered.
    """
    writer = Writer(spec)
    sampling = spec.params.sampling(stream_of(spec, "target"))
    drafter = _Drafter(writer, draft, d, sampling)
    tokens: list[int] = []
    proposed = accepted = passes = 0

    async def write() -> str:
        nonlocal proposed, accepted, passes
        while True:
            left = spec.params.token_limit - len(tokens)
            guess = await drafter.guess(min(proposal_tokens, left - 1))
            answer = await target.propose(t, guess, left, sampling, written=len(tokens))
            passes += 1
            proposed += len(guess)
            accepted += answer.accepted
            tokens.extend(answer.tokens)
            writer.waited(answer.wait_s)
            own = answer.tokens[answer.accepted :]
            writer.wrote(0, "draft", writer.back.push(answer.tokens[: answer.accepted]), answer.accepted)
            writer.wrote(0, "target", writer.back.push(own), len(own))
            if answer.finish is not None:
                return answer.finish
            await drafter.follow(len(guess) - answer.accepted, own)

    try:
        finish, error = await finish_of(spec, write())
    finally:
        await draft.close(d)
        await target.close(t)
    turn = Turn(
        0,
        "",
        accepted,
        target=spec.tongues.target.codec.decode(tokens),
        target_tokens=len(tokens) - accepted,
        t_target=writer.elapsed(),
    )
    writer.costs["discarded_draft_tokens"] = proposed - accepted
    counts = {"proposed_tokens": proposed, "accepted_tokens": accepted, "target_passes": passes}
    return writer.result([turn], finish, error, counts)


class _Drafter:
    """The draft's side of a chain: guesses as long as its context lasts, then nothing."""

    def __init__(self, writer: Writer, lane: Lane, seq: Seq, sampling: SamplingParams) -> None:
        self._writer = writer
        self._lane = lane
        self._seq = seq
        self._sampling = sampling
        self._full = False

    async def guess(self, n: int) -> tuple[int, ...]:
        """At most n tokens that the target may draw next."""
        tokens: list[int] = []
        if self._full or not n:
            return ()
        try:
            async with aclosing(self._lane.decode(self._seq, n, self._sampling)) as chunks:
                async for chunk in chunks:
                    tokens += chunk.tokens
                    if chunk.finish is not None:
                        self._writer.waited(chunk.wait_s)
        except ContextFull:
            self._full = True
        return tuple(tokens)

    async def follow(self, refused: int, own: tuple[int, ...]) -> None:
        """Have the target's own tokens in the place of the last `refused` guesses."""
        if self._full:
            return
        if refused:
            await self._lane.truncate(self._seq, self._seq.length - refused)
        try:
            await self._lane.append(self._seq, own)
        except ContextFull:
            self._full = True
