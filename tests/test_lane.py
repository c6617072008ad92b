"""A lane on the fake model: batching, stops, scores, the gate, and failures that stay with the one who has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from atts_engine.conformal import Mondrian, RingStore, decide
from atts_engine.errors import ChainError, ContextFull, InputError, LaneError
from atts_engine.runtime.commands import Append, Command, Decode, Fork, Reply, Truncate, Verdict
from atts_engine.runtime.lane import LaneCore
from atts_engine.runtime.records import SamplingParams, SpanResult, TokenChunk
from tests.fakes import EOS, VOCAB, FakeDecoder, fake_model, favoured, greedy, log_probability

GREEDY = SamplingParams(temperature=0.0)


class Bench:
    """A lane that is stepped by hand."""

    def __init__(
        self, kv_tokens: int = 400, max_positions: int = 64, poison: int | None = None, budget: int = 64
    ) -> None:
        model = fake_model(max_positions, poison)
        self.core = LaneCore(
            "fake", model, kv_tokens=kv_tokens, page_size=4, max_batch_tokens=budget, device=torch.device("cpu")
        )
        self.heard: list[Any] = []

    def post(self, seq: int, make: Callable[[Reply], Command]) -> list[tuple[Any, BaseException | None]]:
        answers: list[tuple[Any, BaseException | None]] = []
        self.core.command(seq, make(lambda value, error: answers.append((value, error))))
        return answers

    def run(self) -> None:
        while self.core.step(lambda request, result: self.heard.append((request, result))):
            pass

    def ask(self, seq: int, make: Callable[[Reply], Command]) -> Any:
        answers = self.post(seq, make)
        self.run()
        ((value, error),) = answers
        if error is not None:
            raise error
        return value

    def decode(self, seq: int, n: int, sampling: SamplingParams = GREEDY, chunk: int = 64) -> list[TokenChunk]:
        chunks: list[TokenChunk] = []
        self.ask(seq, lambda reply: Decode(n, sampling, chunk, chunks.append, reply))
        return chunks

    def append(self, seq: int, tokens: list[int], score: bool = True) -> None:
        self.ask(seq, lambda reply: Append(tuple(tokens), score, reply))

    def verdict(self, seq: int, gate: Any = None) -> SpanResult:
        result = self.ask(seq, lambda reply: Verdict(gate, reply))
        assert isinstance(result, SpanResult)
        return result


def test_prompt_is_computed_once_for_all_forks_and_its_last_token_once_per_chain() -> None:
    bench = Bench()
    bench.core.open(0, (1, 2, 3, 4, 5))
    bench.ask(0, lambda reply: Fork((1, 2, 3), reply))
    assert bench.core.stats.computed_tokens == 4
    shared = set(bench.core._sequences[0].table.pages)
    assert all(set(bench.core._sequences[i].table.pages) == shared for i in (1, 2, 3))
    for seq in (1, 2, 3):
        (chunk,) = bench.decode(seq, 5)
        assert list(chunk.tokens) == greedy([1, 2, 3, 4, 5], 5)
    assert bench.core.stats.computed_tokens == 4 + 3 * 5
    assert bench.core.stats.recomputed_tokens == 0


def test_first_token_of_a_span_is_scored_after_fork_truncate_and_decode() -> None:
    bench = Bench()
    bench.core.open(0, (3, 1))
    bench.ask(0, lambda reply: Fork((1,), reply))
    history = [3, 1]
    for cut in (0, 1, 2):
        span = [favoured(history), 5, 7]
        bench.append(1, span)
        result = bench.verdict(1)
        expected = [log_probability((history + span)[: len(history) + i], t) for i, t in enumerate(span)]
        assert result.n_tokens == 3
        assert result.sum_logprob == pytest.approx(sum(expected), abs=1e-5)
        assert result.score == pytest.approx(-sum(expected) / 3, abs=1e-5)
        history += span
        history += [t for c in bench.decode(1, 2) for t in c.tokens]
        history = history[: len(history) - cut]
        bench.ask(1, lambda reply, keep=tuple(history): Truncate(len(keep), reply))  # type: ignore[misc]


def test_score_of_a_span_does_not_depend_on_how_it_was_cut() -> None:
    span = [int(t) for t in np.random.default_rng(0).integers(0, VOCAB - 1, 24)]
    results = []
    for budget, pieces in ((64, [24]), (5, [24]), (64, [7, 1, 16]), (3, [1] * 24)):
        bench = Bench(budget=budget)
        bench.core.open(0, (2, 4, 6))
        at = 0
        for n in pieces:
            bench.post(0, lambda reply, part=tuple(span[at : at + n]): Append(part, True, reply))  # type: ignore[misc]
            at += n
        results.append(bench.verdict(0))
    assert len(set(results)) == 1


def test_stop_strings_ids_and_eos_end_a_span_and_stay_in_it() -> None:
    prompt = [1, 2]
    want = greedy(prompt, 12)
    text = "".join(chr(97 + t) for t in want)

    def finish(sampling: SamplingParams) -> tuple[list[int], str | None]:
        bench = Bench()
        bench.core.open(0, tuple(prompt))
        chunks = bench.decode(0, 12, sampling, chunk=4)
        return [t for c in chunks for t in c.tokens], chunks[-1].finish

    assert finish(GREEDY) == (want, "length")
    at = text.index(text[5:8])
    assert finish(SamplingParams(temperature=0.0, stop=(text[5:8],))) == (want[: at + 3], "stop")
    first = want.index(want[7])
    assert finish(SamplingParams(temperature=0.0, stop_token_ids=(want[7],))) == (want[: first + 1], "stop")
    hot = SamplingParams(temperature=50.0, seed=1)
    tokens, why = finish(hot)
    if EOS in tokens:
        assert (tokens.index(EOS), why) == (len(tokens) - 1, "stop")
    ignoring = SamplingParams(temperature=50.0, seed=1, ignore_eos=True)
    assert len(finish(ignoring)[0]) == 12


def test_log_probabilities_of_drawn_tokens_are_the_models_own_and_only_given_when_asked_for() -> None:
    """Temperature and filters decide what is drawn, not what is told; askers share steps with the rest."""
    bench = Bench()
    drawn: dict[int, list[TokenChunk]] = {0: [], 1: [], 2: []}
    for i, chunks in drawn.items():
        bench.core.open(i, (i, 3))
        sampling = SamplingParams(temperature=3.0, top_k=5, top_p=0.9, seed=i, ignore_eos=True, logprobs=i != 1)
        bench.post(i, lambda reply, s=sampling, out=chunks: Decode(20, s, 6, out.append, reply))  # type: ignore[misc]
    bench.run()
    for i, chunks in drawn.items():
        assert [len(c.tokens) for c in chunks] == [6, 6, 6, 2]
        if i == 1:
            assert all(c.logprobs == () for c in chunks)
            continue
        tokens = [t for c in chunks for t in c.tokens]
        wanted = [log_probability([i, 3, *tokens[:n]], token) for n, token in enumerate(tokens)]
        assert len(set(wanted)) == 2  # a draw that was never the favourite would prove little
        assert [p for c in chunks for p in c.logprobs] == pytest.approx(wanted, abs=1e-6)


def test_nan_ends_one_chain_and_its_pages_harm_nobody() -> None:
    bench = Bench(kv_tokens=48, poison=EOS)  # favoured() never gives EOS
    bench.core.open(0, (1, 2, 3))
    bench.core.open(1, (1, 2, 3, EOS, 4))
    with pytest.raises(ChainError, match="NaN"):
        bench.decode(1, 3)
    bench.core.open(2, (4, 4, 4))
    bench.append(2, [EOS, 1, 1])
    with pytest.raises(ChainError, match="NaN or infinity"):
        bench.verdict(2)
    # Everything the pool has, the poisoned pages included, goes through one sequence.
    (chunk,) = bench.decode(0, 40)
    assert list(chunk.tokens) == greedy([1, 2, 3], 40)
    bench.core.close(0)
    assert bench.core.pool.used - len(bench.core.pool.quarantined) == 0
    with pytest.raises(ChainError, match="closed"):
        bench.append(1, [1])


def test_a_sequence_that_no_pool_holds_fails_alone() -> None:
    bench = Bench(kv_tokens=16)
    bench.core.open(0, (1,))
    bench.core.open(1, (2,))
    first: list[TokenChunk] = []
    long = bench.post(0, lambda reply: Decode(40, GREEDY, 64, lambda c: None, reply))
    bench.post(1, lambda reply: Decode(9, GREEDY, 64, first.append, reply))
    bench.run()
    assert isinstance(long[0][1], ChainError) and "kv_tokens" in str(long[0][1])
    assert list(first[0].tokens) == greedy([2], 9)


def test_preempted_sequences_write_the_same_text() -> None:
    bench = Bench(kv_tokens=40)
    texts: dict[int, list[TokenChunk]] = {i: [] for i in range(4)}
    for i, chunks in texts.items():
        bench.core.open(i, (i, i + 1))
        bench.post(i, lambda reply, out=chunks: Decode(30, GREEDY, 64, out.append, reply))  # type: ignore[misc]
    bench.run()
    assert bench.core.stats.preemptions > 0
    assert bench.core.stats.recomputed_tokens > 0
    for i, chunks in texts.items():
        assert [t for c in chunks for t in c.tokens] == greedy([i, i + 1], 30)


def test_context_is_a_limit_not_a_crash() -> None:
    bench = Bench(max_positions=16)
    bench.core.open(0, (1, 2, 3))
    (chunk,) = bench.decode(0, 100)
    assert (len(chunk.tokens), chunk.finish) == (13, "length")
    with pytest.raises(ContextFull, match="16"):
        bench.decode(0, 1)
    with pytest.raises(ContextFull, match="context"):
        bench.append(0, [1])


def test_a_fault_of_the_model_fails_the_lane_with_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("device lost")

    bench = Bench()
    monkeypatch.setattr(FakeDecoder, "forward", broken)
    bench.core.open(0, (1, 2))
    bench.core.open(1, (1, 2))
    waiting = bench.post(1, lambda reply: Append((3,), True, reply))
    verdict = bench.post(1, lambda reply: Verdict(None, reply))
    with pytest.raises(LaneError, match="device lost"):
        bench.decode(0, 3)
    assert waiting[0][1] is None
    assert isinstance(verdict[0][1], LaneError)
    with pytest.raises(LaneError):
        bench.append(0, [1])
    assert bench.core.pool.used == 0


def test_gate_decides_a_batch_against_one_store_and_mirrors_the_host() -> None:
    """Verdicts of a step see the store as it was; the oracle counts in plain Python."""
    calibrator = Mondrian(0.4, keys=2, capacity=8)
    bench = Bench()
    rng = np.random.default_rng(3)
    stores: dict[int, list[float]] = {0: [], 1: []}
    for _ in range(10):
        answers, asked = [], []
        for seq in range(5):
            bench.core.open(seq, (seq, 1))
            tokens = tuple(int(t) for t in rng.integers(0, 4, 3))
            request = calibrator.request(int(rng.integers(0, 2)), int(rng.integers(1, 2**32 + 1)))
            bench.post(seq, lambda reply, t=tokens: Append(t, True, reply))  # type: ignore[misc]
            answers.append(bench.post(seq, lambda reply, r=request: Verdict(r, reply)))  # type: ignore[misc]
            asked.append(request)
        bench.heard.clear()
        bench.run()
        batches: dict[int, list[tuple[Any, SpanResult]]] = {}
        for request, result in bench.heard:
            batches.setdefault(result.outcome.batch, []).append((request, result))
        for batch in batches.values():
            for request, result in batch:
                held = stores[request.key][-8:]
                outcome = result.outcome
                assert outcome is not None
                assert outcome.n == len(held)
                assert outcome.greater == sum(c > result.score for c in held)
                assert outcome.ties == sum(c == result.score for c in held)
                assert outcome.takeover == decide(outcome.greater, outcome.ties, outcome.n, request.level, request.u)
            for request, result in batch:
                stores[request.key].append(result.score)
                calibrator.observe(result.score, request.key)
        assert [a[0][0].outcome.decision_seq for a in answers] == [r.outcome.decision_seq for _, r in bench.heard]
        for seq in range(5):
            bench.core.close(seq)
    mirror = next(iter(bench.core._gate._mirrors.values()))
    assert np.array_equal(mirror.ring.numpy(), calibrator.store.ring)
    assert np.array_equal(mirror.size.numpy(), calibrator.store.size)


def test_the_lane_never_writes_the_calibrators_store() -> None:
    store = RingStore(1, 4)
    calibrator = Mondrian(0.5, keys=1, capacity=4)
    calibrator.store = store
    bench = Bench()
    bench.core.open(0, (1, 2))
    bench.append(0, [3, 4])
    bench.verdict(0, calibrator.request(0, 1 << 32))
    assert int(store.size[0]) == 0


def test_misuse_is_named() -> None:
    bench = Bench()
    bench.core.open(0, (1, 2))
    with pytest.raises(InputError, match="nothing was scored"):
        bench.verdict(0)
    with pytest.raises(InputError, match="truncate"):
        bench.ask(0, lambda reply: Truncate(0, reply))
    with pytest.raises(InputError, match="truncate"):
        bench.ask(0, lambda reply: Truncate(3, reply))
