"""What a set of chains achieved, and how sure that is. Problems, not chains, are the unit of every interval:
chains of one problem are anything but independent."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from atts_engine.errors import InputError
from atts_engine.evaluation.detection import wrong_chains
from atts_engine.evaluation.grading import Grader, is_graded, is_right
from atts_engine.evaluation.intervals import (
    Interval,
    McNemar,
    bootstrap,
    bootstrap_quantile,
    bootstrap_ratio,
    mcnemar,
    paired_bootstrap,
)
from atts_engine.evaluation.traces import has_tokens
from atts_engine.pipeline.records import Chain
from atts_engine.pipeline.voting import tally, winner


@dataclass(frozen=True, slots=True)
class Outcome:
    """One problem, graded. correct: one per chain, in chain order; majority, weighted: whether the answer that such a
    vote of its chains gives is right, equal answers being one; majority_by_spelling: the same with equal texts being
    one; any_of: whether any chain is right; voted: whether the answer is right that the strategy gave, or a majority
    where that is not known."""

    problem_id: str
    correct: tuple[bool, ...]
    majority: bool
    weighted: bool
    any_of: bool
    voted: bool
    majority_by_spelling: bool

    @property
    def chain_accuracy(self) -> float:
        return sum(self.correct) / len(self.correct)

    def any_of_k(self, k: int) -> float:
        """Probability that k of the problem's n chains, drawn without replacement, hold a right one: with c right ones
        1 - C(n-c, k) / C(n, k), which is unbiased for k fresh chains (pass@k; Chen et al., arXiv 2107.03374, eq. 1).
        """
        n, c = len(self.correct), sum(self.correct)
        if not 1 <= k <= n:
            raise InputError(f"any of {k} needs {k} chains or more of each problem; {self.problem_id} has {n}")
        return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def by_problem(chains: Iterable[Chain]) -> dict[str, list[Chain]]:
    """Chains of each problem by chain number, problems in the order of their index."""
    groups: dict[str, list[Chain]] = defaultdict(list)
    for chain in sorted(chains, key=lambda c: (c.problem_index, c.problem_id, c.chain)):
        groups[chain.problem_id].append(chain)
    return dict(groups)


def counted_answer(chain: Chain) -> str | None:
    """The chain's answer, if it is one: a chain that its strategy gave up has none, whatever its text holds."""
    return None if chain.finish == "stopped" else chain.final_answer


def grade(
    chains: Iterable[Chain],
    equal: Callable[[str, str], bool] | None = None,
    answers: Mapping[str, str | None] | None = None,
) -> list[Outcome]:
    """One outcome per problem that has a gold answer; a chain without an answer is wrong. answers: those that a
    strategy gave, by problem; None: not known.

    equal(gold, answer) defaults to a `Grader`'s and also decides which answers are one in a vote.
    """
    same = Grader().equal if equal is None else equal
    outcomes = []
    for problem_id, group in by_problem(chains).items():
        gold = group[0].gold
        if not is_graded(problem_id, gold):
            continue
        votes = (tally(group, "majority", same), tally(group, "weighted", same), tally(group, "majority"))
        correct = tuple(bool(is_right(problem_id, gold, counted_answer(c), same)) for c in group)
        majority, weighted, spelling = (bool(is_right(problem_id, gold, winner(vote), same)) for vote in votes)
        own = majority if answers is None else bool(is_right(problem_id, gold, answers[problem_id], same))
        outcomes.append(Outcome(problem_id, correct, majority, weighted, any(correct), own, spelling))
    return outcomes


def takeover_rates(chains: Iterable[Chain]) -> dict[str, Any]:
    """{"decisions", "rate", "early", "by_turn": {turn: {"n", "rate"}}, "by_problem": {id: {"n", "rate"}}} over judged
    turns; a rate without decisions is None. early: how many verdicts were settled before their span was whole."""
    turns: dict[int, list[bool]] = defaultdict(list)
    problems: dict[str, list[bool]] = {}
    early = 0
    for problem_id, group in by_problem(chains).items():
        for chain in group:
            for turn in chain.turns:
                if turn.judged:
                    turns[turn.turn].append(turn.takeover)
                    problems.setdefault(problem_id, []).append(turn.takeover)
                    early += turn.early
    everything = [taken for cell in turns.values() for taken in cell]
    return {
        "decisions": len(everything),
        "rate": sum(everything) / len(everything) if everything else None,
        "early": early,
        "by_turn": {str(t): _cell(turns[t]) for t in sorted(turns)},
        "by_problem": {name: _cell(cell) for name, cell in problems.items()},
    }


def takeover_interval(rates: Mapping[str, Any], *, level: float = 0.95, seed: int = 0) -> Interval | None:
    """The rate over all decisions of `takeover_rates`, problems drawn again with all their decisions; None
    without any."""
    cells = rates["by_problem"].values()
    if not cells:
        return None
    taken = [cell["n"] * cell["rate"] for cell in cells]
    return bootstrap_ratio(taken, [cell["n"] for cell in cells], level=level, seed=seed)


def latencies(chains: Iterable[Chain]) -> list[float]:
    """Seconds until the last chain of each problem had ended, its chains having begun together."""
    return [max(c.duration_s for c in group) for group in by_problem(chains).values()]


def _cell(taken: Sequence[bool]) -> dict[str, Any]:
    return {"n": len(taken), "rate": sum(taken) / len(taken)}


def tokens_by_author(chains: Sequence[Chain]) -> dict[str, int] | None:
    """{"draft", "target"}: tokens generated by each, or None where a trace did not record them."""
    if not all(has_tokens(chain) for chain in chains):
        return None
    return {"draft": sum(c.draft_tokens for c in chains), "target": sum(c.target_tokens for c in chains)}


def summary(
    chains: Sequence[Chain],
    equal: Callable[[str, str], bool] | None = None,
    *,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """The figures of one strategy, ready for JSON. An interval is {"mean", "low", "high"} at `level`, bootstrapped over
    problems.

    chain_accuracy, majority, majority_by_spelling, weighted, any_of: intervals over graded problems; any_of_k: {k:
    interval} for k = 1, 2, 4, ... up to what every problem has; None where nothing is graded. takeovers as
    `takeover_rates`, with its `interval`. tokens as `tokens_by_author`; tokens_per_problem: {author: interval},
    None where tokens is. latency_s: {"mean", "p50", "p95"}: intervals of `latencies`.
    auc_chains: `detection.wrong_chains`.
    """
    same = Grader().equal if equal is None else equal
    outcomes = grade(chains, same)
    groups = by_problem(chains)
    tokens = tokens_by_author(chains)
    takeovers = takeover_rates(chains)

    def mean(values: Sequence[float]) -> dict[str, float]:
        return as_json(bootstrap(values, level=level, seed=seed))

    measured = {
        name: mean([float(getattr(o, name)) for o in outcomes]) if outcomes else None
        for name in ("chain_accuracy", "majority", "majority_by_spelling", "weighted", "any_of")
    }
    rate = takeover_interval(takeovers, level=level, seed=seed)
    return {
        "problems": len(groups),
        "graded": len(outcomes),
        "chains": len(chains),
        "answered": sum(c.final_answer is not None for c in chains),
        "errors": sum(c.error is not None for c in chains),
        **measured,
        "any_of_k": {str(k): mean([o.any_of_k(k) for o in outcomes]) for k in draws(outcomes)} if outcomes else None,
        "takeovers": takeovers | {"interval": None if rate is None else as_json(rate)},
        "tokens": tokens,
        "tokens_per_problem": None
        if tokens is None
        else {
            author: mean([sum(getattr(c, f"{author}_tokens") for c in group) for group in groups.values()])
            for author in tokens
        },
        "latency_s": latency_figures(latencies(chains), level=level, seed=seed),
        "auc_chains": wrong_chains(chains, same, level=level, seed=seed),
        "level": level,
    }


def draws(outcomes: Sequence[Outcome]) -> list[int]:
    """1, 2, 4, ... and the most chains that every problem has."""
    most = min(len(o.correct) for o in outcomes)
    return [*(2**i for i in range((most - 1).bit_length())), most]


def latency_figures(values: Sequence[float], *, level: float = 0.95, seed: int = 0) -> dict[str, Any] | None:
    """{"mean", "p50", "p95"} of the seconds of each problem, each with its interval; None without a problem."""
    if not values:
        return None
    quantiles = {f"p{q}": bootstrap_quantile(values, q / 100, level=level, seed=seed) for q in (50, 95)}
    return {
        name: as_json(found)
        for name, found in ({"mean": bootstrap(values, level=level, seed=seed)} | quantiles).items()
    }


def throughput(
    chains: Sequence[Chain], wall_s: float, *, level: float = 0.95, seed: int = 0
) -> dict[str, float] | None:
    """Tokens of both authors a second of wall time, with its interval: problems are drawn again with their tokens and
    their latency, and a resample's wall time is `wall_s` by its share of the latencies, as many problems being in
    flight. None where tokens or time are not known."""
    groups = by_problem(chains)
    busy = latencies(chains)
    if tokens_by_author(chains) is None or wall_s <= 0.0 or not sum(busy) > 0.0:
        return None
    tokens = [sum(c.draft_tokens + c.target_tokens for c in group) for group in groups.values()]
    share = wall_s / sum(busy)
    return as_json(bootstrap_ratio(tokens, [share * seconds for seconds in busy], level=level, seed=seed))


def compare(
    first: Sequence[Outcome],
    second: Sequence[Outcome],
    measure: str = "majority",
    *,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """first - second on the same problems: {"difference": {"mean", "low", "high"}, "mcnemar": {...} or None}.

    measure: chain_accuracy, majority, weighted, any_of or voted; McNemar's test is for those that are right or wrong
    as a whole. `InputError` unless both hold exactly the same problems.
    """
    ours, theirs = ({o.problem_id: float(getattr(o, measure)) for o in side} for side in (first, second))
    if ours.keys() != theirs.keys():
        odd = sorted(ours.keys() ^ theirs.keys())[0]
        raise InputError(f"a paired comparison needs the same problems on both sides; {odd} is on one only")
    a = np.array(list(ours.values()))
    b = np.array([theirs[name] for name in ours])
    test = mcnemar(a > 0.5, b > 0.5) if measure != "chain_accuracy" else None
    return {
        "measure": measure,
        "problems": len(a),
        "difference": as_json(paired_bootstrap(a, b, level=level, seed=seed)),
        "level": level,
        "mcnemar": None if test is None else as_json(test),
    }


def as_json(record: Interval | McNemar) -> dict[str, float]:
    """The record's fields."""
    return {name: getattr(record, name) for name in type(record).__slots__}
