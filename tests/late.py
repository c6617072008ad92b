"""A runner that is late: what was launched runs only when its results are wanted, in the order of the launches.

A GPU behind its host behaves so. Whoever frees a page too early, reads a token before it was drawn or wipes what is
still to be written is found out on the CPU.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch

from atts_engine.runtime.batch import arrays_of, draws_of
from atts_engine.runtime.runner import Pending, Runner, StepOutput
from atts_engine.runtime.scheduler import Step


class LatePending:
    """Implements what a lane and the next step ask of a `Pending`. owners: pages that the step writes, and for whom."""

    def __init__(self, runner: LateRunner, step: Step, page_size: int) -> None:
        self.step = step
        self.owners = {
            work.seq.table.pages[position // page_size]: work.seq.id
            for work in step.work
            for position in range(work.start, work.start + work.count)
        }
        self.rows = {w.seq.id: i for i, w in enumerate(draws_of(step))}
        self.done: Pending | None = None
        self._runner = runner
        self._asked = 0

    @property
    def sampled(self) -> torch.Tensor | None:
        assert self.done is not None, "a step ran before the one that it depends on"
        return self.done.sampled

    def ready(self) -> bool:
        """Not at the first time of asking."""
        self._asked += 1
        return self._asked > 1

    def collect(self) -> StepOutput:
        while self.done is None:
            self._runner.queue.popleft()()
        return self.done.collect()


class LateRunner(Runner):
    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.queue: deque[Callable[[], None]] = deque()
        self._executing = False

    def launch(self, step: Step, before: Pending | None) -> Pending:
        arrays = arrays_of(step, before.rows if before is not None else {})
        assert (arrays.ids >= 0).all()
        pending = LatePending(self, step, self.kv.shape[3])
        if isinstance(before, LatePending):
            for page, owner in pending.owners.items():
                assert before.owners.get(page, owner) == owner, "a page went to somebody else in flight"

        def run() -> None:
            self._executing = True
            pending.done = self.execute(step, arrays, before)
            self._executing = False

        self.queue.append(run)
        return pending  # type: ignore[return-value]

    def move(self, step: Step) -> None:
        # Called by `execute` too, which is in its turn already.
        move = super().move
        if self._executing:
            move(step)
        else:
            self.queue.append(lambda: move(step))

    def wipe(self, pages: list[int]) -> None:
        wipe = super().wipe
        self.queue.append(lambda: wipe(pages))


def fake_capture(work: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
    """A graph without a GPU: repeats a Python function into the same tensor."""
    output = work().clone()
    return lambda: output.copy_(work()), output
