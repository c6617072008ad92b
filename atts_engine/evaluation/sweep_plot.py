"""A sweep as pictures: r against chains, and T_s against chains and turns with the law that fits best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atts_engine.evaluation.files import atomically
from atts_engine.evaluation.growth import Law
from atts_engine.evaluation.sweep import LANES, MODES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LOOK = {"async": ("-", "o"), "sync": ("--", "s")}


def draw_sweep(figures: Mapping[str, Any], folder: Path, suffix: str = ".svg") -> list[Path]:
    """`intensity` and `growth` with the suffix in `folder`; figures: as `sweep.sweep_figures`. Returns both paths."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = {"svg.hashsalt": "sweep", "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False}
    cells = figures["cells"]
    paths = [folder / f"{name}{suffix}" for name in ("intensity", "growth")]
    with rc_context(style):
        figure = Figure(figsize=(9.6, 3.6), layout="constrained")
        for axes, lane in zip(figure.subplots(1, 2), LANES, strict=True):
            _lines(axes, cells, "chains", "turns", lambda c, at=lane: c["lanes"][at]["r"])
            axes.set_title(f"{lane} lane", loc="left")
            axes.set_ylabel("r = T_c / (T_m + T_s)")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
        _save(figure, paths[0])
        figure = Figure(figsize=(9.6, 3.6), layout="constrained")
        for axes, (x, other) in zip(figure.subplots(1, 2), (("chains", "turns"), ("turns", "chains")), strict=True):
            most = max(c[other] for c in cells)
            widest = [c for c in cells if c[other] == most]
            _lines(axes, widest, x, other, lambda c: c["wait_s"])
            _law(axes, figures["growth"], x, other, most, sorted({c[x] for c in cells}))
            axes.set_yscale("log")
            axes.set_ylabel("seconds that chains waited")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
        _save(figure, paths[1])
    return paths


def _save(figure: Figure, path: Path) -> None:
    metadata = {"Date": None} if path.suffix == ".svg" else None
    with atomically(path) as partial:
        figure.savefig(partial, format=path.suffix.removeprefix("."), dpi=150, metadata=metadata)


def _lines(axes: Axes, cells: Sequence[Mapping[str, Any]], x: str, other: str, y: Any) -> None:
    values = sorted({c[other] for c in cells})
    for mode in MODES:
        line, marker = _LOOK[mode]
        for number, value in enumerate(values):
            own = sorted((c for c in cells if c["mode"] == mode and c[other] == value), key=lambda c: c[x])
            axes.plot(
                [c[x] for c in own],
                [y(c) for c in own],
                linestyle=line,
                marker=marker,
                markersize=4,
                color=f"C{number}",
                label=f"{mode}, {value} {other}",
            )
    axes.set_xscale("log", base=2)
    ticks = sorted({c[x] for c in cells})
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.set_xlabel(x)
    axes.grid(linewidth=0.4, alpha=0.6)


def _law(axes: Axes, laws: Mapping[str, Any], x: str, other: str, held: int, at: Sequence[int]) -> None:
    for mode in MODES:
        found = laws[mode].get("chains waiting")
        if not found:
            continue
        law = Law(**found[0])
        points = [(v, held) if x == "chains" else (held, v) for v in at]
        axes.plot(at, [law.predict(*p) for p in points], color="0.35", linewidth=1, linestyle=":", label=f"{mode}, law")
