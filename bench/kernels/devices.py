"""What a device can do at best, and how long a call takes on it.

On a GPU a call is replayed in a CUDA graph, since a kernel below 100 microseconds would otherwise time Python. Calls go
round several sets of inputs, together larger than the caches where that is possible, so that inputs come from memory.
Providers take turns, and what is reported is the median of the rounds.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch

Call = Callable[[], object]
_SAMPLE_S = 0.004
"""A sample on the CPU lasts at least this long, so that the clock and the first call do not count."""
_GRAPH_CALLS = 16
"""Calls in a captured graph at least."""
_AWAKE_S = 0.2
"""How long a GPU is kept at work before a limit is measured: its clocks rise when it has something to do."""


@dataclass(frozen=True, slots=True)
class Facts:
    """A device and its limits as measured: bandwidth of memory and of the link to the host in bytes/s, products of
    bfloat16 matrices in FLOP/s; cache: bytes of the last level."""

    kind: str
    name: str
    bandwidth: float
    link: float
    peak: float
    cache: int


@dataclass(slots=True)
class Runner:
    """One provider ready to be timed: a call for each set of inputs. scope: entered around its calls."""

    name: str
    calls: Sequence[Call]
    scope: Callable[[], AbstractContextManager[object]] = nullcontext
    seconds: list[float] = field(default_factory=list)
    graph: bool = False

    def median(self) -> float:
        return statistics.median(self.seconds)


def measure(device: torch.device, size: int = 1 << 28, matrix: int = 4096) -> Facts:
    """Measure the limits of a device with arrays of `size` bytes and square matrices; a fraction of a second."""
    x = torch.ones(size // 4, device=device)
    y = torch.empty_like(x)
    host = torch.empty(size // 4, pin_memory=device.type == "cuda")
    a = torch.randn(matrix, matrix, device=device).bfloat16()
    b = a.T.contiguous()
    seconds = {
        "copy": _best(device, lambda: y.copy_(x)),
        "read": _best(device, lambda: x.sum()),
        "link": _best(device, lambda: host.copy_(x, non_blocking=True)),
        "product": _best(device, lambda: a @ b),
    }
    return Facts(
        kind=device.type,
        name=torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        bandwidth=max(2 * x.nbytes / seconds["copy"], x.nbytes / seconds["read"]),
        link=x.nbytes / seconds["link"],
        peak=2 * matrix**3 / seconds["product"],
        cache=_cache_bytes(device),
    )


def _best(device: torch.device, call: Call, rounds: int = 7) -> float:
    call()
    if device.type == "cuda":
        began = time.perf_counter()
        while time.perf_counter() < began + _AWAKE_S:
            call()
            synchronise(device)
    found = []
    for _ in range(rounds):
        synchronise(device)
        began = time.perf_counter()
        call()
        synchronise(device)
        found.append(time.perf_counter() - began)
    return min(found)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _cache_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [
        int(path.read_text().strip().removesuffix("K")) << 10
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    return max(sizes, default=32 << 20)


def input_sets(case_bytes: int, cache: int, budget: int = 1 << 31, most: int = 256) -> tuple[int, bool]:
    """(sets of inputs to go round, whether they are so large together that each comes from memory)."""
    wanted = -(-4 * cache // max(1, case_bytes))
    sets = max(1, min(wanted, most, budget // max(1, case_bytes)))
    return sets, sets >= wanted


def race(device: torch.device, runners: Sequence[Runner], rounds: int) -> dict[str, str]:
    """Time all runners in turns, `rounds` times each, into their `seconds` (of one call). Returns by name why a runner
    could not be made ready: it takes no part."""
    samples: list[tuple[Runner, Callable[[], float]]] = []
    failed: dict[str, str] = {}
    for runner in runners:
        try:
            samples.append((runner, _sampler(device, runner)))
        except Exception as error:  # of a peer, or of ours: the others are measured all the same
            failed[runner.name] = one_line(error)
    for _ in range(rounds):
        for runner, sample in samples:
            with runner.scope():
                runner.seconds.append(sample())
    return failed


def one_line(error: BaseException) -> str:
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0][:300] if said else 'no message'}"


def _sampler(device: torch.device, runner: Runner) -> Callable[[], float]:
    with runner.scope():
        for call in runner.calls:
            call()  # compiles, plans, fills caches
        return _cuda_sampler(device, runner) if device.type == "cuda" else _cpu_sampler(runner)


def _cpu_sampler(runner: Runner) -> Callable[[], float]:
    began = time.perf_counter()
    runner.calls[0]()
    repeats = max(1, round(_SAMPLE_S / max(1e-7, time.perf_counter() - began)))
    order = _round_robin(runner.calls)

    def sample() -> float:
        calls = [next(order) for _ in range(repeats)]
        began = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - began) / repeats

    return sample


def _round_robin(calls: Sequence[Call]) -> Iterator[Call]:
    while True:
        yield from calls


def _cuda_sampler(device: torch.device, runner: Runner) -> Callable[[], float]:
    calls = list(runner.calls) * -(-_GRAPH_CALLS // len(runner.calls))

    def eager() -> None:
        for call in calls:
            call()

    replay: Call = eager
    torch.cuda.synchronize(device)
    if not waits(calls[0]):  # what reads on the host cannot be captured; it is timed as it is
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            eager()
        replay, runner.graph = graph.replay, True
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample() -> float:
        start.record()
        replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / len(calls)

    return sample


def waits(call: Call) -> bool:
    """Whether the host waits for the GPU in a call. Found out before a capture and not by one: a capture that was
    broken off leaves torch's allocator, and its random numbers, as if it went on."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """The profiler's own library writes a line there at each start and each end."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def bytes_allocated(device: torch.device, call: Call) -> int:
    """Bytes that one call asks the allocator for, all together."""
    if device.type == "cuda":
        before = torch.cuda.memory_stats(device)["allocated_bytes.all.allocated"]
        call()
        return int(torch.cuda.memory_stats(device)["allocated_bytes.all.allocated"] - before)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _silent_stderr(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events() if profile.profiler is not None else []
    return sum(event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0)
