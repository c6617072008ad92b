"""Self-Calibration (Huang et al., arXiv 2503.00031) on the built-in draft: teach it to say whether its chain is right.

    python -m bench.self_calibration                    # writes bench/results/self_calibration_cpu.json
    python -m bench.self_calibration --save FOLDER      # keeps the tuned draft too: --draft FOLDER

The draft writes chains of training problems. The label of a chain is the soft self-consistency of its answer: no gold
answer is used. It is then asked "?" behind the chain and learns to give "!" (its yes) that probability: SmoothL1 with
beta 0.25 on c = P("!"), and the next-token loss on chains whose label is above 0.75, as in the paper. This departs from
it in two places, since the draft was never asked anything before. Its confidence in the labels is the geometric mean
probability per token that it gave the chain. And it must learn first that "!" or "%" is the answer: in the first fifth
of the steps its output layer alone learns the cross-entropy of the two, since SmoothL1 has no gradient where P("!") is
nothing.

Figures are of held-out problems, on chains of the draft as it was: how well each confidence tells right from wrong
chains, and what the strategies that use it answer. Intervals are 95% bootstraps over problems.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from atts_engine.evaluation.files import write_text
from bench.output import out_file
from bench.provenance import ROOT, provenance

sys.path.insert(0, str(ROOT / "examples"))

from tiny_pair.checkpoint import export, load_exported
from tiny_pair.model import Llama
from tiny_pair.sampler import sample, token_nll
from tiny_pair.vocab import BOS, EOS, ID, PAD, decode, encode

from atts_engine.evaluation.registers import RegisterProblem, generate, heldout
from atts_engine.pipeline.answers import find_answer
from atts_engine.pipeline.strategies.best_of_n import best
from atts_engine.pipeline.strategies.self_check import SMALL_WORDS
from atts_engine.pipeline.strategies.stopping import (
    first_sure,
    soft_self_consistency,
    to_majority,
    to_share,
)
from atts_engine.pipeline.voting import weigh, winner

OUT = ROOT / "bench" / "results" / "self_calibration_cpu.json"
DRAFT = ROOT / "atts_engine" / "models" / "builtin" / "tiny_draft"
STEPS = (4, 6)
TEMPERATURE = 0.8
MAX_TOKENS = 200
HEAD_RATE = 1e-2
SMOOTH_BETA = 0.25
LM_ABOVE = 0.75
QUESTION, YES, NO = encode(SMALL_WORDS[0]), ID[SMALL_WORDS[1]], ID["%"]
Values = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


@dataclass(frozen=True)
class Written:
    """A chain: tokens of prompt and text without the end mark. `right` is for figures only."""

    problem: int
    prompt: tuple[int, ...]
    text: tuple[int, ...]
    answer: str | None
    right: bool

    @property
    def asked(self) -> list[int]:
        return [*self.prompt, *self.text, *QUESTION]


@dataclass(frozen=True)
class Example:
    """A chain to learn from. label: what its confidence should be."""

    chain: Written
    label: float


def write(model: Llama, problems: Sequence[RegisterProblem], chains: int, seed: int) -> list[Written]:
    """`chains` of each problem, one problem after the other."""
    prompts = [(BOS, *encode(f"Q: {p.problem}\n\n")) for p in problems for _ in range(chains)]
    texts = sample(model, [list(p) for p in prompts], MAX_TOKENS, TEMPERATURE, seed)
    found = []
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        answer = find_answer(decode(text))
        found.append(Written(i // chains, prompt, tuple(text), answer, answer == problems[i // chains].answer))
    return found


def rows_of(sequences: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids [B, T], right-padded; lengths [B])."""
    longest = max(map(len, sequences))
    ids = torch.tensor([[*s, *[PAD] * (longest - len(s))] for s in sequences])
    return ids, torch.tensor([len(s) for s in sequences])


def yes(logits: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """P(yes) [B] behind the last token of each row, of logits [B, T, V]."""
    last: torch.Tensor = logits[torch.arange(len(lengths)), lengths - 1].float().softmax(-1)
    return last[:, YES]


@torch.inference_mode()
def confidences(model: Llama, chains: Sequence[Written], batch: int = 256) -> Values:
    told = []
    for at in range(0, len(chains), batch):
        ids, lengths = rows_of([c.asked for c in chains[at : at + batch]])
        told.append(yes(model(ids)[0], lengths))
    return torch.cat(told).double().numpy()


def likelihoods(model: Llama, chains: Sequence[Written]) -> Values:
    """exp(mean log-probability) of each text, end mark included."""
    nll = token_nll(model, [[*c.prompt, *c.text, EOS] for c in chains])
    return np.array([float((-row[len(c.prompt) - 1 :].mean()).exp()) for row, c in zip(nll, chains, strict=True)])


def labelled(chains: Sequence[Written], confidence: Values, per_problem: int) -> list[Example]:
    """Each chain with the soft self-consistency of its answer among the chains of its problem; 0 without an answer."""
    examples = []
    for at in range(0, len(chains), per_problem):
        own = chains[at : at + per_problem]
        shares = soft_self_consistency([c.answer for c in own], confidence[at : at + per_problem].tolist())
        examples += [Example(c, shares[c.answer] if c.answer is not None else 0.0) for c in own]
    return examples


def loss_of(model: Llama, batch: Sequence[Example], opening: bool) -> torch.Tensor:
    """SmoothL1 of the confidence, in the opening cross-entropy of yes and no, and the next-token loss of texts whose
    label is above `LM_ABOVE`."""
    ids, lengths = rows_of([e.chain.asked for e in batch])
    labels = torch.tensor([e.label for e in batch])
    logits = model(ids)[0]
    if opening:
        said = logits[torch.arange(len(batch)), lengths - 1].float().log_softmax(-1)
        asked = -(labels * said[:, YES] + (1.0 - labels) * said[:, NO]).mean()
    else:
        asked = F.smooth_l1_loss(yes(logits, lengths), labels, beta=SMOOTH_BETA)
    goal = torch.full_like(ids, -100)
    for row, example in enumerate(batch):
        if example.label > LM_ABOVE:
            begin, text = len(example.chain.prompt), [*example.chain.text, EOS]
            goal[row, begin - 1 : begin - 1 + len(text)] = torch.tensor(text)
    if not (goal >= 0).any():
        return asked
    return asked + F.cross_entropy(logits.flatten(0, 1).float(), goal.flatten(), ignore_index=-100)


def tune(model: Llama, examples: Sequence[Example], steps: int, batch: int, rate: float, seed: int) -> None:
    """AdamW: the opening on the output layer alone, then all weights, the rate falling by a cosine."""
    rng = random.Random(seed)
    by_length = sorted(examples, key=lambda e: len(e.chain.asked))
    opening = max(1, steps // 5)
    head = torch.optim.AdamW([model.lm_head.weight], lr=HEAD_RATE, weight_decay=0.0)
    whole = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(whole, max(1, steps - opening))
    for step in range(steps):
        # Rows of like length together; labels are mixed within a batch.
        at = rng.randrange(max(1, len(by_length) - batch))
        loss = loss_of(model, by_length[at : at + batch], step < opening)
        optimiser = head if step < opening else whole
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step >= opening:
            falling.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step} loss {loss.item():.4f}", flush=True)


def brier(confidence: Values, right: Values) -> float:
    return float(((confidence - right) ** 2).mean())


def expected_calibration_error(confidence: Values, right: Values, bins: int = 10) -> float:
    """Mean |share right - mean confidence| over bins of equal width, by their chains (Naeini et al., 2015)."""
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    parts = [(right[index == b].mean() - confidence[index == b].mean(), (index == b).mean()) for b in set(index)]
    return float(sum(abs(gap) * share for gap, share in parts))


def auc(confidence: Values, right: Values) -> float:
    """P(a right chain has a higher confidence than a wrong one), ties by half; NaN unless there are both."""
    _, place, count = np.unique(confidence, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2.0)[place]
    n = right.sum()
    with np.errstate(invalid="ignore"):
        return float((rank[right > 0].sum() - n * (n + 1) / 2.0) / (n * (len(right) - n)))


def interval(figure: Callable[[Values], float], problems: int, seed: int, draws: int = 500) -> dict[str, float]:
    """The figure of all problems and its 95% bootstrap interval. figure: of problem numbers, drawn with repetition."""
    rng = np.random.default_rng(seed)
    found = [figure(rng.integers(0, problems, problems)) for _ in range(draws)]
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return {k: round(float(x), 4) for k, x in zip(("mean", "low", "high"), (figure(np.arange(problems)), low, high))}


def calibration(confidence: Values, right: Values, per_problem: int, seed: int) -> dict[str, dict[str, float]]:
    c, r = confidence.reshape(-1, per_problem), right.reshape(-1, per_problem)

    def of(measure: Callable[[Values, Values], float]) -> dict[str, float]:
        return interval(lambda rows: measure(c[rows].ravel(), r[rows].ravel()), len(c), seed)

    return {"brier": of(brier), "ece": of(expected_calibration_error), "auc": of(auc)}


def voted(answers: list[str | None], sure: list[float], tau: float) -> dict[str, tuple[str | None, int]]:
    """(answer, chains) of each strategy on the chains of one problem, by the rules that the engine runs."""
    ones = [1.0] * len(answers)
    majority = _first(len(answers), lambda n: to_majority(answers[:n], 0.95))
    share = _first(len(answers), lambda n: to_share(answers[:n], sure[:n], tau))
    at = first_sure(answers, sure, tau)
    last = next((a for a in reversed(answers) if a is not None), None)
    return {
        "self-consistency": (winner(weigh(answers, ones)), len(answers)),
        "adaptive-consistency": (winner(weigh(answers[:majority], ones)), majority),
        "sc-conf": (winner(weigh(answers, sure)), len(answers)),
        "asc-conf": (winner(weigh(answers[:share], sure[:share])), share),
        "best-of-n:score=p-true": (winner(best(answers, sure)), len(answers)),
        "early-stop-bon": (last, len(answers)) if at is None else (answers[at], at + 1),
    }


def _first(most: int, needed: Callable[[int], int]) -> int:
    return next((n for n in range(most) if needed(n) == 0), most)


def strategies(
    chains: Sequence[Written], confidence: Values, gold: Sequence[str], per_problem: int, tau: float, seed: int
) -> dict[str, dict[str, object]]:
    results: dict[str, list[tuple[bool, int]]] = {}
    for i, answer in enumerate(gold):
        own = slice(i * per_problem, (i + 1) * per_problem)
        found = voted([c.answer for c in chains[own]], confidence[own].tolist(), tau)
        for name, (said, n) in found.items():
            results.setdefault(name, []).append((said == answer, n))
    return {
        name: {
            "accuracy": interval(lambda rows, r=right: float(r[rows].mean()), len(gold), seed),
            "chains": round(float(np.mean([n for _, n in rows])), 2),
        }
        for name, rows in results.items()
        for right in [np.array([ok for ok, _ in rows], dtype=float)]
    }


def run(options: argparse.Namespace) -> dict[str, object]:
    torch.manual_seed(options.seed)
    model = load_exported(DRAFT)
    per_problem = options.chains
    found: dict[str, RegisterProblem] = {}
    for index in range(50 * options.train):
        problem = generate(options.seed, index, STEPS, "train")
        found.setdefault(problem.problem, problem)
        if len(found) == options.train:
            break
    examples = write(model, list(found.values()), per_problem, options.seed)
    held_out = heldout(options.held_out, options.seed + 1, STEPS)
    chains = write(model, held_out, per_problem, options.seed + 1)
    right = np.array([c.right for c in chains], dtype=float)
    told = {"likelihood": likelihoods(model, chains), "before": confidences(model, chains)}
    labels = labelled(examples, likelihoods(model, examples), per_problem)
    tune(model, labels, options.steps, options.batch, options.rate, options.seed)
    told["after"] = confidences(model, chains)
    again = write(model, held_out, per_problem, options.seed + 1)
    if options.save is not None:
        export(model, options.save)
    gold = [p.answer for p in held_out]
    return {
        "provenance": provenance(options.command),
        "training": {
            "problems": len(found),
            "chains_per_problem": per_problem,
            "steps": options.steps,
            "batch": options.batch,
            "rate": options.rate,
            "mean_label": round(float(np.mean([e.label for e in labels])), 4),
        },
        "held_out": {"problems": len(gold), "chains_per_problem": per_problem, "steps": list(STEPS)},
        "chain_accuracy": {"before": round(float(right.mean()), 4), "after": round(_accuracy(again), 4)},
        "calibration": {name: calibration(c, right, per_problem, options.seed) for name, c in told.items()},
        "tau": options.tau,
        "strategies": strategies(chains, told["after"], gold, per_problem, options.tau, options.seed),
    }


def _accuracy(chains: Sequence[Written]) -> float:
    return float(np.mean([c.right for c in chains]))


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=192, help="training problems (default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=100, help="held-out problems (default: %(default)s)")
    parser.add_argument("--chains", type=int, default=16, help="chains a problem (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=120, help="training steps (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="chains a step (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=5e-4, help="learning rate (default: %(default)s)")
    parser.add_argument("--tau", type=float, default=0.7, help="of early-stop-bon and asc-conf (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, default=None, metavar="FOLDER", help="keep the tuned draft here")
    parser.add_argument("--out", type=out_file, default=OUT, help="default: bench/results/self_calibration_cpu.json")
    options = parser.parse_args(arguments)
    options.command = shlex.join(["python", "-m", "bench.self_calibration", *arguments])
    figures = run(options)
    write_text(options.out, json.dumps(figures, indent=1) + "\n")
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
