"""What one request or one chain meets, it meets alone: each gives its one clear error, and the others end as they would
have."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest
import torch

from atts_engine import AsyncEngine, ATTSParams, Chain, ChainEvent, InputError, LaneError, Problem, QueueFull, Solution
from atts_engine.backends import InProcessLane
from atts_engine.conformal import Mondrian
from atts_engine.pipeline import Pair, Prompts, SolutionEvent, TokensEvent, Tongues, Words, run_problem
from atts_engine.pipeline.gate import ConformalGate
from atts_engine.pipeline.voting import tally
from atts_engine.runtime import EngineLoop, LaneCore, Mailbox
from tests.fakes import EOS, FakeTokenizer, fake_model
from tests.test_engine import CONFIG, PARAMS, content, frozen_calibrator, problems, with_engine

CHAINS = ATTSParams(chains=24, turns=1, draft_tokens=30, target_tokens=30, temperature=2.0, seed=1, strategy="draft")


def on_fakes(params: ATTSParams, kv_tokens: int = 4000, poison: int | None = None) -> Solution:
    """The chains of one problem on two lanes of the fake model."""

    async def main() -> Solution:
        mailbox = Mailbox(asyncio.get_running_loop())
        cores = [
            LaneCore(
                name,
                fake_model(400, poison),
                kv_tokens=kv_tokens,
                page_size=4,
                max_batch_tokens=64,
                device=torch.device("cpu"),
            )
            for name in ("draft", "target")
        ]

        def decided(request: Any, result: Any) -> None:
            mailbox.post(lambda: request.gate.heard(request, result))

        loop = EngineLoop([(core, decided) for core in cores])
        lanes = [InProcessLane(core, loop, mailbox) for core in cores]
        loop.start()
        calibrator = Mondrian(params.alpha)
        calibrator.frozen = True
        words = Words(FakeTokenizer(), frozenset({EOS}))
        pair = Pair(lanes[0], lanes[1], Tongues(words, words))
        prompts = Prompts((1, 2, 3), (1, 2, 3))
        try:
            return await run_problem(
                pair, prompts, Problem("p", "x"), params, ConformalGate(calibrator), lambda event: None
            )
        finally:
            await asyncio.to_thread(loop.stop)
            assert all(core.pool.used == len(core.pool.quarantined) for core in cores)

    return asyncio.run(main())


@pytest.mark.parametrize("strategy", ["draft", "target", "atts"])
def test_nan_logits_end_the_chains_that_met_them(strategy: str) -> None:
    params = replace(CHAINS, strategy=strategy)
    wanted, found = on_fakes(params).chains, on_fakes(params, poison=5).chains
    failed = [c for c in found if c.error is not None]
    assert 0 < len(failed) < len(found)
    for chain, whole in zip(found, wanted, strict=True):
        if chain.error is not None:
            assert chain.finish == "error" and "NaN" in chain.error
        else:
            assert content(chain) == content(whole)
            # Nobody is poisoned by the last token of its text: it is not forwarded.
            assert all("f" not in (t.draft + (t.target or ""))[:-1] for t in chain.turns)


def test_a_pool_too_small_for_one_sequence_ends_that_one() -> None:
    wanted, found = on_fakes(CHAINS).chains, on_fakes(CHAINS, kv_tokens=24).chains
    short = [c for c in wanted if 3 + c.draft_tokens <= 24]
    assert 0 < len(short) < len(wanted)
    for chain, whole in zip(found, wanted, strict=True):
        if whole in short:
            assert content(chain) == content(whole)
        else:
            assert chain.finish == "error" and chain.error is not None and "kv_tokens" in chain.error


def beside(disturb: Callable[[AsyncEngine, Problem], Awaitable[None]], **settings: Any) -> None:
    """The first problem ends as it does alone, whatever is done with the second one meanwhile."""
    first, second = problems(2)

    async def work(engine: AsyncEngine) -> tuple[Any, Any]:
        alone = await engine.solve(first, PARAMS, calibrator=frozen_calibrator())
        task = asyncio.create_task(engine.solve(first, PARAMS, calibrator=frozen_calibrator()))
        await asyncio.sleep(0)
        await disturb(engine, second)
        return alone, await task

    alone, found = with_engine(work, replace(CONFIG, **settings))
    assert [content(c) for c in found.chains] == [content(c) for c in alone.chains]
    assert found.votes == alone.votes


def test_a_prompt_longer_than_the_context_is_refused() -> None:
    async def disturb(engine: AsyncEngine, problem: Problem) -> None:
        with pytest.raises(InputError, match="the prompt has .* context"):
            await engine.solve("; ".join(["a = 85"] * 400), PARAMS)

    beside(disturb)


def test_an_iterator_that_is_left_harms_nobody() -> None:
    async def disturb(engine: AsyncEngine, problem: Problem) -> None:
        for stop_after in (1, 7):
            async with aclosing(engine.generate(problem, PARAMS, calibrator=frozen_calibrator())) as stream:
                for _ in range(stop_after):
                    await anext(stream)

    beside(disturb)


def test_a_full_queue_refuses_the_new_request_alone() -> None:
    async def disturb(engine: AsyncEngine, problem: Problem) -> None:
        with pytest.raises(QueueFull, match="4 chains are open and 4 more .* max_sequences = 6"):
            await engine.solve(problem, PARAMS)
        with pytest.raises(InputError, match="max_sequences = 6"):
            await engine.solve(problem, replace(PARAMS, chains=7))
        assert len((await engine.solve(problem, replace(PARAMS, chains=2))).chains) == 2

    beside(disturb, max_sequences=6)


def test_what_has_ended_makes_room() -> None:
    async def work(engine: AsyncEngine) -> None:
        for _ in range(2):
            await engine.solve(problems(1)[0], replace(PARAMS, turns=2))
            async with aclosing(engine.generate(problems(1)[0], PARAMS)) as stream:
                await anext(stream)

    with_engine(work, replace(CONFIG, max_sequences=PARAMS.chains))


def jump(seconds: float) -> None:
    """Have the running loop's clock go forward at once."""
    loop = asyncio.get_running_loop()
    clock = type(loop).time
    loop.time = lambda: clock(loop) + seconds  # type: ignore[method-assign]


# One model alone writes its chains in step, so that they end within a few steps of each other: it is cut in mid-span.
@pytest.mark.parametrize(
    ("strategy", "cut_at"),
    [("atts", ChainEvent), ("atts-sync", ChainEvent), ("draft", TokensEvent), ("target", TokensEvent)],
)
def test_a_deadline_ends_the_chains_that_still_run_where_they_are(
    strategy: str, cut_at: type[ChainEvent] | type[TokensEvent]
) -> None:
    params = replace(PARAMS, chains=8, strategy=strategy)
    problem = problems(1)[0]

    async def work(engine: AsyncEngine) -> tuple[Solution, list[Chain], Solution]:
        whole = await engine.solve(problem, params, calibrator=frozen_calibrator())
        ended: list[Chain] = []
        async for event in engine.generate(problem, params, calibrator=frozen_calibrator(), deadline_s=3600.0):
            if isinstance(event, ChainEvent):
                ended.append(event.chain)
            if isinstance(event, cut_at):
                jump(4000.0)
            if isinstance(event, SolutionEvent):
                return whole, ended, event.solution
        raise AssertionError

    whole, ended, cut = with_engine(work, replace(CONFIG, chunk_tokens=4))
    assert sorted(c.chain for c in ended) == [c.chain for c in cut.chains] == list(range(8))
    finishes = {c.finish for c in cut.chains}
    assert "deadline" in finishes
    assert cut_at is TokensEvent or len(finishes) > 1
    for chain, full in zip(cut.chains, whole.chains, strict=True):
        assert chain.error is None
        if chain.finish != "deadline":
            if strategy != "atts-sync":
                assert content(chain) == content(full)
        elif strategy in ("draft", "target"):
            author = f"{strategy}_tokens"
            assert getattr(chain.turns[0], author) <= getattr(full.turns[0], author)
        elif strategy == "atts":
            # Of a turn that was being taken over, the draft's part stands.
            done = len(chain.turns) - 1
            assert content(chain).turns[:done] == content(full).turns[:done]
            assert chain.turns[done:] == () or chain.turns[done].draft == full.turns[done].draft
    assert cut.votes == tally(cut.chains, params.vote)


def test_a_deadline_before_anything_began_and_one_that_is_none() -> None:
    async def disturb(engine: AsyncEngine, problem: Problem) -> None:
        for bad in (0.0, -1.0, float("nan")):
            with pytest.raises(InputError, match="deadline_s"):
                await engine.solve(problem, PARAMS, deadline_s=bad)
        solution = await engine.solve(problem, PARAMS, deadline_s=1e-9)
        assert [(c.finish, c.turns, c.final_answer) for c in solution.chains] == [("deadline", (), None)] * 4
        assert (solution.answer, solution.votes) == (None, {})

    beside(disturb)


def test_priorities_change_the_order_and_not_the_chains() -> None:
    async def work(engine: AsyncEngine) -> list[Any]:
        found = problems(2)
        alone = [await engine.solve(p, PARAMS, calibrator=frozen_calibrator()) for p in found]
        ranked = await asyncio.gather(
            *(engine.solve(p, PARAMS, calibrator=frozen_calibrator(), priority=-i) for i, p in enumerate(found))
        )
        return [[content(c) for s in run for c in s.chains] for run in (alone, ranked)]

    alone, ranked = with_engine(work, replace(CONFIG, max_batch_tokens=16, kv_tokens=700, preemption="swap"))
    assert alone == ranked


@pytest.mark.parametrize("where", ["commit", "command"])
def test_a_fault_fails_the_lane_and_leaves_no_page_taken(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """In the midst of a commit, when its step is in flight no more, and in a command, which no step runs."""

    async def work(engine: AsyncEngine) -> None:
        core = engine._lanes[0].core

        def fault(*_: Any) -> None:
            raise RuntimeError("device-side assert")

        monkeypatch.setattr(core, "_take" if where == "commit" else "_begin_decode", fault)
        with pytest.raises(LaneError, match="device-side assert"):
            await engine.solve(problems(1)[0], replace(PARAMS, strategy="draft"))
        with pytest.raises(LaneError, match="device-side assert"):
            await engine.solve(problems(1)[0], replace(PARAMS, strategy="draft"))
        # Closing is told to the lane and not waited for.
        async with asyncio.timeout(10):
            while engine.stats()["draft"]["open_sequences"]:
                await asyncio.sleep(0.01)
        assert engine.stats()["draft"]["used_pages"] == 0

    with_engine(work)


def test_a_listener_that_raises_costs_nobody_an_answer() -> None:
    """It is called among the answers that a lane hands over in one piece; those behind it are for others."""
    heard: list[int] = []
    told: list[BaseException] = []

    def listener(decision: Any) -> None:
        heard.append(decision.decision_seq)
        raise RuntimeError("a bug of the caller's")

    async def work(engine: AsyncEngine) -> list[Any]:
        found = problems(2)
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: told.append(context["exception"]))
        runs = []
        for angry in (False, True):
            if angry:
                engine.add_decision_listener(listener)
            async with asyncio.timeout(60):
                solved = (engine.solve(p, PARAMS, calibrator=frozen_calibrator()) for p in found)
                runs.append([[content(c) for c in s.chains] for s in await asyncio.gather(*solved)])
        return runs

    quiet, loud = with_engine(work)
    assert loud == quiet
    assert len(told) == len(heard) > 0 and {str(error) for error in told} == {"a bug of the caller's"}


def test_a_call_that_raises_drops_no_other() -> None:
    async def main() -> tuple[list[int], list[str]]:
        loop = asyncio.get_running_loop()
        told: list[str] = []
        loop.set_exception_handler(lambda _, context: told.append(str(context["exception"])))
        mailbox, taken = Mailbox(loop), list[int]()
        for call in (lambda: taken.append(0), lambda: 1 // 0, lambda: taken.append(2), lambda: taken.append(1 // 0)):
            mailbox.post(call)
        await asyncio.sleep(0)
        mailbox.post(lambda: taken.append(4))
        await asyncio.sleep(0)
        return taken, told

    taken, told = asyncio.run(main())
    assert taken == [0, 2, 4] and len(told) == 2 and "zero" in told[0]
