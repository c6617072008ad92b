"""How an engine drives its lanes changes no chain: ahead of the results or not, one thread or one each."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch

from atts_engine import AsyncEngine, Chain, EngineConfig, InputError
from atts_engine.models import load_model, resolve_device
from atts_engine.runtime import lane as lane_module
from tests.late import LateRunner
from tests.test_engine import CONFIG, PARAMS, content, frozen_calibrator, problems, with_engine


def chains(config: EngineConfig) -> tuple[list[Chain], dict[str, dict[str, float]], set[str]]:
    async def work(engine: AsyncEngine) -> Any:
        calibrator = frozen_calibrator()
        threads = {t.name for t in threading.enumerate() if t.name.startswith("atts-")}
        solutions = await asyncio.gather(*(engine.solve(p, PARAMS, calibrator=calibrator) for p in problems(2)))
        return [content(c) for s in solutions for c in s.chains], engine.stats(), threads

    found: tuple[list[Chain], dict[str, dict[str, float]], set[str]] = with_engine(work, config)
    return found


def test_overlap_and_threads_give_the_same_chains_to_the_bit() -> None:
    plain, stats, threads = chains(replace(CONFIG, lane_threads="one"))
    assert threads == {"atts-draft+target"}
    assert any(t.takeover for c in plain for t in c.turns)
    assert all(lane["discarded_rows"] == 0 for lane in stats.values())
    ahead, ahead_stats, _ = chains(replace(CONFIG, overlap=True))
    assert ahead == plain
    # Spans that end in EOS or a stop string, which nobody knows beforehand.
    assert ahead_stats["draft"]["discarded_rows"] > 0
    for lane in ("draft", "target"):
        for name in ("computed_tokens", "recomputed_tokens", "scored_tokens", "sampled_tokens"):
            assert ahead_stats[lane][name] == stats[lane][name]
    apart, _, threads = chains(replace(CONFIG, overlap=True, lane_threads="each"))
    assert threads == {"atts-draft", "atts-target"}
    assert apart == plain


def test_one_thread_goes_on_with_a_lane_while_the_other_ones_device_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that are not ready when they are asked for: the thread polls, and the chains are the same."""
    plain, _, _ = chains(CONFIG)
    monkeypatch.setattr(lane_module, "Runner", LateRunner)
    late, _, _ = chains(replace(CONFIG, overlap=True, lane_threads="one"))
    assert late == plain


def test_one_model_in_both_lanes_shares_weights_and_no_buffers() -> None:
    async def work(engine: AsyncEngine) -> Any:
        draft, target = engine.draft_model.decoder, engine.target_model.decoder
        assert draft is not target
        assert draft.lm_head is target.lm_head

    with_engine(work, replace(CONFIG, target=CONFIG.draft))


@pytest.mark.parametrize("parent_fails", [False, True])
def test_a_fork_that_happens_when_its_caller_has_gone_leaves_no_children(parent_fails: bool) -> None:
    async def work(engine: AsyncEngine) -> None:
        lane = engine._pair.target
        held, free = threading.Event(), threading.Event()

        def stand_still() -> None:
            held.set()
            free.wait(60)

        # The scheduler's thread stands still until the caller is gone; only then is the parent computed and forked.
        engine._lanes[1]._loop.post(stand_still)
        await asyncio.to_thread(held.wait, 60)
        parent = await lane.open([1] * 300)
        fork = asyncio.create_task(lane.fork(parent, 3))
        await asyncio.sleep(0)
        fork.cancel()
        await asyncio.gather(fork, return_exceptions=True)
        assert fork.cancelled()
        if parent_fails:
            await lane.close(parent)
        free.set()
        if not parent_fails:
            (other,) = await lane.fork(parent, 1)
            await lane.close(other)
            await lane.close(parent)

    # It looks whether any sequence is open when the work is done.
    with_engine(work)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")
@pytest.mark.parametrize("name", ["cuda", "cuda:7", "gpu", "mps", "meta"])
def test_a_device_that_is_not_there_is_named_with_what_there_is(name: str) -> None:
    for ask in (lambda: resolve_device(name), lambda: load_model("tiny-draft", name)):
        with pytest.raises(InputError, match=rf"no device '{name}': there is only cpu \(torch") as found:
            ask()
        assert "\n" not in str(found.value)


def test_settings_that_cannot_be_had_are_refused() -> None:
    with pytest.raises(InputError, match="lane_threads"):
        EngineConfig("tiny-draft", "tiny-target", lane_threads="many")
    with pytest.raises(InputError, match="paged_attention"):
        with_engine(lambda engine: asyncio.sleep(0), replace(CONFIG, graphs=True))
    with pytest.raises(InputError, match="no device"):
        with_engine(lambda engine: asyncio.sleep(0), replace(CONFIG, target_device="cuda:99"))
