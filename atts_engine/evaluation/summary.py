"""The figures of finished jobs, ready for JSON: of one strategy, and of several on the same problems."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from atts_engine.evaluation import measures
from atts_engine.evaluation.grading import Grader
from atts_engine.evaluation.job import JobResult
from atts_engine.pipeline.params import ATTSParams
from atts_engine.pipeline.records import Chain
from atts_engine.pipeline.voting import tally, winner

Same = Callable[[str, str], bool]


def figures(result: JobResult, params: ATTSParams, same: Same | None = None) -> dict[str, Any]:
    """`measures.summary` of the job's chains, with what only the job knows: strategy, level, time, and the vote per problem.

    tokens_per_s: tokens that this process generated, by both authors, over its wall time; None where chains of an earlier
    process are among them, since their time is not known.
    """
    same = Grader().equal if same is None else same
    found = measures.summary(result.chains, same)
    tokens = found["tokens"]
    whole = result.restored == 0
    return {
        "strategy": result.strategy,
        "alpha": params.alpha,
        "vote": params.vote,
        "chains_per_problem": params.chains,
        **found,
        "decisions": len(result.decisions),
        "wall_s": result.wall_s,
        "restored_chains": result.restored,
        "tokens_per_s": sum(tokens.values()) / result.wall_s if tokens and whole and result.wall_s > 0 else None,
        "answers": answers(result, params, same),
    }


def answers(result: JobResult, params: ATTSParams, same: Same) -> dict[str, dict[str, Any]]:
    """{problem id: {"answer", "gold", "right", "votes"}}; `right` is None without a gold answer."""
    found = {}
    for problem in result.problems:
        votes = tally(result.of_problem(problem.id), params.vote, same)
        answer = winner(votes)
        right = None if problem.answer is None else answer is not None and same(problem.answer, answer)
        found[problem.id] = {"answer": answer, "gold": problem.answer, "right": right, "votes": votes}
    return found


def voter(params: ATTSParams, same: Same) -> Callable[[Sequence[Chain]], str | None]:
    """The answer that the chains of a problem vote for."""
    return lambda chains: winner(tally(chains, params.vote, same))


def comparison(
    results: Mapping[str, JobResult], params: Mapping[str, ATTSParams], same: Same, baseline: str = "target"
) -> dict[str, Any]:
    """{"strategies": {name: figures}, "against": {name: {...}}}: each strategy alone, and paired with the baseline.

    against: `measures.compare` of the vote, and `target_token_share`, the strategy's target-generated tokens over the
    baseline's. Empty where the baseline did not run or no problem has a gold answer.
    """
    each = {name: figures(result, params[name], same) for name, result in results.items()}
    against: dict[str, Any] = {}
    if baseline in results:
        outcomes = {name: measures.grade(result.chains, same) for name, result in results.items()}
        for name in results:
            if name != baseline and outcomes[name]:
                paired = measures.compare(outcomes[name], outcomes[baseline], params[name].vote)
                against[name] = {
                    "baseline": baseline,
                    **paired,
                    "target_token_share": _share(each[name], each[baseline]),
                }
    return {"strategies": each, "against": against}


def _share(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> float | None:
    if not ours["tokens"] or not theirs["tokens"] or not theirs["tokens"]["target"]:
        return None
    return float(ours["tokens"]["target"] / theirs["tokens"]["target"])
