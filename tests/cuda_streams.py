"""Streams, events and graphs of CUDA devices as queues of Python functions, which run late and in any legal order.

What is queued on one stream runs in the order in which it was queued; what is queued on two streams runs in any order
that their events allow. An `Order` chooses one: `Late`, `Early`, `Ahead`, or `Shuffled` by a seed. Each piece of work
runs as a whole: two kernels never overlap, their stores are visible at once, and nothing takes time. So a wrong order
is found, and neither a race inside a kernel nor one between two halves of two kernels.

Beside that every access is checked against the order in which it was queued: two pieces of work that touch the same
allocation, one of them writing, with nothing that orders them, are a race whatever order was run (`Machine.reports`).
What the host has waited for, or was told has been, comes before all that it queues afterwards. Allocations are told
apart, parts of one are not; host threads count as one; what the host itself reads and writes is not seen here.

`tests.cuda_tensors` puts tensors on such devices.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

Clock = dict[int, int]
"""For each stream, by number, how many of its pieces of work are known to have been before."""

_POLLED = 4
"""Questions, with nothing queued between them, from which on the host is taken to poll."""
_MEANWHILE = 16
"""Pieces of work that run between two questions of a host that polls."""


class Mark(NamedTuple):
    """A place in a stream: behind its first `count` pieces of work. clock: all that is before it."""

    stream: Stream
    count: int
    clock: Clock

    @property
    def reached(self) -> bool:
        return self.stream.ran >= self.count


@dataclass(slots=True, eq=False)
class Memory:
    """One allocation, on a device or page-locked on the host. stream: whose it is again when it is freed; spoil: writes
    nonsense over it; pool: of graphs, where a capture allocated it."""

    spoil: Callable[[], object]
    stream: Stream | None = None
    pool: Pool | None = None
    recorded: set[Stream] = field(default_factory=set)
    """Other streams that `record_stream` named."""
    written: tuple[Stream, int, str] | None = None
    """By the last write: the stream, which piece of its work, and its name."""
    read: dict[Stream, tuple[int, str]] = field(default_factory=dict)
    """The last read on each stream since then."""


@dataclass(slots=True)
class Work:
    name: str
    run: Callable[[], object]
    reads: Sequence[Memory] = ()
    writes: Sequence[Memory] = ()
    waits: Sequence[Mark] = ()


class Pool:
    """Memory of captured graphs. What was freed inside a capture is taken again by any graph of the pool."""

    def __init__(self) -> None:
        self.free: list[Memory] = []


class Stream:
    """Stands for `torch.cuda.Stream`. device: its number. priority is taken and has no effect."""

    def __init__(self, owner: Machine, device: int = 0, priority: int = 0) -> None:
        self.number = len(owner.streams)
        self.device = device
        self.priority = priority
        self.queue: deque[Work] = deque()
        self.ran = 0
        self.capture: Graph | None = None
        self._owner = owner
        self._clock: Clock = {}
        owner.streams.append(self)

    @property
    def cuda_stream(self) -> int:
        return self.number

    @property
    def issued(self) -> int:
        return self.ran + len(self.queue)

    @property
    def ready(self) -> bool:
        """Whether its next piece of work may run."""
        return bool(self.queue) and all(mark.reached for mark in self.queue[0].waits)

    def add(self, work: Work) -> None:
        _join(self._clock, self._owner.known)
        self._clock[self.number] = self.issued + 1
        self.queue.append(work)
        for memory in work.reads:
            self._after_write(memory, work.name)
            memory.read[self] = self.issued, work.name
        for memory in work.writes:
            self._after_write(memory, work.name)
            for stream, (count, name) in memory.read.items():
                self._check(stream, count, f"{work.name} writes what {name} reads")
            memory.written, memory.read = (self, self.issued, work.name), {}

    def _after_write(self, memory: Memory, name: str) -> None:
        if memory.written is not None:
            stream, count, writer = memory.written
            self._check(stream, count, f"{name} touches what {writer} writes")

    def _check(self, stream: Stream, count: int, what: str) -> None:
        if self._clock.get(stream.number, 0) < count:
            self._owner.report(f"race: {what}, streams {self.number} and {stream.number}")

    @property
    def mark(self) -> Mark:
        """Behind all that is queued now."""
        return Mark(self, self.issued, dict(self._clock))

    def wait_event(self, event: Event) -> None:
        if self.capture is not None:
            raise RuntimeError("an event inside a capture is not modelled")
        if event.mark is not None:
            self.add(Work("wait for an event", lambda: None, waits=[event.mark]))
            _join(self._clock, event.mark.clock)

    def wait_stream(self, stream: Stream) -> None:
        self.wait_event(stream.record_event())

    def record_event(self, event: Event | None = None) -> Event:
        event = Event(self._owner) if event is None else event
        event.record(self)
        return event

    def synchronize(self) -> None:
        self._owner.wait(self.mark)

    def query(self) -> bool:
        return self._owner.asked(self.mark)

    def step(self) -> None:
        work = self.queue.popleft()
        self.ran += 1
        try:
            work.run()
        except Exception as error:
            self._owner.report(f"fault: {work.name}: {type(error).__name__}: {error}")


class Event:
    """Stands for `torch.cuda.Event`; the time between two of them is 0."""

    def __init__(self, owner: Machine, enable_timing: bool = False) -> None:
        self.mark: Mark | None = None
        self._owner = owner
        self._timing = enable_timing

    def record(self, stream: Stream | None = None) -> None:
        stream = self._owner.current if stream is None else stream
        if stream.capture is not None:
            raise RuntimeError("an event inside a capture is not modelled")
        if self.mark is not None and self.mark.stream.device != stream.device:
            raise RuntimeError("an event belongs to the device on which it was recorded first")
        self.mark = stream.mark

    def wait(self, stream: Stream | None = None) -> None:
        (self._owner.current if stream is None else stream).wait_event(self)

    def query(self) -> bool:
        return self.mark is None or self._owner.asked(self.mark)

    def synchronize(self) -> None:
        if self.mark is not None:
            self._owner.wait(self.mark)

    def elapsed_time(self, end: Event) -> float:
        for event in (self, end):
            if not event._timing or event.mark is None or not event.mark.reached:
                raise RuntimeError("both events must be recorded, passed and made with enable_timing")
        return 0.0


class Graph:
    """Stands for `torch.cuda.CUDAGraph`: what was queued on one stream during a capture, queued again by a replay."""

    def __init__(self, owner: Machine) -> None:
        self.works: list[Work] = []
        self.pool = Pool()
        self._owner = owner

    def replay(self) -> None:
        # Whatever a capture freed holds anything by now: another graph of the pool may have run.
        free = list(self.pool.free)
        self._owner.put(Work("reuse of graph memory", lambda: [memory.spoil() for memory in free], writes=free))
        for work in self.works:
            self._owner.put(work)


class Order(Protocol):
    """Chooses among the legal orders."""

    def idle(self, machine: Machine) -> None:
        """The host does something: the device may get on."""

    def pick(self, ready: list[Stream], needed: Stream) -> Stream:
        """The host waits: which stream runs its next piece of work. needed: one that it waits for; it is ready."""


class Late:
    """Nothing runs before the host waits for it, and then what it waits for and no more."""

    def idle(self, machine: Machine) -> None:
        return None

    def pick(self, ready: list[Stream], needed: Stream) -> Stream:
        return needed


class Early:
    """Everything runs as soon as it may."""

    def idle(self, machine: Machine) -> None:
        while ready := machine.ready:
            ready[0].step()

    def pick(self, ready: list[Stream], needed: Stream) -> Stream:
        return needed


class Ahead:
    """Nothing runs before the host waits, and then all that it does not wait for comes first."""

    def idle(self, machine: Machine) -> None:
        return None

    def pick(self, ready: list[Stream], needed: Stream) -> Stream:
        return next((stream for stream in ready if stream is not needed), needed)


class Shuffled:
    """By a seed: how far the device gets meanwhile, and how much one stream is ahead of another, change at random."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._pace = self._random.choice([0.02, 0.3, 1.0])
        self._haste: dict[int, float] = {}

    def idle(self, machine: Machine) -> None:
        while self._random.random() < self._pace / (1 + self._pace) and (ready := machine.ready):
            self._one_of(ready).step()

    def pick(self, ready: list[Stream], needed: Stream) -> Stream:
        return self._one_of(ready)

    def _one_of(self, ready: list[Stream]) -> Stream:
        if len(ready) == 1:
            return ready[0]
        for stream in ready:
            if stream.number not in self._haste or self._random.random() < 0.02:
                self._haste[stream.number] = self._random.choice([0.02, 1.0, 50.0])
        return self._random.choices(ready, [self._haste[stream.number] for stream in ready])[0]


class Machine:
    """The streams of some devices, what the host knows of them, and what went wrong (`reports`)."""

    def __init__(self, order: Order, devices: int = 1) -> None:
        self.lock = threading.RLock()
        self._order = order
        self.streams: list[Stream] = []
        self.defaults = [Stream(self, device) for device in range(devices)]
        self.known: Clock = {}
        """What the host has waited for."""
        self.reports: list[str] = []
        self._thread = threading.local()
        self._asked = 0
        """Questions since work was queued last."""

    def report(self, what: str) -> None:
        if what not in self.reports:
            self.reports.append(what)

    @property
    def device(self) -> int:
        """The calling thread's current one."""
        return getattr(self._thread, "device", 0)

    @property
    def current(self) -> Stream:
        """The calling thread's current stream on its current device."""
        return self.current_on(self.device)

    def current_on(self, device: int) -> Stream:
        return getattr(self._thread, f"stream{device}", self.defaults[device])

    def new_stream(self, device: int | None = None, priority: int = 0) -> Stream:
        return Stream(self, self.device if device is None else device, priority)

    def new_event(self, enable_timing: bool = False) -> Event:
        return Event(self, enable_timing)

    @contextmanager
    def on(self, stream: Stream | None) -> Iterator[None]:
        """Makes it the current stream of its device, and that the current device."""
        stream = self.current if stream is None else stream
        device, before = self.device, self.current_on(stream.device)
        self._become(stream.device, stream)
        try:
            yield
        finally:
            self._become(device, before)

    @contextmanager
    def on_device(self, device: int) -> Iterator[None]:
        with self.on(self.current_on(device)):
            yield

    def _become(self, device: int, stream: Stream) -> None:
        self._thread.device = device
        setattr(self._thread, f"stream{stream.device}", stream)

    @contextmanager
    def no_waiting(self) -> Iterator[None]:
        """Where the calling thread raises instead of waiting for the device."""
        before = getattr(self._thread, "may_not_wait", False)
        self._thread.may_not_wait = True
        try:
            yield
        finally:
            self._thread.may_not_wait = before

    @property
    def ready(self) -> list[Stream]:
        return [stream for stream in self.streams if stream.ready]

    def put(self, work: Work, device: int | None = None) -> None:
        """Queue work on the device's current stream, or record it where that captures."""
        with self.lock:
            stream = self.current_on(self.device if device is None else device)
            if stream.capture is not None:
                stream.capture.works.append(work)
                return
            stream.add(work)
            self._asked = 0
            self._order.idle(self)

    def free(self, memory: Memory) -> None:
        """The last reference is gone. As in torch's allocator the memory is its stream's at once: whatever is queued
        there from now on may write it. Inside a capture it is the graph's. Nothing runs here: this may be called
        anywhere."""
        with self.lock:
            stream = memory.stream
            assert stream is not None
            work = Work("reuse of freed memory", memory.spoil, writes=[memory])
            if memory.pool is not None:
                memory.pool.free.append(memory)
                if stream.capture is not None:
                    stream.capture.works.append(work)
            else:
                for other in memory.recorded:
                    stream.wait_stream(other)
                stream.add(work)

    def wait(self, mark: Mark) -> None:
        """The host waits until a stream has come to a mark."""
        with self.lock:
            if getattr(self._thread, "may_not_wait", False):
                raise RuntimeError("the host would wait for the device here")
            if self.current.capture is not None:
                raise RuntimeError("operation not permitted when stream is capturing")
            self._reach(mark)
            _join(self.known, mark.clock)

    def synchronize(self, device: int | None = None) -> None:
        """Waits for all streams of a device; None: the current one."""
        device = self.device if device is None else device
        with self.lock:
            for stream in self.streams:
                if stream.device == device:
                    stream.synchronize()

    def asked(self, mark: Mark) -> bool:
        """Whether a stream has come to a mark. Asking does not wait, but who polls hears yes in the end."""
        with self.lock:
            self._order.idle(self)
            if mark.reached:
                _join(self.known, mark.clock)
                return True
            self._asked += 1
            for _ in range(_MEANWHILE if self._asked >= _POLLED else 0):
                if not mark.reached:
                    self._order.pick(self.ready, _needed(mark)).step()
            return False

    @contextmanager
    def capture(self, graph: Graph, pool: Pool | None = None, stream: Stream | None = None) -> Iterator[None]:
        self.synchronize()
        stream = self.new_stream() if stream is None else stream
        graph.pool = graph.pool if pool is None else pool
        with self.on(stream):
            stream.capture = graph
            try:
                yield
            finally:
                stream.capture = None

    def _reach(self, mark: Mark) -> None:
        while not mark.reached:
            self._order.pick(self.ready, _needed(mark)).step()


def _needed(mark: Mark) -> Stream:
    """A stream that can run now and must before the mark is reached."""
    while not mark.stream.ready:
        mark = next(wait for wait in mark.stream.queue[0].waits if not wait.reached)
    return mark.stream


def _join(clock: Clock, other: Clock) -> None:
    for number, count in other.items():
        clock[number] = max(clock.get(number, 0), count)
