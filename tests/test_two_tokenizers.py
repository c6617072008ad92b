"""A pair with two tokenizers: both lanes hold one text, and what is scored is what one tokenizer would score."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncGenerator, Callable, Hashable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers, trainers

from atts_engine import AsyncEngine, ATTSParams, Chain, EngineConfig, Problem
from atts_engine.backends import InProcessLane
from atts_engine.conformal import Mondrian
from atts_engine.models import Tokenizer, resolve
from atts_engine.pipeline.chain import run_chain
from atts_engine.pipeline.gate import Judged, Place
from atts_engine.pipeline.translation import Tongues, Words
from atts_engine.pipeline.writer import ChainSpec, Prompts
from atts_engine.runtime.records import SamplingParams, SpanResult, TokenChunk
from tests.test_engine import problems

CORPUS = ["The cat's mat isn't where it'll be; we've 12345 cats.\n\nWait, é and ünï, 日本語 text 😀👍!!  x = 3\n"] * 4


@cache
def byte_level(vocabulary: int) -> Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=alphabet, special_tokens=["<eos>"], show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return Tokenizer(backend, eos_token_ids=[0], special_tokens={"eos_token": "<eos>"})


# Any tokens at all -------------------------------------------------------------------------------------------------


class ListSeq:
    def __init__(self, ids: Sequence[int] = ()) -> None:
        self.ids = list(ids)

    @property
    def length(self) -> int:
        return len(self.ids)


class ListLane:
    """A lane that is a list of tokens and writes whatever comes; `check` is called before it writes."""

    def __init__(self, tokenizer: Tokenizer, rng: random.Random, check: Callable[[], None], opening: str = "") -> None:
        """opening: said first in each span."""
        self.tokenizer, self.rng, self.check, self.unjudged = tokenizer, rng, check, 0
        self.opening = tokenizer.encode(opening)
        text = "".join(CORPUS[:1])
        self.common = tokenizer.encode(text)

    async def open(self, prompt: Sequence[int], *, group: Hashable = None, priority: int = 0) -> ListSeq:
        return ListSeq(prompt)

    async def fork(self, seq: Any, n: int) -> list[Any]:
        return [ListSeq(seq.ids) for _ in range(n)]

    async def close(self, seq: Any) -> None:
        seq.ids.clear()

    async def decode(self, seq: Any, max_tokens: int, sampling: SamplingParams) -> AsyncGenerator[TokenChunk, None]:
        self.check()
        left = max_tokens
        if self.opening:
            left -= 1
            seq.ids += self.opening
            yield TokenChunk(tuple(self.opening), None if left else "length")
        while left:
            ids: list[int] = []
            for _ in range(min(left, self.rng.choice([1, 2, 5]))):
                # Single bytes often, whole characters never on purpose.
                any_id = self.rng.randrange(1, self.tokenizer.vocab_size)
                ids.append(self.rng.choice([any_id, self.rng.choice(self.common)]))
                if self.rng.random() < 0.01:
                    ids[-1] = 0
                    break
            left -= len(ids)
            seq.ids += ids
            finish = "stop" if ids[-1] == 0 else "length" if not left else None
            yield TokenChunk(tuple(ids), finish)
            if finish == "stop":
                return

    async def append(self, seq: Any, tokens: Sequence[int], *, score: bool = False) -> None:
        assert tokens
        seq.ids += tokens
        self.unjudged += len(tokens) if score else 0

    async def verdict(self, seq: Any, gate: Any) -> SpanResult:
        n, self.unjudged = self.unjudged, 0
        assert n
        return SpanResult(-1.0 * n, n, 1.0)

    async def scored(self, seq: Any, *, wait: bool = False) -> tuple[float, ...]:
        return (-1.0,) * self.unjudged

    async def truncate(self, seq: Any, length: int) -> None:
        assert 0 <= length <= len(seq.ids)
        del seq.ids[length:]


def said(tokenizer: Tokenizer, seq: ListSeq) -> str:
    """The text but for characters that are not whole, which may be told to one lane alone."""
    return tokenizer.decode(seq.ids).replace("\ufffd", "")


class CoinGate:
    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    async def ask(
        self, lane: Any, seq: Any, place: Place, seed: int, most: int | None = None, *, appraisal: Any = None
    ) -> Judged:
        result = await lane.verdict(seq, None)
        return Judged(result.score, self.rng.random() < 0.5, sum_logprob=result.sum_logprob)

    def settled(self, place: Place, seed: int, logprobs: Sequence[float], most: int) -> int | None: ...

    def begin(self, problem_id: str, chains: Sequence[int]) -> None: ...

    def enter(self, place: Place) -> None: ...

    def leave(self, place: Place) -> None: ...

    def end(self, problem_id: str) -> None: ...


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    takeover=st.sampled_from(["continue", "replace"]),
    span=st.integers(1, 12),
    sizes=st.sampled_from([(290, 330), (330, 290), (265, 300)]),
)
def test_both_lanes_hold_one_text(seed: int, takeover: str, span: int, sizes: tuple[int, int]) -> None:
    rng = random.Random(seed)
    codecs = byte_level(sizes[0]), byte_level(sizes[1])
    d, t = ListSeq(), ListSeq()

    def draft_goes_on() -> None:
        # The target may be behind by what is not final yet, never ahead and never elsewhere.
        assert said(codecs[0], d).startswith(said(codecs[1], t))

    def target_goes_on() -> None:
        assert said(codecs[1], t) == said(codecs[0], d)

    # A target that says nothing at all would let the draft end a character that it had begun before.
    lanes = ListLane(codecs[0], rng, draft_goes_on), ListLane(codecs[1], rng, target_goes_on, "x")
    words = [Words(codec, frozenset({0}), 0) for codec in codecs]
    params = ATTSParams(chains=1, turns=6, draft_tokens=span, target_tokens=span, takeover=takeover)
    events: list[Any] = []
    spec = ChainSpec(Problem("p", "x"), 0, params, Tongues(words[0], words[1], codecs), Prompts((), ()), events.append)
    chain = asyncio.run(run_chain(spec, lanes[0], d, lanes[1], t, CoinGate(rng)))
    assert chain.error is None or "no text that the target could score" in chain.error
    for turn in chain.turns:
        assert turn.score_per_byte is None or turn.score_per_byte > 0


# One text, spelled with other numbers ------------------------------------------------------------------------------


def renumbered(folder: Path, out: Path) -> Path:
    """The same model with its vocabulary in another order."""
    out.mkdir()
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    weights = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    size = config["vocab_size"]
    new = np.random.default_rng(0).permutation(size)
    old_of = torch.from_numpy(np.argsort(new))
    for name, weight in weights.items():
        if weight.shape[0] == size:
            weights[name] = weight[old_of].contiguous()
    tokenizer["model"]["vocab"] = {token: int(new[i]) for token, i in tokenizer["model"]["vocab"].items()}
    for token in tokenizer["added_tokens"]:
        token["id"] = int(new[token["id"]])
    for key in ("eos_token_id", "bos_token_id", "pad_token_id"):
        if isinstance(config.get(key), int):
            config[key] = int(new[config[key]])
    for file in folder.iterdir():
        if file.is_file():
            (out / file.name).write_bytes(file.read_bytes())
    save_file(weights, out / "model.safetensors")
    (out / "tokenizer.json").write_text(json.dumps(tokenizer))
    (out / "config.json").write_text(json.dumps(config))
    (out / "generation_config.json").unlink(missing_ok=True)
    return out


@pytest.fixture(scope="module")
def other_target(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(renumbered(Path(resolve("tiny-target")), tmp_path_factory.mktemp("pair") / "target"))


def run(
    target: str, monkeypatch: pytest.MonkeyPatch, *, always: bool, takeover: str
) -> tuple[list[Chain], list[list[float]]]:
    """Chains, and for each the log-probabilities of all that was scored."""
    scored: dict[int, list[float]] = {}
    with monkeypatch.context() as patch:
        plain = InProcessLane.verdict

        async def verdict(self: InProcessLane, seq: Any, gate: Any) -> SpanResult:
            result = await plain(self, seq, gate)
            scored.setdefault(seq.id, []).extend(result.logprobs)
            return result

        patch.setattr(InProcessLane, "verdict", verdict)
        calibrator = Mondrian(0.4)
        for score in np.linspace(-2.0, -1.0, 20) if always else np.linspace(1e3, 2e3, 20):
            for key in range(8):
                calibrator.observe(float(score), key)
        calibrator.frozen = True
        params = ATTSParams(
            chains=1, turns=8, draft_tokens=11, target_tokens=13, temperature=0.0, takeover=takeover, seed=1
        )

        async def main() -> list[Chain]:
            config = EngineConfig("tiny-draft", target, kv_tokens=4096, prompt="{problem}")
            async with await AsyncEngine.create(config) as engine:
                return [(await engine.solve(p, params, calibrator=calibrator)).chains[0] for p in problems(5)]

        return asyncio.run(main()), [scored[i] for i in sorted(scored)]


@pytest.mark.parametrize(("always", "takeover"), [(False, "continue"), (True, "continue"), (True, "replace")])
def test_another_numbering_changes_nothing(
    other_target: str, monkeypatch: pytest.MonkeyPatch, always: bool, takeover: str
) -> None:
    wanted, wanted_scores = run("tiny-target", monkeypatch, always=always, takeover=takeover)
    found, found_scores = run(other_target, monkeypatch, always=always, takeover=takeover)
    for chain, other in zip(wanted, found, strict=True):
        assert other.error is None and other.finish == chain.finish and other.final_answer == chain.final_answer
        assert [(t.draft, t.target, t.takeover) for t in other.turns] == [
            (t.draft, t.target, t.takeover) for t in chain.turns
        ]
        assert all(not t.chunks for t in other.turns)
    if not always:
        for theirs, ours in zip(wanted_scores, found_scores, strict=True):
            # What was not final at the end of the last span was never scored.
            assert len(theirs) - 8 <= len(ours) <= len(theirs)
            np.testing.assert_allclose(ours, theirs[: len(ours)], atol=2e-5)
