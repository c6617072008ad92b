"""The search behind `atts bench --tune`: every candidate first gives the default's bits, and then its time."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from atts_engine.ops.tuning.table import Entry

Timer = Callable[[Callable[[], object], Mapping[str, int]], float]
"""(a launch, its settings) -> seconds."""
_WORTH = 0.98
"""A candidate replaces the default where it takes at most this share of its time: less is noise."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Launches of score_tokens to find settings for. rows: (most rows of a class, one size measured for each)."""

    vocab: int
    hidden: int
    dtype: torch.dtype
    rows: Sequence[int]


def candidates(kernel: str) -> Iterator[dict[str, int]]:
    """Every combination of the values that a table may hold."""
    from atts_triton.tuning import TUNABLE

    names = TUNABLE[kernel]
    for values in product(*names.values()):
        yield dict(zip(names, values, strict=True))


def score_tokens(problem: Problem, device: torch.device, timer: Timer, told: Callable[[str], None]) -> list[Entry]:
    """An entry for every class of rows where some candidate is worth it; `told` hears a line for each class.

    A candidate whose scores differ from the default's in one bit is dropped: a score must not depend on a table. One
    that does not compile or fit the device is dropped too.
    """
    g = torch.Generator(device).manual_seed(0)
    weight = torch.randn(problem.vocab, problem.hidden, generator=g, device=device).to(problem.dtype)
    weight.mul_(problem.hidden**-0.5)
    found, low = [], 1
    for rows in problem.rows:
        hidden = torch.randn(rows, problem.hidden, generator=g, device=device).to(problem.dtype)
        ids = torch.randint(0, problem.vocab, (rows,), generator=g, device=device)
        entry = _best(hidden, weight, ids, low, timer, told)
        found += [entry] if entry is not None else []
        low = rows + 1
    return found


def _best(
    hidden: Tensor, weight: Tensor, ids: Tensor, low: int, timer: Timer, told: Callable[[str], None]
) -> Entry | None:
    rows, (vocab, width) = hidden.shape[0], weight.shape
    default = _launch(hidden, weight, ids, {})
    wanted, base = default(), timer(default, {})
    timed: list[tuple[float, dict[str, int]]] = []
    dropped = 0
    for config in candidates("score_tokens"):
        launch = _launch(hidden, weight, ids, config)
        if _same_bits(launch, wanted):
            timed.append((timer(launch, config), config))
        else:
            dropped += 1
    timed.sort(key=lambda pair: pair[0])
    base = min(base, timer(default, {}))  # once more at the end: clocks drift during a search
    what = f"score_tokens T={rows} V={vocab} H={width} {_name(hidden.dtype)}"
    if not timed or timed[0][0] > _WORTH * base:
        told(f"{what}: the default stays, {base * 1e6:.1f} us ({dropped} candidates dropped)")
        return None
    best, config = timed[0]
    told(f"{what}: {config}, {best * 1e6:.1f} us; default {base * 1e6:.1f} us ({dropped} candidates dropped)")
    bounds = {"T": (low, rows), "V": (vocab, vocab), "H": (width, width)}
    others = tuple((other, 1e6 * time) for time, other in timed[1:4])
    return Entry(_name(hidden.dtype), bounds, config, 1e6 * best, others)


def _launch(hidden: Tensor, weight: Tensor, ids: Tensor, config: Mapping[str, int]) -> Callable[[], Tensor]:
    """score_tokens with these settings; the table in force is put back after every call."""
    import atts_triton
    from atts_triton.tuning import Choice, set_table

    table = {"score_tokens": (Choice(hidden.dtype, {}, config),)}

    def launch() -> Tensor:
        before = set_table(table)
        try:
            result: Tensor = atts_triton.score_tokens(hidden, weight, ids)
        finally:
            set_table(before)
        return result

    return launch


def _same_bits(launch: Callable[[], Tensor], wanted: Tensor) -> bool:
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    try:
        return torch.equal(launch(), wanted)
    except (CompilationError, OutOfResources, PTXASError):
        return False


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cuda_timer(launch: Callable[[], object], config: Mapping[str, int]) -> float:
    """Median seconds of a launch, replayed in a CUDA graph with the level-2 cache flushed before each."""
    cache = torch.empty(4 * torch.cuda.get_device_properties().L2_cache_size, dtype=torch.uint8, device="cuda")
    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    seconds = []
    for _ in range(15):
        cache.zero_()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return statistics.median(seconds)


def dry_timer(launch: Callable[[], object], config: Mapping[str, int]) -> float:
    """A made-up time that depends on the settings alone, for trying the search where there is no GPU."""
    return 1e-5 * (1 + abs(config.get("block_t", 128) - 32) / 32 + config.get("num_warps", 8) / 8)
