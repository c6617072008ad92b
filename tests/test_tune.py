"""Studies: cost model, search space, proposers, the loop, its history and its results. No model is run."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atts_engine.errors import InputError
from atts_engine.evaluation.tuning import (
    Budget,
    Choice,
    Configuration,
    GridSearch,
    Proposal,
    Proposer,
    RandomSearch,
    Range,
    Sizes,
    Space,
    StudyFolder,
    Trial,
    Unit,
    Workload,
    best,
    best_so_far,
    computed_costs,
    dimension,
    pareto,
    run_study,
    samples_within,
    unit_cost,
)
from atts_engine.evaluation.tuning.cost import planned_work
from atts_engine.evaluation.tuning.pruning import hopeless
from atts_engine.evaluation.tuning.report import figures, study_report
from atts_engine.evaluation.tuning.results import merit
from tests.fake_tuning import BUDGET, FakeEvaluator, measurement, smooth, space, target_tokens
from tests.test_report import check

SETTINGS = {"format": "test", "proposer": {"name": "random"}, "problems": {"count": 40}}
ONE = Configuration("d:t", 4, 8, 24, 16, 0.5, "continue")
amounts = st.integers(1, 10_000)


# The cost model


def test_one_sample_of_the_unit_model_costs_exactly_one() -> None:
    assert unit_cost(1, 3e9, 128, 64) == 1.0
    assert unit_cost(1, 5e5, 32, 16, Unit(5e5, 32, 16)) == 1.0


@given(st.integers(1, 100), amounts, amounts, amounts, amounts, amounts, amounts)
def test_the_cost_is_the_formula_of_the_paper_and_its_inverse_round_trips(
    samples: int, parameters: int, prompt: int, written: int, small: int, prompt2: int, written2: int
) -> None:
    a, b1 = Fraction(parameters, small), Fraction(prompt, written)
    b2, b3 = Fraction(prompt2, written2), Fraction(prompt, prompt2)
    exact = b2 * (a * b3 * (b1 + samples) / b1 - 1)
    unit = Unit(small, prompt2, written2)
    cost = unit_cost(samples, parameters, prompt, written, unit)
    assert cost == pytest.approx(float(exact), rel=1e-9, abs=1e-9 * float(b2))
    inverse = b1 * ((exact / b2 + 1) / (a * b3) - 1)
    assert inverse == samples
    # The two terms of size b1 nearly cancel, so that is the scale of the rounding.
    assert samples_within(float(exact), parameters, prompt, written, unit) == pytest.approx(
        samples, rel=1e-9, abs=1e-9 * float(b1 + b2 * b1 / (a * b3))
    )


def test_costs_of_a_problem_by_hand() -> None:
    work = Workload(chains=4, prompt_tokens=(50, 60), draft_tokens=80, target_tokens=20)
    costs = computed_costs(work, Sizes(1000, 5000), Unit(1000, 128, 64))
    assert costs["tokens"] == 80
    assert costs["flops"] == 2 * 1000 * (50 + 400) + 2 * 5000 * (60 + 400)
    # Both models: M (Np + S Nd) / (M_small Nd2) - Np2 / Nd2.
    assert costs["units"] == pytest.approx(450 / 64 - 2 + 5 * 460 / 64 - 2)
    assert costs["units"] == pytest.approx(costs["flops"] / (2 * 1000 * 64) - 2 * 2)
    silent = replace(work, draft_tokens=0, target_tokens=0)
    assert computed_costs(silent, Sizes(1000, 5000), Unit(1000, 128, 64))["flops"] == 2 * (1000 * 50 + 5000 * 60)


def test_planned_work_by_hand() -> None:
    # continue: 24 + 0.5 * 16 = 32 tokens a turn, replace: 0.5 * 24 + 0.5 * 16 = 20.
    assert planned_work(ONE, 160, (50, 50)) == Workload(4, (50, 50), 5 * 24, 5 * 8)
    assert planned_work(replace(ONE, takeover="replace"), 160, (50, 50)) == Workload(4, (50, 50), 8 * 24, 8 * 8)
    assert planned_work(replace(ONE, turns=2), 160, (50, 50)) == Workload(4, (50, 50), 2 * 24, 2 * 8)


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan"), float("inf")])
def test_a_budget_is_a_positive_number(limit: float) -> None:
    with pytest.raises(InputError, match="positive number of target tokens"):
        Budget("tokens", limit)


# The search space


def test_dimensions_as_people_write_them() -> None:
    assert dimension("chains", "4-16") == Range(4, 16, True)
    assert dimension("chains", "1,2,8") == Choice((1, 2, 8))
    assert dimension("alpha", "0.4") == Choice((0.4,))
    assert dimension("alpha", "0.1-0.9") == Range(0.1, 0.9, False)
    for name, text in (("chains", "x"), ("chains", "1.5"), ("chains", "8-4"), ("alpha", "nan"), ("turns", "1,,2")):
        with pytest.raises(InputError, match=f"{name} must be a range"):
            dimension(name, text)
    with pytest.raises(InputError, match="different values"):
        dimension("chains", "4,4")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"chains": Range(0, 4, True)}, "chains must be whole numbers, 1 or more, not 0"),
        ({"alpha": Range(0.5, 1.0, False)}, r"alpha must be inside \(0, 1\), not 1.0"),
        ({"takeover": Choice(("swap",))}, "takeover must be one of continue, replace, not 'swap'"),
    ],
)
def test_a_space_holds_only_what_can_be_run(changed: dict[str, Range | Choice], said: str) -> None:
    with pytest.raises(InputError, match=said):
        space(**changed)
    with pytest.raises(InputError, match="exactly the dimensions"):
        Space({"chains": Range(1, 4, True)})


def test_a_configuration_out_of_the_space_is_refused_with_every_fault() -> None:
    values = {"pair": "d:x", "chains": 4.0, "turns": True, "draft_tokens": "8", "alpha": float("nan"), "depth": 3}
    with pytest.raises(InputError) as refusal:
        space().configuration(values)
    for said in (
        "'depth' is no setting", "target_tokens is missing", "takeover is missing",
        "pair must be one of d:t, d:big, not 'd:x'", "chains must be a whole number from 1 to 16, not 4.0",
        "turns must be a whole number", "draft_tokens must be", "alpha must be a number from 0.1 to 0.9, not nan",
    ):  # fmt: skip
        assert said in str(refusal.value)
    listed = space(chains=Choice((4, 8)))
    with pytest.raises(InputError, match=r"chains must be one of 4, 8, not 4.0"):
        listed.configuration({**vars_of(ONE), "chains": 4.0})


def vars_of(configuration: Configuration) -> dict[str, object]:
    return {name: getattr(configuration, name) for name in space().dimensions}


def test_levels_of_a_range_are_even_on_its_scale() -> None:
    assert Range(1, 16, True).levels(5) == (1, 2, 4, 8, 16)
    assert Range(0.1, 0.9, False).levels(3) == (0.1, 0.5, 0.9)
    assert Range(1, 2, True).levels(4) == (1, 2)
    assert Range(4, 16, True).levels(1) == (8,)


# The proposers


def histories(numbers: int) -> list[Trial]:
    return [Trial(i + 1, "refused", None) for i in range(numbers)]


def test_a_grid_proposes_every_combination_once_and_then_ends() -> None:
    small = space(turns=Choice((4,)), draft_tokens=Choice((8,)), target_tokens=Choice((8, 16)))
    grid = GridSearch(small, seed=1)
    proposed = []
    while (proposal := grid.propose(histories(len(proposed)))) is not None:
        proposed.append(proposal.configuration)
    assert len(proposed) == len(set(proposed)) == 2 * 3 * 1 * 1 * 2 * 3 * 2
    again = [GridSearch(small, seed=1).propose(histories(i)).configuration for i in range(5)]
    assert again == proposed[:5]
    with pytest.raises(InputError, match="too large: take fewer levels"):
        GridSearch(space(), seed=1, levels=30)
    assert [GridSearch(small, seed=2).propose(histories(i)).configuration for i in range(5)] != proposed[:5]


@given(st.integers(0, 1000), st.integers(0, 50))
def test_random_search_stays_in_the_space_and_needs_no_past(seed: int, number: int) -> None:
    proposed = RandomSearch(space(), seed).propose(histories(number)).configuration
    assert proposed is not None
    assert space().configuration(vars_of(proposed)) == proposed
    assert RandomSearch(space(), seed).propose(histories(number)).configuration == proposed


def test_random_search_finds_the_best_of_a_finite_space_as_often_as_it_must() -> None:
    stats = pytest.importorskip("scipy.stats", reason="the oracle scipy is not installed")
    finite = space(
        chains=Choice((1, 2, 4)), turns=Choice((4,)), draft_tokens=Choice((8,)), target_tokens=Choice((8,)),
        alpha=Choice((0.2, 0.4, 0.6)),
    )  # fmt: skip
    studies, trials, size = 300, 12, 2 * 3 * 3 * 2
    goal = Configuration("d:big", 4, 4, 8, 8, 0.6, "replace")
    found = sum(
        any(RandomSearch(finite, seed).propose(histories(i)).configuration == goal for i in range(trials))
        for seed in range(studies)
    )
    chance = stats.binom(studies, 1 - (1 - 1 / size) ** trials)
    assert chance.ppf(1e-6) <= found <= chance.ppf(1 - 1e-6)


def optuna(where: Space, budget: Budget, seed: int) -> Proposer:
    pytest.importorskip("optuna", reason="optuna is not installed (the extra tune brings it)")
    from atts_engine.evaluation.tuning.optuna_proposer import OptunaProposer

    return OptunaProposer(where, budget, seed)


def test_optuna_comes_nearer_to_the_summit_than_chance(tmp_path: Path) -> None:
    # The summit is replace with alpha 0.62; all else is fixed. A random trial is farther than d from it with
    # probability 1 - P(replace) P(|alpha - 0.62| <= d), and the nearest of n has that to the power of n.
    fixed = Choice((4,))
    where = space(
        pair=Choice(("d:t",)), chains=fixed, turns=fixed, draft_tokens=Choice((8,)), target_tokens=Choice((8,))
    )
    trials, seeds, step = 24, range(6), 1e-4
    nearer = [min(d, 0.28) + min(d, 0.52) for d in (step * (i + 0.5) for i in range(int(0.52 / step)))]
    expected = sum(step * (1.0 - 0.5 * width / 0.8) ** trials for width in nearer)
    distances = []
    for seed in seeds:
        with StudyFolder.open(tmp_path / str(seed), SETTINGS, where, resume=False) as folder:
            run_study(folder, BUDGET, optuna(where, BUDGET, seed), FakeEvaluator(), trials=trials)
            tried = [t.configuration for t in folder.trials if t.configuration is not None]
        distances.append(min(abs(c.alpha - 0.62) for c in tried if c.takeover == "replace"))
    assert 0.02 < expected < 0.04
    assert sum(distances) / len(distances) < expected / 2


def test_optuna_without_optuna_says_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from atts_engine.evaluation.tuning import optuna_proposer

    monkeypatch.setattr(optuna_proposer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'atts-engine\[tune\]'"):
        optuna_proposer.OptunaProposer(space(), BUDGET, 0)


# The loop


def study(path: Path, proposer: Proposer, evaluator: FakeEvaluator, trials: int, *, prune: bool = False) -> list[Trial]:
    with StudyFolder.open(path, SETTINGS, space(), resume=True) as folder:
        run_study(folder, BUDGET, proposer, evaluator, trials=trials, prune=prune)
        return list(folder.trials)


@pytest.mark.parametrize("name", ["random", "grid", "optuna"])
def test_a_resumed_study_is_the_uninterrupted_one(tmp_path: Path, name: str) -> None:
    def proposer() -> Proposer:
        if name == "optuna":
            return optuna(space(), BUDGET, 3)
        return RandomSearch(space(), 3) if name == "random" else GridSearch(space(), 3)

    whole = study(tmp_path / "whole", proposer(), FakeEvaluator(), 25)
    for dies_after in (4, 1):
        with pytest.raises(KeyboardInterrupt):
            study(tmp_path / "cut", proposer(), FakeEvaluator(dies_after=dies_after), 25)
        with (tmp_path / "cut" / "trials.jsonl").open("ab") as file:
            file.write('{"number": 9, "reason": "é'.encode()[:-1])
    assert study(tmp_path / "cut", proposer(), FakeEvaluator(), 25) == whole
    assert (tmp_path / "cut" / "trials.jsonl").read_bytes() == (tmp_path / "whole" / "trials.jsonl").read_bytes()
    assert len(whole) == 25


def test_a_study_of_more_trials_begins_with_those_of_a_shorter_one(tmp_path: Path) -> None:
    short = study(tmp_path, RandomSearch(space(), 5), FakeEvaluator(), 4)
    assert study(tmp_path, RandomSearch(space(), 5), FakeEvaluator(), 9)[:4] == short


def test_what_is_over_the_budget_by_plan_is_recorded_and_never_run(tmp_path: Path) -> None:
    evaluator = FakeEvaluator()
    trials = study(tmp_path, RandomSearch(space(), 0), evaluator, 40)
    refused = [t for t in trials if t.state == "infeasible"]
    assert refused and all(t.planned_cost is not None and t.planned_cost > BUDGET.limit for t in refused)
    assert all(t.measurement is None for t in refused)
    # Of the first nothing is known beforehand.
    assert all(target_tokens(c) <= BUDGET.limit for c in evaluator.ran[1:])
    assert len(evaluator.ran) + len(refused) == 40
    top = best(trials, BUDGET)
    assert top is not None and target_tokens(top[0].configuration) <= BUDGET.limit
    assert top[1].accuracy == max(smooth(c) for c in evaluator.ran if target_tokens(c) <= BUDGET.limit)


def test_what_turns_out_to_be_over_the_budget_is_never_the_best(tmp_path: Path) -> None:
    evaluator = FakeEvaluator(plans=False)
    trials = study(tmp_path, RandomSearch(space(), 0), evaluator, 40)
    assert any(target_tokens(c) > BUDGET.limit for c in evaluator.ran)
    top = best(trials, BUDGET)
    assert top is not None and top[1].costs["tokens"] <= BUDGET.limit
    assert top[1].accuracy == max(smooth(c) for c in evaluator.ran if target_tokens(c) <= BUDGET.limit)
    assert best_so_far(trials, BUDGET)[-1] == top[1].accuracy
    assert best(trials, Budget("tokens", 1e-3)) is None


class Scripted:
    def __init__(self, configurations: Sequence[Configuration | None]) -> None:
        self._configurations = configurations

    def propose(self, history: Sequence[Trial]) -> Proposal | None:
        if len(history) >= len(self._configurations):
            return None
        return Proposal(self._configurations[len(history)], ("so it is",), "why not", ("no",))


def test_repeats_are_not_run_again_and_refusals_count(tmp_path: Path) -> None:
    evaluator = FakeEvaluator()
    other = replace(ONE, alpha=0.3)
    trials = study(tmp_path, Scripted([ONE, None, other, ONE]), evaluator, 10)
    assert [t.state for t in trials] == ["measured", "refused", "measured", "measured"]
    assert evaluator.ran == [ONE, other]
    assert trials[3].repeats == 1 and trials[3].measurement == trials[0].measurement
    assert trials[1].complaints == ("no",) and trials[0].insights == ("so it is",)
    assert [t.number for t, _ in pareto(trials, "tokens")] == sorted(
        (t.number for t in trials[:3:2]), key=lambda n: trials[n - 1].measurement.costs["tokens"]
    )


def test_a_hopeless_trial_is_ended_and_is_not_among_the_best(tmp_path: Path) -> None:
    assert hopeless(0, 10, measurement(0.9, 10.0))
    assert not hopeless(7, 10, measurement(0.9, 10.0))
    good, bad = replace(ONE, alpha=0.62, takeover="replace", chains=8, turns=4), replace(ONE, alpha=0.1, chains=1)

    def steep(c: Configuration) -> float:
        return 0.95 if c == good else 0.05

    for prune in (True, False):
        trials = study(
            tmp_path / str(prune),
            Scripted([bad, good, bad, replace(bad, turns=2)]),
            FakeEvaluator(steep),
            9,
            prune=prune,
        )
        assert trials[3].state == ("pruned" if prune else "measured")
        assert trials[3].measurement is not None and trials[3].measurement.problems == (10 if prune else 40)
        assert trials[2].repeats == 1
        assert best(trials, BUDGET)[0].number == 2
    assert [t.number for t, _ in pareto(trials, "tokens")][-1] == 2


# What a history says


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), max_size=12))
def test_the_pareto_set_is_what_nothing_dominates(cells: list[tuple[int, int]]) -> None:
    trials = [Trial(i + 1, "measured", ONE, None, measurement(a / 6, float(c))) for i, (a, c) in enumerate(cells)]
    front = [(t.measurement.accuracy, t.measurement.costs["tokens"]) for t, _ in pareto(trials, "tokens")]
    points = {(a / 6, float(c)) for a, c in cells}
    dominated = {p for p in points for q in points if q != p and q[0] >= p[0] and q[1] <= p[1]}
    assert set(front) == points - dominated
    assert len(front) == len(set(front)) and front == sorted(front, key=lambda p: p[1])


def test_merit_ranks_what_keeps_to_the_budget_first() -> None:
    inside, over, planned = (
        Trial(1, "measured", ONE, 1.0, measurement(0.0, 400.0)),
        Trial(2, "measured", ONE, 1.0, measurement(1.0, 401.0)),
        Trial(3, "infeasible", ONE, 800.0),
    )
    found = [merit(t, BUDGET) for t in (inside, over, planned)]
    assert found == sorted(found, reverse=True) and found[0] == 0.0 and found[2] == -2.0
    assert merit(Trial(4, "refused", None), BUDGET) is None


def test_the_figures_and_the_page_of_a_study(tmp_path: Path) -> None:
    trials = [
        *study(tmp_path, RandomSearch(space(), 0), FakeEvaluator(), 12),
        Trial(13, "refused", None, complaints=("<x>",)),
    ]
    trials[-1] = replace(trials[-1], insights=("chains <b>help</b>",))
    kept_out = measurement(0.5, 100.0)
    found = figures(trials, BUDGET, SETTINGS, kept_out)
    assert json.loads(json.dumps(found, allow_nan=False))["validation"]["accuracy"] == 0.5
    assert sum(found["states"].values()) == found["trials"] == 13
    assert found["best"]["measurement"]["accuracy"] == found["best_so_far"][-1]
    words = " ".join(check(study_report(trials, BUDGET, SETTINGS, kept_out)).words)
    assert "chains <b>help</b>" in words and "is optimistic" in words and "50.0%" in words
    assert "Best within the budget, so far" in words
    check(study_report([], BUDGET, SETTINGS, None))


# The folder


def test_a_folder_is_taken_up_only_as_it_was_made(tmp_path: Path) -> None:
    study(tmp_path, RandomSearch(space(), 0), FakeEvaluator(), 3)
    with pytest.raises(InputError, match="already holds a study: add --resume"):
        StudyFolder.open(tmp_path, SETTINGS, space(), resume=False)
    with pytest.raises(InputError, match='format: was "test", is "other"'):
        StudyFolder.open(tmp_path, {**SETTINGS, "format": "other"}, space(), resume=True)
    file = tmp_path / "trials.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    for damaged, said in (
        ([lines[0], lines[2]], "line 2: trial 3 stands where trial 2 should be"),
        ([lines[0].replace('"chains":', '"chainz":')], "line 1: not a trial of this study"),
        ([lines[0].replace('"measured"', '"done"')], "line 1: state must be one of"),
        ([lines[0].replace('"costs":', '"cost":')], "line 1: not a trial of this study"),
    ):
        file.write_text("".join(damaged))
        with pytest.raises(InputError, match=said):
            StudyFolder.open(tmp_path, SETTINGS, space(), resume=True)
    with pytest.raises(InputError, match="cannot write to"):
        StudyFolder.open(file, SETTINGS, space(), resume=False)


def test_a_trial_survives_its_line_to_the_bit(tmp_path: Path) -> None:
    rng = random.Random(0)
    trial = Trial(
        1, "measured", replace(ONE, alpha=0.123), rng.random(), measurement(rng.random(), rng.random()), None, ("é",),
        "so", ("no",),
    )  # fmt: skip
    with StudyFolder.open(tmp_path, SETTINGS, space(), resume=False) as folder:
        folder.add(trial)
    with StudyFolder.open(tmp_path, SETTINGS, space(), resume=True) as folder:
        assert folder.trials == [trial] and folder.restored == 1
