"""Train the built-in pair, tiny-draft and tiny-target, on the register task.

    python examples/train_tiny_pair.py --out runs/tiny-pair

The target learns the task with four layers, grows to six, and then learns to find and redo wrong steps, with an
auxiliary head that says of each digit whether it is wrong (dropped afterwards). The draft is small and stopped early.
A run that was stopped goes on when the same command is given again. Stages are timed (CPU time per thread), so the
result depends on the machine's speed. Results: OUT/tiny_target and OUT/tiny_draft, as Hugging Face folders. About an
hour and a half on two CPU cores.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tiny_pair import checkpoint
from tiny_pair.data import Batch, Recipe, Stream
from tiny_pair.model import Llama, Shape, grow
from tiny_pair.optim import MuonAdamW
from tiny_pair.vocab import TOKENS
from torch import nn

WARM_UP_STEPS = 100
SAVE_EVERY_S = 60.0
AUX_WEIGHT = 0.5
AUX_POSITIVE = 4.0  # wrong digits are a few in a hundred


@dataclass(frozen=True)
class Stage:
    """One learning-rate cycle. ``share``: of the model's minutes. ``tap``: the block that feeds the auxiliary head,
    or None.
    """

    name: str
    shape: Shape
    share: float
    recipe: Recipe
    muon_lr: float
    adam_lr: float
    batch_tokens: int
    tap: int | None = None
    short_first: bool = False


def _target(layers: int) -> Shape:
    return Shape(vocab=len(TOKENS), width=128, layers=layers, heads=4, hidden=384)


DRAFT = Shape(vocab=len(TOKENS), width=64, layers=3, heads=4, hidden=192)
STAGES: dict[str, tuple[Stage, ...]] = {
    "target": (
        Stage("steps", _target(4), 0.139, Recipe(), 0.02, 3e-3, 4096, short_first=True),
        Stage("recovery", _target(6), 0.3244, Recipe(error_rate=0.3), 0.015, 2e-3, 4096, tap=4),
        Stage("repeat", _target(6), 0.1707, Recipe(error_rate=0.3), 0.015, 2e-3, 4096, tap=4),
        Stage("settle", _target(6), 0.0732, Recipe(error_rate=0.3), 0.01, 1.3e-3, 4096, tap=4),
        Stage("again", _target(6), 0.0976, Recipe(error_rate=0.3, emphasis=2.5), 0.01, 1.3e-3, 4096, tap=4),
        Stage("finish", _target(6), 0.0488, Recipe(error_rate=0.3, emphasis=2.5), 0.008, 1e-3, 4096, tap=4),
        Stage("polish", _target(6), 0.1463, Recipe(error_rate=0.3, emphasis=2.5), 0.012, 1.5e-3, 4096, tap=4),
    ),
    "draft": (
        Stage("steps", DRAFT, 0.6, Recipe(error_rate=0.08, corrects=False), 0.02, 3e-3, 4096, short_first=True),
        Stage("finish", DRAFT, 0.4, Recipe(error_rate=0.08, corrects=False), 0.015, 2e-3, 4096),
    ),
}


@dataclass(frozen=True)
class Options:
    out: Path
    device: str
    seed: int
    compile: bool


Report = Callable[[str, float, int, float], None]  # label, share done, step, smoothed loss


def rate(step: int, progress: float) -> float:
    """Learning-rate factor: linear warm-up, flat to half of the stage, then linear to 1%."""
    return min((step + 1) / WARM_UP_STEPS, 1.0) * (1.0 if progress < 0.5 else 1.0 - 0.99 * (progress - 0.5) / 0.5)


def loss_of(
    model: Llama, aux: nn.Linear | None, tap: int | None, batch: Batch, device: str
) -> tuple[torch.Tensor, float]:
    """Weighted next-token loss (plus the auxiliary head's), and its next-token part as a number for display."""
    logits, tapped = model(batch.ids.to(device), tap=-1 if tap is None else tap)
    weights = batch.weights.to(device).flatten()
    token = F.cross_entropy(logits.flatten(0, 1).float(), batch.labels.to(device).flatten(), reduction="none")
    loss = (token * weights).sum() / weights.sum()
    if aux is None:
        return loss, loss.item()
    digit = batch.digit.to(device)
    said = aux(tapped[digit]).squeeze(-1)
    wrong = F.binary_cross_entropy_with_logits(
        said, batch.wrong.to(device)[digit], pos_weight=torch.tensor(AUX_POSITIVE, device=device)
    )
    return loss + AUX_WEIGHT * wrong, loss.item()


def busy_seconds(device: str) -> float:
    """Time for the schedule: CPU time per thread, so that other work on the machine cannot eat the decay."""
    return time.process_time() / torch.get_num_threads() if device == "cpu" else time.monotonic()


class Trainer:
    """Trains one model through its stages; everything that a resumed run needs is in its checkpoint."""

    def __init__(self, name: str, minutes: float, options: Options, report: Report) -> None:
        self.name, self.minutes, self.options, self.report = name, minutes, options, report
        self.stages = STAGES[name]
        self.path = options.out / f"{name}.pt"
        self.stage, self.step, self.elapsed = 0, 0, 0.0
        self.aux: nn.Linear | None = None
        torch.manual_seed(options.seed)
        self._build(Llama(self.stages[0].shape))
        if self.path.exists():
            self._restore()

    def _build(self, model: Llama) -> None:
        stage = self.stages[self.stage]
        before = self.aux
        self.model = model.to(self.options.device)
        self.aux = None if stage.tap is None else nn.Linear(stage.shape.width, 1).to(self.options.device)
        if self.aux is not None and before is not None:
            self.aux.load_state_dict(before.state_dict())
        trained = nn.ModuleDict({"model": self.model} if self.aux is None else {"model": self.model, "aux": self.aux})
        self.optimiser = MuonAdamW(trained, stage.muon_lr, stage.adam_lr)
        if self.options.compile:
            for block in self.model.model.layers:
                block.compile(dynamic=True)

    def _restore(self) -> None:
        state = checkpoint.load(self.path, self.options.device)
        self.stage, self.step, self.elapsed = state["stage"], state["step"], state["elapsed"]
        if self.stage >= len(self.stages):
            return
        self._build(Llama(self.stages[self.stage].shape))
        self.model.load_state_dict(state["model"])
        if self.aux is not None:
            self.aux.load_state_dict(state["aux"])
        self.optimiser.load_state_dict(state["optimiser"])

    def save(self) -> None:
        """Checkpoint to resume from, and the model as it is now in its final format."""
        state = {"stage": self.stage, "step": self.step, "elapsed": self.elapsed, "model": self.model.state_dict()}
        state["aux"] = None if self.aux is None else self.aux.state_dict()
        state["optimiser"] = self.optimiser.state_dict()
        checkpoint.save(self.path, state)
        checkpoint.export(self.model, self.options.out / f"tiny_{self.name}")

    def run(self) -> None:
        """Train what is left. On Ctrl-C the state is saved before the interrupt goes on."""
        while self.stage < len(self.stages):
            try:
                self._run_stage()
            except KeyboardInterrupt:
                self.save()
                raise
            self.stage, self.step, self.elapsed = self.stage + 1, 0, 0.0
            if self.stage < len(self.stages):
                self._build(grow(self.model, self.stages[self.stage].shape.layers))
            self.save()

    def _streams(self, stage: Stage) -> tuple[Stream, Stream]:
        # A resumed run takes fresh problems: the step is part of the seed, so none is seen twice.
        seed = hash((self.options.seed, self.stage, self.step))
        short = replace(stage.recipe, steps=(2, 3))
        return Stream(stage.recipe, stage.batch_tokens, seed), Stream(short, stage.batch_tokens, seed + 1)

    def _run_stage(self) -> None:
        stage = self.stages[self.stage]
        budget = self.minutes * 60.0 * stage.share
        full, short = self._streams(stage)
        smooth, saved = 0.0, self.elapsed
        while self.elapsed < budget:
            begin = busy_seconds(self.options.device)
            progress = self.elapsed / budget
            batch = next(short if stage.short_first and progress < 0.25 else full)
            loss, shown = loss_of(self.model, self.aux, stage.tap, batch, self.options.device)
            self.optimiser.zero_grad()
            loss.backward()
            self.optimiser.step(rate(self.step, progress))
            self.step += 1
            smooth = shown if smooth == 0.0 else 0.98 * smooth + 0.02 * shown
            if self.elapsed - saved > SAVE_EVERY_S:
                self.save()
                saved = self.elapsed
            self.elapsed += busy_seconds(self.options.device) - begin
            self.report(f"{self.name}: {stage.name}", min(self.elapsed / budget, 1.0), self.step, smooth)


@contextmanager
def progress_report() -> Iterator[Report]:
    """A progress bar on a terminal that has rich; otherwise a plain line every 20 seconds."""
    if sys.stdout.isatty() and importlib.util.find_spec("rich") is not None:
        from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

        text = TextColumn("{task.description}")
        with Progress(text, BarColumn(), TextColumn("{task.percentage:3.0f}%"), TimeRemainingColumn()) as bar:
            tasks: dict[str, TaskID] = {}

            def show(label: str, done: float, step: int, loss: float) -> None:
                if label not in tasks:
                    tasks[label] = bar.add_task(label, total=1.0)
                bar.update(tasks[label], completed=done, description=f"{label} step {step} loss {loss:.4f}")

            yield show
        return
    shown = float("-inf")

    def line(label: str, done: float, step: int, loss: float) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown >= 20.0 or done >= 1.0:
            shown = now
            sys.stdout.write(f"{label} {done:6.1%} step {step} loss {loss:.4f}\n")
            sys.stdout.flush()

    yield line


def keep_memory() -> None:
    """Tell glibc to keep freed memory: activations are freed and taken again every step, and fresh pages are slow,
    above all on virtual machines that hand free pages back to their host."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            m_trim_threshold, m_mmap_max = -1, -4
            mallopt(m_mmap_max, 0)
            mallopt(m_trim_threshold, 2**31 - 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and the trained models")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--minutes-target", type=float, default=82.0)
    parser.add_argument("--minutes-draft", type=float, default=13.3)
    parser.add_argument("--only", choices=("target", "draft"), help="train one of the two")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true", help="do without torch.compile (no C++ compiler at hand)")
    args = parser.parse_args()
    keep_memory()
    options = Options(args.out, args.device, args.seed, not args.no_compile)
    minutes = {"target": args.minutes_target, "draft": args.minutes_draft}
    try:
        with progress_report() as report:
            for name in (args.only,) if args.only else ("target", "draft"):
                Trainer(name, minutes[name], options, report).run()
    except KeyboardInterrupt:
        sys.stderr.write(f"stopped; the state is in {args.out}: the same command goes on from there\n")
        return 130
    sys.stdout.write(f"done: {args.out}/tiny_target {args.out}/tiny_draft\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
