"""All chains of one problem, and their vote."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from atts_engine.pipeline.events import Event, Solution, SolutionEvent
from atts_engine.pipeline.gate import Gate
from atts_engine.pipeline.params import ATTSParams
from atts_engine.pipeline.records import Problem
from atts_engine.pipeline.strategies import Pair, Work, solve
from atts_engine.pipeline.task import PlainTask, Task
from atts_engine.pipeline.writer import Prompts


async def run_problem(
    pair: Pair,
    prompts: Prompts,
    problem: Problem,
    params: ATTSParams,
    conformal: Gate,
    emit: Callable[[Event], None],
    chains: Sequence[int] | None = None,
    priority: int = 0,
    deadline_s: float | None = None,
    task: Task | None = None,
) -> Solution:
    """Write the chains (all of them, or those numbered in `chains`) and vote. Those that still run `deadline_s` seconds
    after the call end where they are, with `finish` "deadline". priority: see `Lane.open`. task: None is `PlainTask`.

    Cancelling it cancels every chain and gives their pages back in both lanes. Errors are those of `solve`.
    """
    deadline = None if deadline_s is None else asyncio.get_running_loop().time() + deadline_s
    numbers = tuple(range(params.chains)) if chains is None else tuple(chains)
    work = Work(pair, prompts, problem, params, conformal, task or PlainTask(), emit, numbers, priority, deadline)
    solution = await solve(work)
    emit(SolutionEvent(solution))
    return solution
