"""Plots of a sweep: time, throughput, and where the chains' time goes, as one PNG."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atts_engine.errors import InputError
from atts_engine.evaluation.files import atomically, cannot_write

COLOURS = {"atts": "#1b7f5c", "atts-sync": "#b3541e", "draft": "#6b7280", "target": "#3b5ba9"}


def check_plot_folder(out: str | None) -> None:
    """`InputError` before any work where matplotlib is missing or the folder cannot be made."""
    if out is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("--out draws a plot, which needs matplotlib: pip install 'atts-engine[eval]'")
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(Path(out), error) from error


def draw_sweep(found: Mapping[str, Any], path: Path) -> None:
    """found: of `sweep.run_sweep`. A strategy's points that did not fit are left out."""
    from matplotlib.figure import Figure

    axis = found["axis"]
    dominated = found["synchronisation_dominates_at"].get("atts-sync", {}).get("chains")
    names = list(dict.fromkeys(name for point in found["points"] for name in point["strategies"]))
    figure = Figure(figsize=(12.0, 3.8), layout="constrained")
    time, speed, shares = figure.subplots(1, 3)
    for name in names:
        at, cells = _fitting(found["points"], axis, name)
        style = {"color": COLOURS.get(name), "marker": "o", "markersize": 4, "label": name}
        time.plot(at, [cell["wall_s"] for cell in cells], **style)
        speed.plot(at, [cell["tokens_per_s"]["all"] for cell in cells], **style)
    time.set(title="Time of the job", ylabel="s", yscale="log")
    speed.set(title="Throughput", ylabel="tokens/s", yscale="log")
    for name in ("atts", "atts-sync"):
        at, cells = _fitting(found["points"], axis, name)
        for key, line in (("computing", "-"), ("barrier", "--")):
            if name == "atts-sync" or key == "computing":
                values = [100 * cell["chain_time"][key] for cell in cells]
                shares.plot(at, values, line, color=COLOURS[name], marker="o", markersize=4, label=f"{name}, {key}")
    shares.set(title="Share of the chains' time", ylabel="%", ylim=(0, 100))
    for at in dominated or ():
        shares.axvline(at, color="#888888", linestyle=":")
    if dominated:
        shares.annotate("dotted: synchronisation dominates", (0.03, 0.03), xycoords="axes fraction", fontsize=8)
    for axes in (time, speed, shares):
        if len(found["points"]) > 1:
            axes.set_xscale("log", base=2)
        ticks = [point[axis] for point in found["points"]]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("GPUs" if axis == "gpus" else axis)
        axes.grid(linewidth=0.4)
        axes.legend(fontsize=8)
    figure.suptitle("simulated", fontsize=9)
    with atomically(path) as partial:
        figure.savefig(partial, format="png", dpi=130, metadata={"Software": None})


def _fitting(
    points: Sequence[Mapping[str, Any]], axis: str, strategy: str
) -> tuple[list[int], list[Mapping[str, Any]]]:
    """Where the strategy fitted, and its figures there."""
    cells = [(point[axis], point["strategies"].get(strategy, {})) for point in points]
    fitting = [(at, cell) for at, cell in cells if "wall_s" in cell]
    return [at for at, _ in fitting], [cell for _, cell in fitting]
