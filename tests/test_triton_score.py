"""Scores and verdicts of the Triton kernels: errors against float64, and bits that do not follow the company of a row.

Without a GPU the interpreter runs them. Its matrix product is a BLAS whose rounding follows a row's place, so bits are
compared on quarters, whose products add up without rounding: tiles, splits, sums and merges are what is tested. How an
instruction rounds is left to the tests marked `gpu`."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atts_engine import ops

pytest.importorskip("triton", reason="triton is not installed")

import atts_triton
from atts_triton.score_tokens import MAX_SPLITS, tiling

pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning:triton.runtime.interpreter")
ONE = 1 << 32
NAN, INF = float("nan"), float("inf")
KERNELS = import_module("atts_triton.score_tokens")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _quarters(*shape: int, seed: int) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 4).round() / 4


def _ids(rows: int, vocab: int, seed: int) -> torch.Tensor:
    return torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(seed))


def _capped(logits: torch.Tensor, softcap: float) -> torch.Tensor:
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def _picked(logits: torch.Tensor, ids: torch.Tensor, softcap: float) -> torch.Tensor:
    return _capped(logits, softcap).log_softmax(-1).gather(1, ids[:, None])[:, 0]


def _assert_as_good_as_torch(got: torch.Tensor, exact: torch.Tensor, single: torch.Tensor) -> None:
    error, torchs = ((x.double() - exact).abs().max().item() for x in (got.cpu(), single))
    assert error <= 3 * torchs + 2e-6


@settings(max_examples=12)
@given(
    st.integers(1, 70), st.integers(1, 70), st.integers(1, 400), st.sampled_from([torch.float32, torch.float16]),
    st.sampled_from([0.0, 0.7, 30.0]), st.integers(0, 99),
)  # fmt: skip
def test_score_tokens_errs_no_more_than_torch(
    rows: int, width: int, vocab: int, dtype: torch.dtype, softcap: float, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(rows, width, generator=g).to(dtype), torch.randn(vocab, width, generator=g).to(dtype)
    ids = _ids(rows, vocab, seed)
    got = atts_triton.score_tokens(hidden.to(DEVICE), weight.to(DEVICE), ids.to(DEVICE), softcap)
    exact = _picked(hidden.double() @ weight.double().T, ids, softcap)
    _assert_as_good_as_torch(got, exact, _picked(hidden.float() @ weight.float().T, ids, softcap))


@pytest.mark.parametrize(("softcap", "descriptors"), [(0.0, True), (9.0, False)])
def test_a_score_has_the_same_bits_in_every_batch(
    softcap: float, descriptors: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not descriptors:
        monkeypatch.setattr(KERNELS, "takes_descriptors", lambda tensor: False)
    hidden, weight = _quarters(200, 64, seed=0).half().to(DEVICE), _quarters(300, 64, seed=1).half().to(DEVICE)
    ids = _ids(200, 300, 2).to(DEVICE)
    whole = atts_triton.score_tokens(hidden, weight, ids, softcap)
    for start, end in ((0, 1), (199, 200), (3, 20), (70, 135), (50, 178), (1, 130)):
        part = atts_triton.score_tokens(hidden[start:end], weight, ids[start:end], softcap)
        assert torch.equal(part, whole[start:end])
    order = torch.randperm(200, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    assert torch.equal(atts_triton.score_tokens(hidden[order], weight, ids[order], softcap), whole[order])
    if descriptors:
        monkeypatch.setattr(KERNELS, "_GROUP_BYTES", 1)
        assert torch.equal(atts_triton.score_tokens(hidden, weight, ids, softcap), whole)


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 32), (torch.float16, 33)])
def test_small_tiles_too_give_the_same_bits_in_every_batch(dtype: torch.dtype, width: int) -> None:
    hidden, weight = (
        _quarters(70, width, seed=0).to(dtype).to(DEVICE),
        _quarters(90, width, seed=1).to(dtype).to(DEVICE),
    )
    ids = _ids(70, 90, 2).to(DEVICE)
    whole = atts_triton.score_tokens(hidden, weight, ids)
    for start, end in ((0, 1), (69, 70), (3, 40), (31, 64)):
        assert torch.equal(atts_triton.score_tokens(hidden[start:end], weight, ids[start:end]), whole[start:end])


def test_extreme_rows_stay_alone() -> None:
    """Whole tiles of -inf, logits of 1e4, NaN, ids that are no token, one column, one row, no row."""
    weight = torch.full((300, 1), -INF)
    weight[250:260] = torch.arange(10.0)[:, None]
    hidden, ids = torch.tensor([[1.0], [1.0], [1e3], [NAN], [1.0], [1.0]]), torch.tensor([251, 3, 259, 251, 300, -1])
    got = atts_triton.score_tokens(hidden.to(DEVICE), weight.to(DEVICE), ids.to(DEVICE)).cpu()
    exact = _picked(hidden[:3].double() @ weight.double().T, ids[:3], 0.0)
    torch.testing.assert_close(got[:3].double(), exact, atol=1e-5, rtol=0)
    assert got[1] == -INF and got[3:].isnan().all()
    one = torch.ones(3, 1, device=DEVICE)
    assert torch.equal(atts_triton.score_tokens(one, one[:1], torch.zeros(3, device=DEVICE).long()), one[:, 0] * 0)
    assert atts_triton.score_tokens(one[:0], one, torch.empty(0, device=DEVICE).long()).shape == (0,)
    huge = torch.tensor([[1e4]]).expand(2, 16).contiguous().to(DEVICE)
    ids = torch.tensor([0, 39], device=DEVICE)
    got = atts_triton.score_tokens(huge, torch.ones(40, 16, device=DEVICE), ids)
    torch.testing.assert_close(got.cpu(), -torch.tensor([40.0, 40.0]).log(), atol=1e-5, rtol=0)


def test_refuses_what_the_kernels_cannot_read() -> None:
    x, ids = torch.zeros(4, 8, device=DEVICE), torch.zeros(4, device=DEVICE).long()
    with pytest.raises(ValueError, match="one of fp32"):
        atts_triton.score_tokens(x.double(), x.double(), ids)
    with pytest.raises(ValueError, match="without gaps"):
        atts_triton.score_tokens(x[:, ::2], x[:, ::2], ids)
    with pytest.raises(ValueError, match="without gaps"):
        atts_triton.score_logits(x[:, ::2], ids)
    with pytest.raises(ValueError, match="not torch.int64"):
        atts_triton.score_logits(x.long(), ids)


def test_partial_results_stay_small() -> None:
    for vocab in (1, 31, 49152, 128256, 151936, 262144, 1 << 20):
        for width, dtype in ((4096, torch.bfloat16), (100, torch.float16), (64, torch.float32)):
            assert tiling(vocab, width, dtype).splits <= MAX_SPLITS


@settings(max_examples=8)
@given(
    st.integers(1, 5), st.sampled_from([1, 37, 4096, 4099, 9001]), st.integers(0, 3),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), st.sampled_from([0.0, 2.0]), st.integers(0, 99),
)  # fmt: skip
def test_score_logits(rows: int, vocab: int, gap: int, dtype: torch.dtype, softcap: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocab + gap, generator=g) * 4).to(dtype)[:, :vocab]
    ids = _ids(rows, vocab, seed)
    got = atts_triton.score_logits(logits.to(DEVICE), ids.to(DEVICE), softcap)
    exact = _picked(logits.double(), ids, softcap)
    _assert_as_good_as_torch(got, exact, _picked(logits.float(), ids, softcap))
    for row in range(rows):
        alone = logits[row : row + 1].contiguous().to(DEVICE)
        assert torch.equal(atts_triton.score_logits(alone, ids[row : row + 1].to(DEVICE), softcap), got[row : row + 1])


def test_score_logits_of_rows_that_are_not_finite() -> None:
    logits = torch.zeros(6, 9000)
    logits[0, :8999] = -INF
    logits[1, 5] = -INF
    logits[2, 8000] = NAN
    logits[3, 1] = INF
    logits[4] = -INF
    ids = torch.tensor([8999, 5, 0, 0, 0, 9000])
    got = atts_triton.score_logits(logits.to(DEVICE), ids.to(DEVICE)).cpu()
    assert got[0] == 0 and got[1] == -INF and got[2:].isnan().all()


@given(
    st.lists(st.lists(st.floats(-50, 0, width=32), min_size=1, max_size=40), max_size=5),
    st.sampled_from([torch.int32, torch.int64]),
)
@settings(max_examples=20)
def test_span_mean_has_the_bits_of_the_reference(spans: list[list[float]], bounds_dtype: torch.dtype) -> None:
    flat = torch.tensor([value for span in spans for value in span], dtype=torch.float32)
    bounds = torch.tensor([0, *(len(span) for span in spans)]).cumsum(0).to(bounds_dtype)
    with ops.use("reference"):
        wanted = ops.span_mean(flat, bounds)
    with ops.use("triton"):
        got = ops.span_mean(flat.to(DEVICE), bounds.to(DEVICE))
    assert all(torch.equal(mine.cpu(), theirs) for mine, theirs in zip(got, wanted))


def test_span_mean_of_bounds_that_do_not_hold() -> None:
    logprob = torch.tensor([-1.0, -2.0, NAN, -4.0], device=DEVICE)
    score, sums = atts_triton.span_mean(logprob, torch.tensor([-1, 0, 2, 2, 3, 4, 5], device=DEVICE))
    wanted = torch.tensor([NAN, 1.5, NAN, NAN, 4.0, NAN])
    torch.testing.assert_close(score.cpu(), wanted, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(sums.isnan(), score.isnan())


def _store(keys: int, capacity: int) -> list[torch.Tensor]:
    return [torch.zeros(keys, capacity), torch.zeros(keys).long(), torch.zeros(keys).long()]


def _same(got: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...]) -> None:
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, rtol=0, atol=0, equal_nan=True)


def _requests(rows: int, keys: int, g: torch.Generator) -> list[torch.Tensor]:
    level, u = (torch.randint(1, ONE + 1, (rows,), generator=g) for _ in range(2))
    return [torch.randint(0, keys, (rows,), generator=g), level, u, torch.rand(rows, generator=g) < 0.7]


SCORES = st.sampled_from([0.0, 0.5, 1.0, NAN, INF, -INF, -1.0])


@settings(max_examples=15)
@given(st.sampled_from([1, 3, 64]), st.lists(st.lists(SCORES, max_size=40), max_size=4), st.integers(0, 99))
def test_gate_has_the_bits_of_the_reference(capacity: int, batches: list[list[float]], seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    expected = _store(3, capacity)
    store = [tensor.clone().to(DEVICE) for tensor in expected]
    for scores in batches:
        score = torch.tensor(scores, dtype=torch.float32)
        key, *rest = _requests(len(scores), 3, g)
        with ops.use("reference"):
            wanted = ops.gate(score, key, *expected, *rest)
        with ops.use("triton"):
            got = ops.gate(score.to(DEVICE), key.to(DEVICE), *store, *(t.to(DEVICE) for t in rest))
        _same((*got, *store), (*wanted, *expected))


def test_gate_counts_a_long_ring_in_parts() -> None:
    g = torch.Generator().manual_seed(0)
    expected = _store(2, 20000)
    expected[0].copy_(torch.randint(0, 50, (2, 20000), generator=g))
    expected[1].copy_(torch.tensor([20000, 9001]))
    store = [tensor.clone().to(DEVICE) for tensor in expected]
    for _ in range(2):
        score, (key, *rest) = torch.randint(0, 50, (5,), generator=g).float(), _requests(5, 2, g)
        with ops.use("reference"):
            wanted = ops.gate(score, key, *expected, *rest)
        with ops.use("triton"):
            got = ops.gate(score.to(DEVICE), key.to(DEVICE), *store, *(t.to(DEVICE) for t in rest))
        _same((*got, *store), (*wanted, *expected))


def test_a_key_that_the_store_lacks_changes_nothing() -> None:
    store = [tensor.to(DEVICE) for tensor in _store(2, 3)]
    key, full = torch.tensor([-1, 2], device=DEVICE), torch.full((2,), ONE, device=DEVICE)
    got = atts_triton.gate(torch.ones(2, device=DEVICE), key, *store, full, full, full > 0)
    wanted = (torch.full((2,), -1), torch.zeros(2).long(), torch.zeros(2).long(), torch.zeros(2).bool())
    _same((*got, *store), (*wanted, torch.full((2,), NAN).double(), *_store(2, 3)))


@settings(max_examples=10)
@given(
    st.lists(st.integers(1, 40), max_size=5), st.sampled_from([1, 2, 50]), st.sampled_from([0.0, 5.0]),
    st.sampled_from([torch.int32, torch.int64]), st.integers(0, 99),
)  # fmt: skip
def test_score_gate_is_its_parts_to_the_bit(
    lengths: list[int], capacity: int, softcap: float, bounds_dtype: torch.dtype, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    tokens, spans = sum(lengths), len(lengths)
    hidden, weight = torch.randn(tokens, 16, generator=g).half(), torch.randn(200, 16, generator=g).half()
    hidden[: tokens // 7] = NAN
    ids, bounds = _ids(tokens, 200, seed), torch.tensor([0, *lengths]).cumsum(0).to(bounds_dtype)
    expected = _store(2, capacity)
    store = [tensor.clone().to(DEVICE) for tensor in expected]
    for _ in range(2):
        key, *rest = _requests(spans, 2, g)
        on_device = [t.to(DEVICE) for t in (hidden, weight, ids, bounds, key)]
        with ops.use("triton"):
            got = ops.score_gate(*on_device, *store, *(t.to(DEVICE) for t in rest), softcap)
            logprob = ops.score_tokens(*on_device[:3], softcap).cpu()
        with ops.use("reference"):
            score, sums = ops.span_mean(logprob, bounds)
            wanted = ops.gate(score, key, *expected, *rest)
        _same((*got, *store), (score, sums, *wanted, *expected))


def test_score_gate_of_spans_and_keys_that_do_not_hold() -> None:
    store = [tensor.to(DEVICE) for tensor in _store(2, 3)]
    hidden, weight = torch.ones(3, 16, device=DEVICE), torch.ones(9, 16, device=DEVICE)
    full = torch.full((4,), ONE, device=DEVICE)
    bounds, key = torch.tensor([0, 2, 2, 3, 9], device=DEVICE), torch.tensor([0, 1, 2, 1], device=DEVICE)
    ids = torch.zeros(3, device=DEVICE).long()
    got = atts_triton.score_gate(hidden, weight, ids, bounds, key, *store, full, full, full > 0)
    assert got[0].isnan().tolist() == [False, True, False, True]
    assert got[2].tolist() == [0, -1, -1, -1] and got[5].tolist() == [True, False, False, False]
    assert store[1].tolist() == [1, 0] and store[0][0, 0] == got[0][0]
    got = atts_triton.score_gate(
        hidden[:0], weight, ids[:0], bounds[:2] * 0, key[:1], *store, *(full[:1],) * 2, full[:1] > 0
    )
    assert got[0].isnan().all() and got[4].tolist() == [1]


_INSTRUCTIONS = """
import re
from atts_triton.aot import compiled, variants
for capability in (80, 90):
    found = set()
    for variant in variants(["score_tokens"]):
        wanted = "bf16" in variant.name and "H=4096" in variant.name and " cap" not in variant.name
        if wanted and capability in (variant.capabilities or {80, 90}):
            found |= set(re.findall(r"m64n\\d+k\\d+|m16n\\d+k\\d+", compiled(variant, capability).asm["ptx"]))
    print(capability, *sorted(found))
"""


def test_every_tile_of_tensor_core_operands_issues_one_instruction(root: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", _INSTRUCTIONS]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["80 m16n8k16", "90 m64n128k16"], done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_score_has_the_same_bits_in_every_batch_on_the_device(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 1024, generator=g).to(dtype).cuda() for rows in (1000, 33333))
    ids = _ids(1000, 33333, 0).cuda()
    whole = atts_triton.score_tokens(hidden, weight, ids)
    for rows in (1, 16, 63, 64, 65, 128, 129, 256, 257, 384, 385, 999):
        part = slice(500 - rows // 2, 500 - rows // 2 + rows)
        assert torch.equal(atts_triton.score_tokens(hidden[part], weight, ids[part]), whole[part])


@pytest.mark.gpu
def test_no_insert_overtakes_a_count_on_the_device_nor_in_a_replay() -> None:
    g = torch.Generator().manual_seed(0)
    expected = _store(3, 100_000)
    expected[0].copy_(torch.randint(0, 999, (3, 100_000), generator=g))
    expected[1].fill_(99_000)
    store = [tensor.clone().cuda() for tensor in expected]
    key, *rest = _requests(200, 3, g)
    inputs, score = [t.cuda() for t in (key, *rest)], torch.zeros(200, device="cuda")
    atts_triton.gate(score, inputs[0], *(t.clone() for t in store), *inputs[1:])  # compiled and loaded before capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = atts_triton.gate(score, inputs[0], *store, *inputs[1:])
    for turn in range(50):
        fresh = torch.randint(0, 999, (200,), generator=g).float()
        score.copy_(fresh)
        if turn % 2:
            graph.replay()
            got = replayed
        else:
            got = atts_triton.gate(score, inputs[0], *store, *inputs[1:])
        with ops.use("reference"):
            wanted = ops.gate(fresh, key, *expected, *rest)
        _same((*got, *store), (*wanted, *expected))
