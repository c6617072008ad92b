"""Strategies that sample chains with one model, end to end on the built-in pair."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from atts_engine import AsyncEngine, ATTSParams, Chain, EngineConfig, InputError, Problem, TokensEvent
from atts_engine.evaluation.registers import heldout
from atts_engine.models import load_model
from atts_engine.pipeline import PlainTask, Solution
from atts_engine.pipeline.strategies.best_of_n import best
from atts_engine.pipeline.strategies.probing import Probe, boxed, settled
from atts_engine.pipeline.strategies.stopping import first_sure, to_majority, to_share, to_unanimous
from atts_engine.pipeline.voting import weigh

CONFIG = EngineConfig("tiny-draft", "tiny-target", kv_tokens=16384)
PARAMS = ATTSParams(chains=10, turns=10, draft_tokens=12, target_tokens=12, seed=3)
Named = tuple[str, tuple[tuple[str, Any], ...]]
DEEPCONF: Named = ("deepconf", (("author", "draft"), ("group", 8), ("warmup", 4), ("wave", 3), ("consensus", 0.99)))
PROBING: Named = ("probing", (("author", "draft"), ("every", 10), ("agree", 2)))
NAMES: tuple[Named, ...] = (
    ("self-consistency", (("author", "draft"), ("weighted", True))),
    ("best-of-n", (("author", "draft"),)),
    ("best-of-n", (("author", "draft"), ("score", "p-true"))),
    ("adaptive-consistency", (("author", "draft"),)),
    ("esc", (("author", "draft"), ("window", 3))),
    DEEPCONF,
    PROBING,
    ("asc-conf", (("author", "draft"), ("tau", 0.9))),
)


def problems(n: int, steps: tuple[int, int] = (5, 6)) -> list[Problem]:
    return [Problem(p.id, p.problem, p.answer, i) for i, p in enumerate(heldout(n, 5, steps))]


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
        return [content(await engine.solve(p, params(n, *o))) for n, o in NAMES for p in problems(1)]

    async def together(engine: AsyncEngine) -> list[Solution]:
        found = await asyncio.gather(*(engine.solve(p, params(n, *o)) for n, o in NAMES for p in problems(1)))
        return [content(s) for s in found]

    alone = with_engine(one_by_one)
    # Small chunks hand tokens over elsewhere, a small pool preempts.
    crowded = replace(CONFIG, chunk_tokens=5, page_size=8, kv_tokens=2400, max_batch_tokens=32)
    assert with_engine(together, crowded) == alone
    for solution in alone:
        assert [c.chain for c in solution.chains] == list(range(len(solution.chains)))
        assert {c.finish for c in solution.chains} <= {"answer", "stop", "length", "stopped"}


def test_chains_are_written_as_long_as_the_rule_wants_more() -> None:
    async def work(engine: AsyncEngine) -> list[list[Solution]]:
        found = [*problems(3, (2, 6)), *problems(1)]
        runs = [params("self-consistency", ("author", "draft")), *(params(n, *o) for n, o in NAMES[3:5])]
        return [await asyncio.gather(*(engine.solve(p, run) for p in found)) for run in runs]

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
            await engine.solve(problem, params("best-of-n", ("score", s), ("author", a), chains=5), task=task)
            for s, a in runs
        ]
        with pytest.raises(InputError, match="judge of steps"):
            await engine.solve(problem, params("best-of-n", ("score", "reward"), draft, chains=1))
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


def test_deepconf_stops_what_falls_below_the_bar() -> None:
    run = params(DEEPCONF[0], *DEEPCONF[1])

    async def work(engine: AsyncEngine) -> list[tuple[Solution, Solution]]:
        plain = params("self-consistency", ("author", "draft"))
        found = problems(4)
        cut = await asyncio.gather(*(engine.solve(p, run) for p in found))
        return list(zip(cut, await asyncio.gather(*(engine.solve(p, plain) for p in found)), strict=True))

    ends = set()
    for solution, plain in with_engine(work):
        bar, chains = solution.extra["bar"], solution.chains
        sure = [c.extra["group_confidence"] for c in chains]
        assert bar == np.percentile(sure[:4], 10.0)
        votes: dict[str, float] = {}
        for number, (chain, whole) in enumerate(zip(chains, plain.chains)):
            # What is stopped is the beginning of what would have been written, and the first to have fallen so far.
            assert whole.turns[0].draft.startswith(chain.turns[0].draft)
            assert (chain.finish == "stopped") == (number >= 4 and sure[number] < bar)
            ends.add(chain.finish)
            if chain.finish == "stopped":
                assert 8 <= chain.draft_tokens <= whole.draft_tokens
            else:
                assert chain.turns[0].draft == whole.turns[0].draft
                if sure[number] >= bar and chain.final_answer is not None:
                    votes[chain.final_answer] = votes.get(chain.final_answer, 0.0) + sure[number]
        assert solution.votes == pytest.approx(votes)
        assert solution.extra["cut"] == sum(c.finish == "stopped" for c in chains)
        agreed = max(votes.values()) / sum(votes.values()) >= 0.99
        assert solution.extra["stopped"] == ("consensus" if agreed else "chains")
        assert len(chains) == 10 if not agreed else len(chains) in (4, 7, 10)
    assert {"stopped", "answer"} <= ends


def test_probes_count_and_leave_no_trace() -> None:
    async def work(engine: AsyncEngine) -> tuple[list[Solution], list[Solution], float]:
        found = problems(3)
        before = engine.stats()["draft"]["sampled_tokens"]
        probed = await asyncio.gather(*(engine.solve(p, params(PROBING[0], *PROBING[1])) for p in found))
        sampled = engine.stats()["draft"]["sampled_tokens"] - before
        plain = await asyncio.gather(*(engine.solve(p, params("draft")) for p in found))
        return probed, plain, sampled

    probed, plain, sampled = with_engine(work)
    chains = [c for s in probed for c in s.chains]
    settled_chains = [c for c in chains if c.extra["settled"]]
    assert 0 < len(settled_chains) < len(chains)
    assert sum(c.draft_tokens for c in chains) == sampled
    for chain, whole in zip(chains, (c for s in plain for c in s.chains), strict=True):
        text = chain.turns[0].draft
        if not chain.extra["settled"]:
            assert (text, chain.finish) == (whole.turns[0].draft, whole.finish)
            continue
        said, _, box = text.rpartition("\n\n\\boxed{")
        assert whole.turns[0].draft.startswith(said) and box == f"{chain.final_answer}}}"
        assert len(load_model("tiny-draft", "cpu", torch.float32).tokenizer.encode(said)) % 10 == 0
        assert chain.finish == "answer"


def test_probes_must_agree_without_a_doubt() -> None:
    def ends(*texts: str, agree: int = 3) -> bool:
        return settled([Probe((), text) for text in texts], agree, str.__eq__)

    assert boxed("\\frac{1}{2}} \\]") == "\\frac{1}{2}"
    assert (boxed("53"), boxed("{5}"), boxed("}")) == (None, None, "")
    assert ends("7}", "5}", "5} \\]", " 5}.")
    assert not ends("5}", "5}")
    assert not ends("5}", "5", "5}")
    assert not ends("}", "}", "}")
    assert not ends("5}", "6}", "5}")
    assert not ends("5}", "5} Wait, ", "5}")
    assert not ends("5}", "5}", "5} I do not know")
    assert ends("5} hmm", "5}", "5}", agree=2)


def test_confidence_is_the_probability_of_yes() -> None:
    async def work(engine: AsyncEngine) -> list[Solution]:
        problem, draft = problems(1)[0], ("author", "draft")
        runs = [("sc-conf",), ("asc-conf", ("tau", 0.9)), ("early-stop-bon", ("tau", 1e-6))]
        return [await engine.solve(problem, params(name, draft, *options)) for name, *options in runs]

    every, adaptive, early = with_engine(work)
    told, sure = answers(every.chains), [c.extra["confidence"] for c in every.chains]
    assert sure == pytest.approx(confidences(every.chains), rel=1e-3)
    assert every.votes == weigh(told, sure)
    needed = next((n for n in range(11) if to_share(told[:n], sure[:n], 0.9) == 0), 10)
    assert answers(adaptive.chains) == told[:needed]
    at = first_sure(told, sure, 1e-6)
    assert len(early.chains) == (10 if at is None else at + 1)
    assert early.votes == {told[-1 if at is None else at]: sure[-1 if at is None else at]}


def confidences(chains: tuple[Chain, ...]) -> list[float]:
    """P("!" | chain + "?") under the draft, by `transformers`."""
    transformers = pytest.importorskip("transformers")
    from atts_engine.models.load import resolve

    model = transformers.LlamaForCausalLM.from_pretrained(resolve("tiny-draft"), dtype=torch.float32).eval()
    tokenizer = load_model("tiny-draft", "cpu", torch.float32).tokenizer
    prompt = tokenizer.chat_prompt([{"role": "user", "content": problems(1)[0].problem}])
    found = []
    for chain in chains:
        ids = [*prompt, *tokenizer.encode(chain.turns[0].draft + "?")]
        with torch.no_grad():
            found.append(float(model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)[tokenizer.encode("!")[0]]))
    return found


def test_words_that_the_model_cannot_spell_are_refused() -> None:
    async def work(engine: AsyncEngine) -> None:
        for name, option in (("sc-conf", "question"), ("probing", "probe")):
            with pytest.raises(InputError, match=f"cannot be asked.*{option}"):
                await engine.solve(problems(1)[0], params(name, (option, "Is it right?")))

    with_engine(work)


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
        return [await engine.solve(problems(1)[0], run, deadline_s=s) for run in runs for s in (1e-6, 0.005)]

    for solution in with_engine(work):
        assert solution.extra["stopped"] == "deadline"
        assert solution.chains and any(c.finish == "deadline" for c in solution.chains)


def test_leaving_the_iterator_frees_every_page() -> None:
    async def work(engine: AsyncEngine) -> None:
        for name, options in NAMES:
            for stop_after in (1, 12):
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
