"""What was found, for people: a table on stdout, plots, and Markdown for README and docs."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atts_engine.evaluation.files import atomically
from bench.gpu_proof.context import Found, Line, Part

PREFIX = "gpu_proof"


def file_name(device: str, date: str, dry: bool) -> str:
    """gpu_proof_nvidia-h100-80gb-hbm3_2026-01-31.json; a dry run's is never taken for a result."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return f"{'dry_' if dry else ''}{PREFIX}_{slug}_{date}.json"


def lines_of(outcome: dict[str, Found], parts: Sequence[tuple[str, float, Part]]) -> list[Line]:
    """Of every part: how it ended, and its own lines."""
    told: list[Line] = []
    for name, _, part in parts:
        if name not in outcome:
            continue
        cell = outcome[name]
        told.append((f"[{name}]", cell["status"], cell["error"] or f"{cell['seconds']:.1f} s"))
        told += part.lines(cell["found"])
    return told


def table(lines: Sequence[Line]) -> str:
    widths = [max((len(line[i]) for line in lines), default=0) for i in range(2)]
    return "\n".join(f"{a.ljust(widths[0])}  {b.ljust(widths[1])}  {c}".rstrip() for a, b, c in lines)


def plots(outcome: dict[str, Found], folder: Path) -> list[str]:
    """PNG files: decoding beside its bound, kernels as a share of their limit. None without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    from matplotlib.figure import Figure

    written = []
    engine = outcome.get("engine", {}).get("found", {})
    models = {name: cell["decode"] for name, cell in engine.items() if isinstance(cell, dict) and cell.get("decode")}
    if models:
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        for name, cells in models.items():
            chains = [int(n) for n in cells]
            (line,) = axes.loglog(chains, [c["tokens_per_s"] for c in cells.values()], marker="o", label=name)
            axes.loglog(chains, [c["bound_tokens_per_s"] for c in cells.values()], ls="--", color=line.get_color())
        axes.set(xlabel="chains", ylabel="tokens/s (dashed: bound by weights and KV)", title="Decoding")
        axes.legend()
        written.append(_saved(figure, folder / "decode.png"))
    kernels = outcome.get("kernels", {}).get("found", {})
    if kernels.get("rows"):
        from bench.gpu_proof.kernels import best_of_ours

        best = best_of_ours(kernels)
        figure = Figure(figsize=(8, 0.3 * len(best) + 1), layout="constrained")
        axes = figure.subplots()
        shares = [100 * row.limit_s / row.seconds for row in best.values()]
        axes.barh([f"{op} {case}" for op, case in best], shares)
        axes.invert_yaxis()
        axes.set(xlabel="% of the limit (measured bandwidth or bf16 peak)", title="Kernels")
        written.append(_saved(figure, folder / "kernels.png"))
    return written


def _saved(figure: Any, path: Path) -> str:
    with atomically(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
    return path.name


def newest(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """(file name, record) of the newest result of each device, by the date within and then by name."""
    found: dict[str, tuple[str, str, dict[str, Any]]] = {}
    for path in sorted(folder.glob(f"{PREFIX}_*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        known = found.get(record["device"])
        if known is None or (record["provenance"]["date"], path.name) > known[:2]:
            found[record["device"]] = (record["provenance"]["date"], path.name, record)
    return [(name, record) for _, name, record in found.values()]


def section(results: Sequence[tuple[str, dict[str, Any]]], parts: Sequence[str] | None = None) -> str:
    """Markdown: a table of each device, and where it was measured; "" without results. parts: only of these."""
    blocks = []
    for name, record in results:
        where = record["provenance"]
        told = [tuple(line[1:]) for line in record["lines"] if parts is None or line[0] in parts]
        rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in told]
        head = [f"**{record['device']}**", "", "| | measured | beside |", "|---|---|---|"]
        tail = (
            f"`{where['command']}` · {where['date']} · {record['device']}, torch {where['torch']}, commit "
            f"{where['commit']} · [bench/results/{name}](LINK/bench/results/{name})"
        )
        blocks.append("\n".join([*head, *rows, "", tail, ""]))
    return "\n".join(blocks)
