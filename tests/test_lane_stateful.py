"""A lane under any order of commands, with a list of tokens as oracle and pools small enough to force preemption."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule

from atts_engine.kv.pages import PAD_PAGE
from atts_engine.runtime.commands import Append, Decode, Fork, Propose, Scored, Truncate, Verdict
from atts_engine.runtime.lane import LaneCore
from atts_engine.runtime.records import Proposal, SamplingParams, SpanResult, TokenChunk
from atts_engine.runtime.scheduler import Step
from tests.fakes import VOCAB, fake_model, greedy, log_probability

TOKENS = st.lists(st.integers(0, VOCAB - 2), min_size=1, max_size=7)
PAGE = 4


@dataclass
class Oracle:
    """What a sequence must hold, and which of its tokens were scored since the last verdict."""

    id: int
    tokens: list[int]
    scored: list[int] = field(default_factory=list)


class LaneMachine(RuleBasedStateMachine):
    sequences = Bundle("sequences")
    preemption = "swap"

    def __init__(self) -> None:
        super().__init__()
        self.core = LaneCore(
            "fake",
            fake_model(),
            kv_tokens=40,
            page_size=PAGE,
            max_batch_tokens=6,
            device=torch.device("cpu"),
            host_kv_tokens=28,
            preemption=self.preemption,
        )
        self.ids = itertools.count()
        self.live: dict[int, Oracle] = {}

    def ask(self, seq: Oracle, make: Any, before_step: Callable[[int], None] = lambda step: None) -> Any:
        """Give a command and step the lane until it is answered."""
        answers: list[tuple[Any, BaseException | None]] = []
        self.core.command(seq.id, make(lambda value, error: answers.append((value, error))))
        for step in range(400):
            if answers:
                break
            before_step(step)
            self.core.step(lambda request, result: None)
        assert answers, "the lane did not answer"
        value, error = answers[0]
        if error is not None:
            raise error
        return value

    @rule(target=sequences, prompt=TOKENS, group=st.sampled_from([None, "a", "b"]), priority=st.integers(-1, 1))
    @precondition(lambda self: len(self.live) < 6)
    def open(self, prompt: list[int], group: str | None, priority: int) -> Oracle:
        seq = Oracle(next(self.ids), list(prompt))
        self.core.open(seq.id, tuple(prompt), group, priority)
        self.live[seq.id] = seq
        return seq

    @rule(target=sequences, seq=sequences, n=st.integers(1, 3))
    @precondition(lambda self: len(self.live) < 6)
    def fork(self, seq: Oracle, n: int) -> Any:
        children = [Oracle(next(self.ids), list(seq.tokens)) for _ in range(n)]
        self.ask(seq, lambda reply: Fork(tuple(c.id for c in children), reply))
        self.live.update({c.id: c for c in children})
        return multiple(*children)

    @rule(seq=sequences, tokens=TOKENS, score=st.booleans())
    def append(self, seq: Oracle, tokens: list[int], score: bool) -> None:
        if len(seq.tokens) + len(tokens) > 30:
            return
        if score:
            seq.scored.extend(range(len(seq.tokens), len(seq.tokens) + len(tokens)))
        seq.tokens.extend(tokens)
        self.ask(seq, lambda reply: Append(tuple(tokens), score, reply))

    @rule(seq=sequences, n=st.integers(1, 6))
    def decode(self, seq: Oracle, n: int) -> None:
        if len(seq.tokens) + n > 30:
            return
        chunks: list[TokenChunk] = []
        sampling = SamplingParams(temperature=0.0, logprobs=True)
        self.ask(seq, lambda reply: Decode(n, sampling, 2, chunks.append, reply))
        written = [t for c in chunks for t in c.tokens]
        assert written == greedy(seq.tokens, n)
        assert [c.finish for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
        # The fake model wants every greedy token equally much, whatever came before it.
        likely = log_probability([], greedy([], 1)[0])
        assert [p for c in chunks for p in c.logprobs] == pytest.approx([likely] * n, abs=1e-6)
        seq.tokens.extend(written)

    @rule(
        seq=sequences,
        right=st.integers(0, 9),
        others=TOKENS | st.just([]),
        most=st.integers(1, 9),
        steps=st.integers(0, 3),
        drops=st.booleans(),
    )
    def propose(self, seq: Oracle, right: int, others: list[int], most: int, steps: int, drops: bool) -> None:
        """The lane may lose its KV at any moment."""
        if len(seq.tokens) + most > 30:
            return
        proposed = greedy(seq.tokens, right) + others

        def lose(step: int) -> None:
            if drops and step == steps:
                self.core._sequences[seq.id].drop_kv()

        greedily = SamplingParams(temperature=0.0)
        found = self.ask(seq, lambda reply: Propose(tuple(proposed), most, greedily, 0, reply), lose)
        coming = greedy(seq.tokens, most)
        agreed = next((n for n, pair in enumerate(zip(proposed, coming)) if pair[0] != pair[1]), len(proposed))
        accepted = min(agreed, most - 1)
        wanted = tuple(coming[: accepted + 1])
        assert found == Proposal(wanted, accepted, "length" if len(wanted) == most else None)
        seq.tokens.extend(wanted)

    @rule(n=st.integers(1, 6))
    def decode_all(self, n: int) -> None:
        """All sequences that have room write side by side, in pools that do not hold them all."""
        written: list[tuple[Oracle, list[TokenChunk]]] = []
        for seq in self.live.values():
            if len(seq.tokens) + n <= 30:
                chunks: list[TokenChunk] = []
                greedily = SamplingParams(temperature=0.0)
                self.core.command(seq.id, Decode(n, greedily, 64, chunks.append, lambda value, error: None))
                written.append((seq, chunks))
        for _ in range(1000):
            if not self.core.step(lambda request, result: None):
                break
        for seq, chunks in written:
            tokens = [t for c in chunks for t in c.tokens]
            assert tokens == greedy(seq.tokens, n)
            seq.tokens.extend(tokens)

    @rule(seq=sequences, n=st.integers(2, 9), steps=st.integers(0, 4))
    def cancel_decode(self, seq: Oracle, n: int, steps: int) -> None:
        if len(seq.tokens) + n > 30:
            return
        command = Decode(n, SamplingParams(temperature=0.0), 64, lambda chunk: None, lambda value, error: None)
        self.core.command(seq.id, command)
        for _ in range(steps):
            self.core.step(lambda request, result: None)
        self.core.stop_decode(seq.id)
        self.ask(seq, lambda reply: Truncate(len(seq.tokens), reply))

    @rule(seq=sequences, wait=st.booleans())
    def tell_scored(self, seq: Oracle, wait: bool) -> None:
        found = self.ask(seq, lambda reply: Scored(wait, reply))
        expected = [log_probability(seq.tokens[:p], seq.tokens[p]) for p in seq.scored]
        assert len(found) == len(expected) if wait else len(found) <= len(expected)
        assert found == pytest.approx(expected[: len(found)], abs=1e-6)

    @rule(seq=sequences)
    def verdict(self, seq: Oracle) -> None:
        if not seq.scored:
            return
        result = self.ask(seq, lambda reply: Verdict(None, reply))
        assert isinstance(result, SpanResult)
        assert result.n_tokens == len(seq.scored)
        expected = [log_probability(seq.tokens[:p], seq.tokens[p]) for p in seq.scored]
        assert result.logprobs == pytest.approx(expected, abs=1e-6)
        assert result.sum_logprob == pytest.approx(sum(expected), abs=1e-5)
        seq.scored.clear()

    @rule(seq=sequences, data=st.data())
    def truncate(self, seq: Oracle, data: st.DataObject) -> None:
        length = data.draw(st.integers(1, len(seq.tokens)))
        self.ask(seq, lambda reply: Truncate(length, reply))
        del seq.tokens[length:]
        seq.scored = [p for p in seq.scored if p < length]

    @rule(seq=consumes(sequences))
    def close(self, seq: Oracle) -> None:
        self.core.close(seq.id)
        del self.live[seq.id]

    @rule(seq=sequences, swap=st.booleans())
    def preempt(self, seq: Oracle, swap: bool) -> None:
        """Whoever it is and whatever it is at; pressure alone would take the young and the idle."""
        core, held = self.core, self.core._sequences[seq.id]
        if swap and 0 < len(held.table.private) <= core.host_pool.free:
            core._runner.move(Step((), (), (), swap_out=tuple(held.park_kv())))
        else:
            held.drop_kv()

    @rule(n=st.integers(1, 3))
    def steps(self, n: int) -> None:
        for _ in range(n):
            self.core.step(lambda request, result: None)

    @invariant()
    def pages_are_conserved(self) -> None:
        tables = [seq.table for seq in self.core._sequences.values()]
        for pool, lists in (
            (self.core.pool, [t.pages for t in tables]),
            (self.core.host_pool, [t.parked for t in tables]),
        ):
            held = Counter(itertools.chain(*lists))
            assert all(len(set(pages)) == len(pages) for pages in lists)
            assert all(pool.refs(page) == n for page, n in held.items())
            assert pool.used == len(held)
            assert pool.free + pool.used == pool.capacity
        assert all(PAD_PAGE not in t.pages for t in tables)

    @invariant()
    def shared_pages_come_first_and_nobody_holds_a_page_too_many(self) -> None:
        for seq in self.core._sequences.values():
            refs = [self.core.pool.refs(page) for page in seq.table.pages]
            assert all(n > 1 for n in refs[: seq.table.shared]) and all(n == 1 for n in refs[seq.table.shared :])
            assert len(refs) + len(seq.table.parked) == -(-seq.computed // PAGE)

    @invariant()
    def only_full_shared_pages_are_final(self) -> None:
        """What a sequence computed can be read back from its pages whoever shares them."""
        runner = self.core._runner
        for seq in self.core._sequences.values():
            pages = [runner.kv[0, 0, page] for page in seq.table.pages]
            pages += [runner._host[slot, 0, 0] for slot in seq.table.parked]
            held = [int(token) for page in pages for token in page.view(-1, 2)[:, 0]]
            assert held[: seq.computed] == seq.tokens[: seq.computed]

    def teardown(self) -> None:
        for seq_id in list(self.live):
            self.core.close(seq_id)
        assert self.core.pool.used == self.core.host_pool.used == 0
        assert self.core.open_sequences == 0


class RecomputingLane(LaneMachine):
    """There is no host pool: whatever is preempted is computed again."""

    preemption = "recompute"


LaneMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
RecomputingLane.TestCase.settings = settings(max_examples=30, stateful_step_count=40)
TestLane = LaneMachine.TestCase
TestRecomputingLane = RecomputingLane.TestCase
