"""Plots as inline SVG that follows the page's colours, light or dark. matplotlib is imported only when one is drawn."""

from __future__ import annotations

import importlib.util
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from atts_engine.conformal.monitor import log_simple_jumper
from atts_engine.evaluation import pareto
from atts_engine.pipeline.records import Chain, Decision

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# matplotlib takes literal colours only; each of these stands for a CSS variable of the page.
INK, GRID, DRAFT, TARGET, TAKEN, KEPT, BACK = (f"#0{i}0{i}0{i}" for i in range(1, 8))
_VARIABLES = {
    INK: "--ink",
    GRID: "--line",
    DRAFT: "--draft",
    TARGET: "--target",
    TAKEN: "--taken",
    KEPT: "--kept",
    BACK: "--card",
}
_COLOURS = {"draft": DRAFT, "target": TARGET, "atts": TAKEN}
MOST_NAMED = 6
"""Strategies of a plot that all have their names beside them."""
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10.5,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "grid.color": GRID,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.labelcolor": INK,
}


@dataclass(frozen=True, slots=True)
class Plot:
    """One figure of a page: `svg` holds markup; `caption` says in words what to look for."""

    svg: str
    caption: str


def can_plot() -> bool:
    """Whether matplotlib is installed (the extra `eval` brings it)."""
    return importlib.util.find_spec("matplotlib") is not None


@contextmanager
def _drawing(title: str, x: str, y: str, into: list[str]) -> Iterator[Axes]:
    # Without pyplot there is no global figure list and no backend to choose, so this works in any thread.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({**_STYLE, "svg.hashsalt": title}):
        figure = Figure(figsize=(5.2, 3.1), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(axis="y", linewidth=0.6)
        axes.tick_params(length=0)
        yield axes
        into.append(_svg(figure, title))


def _svg(figure: Figure, title: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Groups of two plots have the same ids ("axes_1"), which a page may hold only once; nothing refers to them.
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    return re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{title}">', text, count=1
    )


def takeover_by_turn(by_turn: Mapping[str, Mapping[str, Any]], alpha: float) -> Plot:
    """Rate of takeovers in each turn against alpha."""
    turns = [int(turn) for turn in by_turn]
    rates = [100 * cell["rate"] for cell in by_turn.values()]
    drawn: list[str] = []
    with _drawing("Spans taken over, by turn", "turn", "%", drawn) as axes:
        axes.bar(turns, rates, color=TAKEN, width=0.72)
        axes.axhline(100 * alpha, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.text(1.01, 100 * alpha, f"alpha\n{alpha:g}", transform=axes.get_yaxis_transform(), va="center")
        axes.set_ylim(0, 100)
        axes.set_xticks(turns if len(turns) <= 20 else turns[:: -(-len(turns) // 15)])
        for turn, rate, cell in zip(turns, rates, by_turn.values(), strict=True):
            if len(turns) <= 12:
                axes.text(turn, rate + 1.5, f"{cell['n']:,}", ha="center", fontsize=8, alpha=0.7)
    return Plot(
        drawn[0],
        "Each turn is calibrated for itself, so every bar should come to the dashed line. Above the bars: verdicts.",
    )


def takeover_by_problem(by_problem: Mapping[str, Mapping[str, Any]], alpha: float) -> Plot:
    """Rate of takeovers of each problem, sorted: calibration holds on average, not for each problem."""
    rates = sorted(100 * cell["rate"] for cell in by_problem.values())
    drawn: list[str] = []
    with _drawing("Spans taken over, by problem", "problems, sorted", "%", drawn) as axes:
        axes.fill_between(range(len(rates) + 1), [*rates, rates[-1]], step="post", color=TAKEN, alpha=0.85, linewidth=0)
        axes.axhline(100 * alpha, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.set_ylim(0, 100)
        axes.set_xlim(0, len(rates))
    return Plot(
        drawn[0], "The rate is held over all problems together; hard problems get more of the target than easy ones."
    )


def p_values(values: Sequence[float]) -> Plot:
    """Histogram of p-values; flat where the scores of each key are exchangeable."""
    drawn: list[str] = []
    with _drawing("p-values", "p-value", "verdicts", drawn) as axes:
        axes.hist(values, bins=20, range=(0.0, 1.0), color=KEPT, rwidth=0.92)
        axes.axhline(len(values) / 20, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.set_xlim(0, 1)
    return Plot(
        drawn[0],
        f"{len(values):,} p-values. Exchangeable scores make them uniform (dashed). Chains of one problem are alike, "
        "so from a cold start and few problems they are not.",
    )


def scores(kept: Sequence[float], taken: Sequence[float]) -> Plot:
    """Scores of the spans that were kept and of those taken over, on a logarithmic axis."""
    import numpy as np

    floor = 1e-4
    both = np.maximum(np.asarray([*kept, *taken], dtype=np.float64), floor)
    edges = np.geomspace(floor, max(float(both.max()) * 1.05, 1.0), 37)
    clipped = [np.maximum(np.asarray(side, dtype=np.float64), floor) for side in (kept, taken)]
    drawn: list[str] = []
    with _drawing("Scores by verdict", "mean negative log-likelihood, nats per token", "spans", drawn) as axes:
        axes.hist(
            clipped, bins=list(edges), stacked=True, color=[KEPT, TAKEN], label=["kept", "taken over"], linewidth=0
        )
        axes.set_xscale("log")
        axes.legend(loc="upper right")
    return Plot(
        drawn[0],
        "What the target thinks of the draft's spans: to the right it would not have written them. Axis cut at 0.0001.",
    )


def rate_so_far(decisions: Sequence[Decision], alpha: float) -> Plot:
    """The rate of takeovers after each verdict, in the order of the verdicts, and the level that it was tested at."""
    import numpy as np

    taken = np.array([d.verdict == "takeover" for d in decisions], dtype=np.float64)
    at = np.arange(1, len(taken) + 1)
    drawn: list[str] = []
    with _drawing("Takeovers so far", "verdicts", "%", drawn) as axes:
        levels = [100 * d.level / 2**32 for d in decisions]
        axes.plot(at, levels, color=KEPT, linewidth=0.8, alpha=0.55, label="level of the verdict")
        axes.plot(at, 100 * np.cumsum(taken) / at, color=TAKEN, linewidth=1.8, label="rate so far")
        axes.axhline(100 * alpha, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.set_ylim(0, 100)
        axes.set_xlim(1, max(2, len(taken)))
        axes.legend(loc="upper right")
    return Plot(
        drawn[0], f"The rate comes to alpha ({alpha:g}, dashed). An adaptive calibrator moves its level for that."
    )


def drift(decisions: Sequence[Decision]) -> Plot | None:
    """Conformal test martingale over the p-values in the order of the verdicts; None without a smoothed p-value."""
    values = [d.p_value for d in decisions if 0.0 <= d.p_value <= 1.0]
    if not values:
        return None
    found = log_simple_jumper(values) / math.log(10)
    drawn: list[str] = []
    with _drawing("Calibration drift", "verdicts", "log10 of the martingale", drawn) as axes:
        axes.plot(range(1, len(found) + 1), found, color=TARGET, linewidth=1.6)
        axes.axhline(2.0, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.set_xlim(1, max(2, len(found)))
        axes.set_ylim(top=max(2.5, float(found.max()) * 1.08))
    return Plot(
        drawn[0],
        "Bets against the p-values being uniform. Above the dashed line (100) the scores have drifted, or those of one "
        "problem are too much alike; while scores are exchangeable, one run in a hundred ever comes there.",
    )


def accuracy_against(strategies: Mapping[str, Mapping[str, Any]], cost: str, among: str = "") -> Plot:
    """Accuracy of the answers of each strategy over a cost (one of `pareto.COSTS`), bars for the intervals of both, and
    the line of the strategies that none dominates. among: what the strategies have in common, for the caption."""
    title, label = {
        "target_tokens": ("Accuracy of the answer by target tokens", "tokens generated by the target, per problem"),
        "latency_s": ("Accuracy of the answer by time", "seconds until a problem's answer"),
    }[cost]
    points = pareto.placed(strategies, cost)
    means = [(x["mean"], 100 * y["mean"]) for x, y in points.values()]
    drawn: list[str] = []
    with _drawing(title, label, "%", drawn) as axes:
        front = pareto.front(means)
        line = [means[i] for i in front]
        axes.plot(*zip(*line, strict=True), color=GRID, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
        # Of many, those are named that nothing beats, and the three that everybody looks for.
        named = {list(points)[i] for i in front} | set(_COLOURS) if len(points) > MOST_NAMED else set(points)
        for name, (x, y) in points.items():
            colour = _COLOURS.get(name, KEPT)
            at = x["mean"], 100 * y["mean"]
            axes.errorbar(
                [at[0]],
                [at[1]],
                xerr=_spread(x, 1.0),
                yerr=_spread(y, 100.0),
                color=colour,
                marker="o",
                markersize=8,
                capsize=3,
                linewidth=1.4,
                alpha=1.0 if name in named else 0.35,
            )
            if name in named:
                axes.annotate(name, at, xytext=(9, 6), textcoords="offset points", fontweight="bold", color=colour)
        axes.margins(x=0.18)
        axes.set_ylim(top=103)
        axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
    return Plot(
        drawn[0],
        f"{among}{'. ' if among else ''}Up and to the left is better; the dashed line joins the strategies that no "
        "other beats in both. Where there are many, the others have no name. Bars: 95% bootstrap intervals over "
        "problems.",
    )


def _spread(interval: Mapping[str, float], scale: float) -> list[list[float]]:
    """Lengths of the bars below and above the mean; a percentile interval of a skewed figure may leave it out."""
    low, high = interval["mean"] - interval["low"], interval["high"] - interval["mean"]
    return [[scale * max(0.0, low)], [scale * max(0.0, high)]]


@dataclass(frozen=True, slots=True)
class Point:
    """A configuration in the plot of a study. accuracy, low, high: fractions; front: nothing is better and cheaper."""

    cost: float
    accuracy: float
    low: float
    high: float
    front: bool


def accuracy_against_cost(points: Sequence[Point], limit: float, best: Point | None, unit: str) -> Plot:
    """Configurations that a study measured, at least one; those that nothing dominates joined by a line; and the
    budget, unless it is so far off that the points would be squeezed together."""
    drawn: list[str] = []
    with _drawing("Accuracy against cost", f"{unit} a problem", "%", drawn) as axes:
        for point in points:
            y = 100 * point.accuracy
            spread = [[y - 100 * point.low], [100 * point.high - y]]
            colour = TAKEN if point is best else KEPT if point.front else DRAFT
            faint = 1.0 if point.front or point is best else 0.4
            axes.errorbar(
                [point.cost], [y], yerr=spread, color=colour, marker="o", markersize=5, alpha=faint, linewidth=1
            )
        front = sorted((p.cost, 100 * p.accuracy) for p in points if p.front)
        axes.plot([x for x, _ in front], [y for _, y in front], color=KEPT, linewidth=1.2, drawstyle="steps-post")
        if limit <= 2 * max(point.cost for point in points):
            axes.axvline(limit, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
            axes.text(limit, 1.01, "budget", transform=axes.get_xaxis_transform(), ha="center", va="bottom", fontsize=9)
        axes.set_ylim(-3, 103)
    return Plot(
        drawn[0],
        "Each point is a configuration with its 95% interval over problems; the stepped line joins those that nothing "
        "beats. The best of many is optimistic: it was picked for its luck too.",
    )


def best_so_far(values: Sequence[float | None]) -> Plot:
    """Accuracy of the best configuration within the budget, behind each trial of a study."""
    drawn: list[str] = []
    known = [(number, 100 * value) for number, value in enumerate(values, 1) if value is not None]
    with _drawing("Best within the budget, so far", "trial", "%", drawn) as axes:
        axes.plot([n for n, _ in known], [v for _, v in known], color=TAKEN, drawstyle="steps-post", marker=".")
        axes.set_xlim(0.5, len(values) + 0.5)
    return Plot(drawn[0], "A flat end says that further trials had stopped helping.")


def of_chains(
    chains: Sequence[Chain], takeovers: Mapping[str, Any], alpha: float, decisions: Sequence[Decision] = ()
) -> list[Plot]:
    """The plots of one strategy; those without data are left out."""
    turns = [turn for chain in chains for turn in chain.turns if turn.score is not None]
    if not turns:
        return []
    plots = [takeover_by_turn(takeovers["by_turn"], alpha), takeover_by_problem(takeovers["by_problem"], alpha)]
    found = [turn.p_value for turn in turns if turn.p_value is not None]
    if found:
        plots.append(p_values(found))
    kept = [t.score for t in turns if t.score is not None and not t.takeover]
    plots.append(scores(kept, [t.score for t in turns if t.score is not None and t.takeover]))
    if decisions:
        plots += [p for p in (rate_so_far(decisions, alpha), drift(decisions)) if p is not None]
    return plots
