"""Measure the built-in pair on held-out register problems and write bench/results/tiny_pair.json.

    python bench/tiny_pair.py

Draft: share of right chains at temperature 0.8 by number of steps, and the majority vote of 8. Target: greedy
accuracy, recovery from a wrong step that it finds before it, and how well its mean NLL tells wrong spans of the draft
from right ones.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from tiny_pair.checkpoint import load_exported  # noqa: E402
from tiny_pair.data import Recipe, Writer  # noqa: E402
from tiny_pair.model import Llama  # noqa: E402
from tiny_pair.sampler import sample, token_nll  # noqa: E402
from tiny_pair.vocab import BLANK, BOS, BOX, EOS, WAIT, decode, encode  # noqa: E402

from atts_engine.evaluation.files import write_text  # noqa: E402
from atts_engine.evaluation.registers import (  # noqa: E402
    REGISTERS,
    RegisterProblem,
    check,
    draw,
    heldout,
    last_boxed,
    problem_text,
    solution,
    split_of,
)
from bench.output import out_file  # noqa: E402

SPAN = 24
CHAINS = 8
TEMPERATURE = 0.8
ROOM = 320


def prompt_ids(problem: str) -> list[int]:
    return [BOS, *encode(f"Q: {problem}\n\n")]


def share(right: list[bool]) -> dict[str, float | int]:
    return {"right": sum(right), "n": len(right), "share": round(sum(right) / max(1, len(right)), 4)}


def draft_figures(texts: list[list[str]], problems: list[RegisterProblem]) -> dict[str, object]:
    """``texts[i]`` are the chains of ``problems[i]``."""
    chains, votes = defaultdict(list), defaultdict(list)
    for problem, row in zip(problems, texts, strict=True):
        chains[problem.steps] += [check(problem.problem, t) for t in row]
        answers = Counter(a for a in map(last_boxed, row) if a is not None)
        votes[problem.steps].append(bool(answers) and answers.most_common(1)[0][0] == problem.answer)
    return {
        "chains": share([x for v in chains.values() for x in v]),
        "majority_of_8": share([x for v in votes.values() for x in v]),
        "chains_by_steps": {k: share(chains[k]) for k in sorted(chains)},
        "majority_by_steps": {k: share(votes[k]) for k in sorted(votes)},
    }


def injected(seed: int, n: int, when: str) -> list[tuple[str, list[int]]]:
    """``n`` held-out prefixes with one wrong step: (problem, ids). ``when``: the prefix ends after the wrong step
    (``fresh``), one or two further steps later (``1 later``, ``2 later``), or behind the wrong chain's box (``after
    box``)."""
    rng, found = random.Random(f"{seed}:{when}"), []
    while len(found) < n:
        start, ops = draw(rng, rng.randint(3, 6))
        text = problem_text(start, ops)
        if split_of(text) != "held-out":
            continue
        row = Writer(rng, Recipe(error_rate=0.4, max_errors=1), start, ops).write().ids
        prefix = _prefix(row, len(prompt_ids(text)), when)
        if prefix is not None:
            found.append((text, prefix))
    return found


def _prefix(ids: list[int], prompt: int, when: str) -> list[int] | None:
    if WAIT not in ids:
        return None
    wait = ids.index(WAIT)
    boxed = BOX in ids[:wait]
    if when == "after box":
        return ids[: wait - 1] if boxed else None
    paragraphs = ids[prompt:wait].count(BLANK)
    redone = REGISTERS.index(decode([ids[wait + 1]]))  # the wrong step's number: its register is the redone one
    later = paragraphs - redone
    return ids[:wait] if not boxed and later == {"fresh": 0, "1 later": 1, "2 later": 2}[when] else None


def recovery(target: Llama, seed: int, n: int) -> dict[str, object]:
    figures: dict[str, object] = {}
    for when in ("fresh", "1 later", "2 later", "after box"):
        cases = injected(seed, n, when)
        wrote = sample(target, [ids for _, ids in cases], ROOM, 0.0, seed)
        right = [check(p, decode(ids + new)) for (p, ids), new in zip(cases, wrote, strict=True)]
        figures[when] = share(right)
    gold = heldout(n, seed + 7)
    ends = sample(target, [prompt_ids(p.problem) + encode(solution(p.problem)) for p in gold], 4, 0.0, seed)
    figures["stops after a right box"] = share([not new for new in ends])
    return figures


def spans(
    target: Llama, draft_ids: list[tuple[RegisterProblem, list[int]]], seed: int
) -> tuple[dict[str, object], list[tuple[RegisterProblem, list[int]]]]:
    """Scores of 24-token draft spans up to and with the one that goes wrong first, and the chains cut after that
    span.
    """
    sequences = [prompt_ids(p.problem) + ids for p, ids in draft_ids]
    scores: dict[bool, list[float]] = {False: [], True: []}
    cut: list[tuple[RegisterProblem, list[int]]] = []
    for (p, ids), sequence, nll in zip(draft_ids, sequences, token_nll(target, sequences), strict=True):
        gold = [*encode(solution(p.problem)), EOS]
        wrong_at = next((i for i, (a, b) in enumerate(zip(ids, gold, strict=False)) if a != b), len(ids))
        begin = len(sequence) - len(ids)
        for at in range(0, len(ids), SPAN):
            end = min(at + SPAN, len(ids))
            wrong = at <= wrong_at < end
            scores[wrong].append(nll[begin + at - 1 : begin + end - 1].mean().item())
            if wrong:
                cut.append((p, sequence[:end]))
                break
    good, bad = torch.tensor(scores[False]), torch.tensor(scores[True])
    below = torch.searchsorted(good.sort().values, bad)
    tied = torch.searchsorted(good.sort().values, bad, right=True) - below
    auc = ((below + 0.5 * tied).sum() / (len(good) * len(bad))).item()
    figures = {
        "span_tokens": SPAN,
        "auc": round(auc, 5),
        "right": {
            "n": len(good),
            "mean": good.mean().item(),
            "p99": good.quantile(0.99).item(),
            "max": good.max().item(),
        },
        "wrong": {"n": len(bad), "mean": bad.mean().item(), "p01": bad.quantile(0.01).item(), "min": bad.min().item()},
        "share_of_wrong_spans_below_the_highest_right": round((bad < good.max()).float().mean().item(), 4),
        "share_of_right_spans_above_the_lowest_wrong": round((good > bad.min()).float().mean().item(), 4),
    }
    return figures, cut


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def write_card(folder: Path, rows: list[tuple[str, dict[str, float | int]]], result: dict[str, object]) -> None:
    """Put the figures into the model card, between its markers."""
    card = folder / "README.md"
    head, rest = card.read_text().split("<!-- figures -->\n", 1)
    tail = rest.split("<!-- end of figures -->\n", 1)[1]
    table = [f"| {label} | {f['share']:.3f} | {f['right']} of {f['n']} |" for label, f in rows]
    source = f"`{result['command']}`, {result['date']}, {result['cpu']}, torch {result['torch']}, seed {result['seed']}"
    body = "\n".join([source, "", "| measured on held-out problems | share | count |", "|---|---|---|", *table])
    write_text(card, f"{head}<!-- figures -->\n{body}\n<!-- end of figures -->\n{tail}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    builtin = ROOT / "atts_engine" / "models" / "builtin"
    parser.add_argument("--draft", type=Path, default=builtin / "tiny_draft")
    parser.add_argument("--target", type=Path, default=builtin / "tiny_target")
    parser.add_argument("--problems", type=int, default=250, help="held-out problems per number of steps, 2 to 6")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=out_file, default=ROOT / "bench" / "results" / "tiny_pair.json")
    parser.add_argument("--cards", action="store_true", help="also write the figures into the models' README.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    begin = time.monotonic()
    draft, target = load_exported(args.draft), load_exported(args.target)
    problems = [p for steps in range(2, 7) for p in heldout(args.problems, args.seed * 10 + steps, (steps, steps))]

    greedy = sample(target, [prompt_ids(p.problem) for p in problems], ROOM, 0.0, args.seed)
    right = [check(p.problem, decode(ids)) for p, ids in zip(problems, greedy, strict=True)]
    few = [p for i, p in enumerate(problems) if i % args.problems < args.problems // 4 + 1]
    jobs = [p for p in few for _ in range(CHAINS)]
    wrote = sample(draft, [prompt_ids(p.problem) for p in jobs], 160, TEMPERATURE, args.seed)
    texts = [decode(ids) for ids in wrote]
    rows = [texts[i : i + CHAINS] for i in range(0, len(texts), CHAINS)]
    scores, cut = spans(target, list(zip(jobs, wrote, strict=True)), args.seed)
    cut = cut[: args.problems]
    mended = sample(target, [ids for _, ids in cut], ROOM, 0.0, args.seed)

    result = {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python bench/tiny_pair.py", *sys.argv[1:]]),
        "cpu": cpu_model(),
        "torch": torch.__version__,
        "seed": args.seed,
        "draft_temperature": TEMPERATURE,
        "parameters": {
            name: sum(p.numel() for p in m.parameters()) for name, m in (("draft", draft), ("target", target))
        },
        "draft": draft_figures(rows, few),
        "target_greedy": share(right),
        "target_greedy_by_steps": {
            k: share([r for r, p in zip(right, problems, strict=True) if p.steps == k]) for k in range(2, 7)
        },
        "target_recovery": recovery(target, args.seed, args.problems),
        "target_recovery_from_draft_errors": share(
            [check(p.problem, decode(ids + new)) for (p, ids), new in zip(cut, mended, strict=True)]
        ),
        "span_scores": scores,
        "seconds": round(time.monotonic() - begin, 1),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=2) + "\n"
    write_text(args.out, text)
    sys.stdout.write(text)
    if args.cards:
        by_steps = result["draft"]["chains_by_steps"], result["draft"]["majority_by_steps"]
        draft_rows = [("chains", result["draft"]["chains"]), ("majority of 8", result["draft"]["majority_of_8"])]
        for name, figures in zip(("chains", "majority of 8"), by_steps, strict=True):
            draft_rows += [(f"{name}, {k} steps", f) for k, f in figures.items()]
        write_card(args.draft, draft_rows, result)
        rows = [("greedy", result["target_greedy"])]
        rows += [(f"greedy, {k} steps", f) for k, f in result["target_greedy_by_steps"].items()]
        rows += [(f"recovery, {k}", f) for k, f in result["target_recovery"].items()]
        rows += [("recovery from the draft's own first wrong span", result["target_recovery_from_draft_errors"])]
        write_card(args.target, rows, result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
