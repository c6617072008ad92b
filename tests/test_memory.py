"""Pool sizes from free memory, and the engine in pools too small: the same chains whatever is done with the pages."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from atts_engine import AsyncEngine, EngineConfig, InputError
from atts_engine.runtime import memory
from atts_engine.runtime.memory import available_bytes, pool_tokens
from atts_engine.runtime.runner import _zeros
from tests.test_engine import CONFIG, PARAMS, content, frozen_calibrator, problems, with_engine

CPU, GPU, OTHER = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)


def test_lanes_on_one_device_hold_the_same_tokens_and_others_have_their_own() -> None:
    assert pool_tokens((GPU, GPU), (30, 70), (10_000, 10_000), 0.5) == [50, 50]
    assert pool_tokens((GPU, OTHER), (30, 70), (10_000, 8_400), 0.5) == [166, 60]
    assert pool_tokens((CPU, GPU), (30, 70), (4_000, 7_000), None) == [33, 85]
    with pytest.raises(InputError, match="kv_memory_fraction"):
        pool_tokens((CPU, CPU), (100, 100), (300, 300), 0.5)


def test_free_memory_is_what_the_container_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, used = tmp_path / "limit", tmp_path / "used"
    monkeypatch.setattr(memory, "_CGROUPS", ((str(limit), str(used)),))
    host = available_bytes(CPU)
    assert host > 64 << 20
    limit.write_text("9000000\n")
    used.write_text("1000000\n")
    assert available_bytes(CPU) == 8_000_000
    limit.write_text("max\n")
    assert available_bytes(CPU) > 64 << 20


def test_an_engine_takes_its_fraction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atts_engine.assembly.available_bytes", lambda device: 100 << 20)

    async def sizes(config: EngineConfig) -> list[tuple[int, int]]:
        async with await AsyncEngine.create(config) as engine:
            return [
                (core.pool.capacity * 16, core.host_pool.capacity * 16)
                for core in (lane.core for lane in engine._lanes)
            ]

    tokens = (100 << 20) // 10 // (1536 + 6144)
    assert (
        asyncio.run(sizes(replace(CONFIG, kv_tokens=None, kv_memory_fraction=0.1))) == [(-(-tokens // 16) * 16, 0)] * 2
    )
    assert asyncio.run(sizes(replace(CONFIG, preemption="swap", kv_tokens=160))) == [(160, 160)] * 2
    assert asyncio.run(sizes(replace(CONFIG, preemption="swap", host_kv_tokens=32))) == [(16384, 32)] * 2
    assert asyncio.run(sizes(replace(CONFIG, preemption="recompute", host_kv_tokens=32))) == [(16384, 0)] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pool_on_the_cpu_is_zero_and_aligned(dtype: torch.dtype) -> None:
    for shape in ((2, 2, 5, 4, 1, 3), (0, 2, 2, 4, 1, 3), (1,)):
        made = _zeros(shape, dtype, CPU)
        assert torch.equal(made, torch.zeros(shape, dtype=dtype)) and made.dtype == dtype
        assert made.numel() == 0 or made.data_ptr() % 64 == 0


def test_chains_are_the_same_to_the_bit_whatever_is_done_with_their_pages() -> None:
    async def work(engine: AsyncEngine) -> tuple[object, dict[str, dict[str, float]]]:
        found = problems(3)
        solutions = await asyncio.gather(*(engine.solve(p, PARAMS, calibrator=frozen_calibrator()) for p in found))
        return [content(c) for s in solutions for c in s.chains], engine.stats()

    wanted, stats = with_engine(work)
    assert all(lane["preemptions"] == 0 for lane in stats.values())
    small = replace(CONFIG, kv_tokens=700, page_size=8)
    again: dict[tuple[str, int | None], float] = {}
    for preemption, host in (("swap", 8000), ("swap", 100), ("recompute", None), ("auto", 400)):
        chains, stats = with_engine(work, replace(small, preemption=preemption, host_kv_tokens=host))
        assert chains == wanted
        lanes = stats.values()
        assert sum(lane["preemptions"] for lane in lanes) > 0
        assert all(lane["preemptions"] == lane["preemptions_swap"] + lane["preemptions_recompute"] for lane in lanes)
        if preemption != "auto":
            assert (sum(lane["swapped_in_pages"] for lane in lanes) > 0) is (preemption == "swap")
        again[preemption, host] = sum(lane["recomputed_tokens"] for lane in lanes)
    # Nothing but what sequences share, which does not move: that is dropped when it is all that one holds.
    assert again["swap", 8000] < again["recompute", None] / 2
    assert again["swap", 100] > 0


def test_settings_are_checked() -> None:
    for bad in (
        {"kv_memory_fraction": 0.0},
        {"kv_memory_fraction": 1.5},
        {"preemption": "drop"},
        {"host_kv_tokens": -1},
        {"host_kv_tokens": 0, "preemption": "swap"},
    ):
        with pytest.raises(InputError, match=next(iter(bad))):
            replace(CONFIG, **bad)  # type: ignore[arg-type]
