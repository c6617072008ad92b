"""The engine on the built-in pair: same chains at any concurrency, scores against `transformers`, logs that replay,
pages that come back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from atts_engine import (
    AsyncEngine,
    ATTSParams,
    Chain,
    ChainEvent,
    Decision,
    Engine,
    EngineConfig,
    InputError,
    LaneError,
    Problem,
    SolutionEvent,
    TokensEvent,
    VerdictEvent,
    ops,
)
from atts_engine.conformal import Mondrian
from atts_engine.evaluation.decisions import check_log
from atts_engine.evaluation.registers import heldout
from atts_engine.models import load_model

CONFIG = EngineConfig("tiny-draft", "tiny-target", kv_tokens=16384)
PARAMS = ATTSParams(chains=4, turns=10, draft_tokens=24, target_tokens=24, seed=3)


def problems(n: int, seed: int = 5) -> list[Problem]:
    return [Problem(p.id, p.problem, p.answer, i) for i, p in enumerate(heldout(n, seed, (3, 5)))]


def with_engine(work: Callable[[AsyncEngine], Awaitable[Any]], config: EngineConfig = CONFIG) -> Any:
    async def main() -> Any:
        async with await AsyncEngine.create(config) as engine:
            result = await work(engine)
            # Sequences are closed on the scheduler thread, a moment after their last answer.
            for _ in range(500):
                if not any(lane["open_sequences"] for lane in engine.stats().values()):
                    break
                await asyncio.sleep(0.01)
            for lane in engine.stats().values():
                assert (lane["open_sequences"], lane["used_pages"], lane["host_used_pages"]) == (0, 0, 0)
            return result

    return asyncio.run(main())


def content(chain: Chain, *, chunks: bool = True) -> Chain:
    """The chain without its times, and without its chunks where runs that hand over differently are compared."""
    turns = tuple(
        replace(t, t_draft=0.0, t_verdict=0.0, t_target=0.0, chunks=t.chunks if chunks else ()) for t in chain.turns
    )
    return replace(chain, duration_s=0.0, turns=turns)


def frozen_calibrator(alpha: float = 0.4) -> Mondrian:
    calibrator = Mondrian(alpha)
    generator = torch.Generator().manual_seed(0)
    for key in range(6):
        for score in torch.rand(50, generator=generator).square().tolist():
            calibrator.observe(score, key)
    calibrator.frozen = True
    return calibrator


@pytest.mark.parametrize(
    ("takeover", "dtype"),
    [
        ("continue", "float32"),
        ("replace", "float32"),
        pytest.param(
            "continue",
            "bfloat16",
            marks=pytest.mark.skipif(
                ops.chosen("linear", "cpu") != "native",
                reason="bfloat16 products are torch's on this machine, whose bits depend on the batch",
            ),
        ),
    ],
)
def test_same_chains_at_any_concurrency_and_batch_size(takeover: str, dtype: str) -> None:
    params = replace(PARAMS, takeover=takeover)
    plain = replace(CONFIG, dtype=dtype)

    def run(in_flight: int, config: EngineConfig) -> list[Chain]:
        async def work(engine: AsyncEngine) -> list[Chain]:
            slots = asyncio.Semaphore(in_flight)
            calibrator = frozen_calibrator()

            async def one(problem: Problem) -> list[Chain]:
                async with slots:
                    solution = await engine.solve(problem, params, calibrator=calibrator)
                return [content(c, chunks=config.chunk_tokens == CONFIG.chunk_tokens) for c in solution.chains]

            return [c for chains in await asyncio.gather(*map(one, problems(6))) for c in chains]

        return with_engine(work, config)

    alone = run(1, plain)
    assert any(t.takeover for c in alone for t in c.turns)
    assert alone == run(6, plain)
    # A small token budget cuts spans elsewhere, small chunks hand them over elsewhere, a small pool preempts.
    other = run(6, replace(plain, max_batch_tokens=9, chunk_tokens=5, page_size=8, kv_tokens=1200))
    assert [content(c, chunks=False) for c in alone] == other


def test_a_chain_is_the_same_alone_and_among_its_siblings() -> None:
    async def work(engine: AsyncEngine) -> tuple[Any, Any]:
        problem, calibrator = problems(1)[0], frozen_calibrator()
        whole = await engine.solve(problem, PARAMS, calibrator=calibrator)
        alone = [e async for e in engine.generate(problem, PARAMS, calibrator=calibrator, chains=[2])]
        return whole.chains[2], next(e.chain for e in alone if isinstance(e, ChainEvent))

    among, alone = with_engine(work)
    assert content(among) == content(alone)


def test_scores_and_greedy_text_equal_transformers() -> None:
    """Every score, first token of the span included, is the mean negative log-likelihood that a plain forward pass of
    `transformers` over the whole history gives."""
    transformers = pytest.importorskip("transformers", reason="the oracle of this test is transformers (extra: dev)")
    from atts_engine.models.load import resolve

    spans: list[tuple[list[int], int, float]] = []

    async def work(engine: AsyncEngine) -> None:
        draft, target = engine._pair.draft, engine._pair.target
        for problem in problems(3):
            prompt = engine._prompts(problem).draft
            d, t = await draft.open(prompt), await target.open(prompt)
            history = list(prompt)
            for turn in range(3):
                tokens: list[int] = []
                async for chunk in draft.decode(d, 11, PARAMS.sampling(turn)):
                    tokens.extend(chunk.tokens)
                await target.append(t, tokens, score=True)
                spans.append((history + tokens, len(tokens), (await target.verdict(t, None)).score))
                history += tokens
                own: list[int] = []
                async for chunk in target.decode(t, 6, replace(PARAMS, temperature=0.0).sampling(0)):
                    own.extend(chunk.tokens)
                greedy.append((list(history), own))
                history += own
                await draft.append(d, own)
            await draft.close(d)
            await target.close(t)

    greedy: list[tuple[list[int], list[int]]] = []
    with_engine(work)
    oracle = transformers.LlamaForCausalLM.from_pretrained(resolve("tiny-target"), dtype=torch.float32).eval()
    with torch.no_grad():
        for history, n, score in spans:
            logprobs = oracle(torch.tensor([history])).logits[0].double().log_softmax(-1)
            expected = -sum(logprobs[p - 1, history[p]] for p in range(len(history) - n, len(history))) / n
            assert score == pytest.approx(float(expected), abs=1e-4)
        for history, own in greedy:
            logits = oracle(torch.tensor([history + own])).logits[0]
            assert own == logits[len(history) - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize("strategy", ["atts", "atts-sync"])
def test_chunk_scores_are_running_means_of_transformers(strategy: str) -> None:
    """Both models' log-probabilities of the draft's tokens, though temperature and filters decide what is drawn. A pool
    so small that sequences are preempted and computed again changes no bit of them."""
    transformers = pytest.importorskip("transformers", reason="the oracle of this test is transformers (extra: dev)")
    from atts_engine.models.load import resolve

    params = replace(PARAMS, strategy=strategy, temperature=0.7, top_k=20, top_p=0.95)
    config = replace(CONFIG, chunk_tokens=7)

    async def work(engine: AsyncEngine) -> tuple[list[Chain], list[tuple[int, ...]], float]:
        found = problems(3)
        solutions = await asyncio.gather(*(engine.solve(p, params, calibrator=frozen_calibrator()) for p in found))
        preempted = sum(lane["preemptions"] for lane in engine.stats().values())
        prompts = [engine._prompts(p).target for p in found]
        return [content(c) for s in solutions for c in s.chains], prompts, preempted

    chains, prompts, _ = with_engine(work, config)
    again, _, preempted = with_engine(work, replace(config, kv_tokens=700, page_size=8))
    assert preempted > 0
    assert again == chains

    models = {
        name: transformers.LlamaForCausalLM.from_pretrained(resolve(name), dtype=torch.float32).eval()
        for name in ("tiny-target", "tiny-draft")
    }
    tokenizer = load_model("tiny-target", "cpu", torch.float32).tokenizer
    cut = 0
    for chain in chains:
        turn = chain.turns[0]
        assert [c.n for c in turn.chunks] == [*range(7, turn.draft_tokens, 7), turn.draft_tokens]
        for turn in chain.turns:
            assert turn.chunks[-1].score == turn.score
            assert turn.chunks[-1].n == turn.draft_tokens
            cut += len(turn.chunks) > 1
        # The text of a first turn is enough to know its tokens, less the one that ends a text.
        turn, prompt = chain.turns[0], prompts[chain.problem_index]
        span = tokenizer.encode(turn.draft)
        if len(span) < turn.draft_tokens:
            span.append(tokenizer.eos_token_ids[0])
        assert len(span) == turn.draft_tokens
        ids = torch.tensor([[*prompt, *span]])
        for name in models:
            with torch.no_grad():
                logprobs = models[name](ids).logits[0].double().log_softmax(-1)
            told = [-float(logprobs[len(prompt) + i - 1, token]) for i, token in enumerate(span)]
            for chunk in turn.chunks:
                given = chunk.score if name == "tiny-target" else chunk.draft_score
                assert given == pytest.approx(sum(told[: chunk.n]) / chunk.n, abs=1e-4)
    assert cut > len(chains)


def test_decision_log_replays_to_the_bit_and_keeps_the_host_store_equal() -> None:
    log: list[Decision] = []
    calibrator = Mondrian(0.4)

    async def work(engine: AsyncEngine) -> None:
        engine.add_decision_listener(log.append)
        await asyncio.gather(*(engine.solve(p, PARAMS, calibrator=calibrator) for p in problems(8)))

    with_engine(work)
    assert [d.decision_seq for d in log] == list(range(len(log)))
    assert {d.verdict for d in log} == {"takeover", "keep"}
    assert check_log(log, Mondrian(0.4)) is None
    assert sum(int(n) for n in calibrator.store.size) == len(log)
    forged = [*log[:-1], replace(log[-1], count=log[-1].count + 1)]
    assert check_log(forged, Mondrian(0.4)) is not None


def test_each_lane_computes_each_token_once() -> None:
    async def work(engine: AsyncEngine) -> tuple[Any, dict[str, dict[str, float]]]:
        problem = problems(1)[0]
        prompt = engine._prompts(problem)
        solution = await engine.solve(problem, replace(PARAMS, takeover="continue"))
        return (solution, len(prompt.target)), engine.stats()

    (solution, prompt_length), stats = with_engine(work)
    assert stats["draft"]["recomputed_tokens"] == stats["target"]["recomputed_tokens"] == 0
    # The prompt but its last token once; then, for each chain, one forward for each token that another follows. A
    # span's closing EOS is taken back before the target goes on, and what it stood on is forwarded again.
    forwards = prompt_length - 1
    for chain in solution.chains:
        forwards += sum(t.draft_tokens + t.target_tokens for t in chain.turns)
    assert abs(stats["target"]["computed_tokens"] - forwards) <= 2 * len(solution.chains)


def test_events_come_in_order_and_hold_the_text() -> None:
    async def work(engine: AsyncEngine) -> list[Any]:
        return [e async for e in engine.generate(problems(1)[0], PARAMS)]

    events = with_engine(work)
    assert isinstance(events[-1], SolutionEvent)
    assert sum(isinstance(e, ChainEvent) for e in events) == PARAMS.chains
    for chain in events[-1].solution.chains:
        for turn in chain.turns:
            spoken = [e for e in events if isinstance(e, TokensEvent | VerdictEvent)]
            mine = [e for e in spoken if (e.chain, e.turn) == (chain.chain, turn.turn)]
            for author, text in (("draft", turn.draft), ("target", turn.target or "")):
                assert "".join(e.text for e in mine if isinstance(e, TokensEvent) and e.author == author) == text
            (verdict,) = [e for e in mine if isinstance(e, VerdictEvent)]
            assert (verdict.takeover, verdict.p_value) == (turn.takeover, turn.p_value)


def test_leaving_the_iterator_frees_the_pages_of_all_chains() -> None:
    async def work(engine: AsyncEngine) -> None:
        for stop_after in (1, 5, 12):
            stream = engine.generate(problems(1)[0], replace(PARAMS, chains=8))
            for _ in range(stop_after):
                await anext(stream)
            await stream.aclose()

    with_engine(work)


def test_synchronous_ranking_takes_over_alpha_of_the_chains() -> None:
    params = replace(PARAMS, chains=5, strategy="atts-sync")

    async def work(engine: AsyncEngine) -> list[Any]:
        return await asyncio.gather(*(engine.solve(p, params) for p in problems(4)))

    for solution in with_engine(work):
        turns = [t for c in solution.chains for t in c.turns]
        assert abs(sum(t.takeover for t in turns) - 0.4 * len(turns)) <= 0.5
        first = [c.turns[0] for c in solution.chains]
        taken = [t.score for t in first if t.takeover]
        kept = [t.score for t in first if not t.takeover]
        assert len(taken) == 2 and min(taken) >= max(kept)


def test_single_model_strategies_use_one_lane() -> None:
    async def work(engine: AsyncEngine) -> None:
        for name, other in (("draft", "target"), ("target", "draft")):
            before = engine.stats()[other]["computed_tokens"]
            solution = await engine.solve(problems(1)[0], replace(PARAMS, strategy=name))
            assert engine.stats()[other]["computed_tokens"] == before
            assert all(len(c.turns) == 1 and getattr(c.turns[0], f"{name}_tokens") > 0 for c in solution.chains)

    with_engine(work)


def test_bad_requests_are_refused_by_name() -> None:
    async def work(engine: AsyncEngine) -> None:
        with pytest.raises(InputError, match="no text"):
            await engine.solve("  ", PARAMS)
        with pytest.raises(InputError, match="context"):
            await engine.solve("; ".join(["a = 85"] * 400), PARAMS)
        with pytest.raises(InputError, match="alpha 0.4.*0.3"):
            await engine.solve(problems(1)[0], replace(PARAMS, alpha=0.3), calibrator=Mondrian(0.4))
        # One bad request harms nobody else.
        assert len((await engine.solve(problems(1)[0], PARAMS)).chains) == PARAMS.chains

    with_engine(work)
    for bad in ({"alpha": 0.0}, {"alpha": 1.5}, {"chains": 0}, {"turns": 0}, {"strategy": "x"}, {"temperature": -1.0}):
        with pytest.raises(InputError, match=next(iter(bad))):
            replace(PARAMS, **bad)
    with pytest.raises(InputError, match="dtype"):
        replace(CONFIG, dtype="float8")
    with pytest.raises(InputError, match="{problem}"):
        replace(CONFIG, prompt="no place for it")


def test_a_closed_engine_says_so() -> None:
    async def main() -> None:
        engine = await AsyncEngine.create(CONFIG)
        await engine.close()
        await engine.close()
        with pytest.raises(LaneError, match="closed"):
            await engine.solve(problems(1)[0], PARAMS)

    asyncio.run(main())


def test_synchronous_wrapper() -> None:
    with Engine(CONFIG) as engine:
        solution = engine.solve(problems(1)[0].problem, PARAMS)
    assert len(solution.chains) == PARAMS.chains
    assert solution.answer in {None, *solution.votes}
