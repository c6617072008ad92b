"""How sure a model was at each token, and what else it might have written there: the ops against torch, the lane
against transformers."""

from __future__ import annotations

import math

import pytest
import torch

from atts_engine import ops
from atts_engine.errors import InputError
from atts_engine.models import load_model
from atts_engine.runtime import lane as lane_module
from atts_engine.runtime.commands import Decode
from atts_engine.runtime.lane import LaneCore
from atts_engine.runtime.likeliest import alternatives, top_logprobs
from atts_engine.runtime.records import SamplingParams, TokenChunk
from tests.late import LateRunner, fake_capture


@pytest.mark.parametrize("k", [1, 5, 20, 48, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_confidence_is_the_mean_of_the_likeliest_tokens(k: int, dtype: torch.dtype) -> None:
    logits = (torch.randn(7, 48, generator=torch.Generator().manual_seed(k)) * 8).to(dtype)
    logits[2] = -3.0
    expected = -torch.log_softmax(logits.double(), 1).sort(1, descending=True).values[:, :k].mean(1)
    found = ops.token_confidence(logits, k)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)
    # A row alone has the bits that it has in company.
    assert torch.equal(torch.cat([ops.token_confidence(row[None], k) for row in logits]), found)


def test_what_cannot_be_asked() -> None:
    with pytest.raises(InputError, match="k must be 1 or more"):
        ops.token_confidence(torch.zeros(2, 3), 0)
    with pytest.raises(InputError, match="token_confidence"):
        ops.token_confidence(torch.zeros(3), 1)
    for name in ("confidence", "alternatives"):
        with pytest.raises(InputError, match=f"{name} must be 0"):
            SamplingParams(**{name: -1})
    assert ops.token_confidence(torch.tensor([[0.0, float("nan")]]), 1).isnan().all()
    assert ops.token_confidence(torch.zeros(0, 4), 2).shape == (0,)
    assert top_logprobs(torch.tensor([[0.0, float("nan")]]), 2)[1].isnan().all()
    assert [each.shape for each in top_logprobs(torch.zeros(0, 4), 2)] == [(0, 2)] * 2


@pytest.mark.parametrize("k", [1, 5, 20, 48, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_likeliest_tokens_and_their_log_probabilities(k: int, dtype: torch.dtype) -> None:
    logits = (torch.randn(7, 48, generator=torch.Generator().manual_seed(k)) * 8).to(dtype)
    logits[2] = -3.0
    logits[3, 20:] = -torch.inf
    whole = torch.log_softmax(logits.double(), 1)
    ids, found = top_logprobs(logits, k)
    assert found.dtype == torch.float32 and ids.shape == found.shape == (7, min(k, 48))
    torch.testing.assert_close(found.double(), whole.topk(min(k, 48), dim=1).values, rtol=1e-6, atol=1e-5)
    # Of ties any may be told, but each once and at its own value.
    torch.testing.assert_close(found.double(), whole.gather(1, ids), rtol=1e-6, atol=1e-5)
    assert all(len(set(row)) == len(row) for row in ids.tolist())
    # A token is told as its log-probability is, whatever the list around it.
    for at in range(min(k, 20)):
        torch.testing.assert_close(found[:, at], ops.score_logits(logits, ids[:, at]), rtol=2**-22, atol=0)
    alone = [top_logprobs(row[None], k) for row in logits]
    assert torch.equal(torch.cat([values for _, values in alone]), found)
    assert torch.equal(torch.cat([own for own, _ in alone]), ids)
    # What cannot be drawn is no alternative.
    told = alternatives(ids[3].tolist(), found[3].tolist())
    assert len(told) == min(k, 20) and all(token < 20 and math.isfinite(value) for token, value in told)


ASKED = (0, 20, 3, 20, 60)
LISTED = (4, 0, 60, 4, 2)


def decoded(*, late: bool, graphs: bool, budget: int) -> dict[int, list[TokenChunk]]:
    """Five sequences of the tiny draft side by side, each with numbers of its own."""
    with pytest.MonkeyPatch.context() as patch:
        if late:
            patch.setattr(lane_module, "Runner", LateRunner)
        core = LaneCore(
            "draft",
            load_model("tiny-draft", "cpu", torch.float32),
            kv_tokens=2000,
            page_size=8,
            max_batch_tokens=budget,
            device=torch.device("cpu"),
            overlap=late,
        )
    if graphs:
        core._runner.capture(fake_capture, 4)
    heard: dict[int, list[TokenChunk]] = {i: [] for i in range(len(ASKED))}
    for i, k in enumerate(ASKED):
        core.open(i, prompt(i))
        wanted = {"logprobs": i % 2 == 0, "confidence": k, "alternatives": LISTED[i]}
        sampling = SamplingParams(temperature=0.8, seed=i, ignore_eos=True, **wanted)
        core.command(i, Decode(9 + i, sampling, 4, heard[i].append, lambda value, error: None))
    idle = 0
    while idle < 2:
        idle = 0 if core.step(lambda request, result: None) else idle + 1
    return heard


def prompt(i: int) -> tuple[int, ...]:
    return 1, 6, 20 + i, 7, 12 + i, 15, 9


@pytest.mark.parametrize(("late", "graphs", "budget"), [(False, False, 64), (True, False, 64), (True, True, 9)])
def test_a_lane_tells_confidences_and_likeliest_tokens_to_whom_they_are_asked_for(
    late: bool, graphs: bool, budget: int
) -> None:
    transformers = pytest.importorskip("transformers")
    from atts_engine.models.load import resolve

    model = transformers.LlamaForCausalLM.from_pretrained(resolve("tiny-draft"), dtype=torch.float32).eval()
    for i, chunks in decoded(late=late, graphs=graphs, budget=budget).items():
        tokens = [t for c in chunks for t in c.tokens]
        told = [x for c in chunks for x in c.confidences]
        assert len(tokens) == 9 + i
        assert all(len(c.logprobs) == (len(c.tokens) if i % 2 == 0 else 0) for c in chunks)
        assert all(len(c.confidences) == len(c.tokens) * (ASKED[i] > 0) for c in chunks)
        assert all(len(c.alternatives) == len(c.tokens) * (LISTED[i] > 0) for c in chunks)
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt(i), *tokens]])).logits[0, len(prompt(i)) - 1 : -1]
        whole = logits.double().log_softmax(-1)
        if ASKED[i]:
            top = whole.topk(min(ASKED[i], 48), dim=-1).values
            assert told == pytest.approx((-top.mean(-1)).tolist(), abs=1e-3)
        for row, others in zip(whole, [each for c in chunks for each in c.alternatives]):
            values = [value for _, value in others]
            assert values == pytest.approx(row.topk(min(LISTED[i], 48)).values.tolist(), abs=1e-3)
            assert values == pytest.approx([row[token].item() for token, _ in others], abs=1e-3)


def test_neither_depends_on_how_steps_were_cut() -> None:
    def whole(chunks: list[TokenChunk]) -> list[object]:
        return [x for c in chunks for x in (*c.tokens, *c.confidences, *c.alternatives)]

    plain = {i: whole(chunks) for i, chunks in decoded(late=False, graphs=False, budget=64).items()}
    for late, graphs, budget in ((False, False, 5), (True, True, 7)):
        assert {i: whole(c) for i, c in decoded(late=late, graphs=graphs, budget=budget).items()} == plain
