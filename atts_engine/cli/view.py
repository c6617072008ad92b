"""How a running job is shown: a moving picture on a terminal, one line a finished problem elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, TextIO

from atts_engine.cli.progress import Finished, Progress
from atts_engine.cli.tables import count, is_live, percent, seconds
from atts_engine.pipeline.events import ChainEvent, TokensEvent, VerdictEvent
from atts_engine.pipeline.records import Chain, Problem

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text


@dataclass(frozen=True, slots=True)
class Heading:
    """What is said of a job above its progress."""

    strategy: str
    draft: str
    target: str
    alpha: float
    detail: str


class View(Protocol):
    """An observer of one job that is entered before it and left after it."""

    def started(self, problem: Problem) -> None: ...

    def event(self, event: TokensEvent | VerdictEvent | ChainEvent) -> None: ...

    def finished(self, problem: Problem, chains: Sequence[Chain], *, restored: bool) -> None: ...

    def notice(self, text: str) -> None:
        """Something the user should know, said once."""
        ...

    def tick(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def make_view(heading: Heading, progress: Progress, stream: TextIO, plain: bool) -> View:
    """The moving view where `stream` can show it, else plain lines."""
    return LiveView(heading, progress, stream) if is_live(stream, plain) else PlainView(heading, progress, stream)


class PlainView:
    """One line for each finished problem, no control codes."""

    def __init__(self, heading: Heading, progress: Progress, stream: TextIO) -> None:
        self.progress = progress
        self._heading = heading
        self._stream = stream

    def __enter__(self) -> Self:
        h = self._heading
        self._line(f"{h.strategy}: {h.draft} -> {h.target}, alpha {h.alpha:g}, {h.detail}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def started(self, problem: Problem) -> None:
        self.progress.start(problem)

    def event(self, event: TokensEvent | VerdictEvent | ChainEvent) -> None:
        self.progress.take(event)

    def finished(self, problem: Problem, chains: Sequence[Chain], *, restored: bool) -> None:
        done = self.progress.finish(problem, chains, restored)
        width = len(str(self.progress.problems))
        self._line(f"[{self.progress.problems_done:>{width}}/{self.progress.problems}] {describe(done)}")

    def notice(self, text: str) -> None:
        self._line(f"! {text}")

    def tick(self) -> None:
        return None

    def _line(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()


def describe(done: Finished) -> str:
    """A finished problem in one line."""
    answer = "no answer" if done.answer is None else f"answer {done.answer}"
    parts = [f"{done.problem.id}: {answer}"]
    if done.right is not None:
        mark = "right" if done.answer_right else f"wrong (gold {done.problem.answer})"
        parts[0] += f", {mark}"
        parts.append(f"{done.right}/{done.chains} chains right")
    if done.verdicts:
        parts.append(f"{done.takeovers}/{done.verdicts} spans taken over")
    if done.errors:
        parts.append(f"{done.errors} chains failed")
    parts.append("saved earlier" if done.seconds is None else seconds(done.seconds))
    return "; ".join(parts)


STYLES = {"draft": "#3b8eea", "target": "#e5933a", "kept": "green", "taken": "bold magenta"}
LABEL = 20


class LiveView:
    """The moving picture: bars, the takeover rate against alpha, and a few chains as they are written."""

    def __init__(self, heading: Heading, progress: Progress, stream: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live

        self.progress = progress
        self._heading = heading
        self._console = Console(file=stream)
        # Redrawn by tick() on the event loop's thread, which is the one that changes the state it draws.
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._slots: list[tuple[str, int]] = []

    def __enter__(self) -> Self:
        self._live.__enter__()
        self.tick()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def started(self, problem: Problem) -> None:
        self.progress.start(problem)

    def event(self, event: TokensEvent | VerdictEvent | ChainEvent) -> None:
        self.progress.take(event)

    def finished(self, problem: Problem, chains: Sequence[Chain], *, restored: bool) -> None:
        self.progress.finish(problem, chains, restored)

    def notice(self, text: str) -> None:
        self._console.print(text, style="bold yellow", highlight=False)

    def tick(self) -> None:
        self._live.update(self.render(), refresh=True)

    def render(self) -> RenderableType:
        """The whole picture, no taller than the terminal."""
        from rich.console import Group
        from rich.panel import Panel
        from rich.text import Text

        rows = max(2, min(8, self._console.height - 14))
        width = max(40, min(self._console.width, 140)) - 4
        h = self._heading
        title = Text.assemble((f" {h.strategy} ", "bold"), (f" {h.detail} ", "dim"))
        body = Group(
            self._names(),
            Text(),
            *self._bars(width),
            Text(),
            *(self._chain(key, width) for key in self._fill_slots(rows)),
            Text(),
            *(self._last(done, width) for done in self.progress.last[-3:]),
        )
        return Panel(body, title=title, title_align="left", border_style="dim", padding=(0, 1), width=width + 4)

    def _names(self) -> RenderableType:
        from rich.text import Text

        h, p = self._heading, self.progress
        return Text.assemble(
            ("draft ", "dim"),
            (h.draft, STYLES["draft"]),
            ("  target ", "dim"),
            (h.target, STYLES["target"]),
            ("  tokens ", "dim"),
            (count(p.tokens["draft"]), STYLES["draft"]),
            (" + ", "dim"),
            (count(p.tokens["target"]), STYLES["target"]),
            ("  ", ""),
            (f"{sum(p.tokens.values()) / max(p.elapsed, 1e-3):,.0f}/s", "bold"),
            ("  ", ""),
            (seconds(p.elapsed), "dim"),
        )

    def _bars(self, width: int) -> list[RenderableType]:
        from rich.text import Text

        p = self.progress
        room = max(10, width - 48)

        def line(name: str, share: float, said: str, style: str, mark: float | None = None) -> RenderableType:
            return Text.assemble((f"{name:<12}", "dim"), bar(share, room, style, mark), f"  {said}")

        right = f", {p.answers_right}/{p.graded} right" if p.graded else ""
        lines = [
            line("problems", p.problems_done / p.problems, f"{p.problems_done}/{p.problems}{right}", "cyan"),
            line("chains", p.chains_done / p.chains, f"{p.chains_done}/{p.chains}", "cyan"),
        ]
        if p.verdicts or self._heading.strategy.startswith("atts"):
            alpha = self._heading.alpha
            said = f"{percent(p.rate)} of {p.verdicts:,}, alpha {alpha:g}"
            lines.append(line("taken over", p.rate or 0.0, said, "magenta", alpha))
        return lines

    def _fill_slots(self, rows: int) -> list[tuple[str, int] | None]:
        """The chains on show: each keeps its row until it ends, so the eye can follow it."""
        active = self.progress.active
        waiting = [key for key in active if key not in self._slots]
        self._slots = [key if key in active or not waiting else waiting.pop(0) for key in self._slots[:rows]]
        self._slots += waiting[: rows - len(self._slots)]
        shown: list[tuple[str, int] | None] = [key if key in active else None for key in self._slots]
        return shown + [None] * (rows - len(shown))

    def _chain(self, key: tuple[str, int] | None, width: int) -> RenderableType:
        from rich.text import Text

        if key is None:
            return Text("·", style="dim")
        problem, chain = key
        name = f"{problem[-(LABEL - 5) :]} ·{chain}"
        text = Text()
        for kind, piece in self.progress.active[key].pieces:
            if kind == "kept":
                text.append(" ✓ ", STYLES["kept"])
            elif kind == "taken":
                text.append(f" ⇄ {piece} ".replace("  ", " "), STYLES["taken"])
            else:
                text.append(" ".join(piece.split("\n")), STYLES[kind])
        room = width - LABEL
        excess = text.cell_len - room
        return Text.assemble((f"{name:<{LABEL}}", "dim"), text[excess:] if excess > 0 else text, no_wrap=True)

    def _last(self, done: Finished, width: int) -> RenderableType:
        from rich.text import Text

        mark, style = {True: ("✓", "green"), False: ("✗", "red"), None: ("·", "dim")}[done.answer_right]
        text = Text.assemble((f"{mark} ", style), (describe(done), "dim"), no_wrap=True)
        text.truncate(width, overflow="ellipsis")
        return text


def bar(share: float, room: int, style: str, mark: float | None = None) -> Text:
    """A bar of `room` cells filled to `share`, with a stroke at `mark`."""
    from rich.text import Text

    filled = round(min(1.0, max(0.0, share)) * room)
    text = Text("━" * filled, style=style)
    text.append("━" * (room - filled), style="bright_black")
    if mark is not None:
        at = min(room - 1, round(mark * room))
        text = Text.assemble(text[:at], ("┃", "bold"), text[at + 1 :])
    return text
