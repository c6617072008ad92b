"""The register task, the sequences that the built-in pair is trained on, and the shipped files."""

from __future__ import annotations

import json
import operator
import random
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atts_engine.errors import InputError
from atts_engine.evaluation import registers

ROOT = Path(__file__).resolve().parents[1]
BUILTIN = ROOT / "atts_engine" / "models" / "builtin"
sys.path.insert(0, str(ROOT / "examples"))

from tiny_pair.data import Recipe, Stream, Writer  # noqa: E402
from tiny_pair.vocab import BLANK, BOS, BOX, EOS, ID, TOKENS, WAIT, decode, encode  # noqa: E402


def evaluate(problem: str) -> int:
    """Oracle: fold the operators over the start value, read from the text by another pattern than the task's own."""
    value = int(re.match(r"a = (\d+);", problem)[1])
    for symbol, constant in re.findall(r"([-+*])(\d+)", problem):
        value = {"+": operator.add, "-": operator.sub, "*": operator.mul}[symbol](value, int(constant))
    return value


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 10**6), st.integers(1, 9))
def test_generated_problem_is_solved_by_its_gold_text(seed: int, index: int, steps: int) -> None:
    problem = registers.generate(seed, index, (1, steps))
    assert problem == registers.generate(seed, index, (1, steps))
    assert problem.answer == str(evaluate(problem.problem))
    ops = registers.operations(problem.problem)
    assert len(ops) == problem.steps <= steps
    assert all(registers.LOW <= value <= registers.HIGH for op in ops for value in (op.before, op.after))
    text = registers.solution(problem.problem)
    assert registers.check(problem.problem, text)
    assert registers.first_wrong_step(problem.problem, text) is None
    for end in range(len(text)):
        assert registers.first_wrong_step(problem.problem, text[:end]) is None


def test_held_out_problems_are_never_trained_on() -> None:
    problems = registers.heldout(200, seed=3)
    assert len({p.problem for p in problems}) == 200
    assert {registers.split_of(p.problem) for p in problems} == {"held-out"}
    assert all(registers.generate(5, i, split="train") != p for i, p in enumerate(problems))
    stream = Stream(Recipe(error_rate=0.3), 2048, seed=0)
    for _ in range(200):
        text = decode(stream.sequence().ids)
        assert registers.split_of(text[len("Q: ") : text.index("\n\n")]) == "train"


def test_problem_line_holds_the_file_format() -> None:
    problem = registers.generate(0, 0)
    expected = {"id": problem.id, "problem": problem.problem, "answer": problem.answer}
    assert json.loads(problem.to_json_line()) == expected


def test_wrong_step_is_found_until_it_is_redone() -> None:
    problem = "a = 85; b = a-43; c = b+11; c?"
    wrong = "b = a-43 = 85-43 = 52\n\nc = b+11 = 52+11 = 63\n\n\\boxed{63}"
    found = registers.first_wrong_step(problem, wrong)
    assert found is not None and (found.register, wrong[found.start : found.end]) == ("b", "b = a-43 = 85-43 = 52")
    assert not registers.check(problem, wrong)
    half = wrong + "\n\nWait, b = a-43 = 85-43 = 42"
    assert registers.first_wrong_step(problem, half).register == "c"
    mended = half + "\n\nc = b+11 = 42+11 = 53\n\n\\boxed{53}"
    assert registers.first_wrong_step(problem, mended) is None
    assert registers.check(problem, mended)
    assert [s.correction for s in registers.written_steps(problem, mended)] == [False, False, True, False]


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        ("", None),
        ("\\boxed{1", None),
        ("\\boxed{1} \\boxed{2", "1"),
        ("\\boxed{a{b}c}", "a{b}c"),
        ("\\boxed{1}\\boxed{2}", "2"),
    ],
)
def test_last_balanced_box(text: str, boxed: str | None) -> None:
    assert registers.last_boxed(text) == boxed


@pytest.mark.parametrize("problem", ["", "a = 1; b?", "a = 1; c = b+2; c?", "a = 1; b = a+2; a?", "2 + 2"])
def test_other_text_is_refused(problem: str) -> None:
    with pytest.raises(InputError):
        registers.solution(problem)


@pytest.mark.parametrize("steps", [(0, 3), (4, 3), (2, 10)])
def test_impossible_numbers_of_steps_are_refused(steps: tuple[int, int]) -> None:
    with pytest.raises(InputError):
        registers.generate(0, 0, steps)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32), st.booleans())
def test_training_sequences_end_right_and_learn_nothing_wrong(seed: int, corrects: bool) -> None:
    rng = random.Random(seed)
    start, ops = registers.draw(rng, rng.randint(2, 6))
    problem = registers.problem_text(start, ops)
    row = Writer(rng, Recipe(error_rate=0.5, corrects=corrects), start, ops).write()
    text = decode(row.ids).removeprefix(f"Q: {problem}\n\n")
    assert encode(decode(row.ids)) == row.ids[1:-1] and row.ids[0] == BOS and row.ids[-1] == EOS
    assert registers.check(problem, text) and registers.first_wrong_step(problem, text) is None
    prompt = 1 + len(encode(f"Q: {problem}\n\n"))
    assert not any(row.weights[:prompt])
    assert not any(weight for weight, wrong in zip(row.weights, row.wrong, strict=True) if wrong)
    for i in range(prompt, len(row.ids)):
        if row.ids[i] == WAIT:
            assert (row.weights[i] > 0) == corrects
        # A chain that goes on although a correction is due teaches the target nothing.
        if corrects and row.ids[i - 1] == BLANK and i > prompt and row.ids[i] != WAIT:
            steps = registers.written_steps(problem, decode(row.ids[prompt:i]))
            since = max((n for n, step in enumerate(steps) if step.correction), default=0)
            assert row.weights[i] == 0 or all(step.right for step in steps[since:])


@pytest.fixture(scope="module", params=["tiny_draft", "tiny_target"])
def folder(request: pytest.FixtureRequest) -> Path:
    return BUILTIN / request.param


def test_tokenizer_round_trip(folder: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert [tokenizer.id_to_token(i) for i in range(len(TOKENS))] == TOKENS
    stream = Stream(Recipe(error_rate=0.5), 2048, seed=1)
    for _ in range(100):
        ids = stream.sequence().ids
        text = "<bos>" + decode(ids) + "<eos>"
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.encode("x^2", add_special_tokens=False).ids == [ID["<unk>"], ID["<unk>"], ID["2"]]


def test_chat_template_writes_the_prompt(folder: Path) -> None:
    jinja2 = pytest.importorskip("jinja2")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    messages = [{"role": "system", "content": "Think."}, {"role": "user", "content": "a = 85; b = a-43; b?"}]
    for generation in (False, True):
        text = jinja2.Template(config["chat_template"]).render(
            messages=messages, add_generation_prompt=generation, bos_token="<bos>", eos_token="<eos>"
        )
        assert text == "<bos>Q: a = 85; b = a-43; b?\n\n"


def test_shipped_files_are_small_and_named_as_llama(folder: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    assert sum(f.stat().st_size for f in BUILTIN.rglob("*") if f.is_file()) <= 12 * 2**20
    config = json.loads((folder / "config.json").read_text())
    with safetensors.safe_open(folder / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= names
    assert len(names) == 3 + 9 * config["num_hidden_layers"]


def test_sampler_agrees_with_the_training_forward() -> None:
    import torch
    from tiny_pair.checkpoint import load_exported
    from tiny_pair.sampler import sample

    torch.manual_seed(0)
    model = load_exported(BUILTIN / "tiny_draft")
    prompts = [[BOS, *encode(f"Q: {p.problem}\n\n")] for p in registers.heldout(6, seed=2)]
    for prompt, new in zip(prompts, sample(model, prompts, 40, 0.0, seed=0), strict=True):
        ids = list(prompt)
        while len(ids) < len(prompt) + 40:
            token = int(model(torch.tensor([ids]))[0][0, -1].argmax())
            if token == EOS:
                break
            ids.append(token)
        assert ids[len(prompt) :] == new


def test_target_solves_held_out_problems_and_mends_a_wrong_chain() -> None:
    from tiny_pair.checkpoint import load_exported
    from tiny_pair.sampler import sample

    target = load_exported(BUILTIN / "tiny_target")
    problems = registers.heldout(40, seed=4)
    prompts = [[BOS, *encode(f"Q: {p.problem}\n\n")] for p in problems]
    wrote = sample(target, prompts, 200, 0.0, seed=0)
    assert sum(registers.check(p.problem, decode(ids)) for p, ids in zip(problems, wrote, strict=True)) >= 36
    finished = [prompt + encode(registers.solution(p.problem)) for prompt, p in zip(prompts, problems, strict=True)]
    assert BOX in finished[0]
    assert sum(not ids for ids in sample(target, finished, 2, 0.0, seed=0)) >= 36
