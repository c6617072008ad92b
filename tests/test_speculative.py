"""Speculative decoding: the chains are the target's own, whatever the draft proposes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from atts_engine import ATTSParams, Chain, EngineConfig, InputError, Problem, SolutionEvent, TokensEvent, ops
from atts_engine.backends import InProcessLane, Verifier
from atts_engine.cli import main as cli
from atts_engine.models import Model
from atts_engine.pipeline.single import run_single
from atts_engine.pipeline.speculative import run_speculative, verifier_of
from atts_engine.pipeline.translation import Tongues, Words
from atts_engine.pipeline.writer import ChainSpec, Prompts
from atts_engine.runtime import EngineLoop, LaneCore, Mailbox
from atts_engine.runtime import lane as lane_module
from tests.fakes import EOS, FakeDecoder, FakeTokenizer, fake_model, greedy
from tests.late import LateRunner
from tests.test_cli import fails, run_words
from tests.test_cli import problems as problems  # the fixture
from tests.test_engine import CONFIG, PARAMS, with_engine
from tests.test_engine import problems as registers
from tests.test_gate import ScriptedLane

SAMPLINGS = (
    {"temperature": 0.0},
    {"temperature": 0.8},
    {"temperature": 3.0},
    {"temperature": 1.2, "top_k": 4},
    {"temperature": 1.2, "top_p": 0.8},
    {"temperature": 1.5, "min_p": 0.1},
)


def text(chain: Chain) -> tuple[Any, ...]:
    """What a chain says, and why it ended."""
    (turn,) = chain.turns
    return chain.problem_id, chain.chain, turn.draft, turn.target, chain.final_answer, chain.finish, chain.error


async def solve(engine: Any, params: ATTSParams, n: int = 2) -> list[Chain]:
    solutions = await asyncio.gather(*(engine.solve(p, params) for p in registers(n)))
    return [c for s in solutions for c in s.chains]


# On the built-in pair ----------------------------------------------------------------------------------------------


def test_chains_are_those_of_the_target_alone() -> None:
    """Text, answer, end and number of tokens, at several samplings; and what the lanes counted adds up."""

    async def work(engine: Any) -> None:
        for sampling in SAMPLINGS:
            params = replace(PARAMS, chains=3, turns=2, strategy="target", **sampling)
            alone = await solve(engine, params, n=1)
            before = engine.stats()
            found = await solve(engine, replace(params, strategy="speculative", options=(("proposal_tokens", 4),)), n=1)
            counted = {k: engine.stats()["target"][k] - v for k, v in before["target"].items()}
            assert [text(c) for c in found] == [text(c) for c in alone]
            for chain, other in zip(found, alone, strict=True):
                assert chain.turns[0].draft_tokens + chain.target_tokens == other.target_tokens
                assert chain.extra["accepted_tokens"] == chain.turns[0].draft_tokens
                # What the draft has cost, not what came of it.
                assert chain.draft_tokens == chain.extra["proposed_tokens"]
                # Each pass but the last gives one token of the target's own; the last may end in an accepted one.
                assert 0 <= chain.extra["target_passes"] - chain.target_tokens <= 1
                assert chain.wait_s is not None and 0 <= chain.wait_s <= chain.duration_s
            for name in ("proposed_tokens", "accepted_tokens"):
                assert counted[name] == sum(c.extra[name] for c in found)
            rates.append(counted["accepted_tokens"] / counted["proposed_tokens"])
            assert counted["sampled_tokens"] == sum(c.turns[0].draft_tokens + c.target_tokens for c in found)
            assert counted["recomputed_tokens"] == counted["repeated_tokens"] == counted["rolled_back_tokens"] == 0

    rates: list[float] = []
    with_engine(work)
    # Both happened, or little would have been tested.
    assert 0.3 < min(rates) < 0.8 < max(rates)


@cache
def alone(params: ATTSParams, dtype: str) -> list[tuple[Any, ...]]:
    found = with_engine(
        lambda engine: solve(engine, replace(params, strategy="target", options=())), replace(CONFIG, dtype=dtype)
    )
    return [text(c) for c in found]


@pytest.mark.parametrize(
    ("proposal_tokens", "config"),
    [
        (1, CONFIG),
        (30, replace(CONFIG, max_batch_tokens=9)),
        (6, replace(CONFIG, kv_tokens=400, page_size=8)),
        (5, replace(CONFIG, overlap=True, lane_threads="each")),
        pytest.param(
            5,
            replace(CONFIG, dtype="bfloat16"),
            marks=pytest.mark.skipif(
                ops.chosen("linear", "cpu") != "native",
                reason="bfloat16 products are torch's on this machine, whose bits depend on the batch",
            ),
        ),
    ],
)
def test_neither_block_nor_budget_nor_pool_nor_overlap_changes_a_chain(
    proposal_tokens: int, config: EngineConfig
) -> None:
    params = replace(PARAMS, turns=2, strategy="speculative", temperature=1.1)

    async def work(engine: Any) -> list[tuple[Any, ...]]:
        found = await solve(engine, replace(params, options=(("proposal_tokens", proposal_tokens),)))
        assert config.kv_tokens == CONFIG.kv_tokens or engine.stats()["target"]["preemptions"] > 0
        return [text(c) for c in found]

    assert with_engine(work, config) == alone(params, config.dtype)


def test_events_say_who_wrote_what_in_the_order_of_the_text() -> None:
    params = replace(PARAMS, chains=2, turns=2, strategy="speculative", temperature=1.2)

    async def work(engine: Any) -> list[Any]:
        return [e async for e in engine.generate(registers(1)[0], params)]

    events = with_engine(work)
    assert isinstance(events[-1], SolutionEvent)
    for chain in events[-1].solution.chains:
        mine = [e for e in events if isinstance(e, TokensEvent) and e.chain == chain.chain]
        assert "".join(e.text for e in mine) == chain.turns[0].target
        for author, n in (("draft", chain.turns[0].draft_tokens), ("target", chain.target_tokens)):
            assert sum(e.n_tokens for e in mine if e.author == author) == n > 0


def test_leaving_in_the_midst_of_a_proposal_frees_the_pages_of_both_lanes() -> None:
    async def work(engine: Any) -> None:
        for stop_after in (1, 6, 23):
            stream = engine.generate(registers(1)[0], replace(PARAMS, chains=6, strategy="speculative"))
            for _ in range(stop_after):
                await anext(stream)
            await stream.aclose()

    with_engine(work)  # looks at the pages itself


# On fake models ----------------------------------------------------------------------------------------------------


class Flatter(FakeDecoder):
    """Wants the same token as the target, but less."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * 0.5


class Contrary(FakeDecoder):
    """Wants another token than the target, always."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden[:, :EOS].roll(1, 1)


def model_of(decoder: type[FakeDecoder], max_positions: int = 64) -> Model:
    model = fake_model(max_positions)
    return replace(model, decoder=decoder(model.config))  # type: ignore[arg-type]


@asynccontextmanager
async def lanes(draft: Model, target: Model, **options: Any) -> AsyncIterator[tuple[InProcessLane, InProcessLane]]:
    settings: dict[str, Any] = {"kv_tokens": 400, "page_size": 4, "max_batch_tokens": 64} | options
    cores = [LaneCore(n, m, device=torch.device("cpu"), **settings) for n, m in (("draft", draft), ("target", target))]
    mailbox = Mailbox(asyncio.get_running_loop())
    loop = EngineLoop([(core, lambda request, result: None) for core in cores])
    loop.start()
    try:
        yield InProcessLane(cores[0], loop, mailbox), InProcessLane(cores[1], loop, mailbox)
    finally:
        loop.stop()
        assert [core.pool.used for core in cores] == [0, 0]


def spec_of(params: ATTSParams, deadline: float | None = None) -> ChainSpec:
    words = Words(FakeTokenizer(), frozenset({EOS}))
    tongues, prompts = Tongues(words, words), Prompts((1, 2), (1, 2))
    return ChainSpec(Problem("p", "x"), 0, params, tongues, prompts, lambda event: None, deadline)


def both_ways(draft: Model, target: Model, params: ATTSParams, **options: Any) -> tuple[Chain, Chain]:
    """The chain of the target alone, and the one by speculation."""

    async def main() -> tuple[Chain, Chain]:
        spec = spec_of(params)
        async with lanes(draft, target, **options) as (left, right):
            alone = await run_single(spec, right, await right.open((1, 2)), "target")
            d, t = await left.open((1, 2)), await right.open((1, 2))
            found = await run_speculative(spec, left, d, right, t, 3)
            assert t.length == 2 + found.turns[0].draft_tokens + found.target_tokens
        return alone, found

    return asyncio.run(main())


@pytest.mark.parametrize("temperature", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("decoder", [FakeDecoder, Flatter, Contrary])
def test_any_draft_gives_the_targets_chain(
    monkeypatch: pytest.MonkeyPatch, decoder: type[FakeDecoder], late: bool, temperature: float
) -> None:
    """One that agrees is always accepted, one that wants something else at temperature 0 never is."""
    if late:
        monkeypatch.setattr(lane_module, "Runner", LateRunner)
    accepted = proposed = 0
    for seed in range(4):
        params = ATTSParams(chains=1, turns=1, draft_tokens=20, target_tokens=17, temperature=temperature, seed=seed)
        alone, found = both_ways(model_of(decoder), fake_model(), params, overlap=late)
        assert text(found) == text(alone)
        assert found.turns[0].draft_tokens + found.target_tokens == alone.target_tokens
        accepted += found.extra["accepted_tokens"]
        proposed += found.extra["proposed_tokens"]
    assert proposed > 0
    if decoder is FakeDecoder or (decoder is Flatter and temperature == 0.0):
        assert accepted == proposed
    elif decoder is Contrary and temperature == 0.0:
        assert accepted == 0
    else:
        assert 0 < accepted < proposed


def test_a_draft_whose_context_is_full_leaves_the_target_to_itself() -> None:
    params = ATTSParams(chains=1, turns=1, draft_tokens=20, target_tokens=17, temperature=0.0)
    for decoder, most in ((FakeDecoder, 10), (Contrary, 0)):
        alone, found = both_ways(model_of(decoder, max_positions=12), fake_model(), params)
        assert text(found) == text(alone)
        assert found.extra["accepted_tokens"] == (8 if most else 0)
        assert alone.target_tokens == 37


def test_a_target_whose_context_is_full_ends_the_chain_as_it_does_alone() -> None:
    params = ATTSParams(chains=1, turns=1, draft_tokens=60, target_tokens=60, temperature=0.0)
    alone, found = both_ways(model_of(FakeDecoder), fake_model(max_positions=30), params)
    assert text(found) == text(alone)
    assert (found.finish, found.turns[0].draft_tokens + found.target_tokens) == ("length", 28)


def test_a_deadline_ends_a_chain_where_it_is() -> None:
    params = ATTSParams(chains=1, turns=100, temperature=0.0)

    async def main() -> Chain:
        async with lanes(model_of(Contrary, 5000), fake_model(5000), kv_tokens=8000) as (left, right):
            d, t = await left.open((1, 2)), await right.open((1, 2))
            deadline = asyncio.get_running_loop().time() + 0.1
            async with asyncio.timeout_at(deadline):
                return await run_speculative(spec_of(params, deadline), left, d, right, t, 3)
        raise AssertionError("no chain")

    chain = asyncio.run(main())
    assert (chain.finish, chain.error) == ("deadline", None)
    written = chain.turns[0].target
    assert written == FakeTokenizer().decode(greedy([1, 2], len(written or "")))


def test_pairs_that_cannot_are_told_why() -> None:
    words = Words(FakeTokenizer(), frozenset({EOS}))
    one, two = Tongues(words, words), Tongues(words, words, (None, None))  # type: ignore[arg-type]
    lane = InProcessLane(None, None, None)  # type: ignore[arg-type]
    assert isinstance(lane, Verifier) and verifier_of(lane, one) is lane
    with pytest.raises(InputError, match="shares a tokenizer"):
        verifier_of(lane, two)
    with pytest.raises(InputError, match="remote server"):
        verifier_of(ScriptedLane(0), one)  # type: ignore[arg-type]


# On the command line -----------------------------------------------------------------------------------------------


def test_the_command_writes_the_targets_chains(tmp_path: Path, problems: Path) -> None:
    found = {}
    for strategy in ("target", "speculative:proposal-tokens=3"):
        out = tmp_path / strategy
        assert cli.main(run_words(problems, out, "--strategy", strategy, "--plain")) == 0
        lines = [json.loads(line) for line in (out / "chains.jsonl").read_text().splitlines()]
        found[strategy] = {(c["problem_id"], c["chain"]): c for c in lines}
    assert len(found["target"]) == 4
    for place, chain in found["speculative:proposal-tokens=3"].items():
        other = found["target"][place]
        assert chain["turns"][0]["target"] == other["turns"][0]["target"]
        assert chain["accepted_tokens"] == chain["turns"][0]["draft_tokens"] <= chain["proposed_tokens"]
        assert chain.get("discarded_draft_tokens", 0) == chain["proposed_tokens"] - chain["accepted_tokens"]
        assert chain["target_passes"] >= chain["turns"][0]["target_tokens"]


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, problems: Path) -> None:
    said = fails(capsys, run_words(problems, tmp_path / "out", "--strategy", "speculative:proposal-tokens=0"))
    assert "proposal_tokens must be 1 or more, not 0" in said
