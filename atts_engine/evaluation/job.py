"""Many problems through one engine: a few in flight, every event to an observer, all that ends to a folder."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from atts_engine.backends.remote.address import Address, is_address
from atts_engine.conformal import Alarm, Calibrator, Monitored
from atts_engine.evaluation.decisions import in_force, learn_again, restore
from atts_engine.evaluation.folder import RunFolder
from atts_engine.evaluation.lanes import LaneUse
from atts_engine.evaluation.servers import ServerUse
from atts_engine.evaluation.solutions import Ballot, SavedSolution
from atts_engine.pipeline.events import ChainEvent, Event, Solution, SolutionEvent, TokensEvent, VerdictEvent
from atts_engine.pipeline.params import ATTSParams
from atts_engine.pipeline.records import Chain, Decision, Problem
from atts_engine.pipeline.task import PlainTask, Task
from atts_engine.pipeline.voting import tally, winner

TICK_S = 1 / 6
"""Time between two looks of an observer at the clock."""


@dataclass(frozen=True, slots=True)
class CutOff:
    """These chains of the problem will be begun anew, or not end at all: what was decided of them does not count."""

    problem_id: str
    chains: tuple[int, ...]


class Solver(Protocol):
    """What the job needs of an engine."""

    def generate(
        self,
        problem: Problem,
        params: ATTSParams,
        *,
        calibrator: Calibrator | None,
        chains: Sequence[int] | None,
        task: Task | None,
    ) -> AsyncGenerator[Event | CutOff, None]: ...

    def add_decision_listener(self, listener: Callable[[Decision], None]) -> Callable[[], None]: ...


class Observer(Protocol):
    """Somebody who watches a job. Called on the event loop's thread, in the order in which things happen."""

    def started(self, problem: Problem) -> None: ...

    def event(self, event: TokensEvent | VerdictEvent | ChainEvent) -> None: ...

    def finished(self, problem: Problem, chains: Sequence[Chain], *, restored: bool) -> None: ...

    def tick(self) -> None: ...


class Unwatched:
    """An observer of jobs that nobody looks at."""

    def started(self, problem: Problem) -> None:
        return None

    def event(self, event: TokensEvent | VerdictEvent | ChainEvent) -> None:
        return None

    def finished(self, problem: Problem, chains: Sequence[Chain], *, restored: bool) -> None:
        return None

    def tick(self) -> None:
        return None


@dataclass(frozen=True, slots=True)
class JobResult:
    """A strategy's chains over the problems, in order of (problem, chain), and its decision log.

    wall_s: seconds of this process; restored: chains of an earlier, interrupted run, which took none of them;
    alarms: of a monitored calibrator; lanes: what each did in this process, where it is known; servers: of the lanes
    that are elsewhere. ballots: of each problem, by its id. cut_off: decision_seq of decisions that the next one would
    discard.
    """

    strategy: str
    problems: tuple[Problem, ...]
    chains: tuple[Chain, ...]
    decisions: tuple[Decision, ...]
    wall_s: float
    restored: int
    alarms: tuple[Alarm, ...] = ()
    lanes: Mapping[str, LaneUse] = field(default_factory=dict)
    ballots: Mapping[str, Ballot] = field(default_factory=dict)
    servers: Mapping[str, ServerUse] = field(default_factory=dict)
    cut_off: tuple[int, ...] = ()

    def in_force(self) -> tuple[Decision, ...]:
        """The decisions of chains that were not cut off, in their order."""
        return tuple(d for d in in_force(self.decisions) if d.decision_seq not in self.cut_off)

    def of_problem(self, problem_id: str) -> tuple[Chain, ...]:
        """The problem's chains in order."""
        return tuple(c for c in self.chains if c.problem_id == problem_id)


def job_settings(
    draft: str,
    target: str,
    dtype: str,
    params: ATTSParams,
    calibration: dict[str, Any],
    problems: Sequence[Problem],
) -> dict[str, Any]:
    """All that decides what a run's chains are, as JSON. Devices and concurrency only decide how fast, and a server may
    have moved."""
    return {
        "format": "atts-run/1",
        "models": {"draft": _model(draft), "target": _model(target), "dtype": dtype},
        "params": {**asdict(params), "options": dict(params.options)},
        "calibration": calibration,
        "problems": {"count": len(problems), "sha256": problems_digest(problems)},
    }


def _model(name: str) -> str:
    if not is_address(name):
        return name
    address = Address.parse(name)
    return f"{address.kind}:{address.name}"


def problems_digest(problems: Sequence[Problem]) -> str:
    """sha256 hex over ids, texts and gold answers in order."""
    text = "\n".join(json.dumps([p.id, p.problem, p.answer]) for p in problems)
    return hashlib.sha256(text.encode()).hexdigest()


async def run_job(
    engine: Solver,
    problems: Sequence[Problem],
    params: ATTSParams,
    observer: Observer,
    *,
    calibrator: Calibrator | None = None,
    folder: RunFolder | None = None,
    concurrency: int = 8,
    task: Task | None = None,
) -> JobResult:
    """Solve the problems with `concurrency` of them in flight, and hand back every chain.

    Chains that an earlier run saved in `folder` are not written again, and its decisions on them are learnt first;
    those on chains that it had not ended are discarded. Where the chains of a problem depend on one another
    (`Settings.per_chain`), a problem without an answer is begun anew.
    The first error of the engine ends the job and is raised as it came; a chain's own error is recorded on the chain.
    `folder` stays open.
    """
    start = deepcopy(calibrator)
    if folder is not None and calibrator is not None:
        restore(calibrator, folder.restored.decisions, folder.restored.cut_off)
    work = _Work(engine, params, observer, calibrator, start, folder, task or PlainTask())
    stop_listening = engine.add_decision_listener(work.decided)
    began = time.perf_counter()
    queue = iter(problems)
    try:
        async with asyncio.TaskGroup() as group:
            clock = group.create_task(_tick(observer))
            unsaved = group.create_task(work.unsaved())
            workers = [group.create_task(work.run(queue)) for _ in range(min(concurrency, len(problems)))]
            await asyncio.gather(*workers)
            clock.cancel()
            unsaved.cancel()
    except BaseExceptionGroup as failures:
        raise _first(failures) from None
    finally:
        stop_listening()
    observer.tick()
    chains = sorted(work.chains, key=lambda c: (c.problem_index, c.chain))
    return JobResult(
        params.strategy,
        tuple(problems),
        tuple(chains),
        work.log(),
        time.perf_counter() - began,
        len(folder.restored.chains) if folder else 0,
        tuple(calibrator.alarms) if isinstance(calibrator, Monitored) else (),
        ballots={problem.id: work.ballots[problem.id] for problem in problems},
        cut_off=work.discards,
    )


class _Work:
    """What the workers of one job share; all of them run on one event loop."""

    def __init__(
        self,
        engine: Solver,
        params: ATTSParams,
        observer: Observer,
        calibrator: Calibrator | None,
        start: Calibrator | None,
        folder: RunFolder | None,
        task: Task,
    ) -> None:
        """start: the calibrator as it stood before the first decision in the log."""
        self.chains: list[Chain] = []
        self.ballots: dict[str, Ballot] = {}
        self._engine = engine
        self._params = params
        self._observer = observer
        self._calibrator = calibrator
        self._start = start
        self._folder = folder
        self._task = task
        self._decisions: list[Decision] = []
        self.discards = folder.restored.cut_off if folder else ()
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._per_chain = params.settings.per_chain
        self._saved: dict[str, dict[int, Chain]] = {}
        for chain in folder.restored.chains if folder else ():
            self._saved.setdefault(chain.problem_id, {})[chain.chain] = chain
        self._answered = {s.problem_id: s for s in folder.restored.solutions} if folder else {}

    async def run(self, queue: Iterator[Problem]) -> None:
        for problem in queue:
            saved = self._saved.get(problem.id, {})
            answered = self._answered.get(problem.id)
            missing = [number for number in range(self._params.chains) if number not in saved]
            if answered is not None and all(number in saved for number in answered.chains):
                chains = {number: saved[number] for number in answered.chains}
                self._finish(problem, chains, answered.ballot, restored=True)
            elif self._per_chain and not missing:
                # Killed between its last chain and its answer.
                ballot = self._vote(saved.values())
                self._save(problem, saved, ballot)
                self._finish(problem, saved, ballot, restored=True)
            else:
                await self._solve(problem, saved, missing)

    async def _solve(self, problem: Problem, saved: dict[int, Chain], missing: list[int]) -> None:
        self._observer.started(problem)
        numbers = missing if self._per_chain else None
        stream = self._engine.generate(
            problem, self._params, calibrator=self._calibrator, chains=numbers, task=self._task
        )
        solution: Solution | None = None
        async with aclosing(stream) as events:
            async for event in events:
                if isinstance(event, SolutionEvent):
                    solution = event.solution
                    continue
                if isinstance(event, CutOff):
                    self._cut_off(event)
                    continue
                if isinstance(event, ChainEvent) and self._folder is not None:
                    self._folder.add_chain(event.chain)
                self._observer.event(event)
        assert solution is not None, "an engine's last event is the solution"
        # Those that an earlier process saved stand as they are.
        chains = {chain.chain: chain for chain in solution.chains}
        chains |= {number: chain for number, chain in saved.items() if self._per_chain or number in chains}
        ballot = Ballot(solution.answer, solution.votes)
        if self._per_chain:
            ballot = self._vote(chains.values())
        took = None if self._per_chain and saved else solution.duration_s
        ballot = replace(ballot, extra=solution.extra, duration_s=took)
        self._save(problem, chains, ballot)
        self._finish(problem, chains, ballot, restored=False)

    def _save(self, problem: Problem, chains: Iterable[int], ballot: Ballot) -> None:
        if self._folder is not None:
            self._folder.add_solution(SavedSolution(problem.id, tuple(sorted(chains)), ballot))

    def _vote(self, chains: Iterable[Chain]) -> Ballot:
        votes = tally(chains, self._params.vote, self._task.equal)
        return Ballot(winner(votes), votes)

    def decided(self, decision: Decision) -> None:
        decision = replace(decision, discards=self.discards)
        if self._folder is None:
            self._decisions.append(decision)
        else:
            try:
                self._folder.add_decision(decision)
            except OSError as error:
                # The engine that calls this can do nothing about it.
                if not self._failed.done():
                    self._failed.set_exception(error)
        self.discards = ()

    def log(self) -> tuple[Decision, ...]:
        """The decision log so far."""
        return tuple(self._decisions) if self._folder is None else self._folder.decisions()

    def _cut_off(self, event: CutOff) -> None:
        """Have the next decision discard those on chains that were cut off, and the calibrator unlearn them."""
        known = in_force(self.log())
        gone = {d.decision_seq for d in known if d.problem == event.problem_id and d.chain in event.chains}
        gone |= set(self.discards)
        self.discards = tuple(sorted(gone))
        if gone and self._calibrator is not None and self._start is not None:
            learn_again(self._calibrator, self._start, (d for d in known if d.decision_seq not in gone))

    async def unsaved(self) -> None:
        """Raise the `OSError` of the first decision that cannot be saved, when there is one."""
        await self._failed

    def _finish(self, problem: Problem, chains: Mapping[int, Chain], ballot: Ballot, *, restored: bool) -> None:
        ordered = [chains[number] for number in sorted(chains)]
        self.chains += ordered
        self.ballots[problem.id] = ballot
        self._observer.finished(problem, ordered, restored=restored)


async def _tick(observer: Observer) -> None:
    while True:
        await asyncio.sleep(TICK_S)
        observer.tick()


def _first(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = failures
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
