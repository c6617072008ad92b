"""Put the results under bench/results/ into README.md and docs/kernels.md, between their markers.

python -m bench.readme [--check]

The figures of a GPU are those of `python -m bench.gpu_proof`, the newest file of each device; without one their blocks
are empty.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from atts_engine.evaluation.plan import stands_in
from atts_engine.evaluation.suite_table import TITLES, terms
from bench.gpu_proof.report import newest
from bench.gpu_proof.report import section as gpu_section
from bench.provenance import ROOT

README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results" / "registers.json"
BEGIN, END = "<!-- results:begin -->\n", "<!-- results:end -->"
STRATEGIES = ROOT / "bench" / "results" / "strategies_cpu.json"
STRATEGIES_BEGIN, STRATEGIES_END = "<!-- strategies:begin -->\n", "<!-- strategies:end -->"
DECODE = {
    "bfloat16": ROOT / "bench" / "results" / "e2e_decode_cpu_packed.json",
    "float32": ROOT / "bench" / "results" / "e2e_decode_cpu_fp32.json",
}
DECODE_BEGIN, DECODE_END = "<!-- decode:begin -->\n", "<!-- decode:end -->"
GPU_BEGIN, GPU_END = "<!-- gpu:begin -->\n", "<!-- gpu:end -->"
GPU_PAGES = {
    "README.md": (".", ("facts", "correctness", "engine", "job")),
    "docs/kernels.md": ("..", ("facts", "kernels", "profiles")),
}
"""By page: where the root is from there, and the parts of bench.gpu_proof that it shows."""
NAMES = {"draft": "draft alone", "target": "target alone", "atts": "**ATTS**", "atts-sync": "synchronous ranking"}


def section(record: dict[str, Any]) -> str:
    """The results as Markdown: a table, each strategy against the target alone, and where it was measured."""
    strategies, where = record["strategies"], record["provenance"]
    first = next(iter(strategies.values()))
    lines = [
        f"The built-in pair on {first['problems']} held-out problems of 6 steps, "
        f"{first['chains_per_problem']} chains each, α = {first['alpha']:g}, online calibration from a cold start "
        "(95% bootstrap intervals over problems):",
        "",
        "| | chain | vote | any of 8 | taken over | target tokens | time |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, cell in strategies.items():
        rate = f"{cell['takeovers']['rate']:.3f}" if cell["takeovers"]["decisions"] else "–"
        row = [_share(cell[k]) for k in ("chain_accuracy", "majority", "any_of")]
        row += [rate, f"{cell['tokens']['target']:,}", f"{cell['wall_s']:.0f} s"]
        lines.append(f"| {NAMES[name]} | " + " | ".join(row) + " |")
    lines.append("")
    for name, cell in record["against"].items():
        d = cell["difference"]
        share = f", at {100 * cell['target_token_share']:.0f}% of its target tokens" if name != "draft" else ""
        lines.append(
            f"- {NAMES[name]} against target alone: vote {100 * d['mean']:+.1f} points "
            f"({100 * d['low']:+.1f} to {100 * d['high']:+.1f}){share}."
        )
    lines += [
        "",
        f"`{where['command']}` · {where['date']} · {where['cpu']}, {where['cores']} cores, torch {where['torch']} · "
        "[bench/results/registers.json](bench/results/registers.json), written by `python -m bench.registers`.",
        "",
    ]
    return "\n".join(lines)


def strategies_section(record: dict[str, Any]) -> str:
    """Every strategy as Markdown: one table a block."""
    where, lines = record["provenance"], []
    first = record["blocks"][0]["rows"][0]
    lines.append(
        f"{first['problems']} held-out problems, {first['chains_cap']} chains where a row says no other. Calibrations "
        f"are frozen, from {record['pilot_problems']} other problems; calibrated strategies stand at the level at "
        "which these problems come to the rate, or to the tokens. Tokens and seconds are a problem's, with 16 in "
        "flight; a chain that a strategy did not write is in no mean."
    )
    for block in record["blocks"]:
        lines += [
            "",
            f"*{TITLES[block['equal']].capitalize()}.*",
            "",
            "| | | chain | answer | taken over | draft tokens | target tokens | seconds | "
            f"answer against {block['against']}, points |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for row in block["rows"]:
            rate, tokens = row["takeovers"]["rate"], row["tokens_per_problem"]
            d = row["difference"] and row["difference"]["difference"]
            cells = [
                f"`{row['label']}`{_marks(row['label'])}",
                terms(row),
                _share(row["chain_accuracy"]),
                _share(row["voted"]),
                "–" if rate is None else f"{rate:.3f}",
                *(f"{tokens[author]['mean']:,.0f}" for author in ("draft", "target")),
                f"{row['latency_s']['mean']['mean']:.1f}",
                "–" if d is None else f"{100 * d['mean']:+.1f} ({100 * d['low']:+.1f} to {100 * d['high']:+.1f})",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    took = "" if record["wall_s"] is None else f" {record['wall_s'] / 60:.0f} minutes ·"
    lines += [
        "",
        "¹ The task's checker, which knows the solution, stands in for a judge or a reward model: an upper end of the "
        "method.  ",
        "² Asks the model whether its answer is correct, which this pair was never taught: its confidence is noise.",
        "",
        f"`{where['command']}` ·{took} {where['date']} · {where['cpu']}, {where['cores']} cores, torch "
        f"{where['torch']} · [bench/results/strategies_cpu.json](bench/results/strategies_cpu.json), written by "
        "`python -m bench.strategies`.",
        "",
    ]
    return "\n".join(lines)


def _marks(label: str) -> str:
    asked = label.split(":")[0] in ("early-stop-bon", "sc-conf", "asc-conf")
    return " ¹" if stands_in(label) else " ²" if asked else ""


def strategies_updated(readme: str, record: dict[str, Any]) -> str:
    return _between(readme, STRATEGIES_BEGIN, STRATEGIES_END, strategies_section(record))


def decode_records() -> dict[str, dict[str, Any]]:
    return {dtype: json.loads(path.read_text(encoding="utf-8")) for dtype, path in DECODE.items()}


def decode_section(records: Mapping[str, dict[str, Any]]) -> str:
    """Decode beside vLLM as Markdown, by our dtype: a table each, with one row for each number of sequences."""
    lines = []
    for dtype, record in records.items():
        where, ours = record["provenance"], record["medians"][f"atts-engine {dtype}"]
        peers = [speeds for engine, speeds in record["medians"].items() if engine.startswith("vLLM")]
        kinds = "bfloat16 or float32, eager or compiled" if dtype == "bfloat16" else "float32, eager or compiled"
        lines += [
            f"SmolLM2-135M, the same weights in both, tokens a second (medians); vLLM {record['vllm']} in the best of "
            f"{len(peers)} settings ({kinds}), the two in turns:",
            "",
            f"| sequences | one lane, {dtype} | vLLM's best | ratio |",
            "|---|---|---|---|",
        ]
        for sequences, speed in ours.items():
            best = max(speeds[sequences] for speeds in peers)
            lines.append(f"| {sequences} | {speed:,.0f} | {best:,.0f} | {speed / best:.2f} |")
        file = DECODE[dtype].relative_to(ROOT)
        lines += [
            "",
            f"`{where['command']}` · {where['date']} · {where['cpu']} ({where['cpu_isa']}), {where['cores']} cores, "
            f"torch {where['torch']} · [{file}]({file}), [notes](bench/NOTES.md).",
            "",
        ]
    return "\n".join(lines)


def decode_updated(readme: str, records: Mapping[str, dict[str, Any]]) -> str:
    return _between(readme, DECODE_BEGIN, DECODE_END, decode_section(records))


def _between(text: str, begin: str, end: str, block: str) -> str:
    """The text with a block in place of what stands between two marks."""
    head, rest = text.split(begin)
    _, tail = rest.split(end)
    return f"{head}{begin}\n{block}\n{end}{tail}"


def _share(interval: dict[str, float]) -> str:
    return f"{100 * interval['mean']:.1f}% ({100 * interval['low']:.1f}–{100 * interval['high']:.1f})"


def updated(readme: str, record: dict[str, Any]) -> str:
    return _between(readme, BEGIN, END, section(record))


def gpu_updated(page: str, text: str, results: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """The text of a page of GPU_PAGES with its block made anew from the results, of which there may be none."""
    root, parts = GPU_PAGES[page]
    head, rest = text.split(GPU_BEGIN)
    _, tail = rest.split(GPU_END)
    block = gpu_section(results, parts).replace("](LINK/", f"]({root}/")
    return f"{head}{GPU_BEGIN}{block and chr(10) + block + chr(10)}{GPU_END}{tail}"


def main(check: bool) -> int:
    results = newest(RESULTS.parent)
    stale = 0
    for page in GPU_PAGES:
        path = ROOT / page
        old = path.read_text(encoding="utf-8")
        new = gpu_updated(page, old, results)
        if path == README:
            new = updated(new, json.loads(RESULTS.read_text(encoding="utf-8")))
            new = strategies_updated(new, json.loads(STRATEGIES.read_text(encoding="utf-8")))
            new = decode_updated(new, decode_records())
        stale += old != new
        if not check:
            path.write_text(new, encoding="utf-8")
    return int(check and stale > 0)


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
