"""examples/vllm without vLLM: the gate behind both of vLLM's interfaces against an oracle that sees each request by
itself, whatever rows a persistent batch gives it. tests/test_plugin_vllm.py runs the same against vLLM."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atts_engine.conformal import LEVEL_ONE, Adaptive, ColdStart, Mondrian, Split, level_of, load_calibrator
from atts_engine.conformal.state import Meta
from atts_engine.errors import InputError
from atts_engine.evaluation.decisions import check_log, read_decisions
from atts_engine.ops import native

SPAN, KEYS, VOCAB, ROWS, MARK = 3, 4, 11, 4, 10
ALPHA = 0.4


class BatchUpdate(NamedTuple):
    batch_size: int
    removed: list[int]
    added: list[tuple[int, Any, None, list[int]]]
    moved: list[tuple[int, int, Any]]


class MoveDirectionality(Enum):
    UNIDIRECTIONAL = auto()
    SWAP = auto()


def _calibrator(path: Path) -> Path:
    meta = Meta(draft="m", target="m", draft_tokens=SPAN)
    made = Mondrian(ALPHA, keys=KEYS, capacity=16, meta=meta, cold=ColdStart("accept", 6))
    scores = np.random.default_rng(3).normal(0.9, 0.4, (KEYS, 12))
    for key in range(KEYS):
        for score in scores[key, : 5 if key == 1 else 12].tolist():
            made.observe(score, key)
    made.save(path)
    return path


def _config(**settings_: str) -> Any:
    return SimpleNamespace(
        additional_config={"atts_gate": settings_},
        speculative_config=None,
        model_config=SimpleNamespace(model="not-a-folder"),
        scheduler_config=SimpleNamespace(max_num_seqs=ROWS),
        parallel_config=SimpleNamespace(world_size_across_dp=1),
    )


@pytest.fixture(scope="module", autouse=True)
def interfaces() -> Iterator[None]:
    """What of vLLM the adapters import: names, and no behaviour."""
    names = {
        "vllm.v1.sample.logits_processor": ("LogitsProcessor", "BatchUpdate", "MoveDirectionality"),
        "vllm.v1.worker.gpu.sample.logits_processor": ("LogitsProcessor", "LogitsContext", "LogitsProcRequestState"),
        "vllm.model_executor.layers.linear": ("UnquantizedLinearMethod",),
        "vllm.model_executor.layers.vocab_parallel_embedding": ("UnquantizedEmbeddingMethod",),
        "vllm.platforms": ("current_platform",),
        "vllm.v1.outputs": ("LogprobsTensors",),
        "vllm.v1.worker.cpu_worker": ("CPUWorker",),
    }
    platform = SimpleNamespace(is_cpu=lambda: True)
    known = {"BatchUpdate": BatchUpdate, "MoveDirectionality": MoveDirectionality, "current_platform": platform}
    with pytest.MonkeyPatch.context() as patch:
        for path, members in names.items():
            module = ModuleType(path)
            for member in members:
                setattr(module, member, known.get(member) or type(member, (), {}))
            patch.setitem(sys.modules, path, module)
        yield
    for adapter in ("self_gate", "self_gate_v2", "scoring_worker"):
        sys.modules.pop(f"examples.vllm.{adapter}", None)


def _params(**extra: Any) -> Any:
    return SimpleNamespace(extra_args=extra, stop_token_ids=[7, MARK], min_tokens=0, structured_outputs=None)


@dataclass(eq=False)
class Chain:
    """A request, and what the oracle knows of it. known_from: the first token whose logits no preemption took away."""

    number: int
    params: Any
    prefill: int
    rng: np.random.Generator
    output: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    known_from: int = 0

    @property
    def gated(self) -> bool:
        return bool(self.params.extra_args)

    def verdict(self, calibrator: Mondrian) -> tuple[int, bool] | None:
        """(turn, takeover) of the span that the last token ended; None where it ended none or its score is lost."""
        drawn = len(self.output)
        if not drawn or drawn % SPAN or drawn - SPAN < self.known_from:
            return None
        turn = self.params.extra_args["atts_turn"] + drawn // SPAN - 1
        alpha = self.params.extra_args.get("atts_alpha")
        level = None if alpha is None else level_of(alpha)
        score = -sum(self.logprobs[-SPAN:]) / SPAN
        return turn, calibrator.decide(score, calibrator.key_of(turn), LEVEL_ONE, level=level).takeover


class V1:
    """The persistent batch of model runner V1: rows that are removed, filled, condensed and swapped."""

    def __init__(self, config: Any) -> None:
        module = importlib.import_module("examples.vllm.self_gate")
        self.processor = module.SelfGate(config, torch.device("cpu"), False)
        self.rows: list[Chain] = []

    def change(self, leaving: list[Chain], joining: list[Chain], swaps: list[tuple[int, int]]) -> None:
        removed = sorted((self.rows.index(chain) for chain in leaving), reverse=True)
        rows: dict[int, Chain] = {i: c for i, c in enumerate(self.rows) if c not in leaving}
        added, moved = [], []
        free = sorted(removed) + list(range(len(self.rows), ROWS))
        for chain in joining:
            row = free.pop(0)
            rows[row] = chain
            if row in removed:
                removed.remove(row)  # as vLLM: an added request stands for the removal of the old one
            added.append((row, chain.params, None, chain.output))
        while rows and max(rows) >= len(rows):
            source, target = max(rows), next(i for i in range(ROWS) if i not in rows)
            rows[target] = rows.pop(source)
            if target in removed:
                removed.remove(target)  # as does one that is moved into its row
            moved.append((source, target, MoveDirectionality.UNIDIRECTIONAL))
        for one, other in swaps:
            if one != other and one in rows and other in rows:
                rows[one], rows[other] = rows[other], rows[one]
                moved.append((one, other, MoveDirectionality.SWAP))
        self.rows = [rows[i] for i in range(len(rows))]
        changed = removed or added or moved
        # With asynchronous scheduling the last token is a placeholder until processors are applied.
        last = [chain.output.pop() if chain.output else None for chain in self.rows]
        for chain, token in zip(self.rows, last):
            chain.output += [] if token is None else [-1]
        self.processor.update_state(BatchUpdate(len(rows), removed, added, moved) if changed else None)
        for chain, token in zip(self.rows, last):
            chain.output[-1:] = [] if token is None else [token]

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return self.processor.apply(logits)


class V2:
    """Model runner V2: a slot for as long as a request runs, rows in another order at every step."""

    def __init__(self, config: Any) -> None:
        module = importlib.import_module("examples.vllm.self_gate_v2")
        self.prompt = np.arange(5, 5 + ROWS, dtype=np.int32)
        state = SimpleNamespace(
            device=torch.device("cpu"), max_num_reqs=ROWS, prompt_len=SimpleNamespace(np=self.prompt)
        )
        self.processor = module.SelfGate(config, state)
        self.rows: list[Chain] = []
        self.slots: dict[Chain, int] = {}
        self.free = list(range(ROWS))

    def change(self, leaving: list[Chain], joining: list[Chain], swaps: list[tuple[int, int]]) -> None:
        for chain in leaving:
            self.rows.remove(chain)
            self.free.append(self.slots.pop(chain))
        for chain in joining:
            self.slots[chain] = self.free.pop()
            assert self.processor.add_request(self.slots[chain], chain.params) is chain.gated
            self.rows.append(chain)
        for one, other in swaps:
            if max(one, other) < len(self.rows):
                self.rows[one], self.rows[other] = self.rows[other], self.rows[one]

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        slots = np.array([self.slots[chain] for chain in self.rows], dtype=np.int32)
        lengths = [int(self.prompt[s]) + len(c.output) - c.prefill for s, c in zip(slots, self.rows)]
        context = SimpleNamespace(
            idx_mapping_np=slots,
            seq_lens_upper_bound_np=np.array(lengths, dtype=np.int32),
            input_ids=torch.tensor([c.output[-1] if c.output else 5 for c in self.rows], dtype=torch.int32),
        )
        return self.processor.apply(logits, context)


def _step(batch: V1 | V2, calibrator: Mondrian) -> list[tuple[int, int, bool]]:
    """One sampling step; verdicts that the oracle gives as (chain, turn, takeover)."""
    plain = np.stack([chain.rng.normal(0, 2, VOCAB).astype(np.float32) for chain in batch.rows])
    shown = batch.apply(torch.from_numpy(plain.copy())).numpy()
    verdicts = []
    for chain, before, after in zip(batch.rows, plain, shown, strict=True):
        verdict = chain.verdict(calibrator) if chain.gated and not chain.prefill else None
        expected = before.copy()
        if verdict is not None:
            verdicts.append((chain.number, *verdict))
        if verdict is not None and verdict[1]:
            expected[:] = -np.inf
            expected[MARK] = 0
        elif chain.gated:
            expected[MARK] = -np.inf
        np.testing.assert_array_equal(after, expected)
        if chain.prefill:
            chain.prefill -= 1
        else:
            chain.output.append(int(after.argmax()))
            wide = before.astype(np.float64)
            chain.logprobs.append(wide[chain.output[-1]] - np.log(np.exp(wide).sum()))
    return verdicts


@pytest.mark.parametrize("interface", [V1, V2])
@settings(max_examples=40)
@given(data=st.data())
def test_a_request_is_gated_as_if_it_ran_alone(
    interface: type[V1 | V2], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("gate")
    file, log = _calibrator(folder / "self.npz"), folder / "decisions.jsonl"
    calibrator = load_calibrator(file, frozen=True)
    assert isinstance(calibrator, Mondrian)
    batch = interface(_config(calibration=str(file), log=str(log)))
    preempted: list[Chain] = []
    verdicts: list[tuple[int, int, bool]] = []
    for step in range(data.draw(st.integers(8, 24), "steps")):
        # A request that has ended may run for one more step: with asynchronous scheduling it was scheduled already.
        leaving = [
            c
            for c in batch.rows
            if MARK in c.output[:-1] or data.draw(st.integers(0, 1 if MARK in c.output else 9)) == 0
        ]
        joining = []
        for place in range(data.draw(st.integers(0, ROWS - len(batch.rows) + len(leaving)), "join")):
            if preempted:
                chain = preempted.pop()
                chain.known_from = len(chain.output)
            else:
                extra = {"atts_turn": data.draw(st.integers(0, 2), "turn"), "atts_mark": MARK, "atts_problem": "p"}
                extra |= {"atts_chain": step * ROWS + place} | data.draw(st.sampled_from([{}, {"atts_alpha": 0.7}]))
                gated = data.draw(st.integers(0, 3), "gated") > 0
                number, prefill = step * ROWS + place, data.draw(st.integers(0, 2), "prompt steps")
                chain = Chain(number, _params(**(extra if gated else {})), prefill, np.random.default_rng(number))
            joining.append(chain)
        preempted += [c for c in leaving if MARK not in c.output and c.prefill == 0]
        swaps = data.draw(st.lists(st.tuples(*[st.integers(0, ROWS - 1)] * 2), max_size=2), "swaps")
        batch.change(leaving, joining, swaps)
        if batch.rows:
            verdicts += _step(batch, calibrator)
    decisions = read_decisions(log)
    assert check_log(decisions, calibrator) is None
    assert sorted((d.chain, d.turn, d.verdict == "takeover") for d in decisions) == sorted(verdicts)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"atts_turn": 0}, "atts_mark"),
        ({"atts_mark": MARK}, "atts_turn"),
        ({"atts_turn": True, "atts_mark": MARK}, "atts_turn"),
        ({"atts_turn": 0, "atts_mark": 3}, "stop_token_ids"),
        ({"atts_turn": 0, "atts_mark": MARK, "atts_alpha": 1.5}, "alpha"),
        ({"atts_turn": 0, "atts_mark": MARK, "atts_alhpa": 0.5}, "atts_alhpa"),
    ],
)
def test_requests_that_cannot_be_are_refused_by_name(params: dict[str, Any], message: str) -> None:
    processor = importlib.import_module("examples.vllm.self_gate").SelfGate
    with pytest.raises(ValueError, match=message):
        processor.validate_params(_params(**params))
    processor.validate_params(_params(atts_turn=0, atts_mark=MARK))
    processor.validate_params(_params(other=1))


def test_settings_that_cannot_be_are_refused_by_name(tmp_path: Path) -> None:
    gate_of = importlib.import_module("examples.vllm.span_gate").gate_of
    cpu, file = torch.device("cpu"), tmp_path / "self.npz"
    with pytest.raises(InputError, match="no calibration"):
        gate_of(_config(), cpu)
    with pytest.raises(InputError, match="no setting 'alpha'"):
        gate_of(_config(calibration=str(_calibrator(file)), alpha="0.4"), cpu)
    drafting = _config(calibration=str(file))
    drafting.speculative_config = object()
    with pytest.raises(InputError, match="speculative"):
        gate_of(drafting, cpu)
    Adaptive(ALPHA, meta=Meta(draft="a", target="b", draft_tokens=SPAN)).save(file)
    with pytest.raises(InputError, match="same model"):
        gate_of(_config(calibration=str(file)), cpu)
    Split(ALPHA, meta=Meta(draft="a", target="a", draft_tokens=SPAN, score="coin")).save(file)
    with pytest.raises(InputError, match="not of coin"):
        gate_of(_config(calibration=str(file)), cpu)


def test_tokens_that_vllm_withholds_are_an_error(tmp_path: Path) -> None:
    module = importlib.import_module("examples.vllm.self_gate")
    processor = module.SelfGate(
        _config(calibration=str(_calibrator(tmp_path / "self.npz"))), torch.device("cpu"), False
    )
    processor.update_state(BatchUpdate(1, [], [(0, _params(atts_turn=0, atts_mark=MARK), None, [-1])], []))
    with pytest.raises(InputError, match="no-async-scheduling"):
        processor.apply(torch.zeros(1, VOCAB))


def test_the_tiled_head_scores_and_ranks_as_the_whole_softmax_does() -> None:
    module = importlib.import_module("examples.vllm.scoring_worker")
    vocab, rows = 20_000, 600  # more than a tile of each
    torch.manual_seed(0)
    weight, hidden, ids = torch.randn(vocab + 64, 16), torch.randn(rows, 16), torch.randint(0, vocab, (rows,))
    head = SimpleNamespace(quant_method=module.UnquantizedEmbeddingMethod(), weight=torch.nn.Parameter(weight))
    model = SimpleNamespace(
        lm_head=head, logits_processor=SimpleNamespace(scale=1.0, soft_cap=30.0, org_vocab_size=vocab)
    )
    config = SimpleNamespace(
        model_config=SimpleNamespace(logprobs_mode="raw_logprobs"),
        parallel_config=SimpleNamespace(world_size=1),
        lora_config=None,
        additional_config={},
    )
    logprob, rank = module.TiledHead(model, config).score(hidden, ids)
    logits = 30 * torch.tanh(hidden.double() @ weight[:vocab].double().T / 30)
    own = logits.gather(1, ids[:, None])
    torch.testing.assert_close(logprob.double(), logits.log_softmax(1).gather(1, ids[:, None])[:, 0], atol=1e-4, rtol=0)
    assert ((rank - (logits >= own).sum(1)).abs() <= 1).all()
    model.logits_processor.scale = 0.5
    with pytest.raises(InputError, match="scaled logits"):
        module.TiledHead(model, config)


def test_the_c_library_judges_numpy_arrays(tmp_path: Path) -> None:
    built = sorted(Path(native.__file__).parent.glob("_libatts.*"))
    if not built:
        pytest.skip("csrc/ was not built")
    module = importlib.import_module("examples.vllm.c_gate")
    file = tmp_path / "self.npz"
    made = Mondrian(ALPHA, keys=2, capacity=8)
    for score in (0.5, 1.0, 1.0, 2.0):
        made.observe(score, 1)
    made.save(file)
    gate = module.CGate(built[0], file, learn=True)
    spans, turns = [[-0.25, -0.75], [-1.0], [-3.0, -2.0, -4.0]], [1, 1, 5]
    scores, takeovers = gate.judge(spans, turns)
    assert scores.tolist() == [0.5, 1.0, 3.0]
    expected = [
        made.decide(score, made.key_of(turn), LEVEL_ONE).takeover for score, turn in zip(scores.tolist(), turns)
    ]
    assert takeovers.tolist() == expected == [False, False, True]
    for score, turn in zip(scores.tolist(), turns):
        made.observe(score, made.key_of(turn))
    np.testing.assert_array_equal(gate.ring, made.store.ring)
    np.testing.assert_array_equal(gate.size, made.store.size)
    with pytest.raises(RuntimeError, match="atts_span_mean_cpu"):
        gate.judge([[]], [0])
