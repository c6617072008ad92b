"""Strategies that sample chains with one model, end to end on the built-in pair."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from atts_engine import AsyncEngine, ATTSParams, Chain, EngineConfig, InputError, Problem, TokensEvent
from atts_engine.evaluation.registers import heldout
from atts_engine.models import load_model
from atts_engine.pipeline import PlainTask, Solution
from atts_engine.pipeline.strategies.best_of_n import best
from atts_engine.pipeline.strategies.stopping import to_majority, to_unanimous

CONFIG = EngineConfig("tiny-draft", "tiny-target", kv_tokens=16384)
PARAMS = ATTSParams(chains=10, turns=10, draft_tokens=12, target_tokens=12, seed=3)
NAMES: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...] = (
    ("self-consistency", (("author", "draft"), ("weighted", True))),
    ("best-of-n", (("author", "draft"),)),
    ("best-of-n", (("author", "draft"), ("score", "p-true"))),
    ("adaptive-consistency", (("author", "draft"),)),
    ("esc", (("author", "draft"), ("window", 3))),
)


def problems(n: int, seed: int = 5) -> list[Problem]:
    return [Problem(p.id, p.problem, p.answer, i) for i, p in enumerate(heldout(n, seed, (5, 6)))]


def with_engine(work: Callable[[AsyncEngine], Awaitable[Any]], config: EngineConfig = CONFIG) -> Any:
    """What `work` returns, once every page is back."""

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


def params(name: str, *options: tuple[str, Any], **changes: Any) -> ATTSParams:
    return replace(PARAMS, strategy=name, options=options, **changes)


def content(solution: Solution) -> Solution:
    """The solution without its times."""
    chains = tuple(
        replace(c, duration_s=0.0, turns=tuple(replace(t, t_draft=0.0, t_target=0.0) for t in c.turns))
        for c in solution.chains
    )
    return replace(solution, chains=chains, duration_s=0.0)


def answers(chains: tuple[Chain, ...]) -> list[str | None]:
    return [c.final_answer for c in chains]


def test_the_same_at_any_concurrency() -> None:
    async def one_by_one(engine: AsyncEngine) -> list[Solution]:
        return [content(await engine.solve(p, params(n, *o))) for n, o in NAMES for p in problems(2)]

    async def together(engine: AsyncEngine) -> list[Solution]:
        found = await asyncio.gather(*(engine.solve(p, params(n, *o)) for n, o in NAMES for p in problems(2)))
        return [content(s) for s in found]

    alone = with_engine(one_by_one)
    # Small chunks hand tokens over elsewhere, a small pool preempts.
    crowded = replace(CONFIG, chunk_tokens=5, page_size=8, kv_tokens=3000, max_batch_tokens=32)
    assert with_engine(together, crowded) == alone
    for solution in alone:
        assert [c.chain for c in solution.chains] == list(range(len(solution.chains)))
        assert {c.finish for c in solution.chains} <= {"answer", "stop", "length"}


def test_chains_are_written_as_long_as_the_rule_wants_more() -> None:
    async def work(engine: AsyncEngine) -> list[list[Solution]]:
        runs = [params("self-consistency", ("author", "draft")), *(params(n, *o) for n, o in NAMES[3:])]
        return [await asyncio.gather(*(engine.solve(p, run) for p in problems(6))) for run in runs]

    whole, adaptive, esc = with_engine(work)
    stopped = set()
    for every, some, windows in zip(whole, adaptive, esc, strict=True):
        told = answers(every.chains)
        assert len(told) == 10 and every.extra == {"stopped": "chains"}
        needed = next((n for n in range(11) if to_majority(told[:n], 0.95) == 0), 10)
        assert answers(some.chains) == told[:needed]
        assert sum(some.votes.values()) == sum(a is not None for a in told[:needed])
        needed = next((n for n in range(11) if to_unanimous(told[:n], 3) == 0), 10)
        assert answers(windows.chains) == told[:needed]
        if windows.extra["stopped"] == "unanimous":
            assert windows.votes == {told[needed - 1]: 3.0}
        stopped |= {("adaptive", some.extra["stopped"]), ("esc", windows.extra["stopped"])}
    assert {("adaptive", "majority"), ("adaptive", "chains"), ("esc", "unanimous")} <= stopped


class Checker(PlainTask):
    """A stand-in for a reward model: the sum of the digits of the text."""

    def reward(self, problem: Problem, before: str, span: str) -> float:
        return float(sum(int(c) for c in span if c.isdigit()))


def test_best_of_n_takes_the_highest_score() -> None:
    assert best(["a", "b", None, "a", "c"], [-2.0, -3.0, 9.0, -1.0, None]) == {"a": -1.0, "b": -3.0}

    async def work(engine: AsyncEngine) -> list[Solution]:
        problem, draft = problems(1)[0], ("author", "draft")
        task = Checker()
        runs = [("nll", "draft"), ("reward", "draft"), ("nll", "target")]
        found = [
            await engine.solve(problem, params("best-of-n", ("score", s), ("author", a)), task=task) for s, a in runs
        ]
        with pytest.raises(InputError, match="judge of steps"):
            await engine.solve(problem, params("best-of-n", ("score", "reward"), draft))
        return found

    by_target, by_task, of_target = with_engine(work)
    reference = likelihoods(by_target.chains)
    told = [c.extra["likelihood"] for c in by_target.chains]
    assert told == pytest.approx(reference, rel=1e-4)
    assert by_target.answer == by_target.chains[told.index(max(told))].final_answer
    own = [c.extra["likelihood"] for c in of_target.chains]
    assert own == pytest.approx(likelihoods(of_target.chains), rel=1e-4)
    rewards = [c.extra["reward"] for c in by_task.chains]
    assert rewards == [sum(int(x) for x in c.turns[0].draft if x.isdigit()) for c in by_task.chains]
    assert by_task.votes[by_task.answer or ""] == max(rewards)


def likelihoods(chains: tuple[Chain, ...]) -> list[float]:
    """exp(mean log-probability) of whole chains under the target, by `transformers`."""
    transformers = pytest.importorskip("transformers")
    from atts_engine.models.load import resolve

    reference = transformers.LlamaForCausalLM.from_pretrained(resolve("tiny-target"), dtype=torch.float32).eval()
    tokenizer = load_model("tiny-target", "cpu", torch.float32).tokenizer
    prompt = tokenizer.chat_prompt([{"role": "user", "content": problems(1)[0].problem}])
    found = []
    for chain in chains:
        turn = chain.turns[0]
        span = tokenizer.encode(turn.draft or turn.target or "")
        if len(span) < turn.draft_tokens + turn.target_tokens:
            span.append(tokenizer.eos_token_ids[0])
        with torch.no_grad():
            logprobs = reference(torch.tensor([[*prompt, *span]])).logits[0].double().log_softmax(-1)
        told = [logprobs[len(prompt) + i - 1, token] for i, token in enumerate(span)]
        found.append(float(torch.stack(told).mean().exp()))
    return found


def test_events_tell_the_text_of_every_chain() -> None:
    async def work(engine: AsyncEngine) -> list[Any]:
        return [e async for e in engine.generate(problems(1)[0], params("adaptive-consistency"))]

    events = with_engine(work)
    for chain in events[-1].solution.chains:
        said = [e for e in events if isinstance(e, TokensEvent) and e.chain == chain.chain]
        assert "".join(e.text for e in said) == chain.turns[0].target
        assert sum(e.n_tokens for e in said) == chain.turns[0].target_tokens


def test_a_deadline_ends_the_round_and_the_problem() -> None:
    async def work(engine: AsyncEngine) -> list[Solution]:
        runs = [params(n, *o, draft_tokens=16, target_tokens=16) for n, o in NAMES]
        return [await engine.solve(problems(1)[0], run, deadline_s=s) for run in runs for s in (1e-6, 0.02)]

    for solution in with_engine(work):
        assert solution.extra["stopped"] == "deadline"
        assert solution.chains and any(c.finish == "deadline" for c in solution.chains)


def test_leaving_the_iterator_frees_every_page() -> None:
    async def work(engine: AsyncEngine) -> None:
        for name, options in NAMES:
            for stop_after in (1, 6):
                stream = engine.generate(problems(1)[0], params(name, *options))
                for _ in range(stop_after):
                    await anext(stream)
                await stream.aclose()

    with_engine(work)


@pytest.mark.parametrize(
    ("name", "option", "says"),
    [
        ("esc", ("window", 1), "window must be 2 or more, not 1"),
        ("esc", ("window", "x"), "window must be a whole number, not 'x'"),
        ("esc", ("window", True), "window must be a whole number, not True"),
        ("best-of-n", ("score", "best"), "score must be one of nll, reward, p-true, not 'best'"),
        ("adaptive-consistency", ("threshold", 1.0), "threshold must lie between 0.5 and 1.0"),
        ("self-consistency", ("author", "both"), "author must be one of draft, target"),
        ("self-consistency", ("weighted", 1), "weighted must be true or false"),
    ],
)
def test_options_are_checked(name: str, option: tuple[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        params(name, option)
