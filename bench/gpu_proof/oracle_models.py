"""The engine against `transformers` on the same weights: logits, scores, and tokens through a lane."""

from __future__ import annotations

import importlib.util
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atts_engine.config import SamplingParams
from atts_engine.errors import AttsError, InputError
from atts_engine.models import Model, load_model, resolve
from atts_engine.models.config import config_from_hf
from atts_engine.models.decoder import Decoder
from atts_engine.models.weights import load_decoder
from atts_engine.runtime import LaneCore
from atts_engine.runtime.commands import Append, Decode, Verdict
from bench.e2e.export import export
from bench.gpu_proof.context import Context, Found, Line, one_line
from tests.models_oracle import paged_logits, reference_logits

SHAPES = {
    "Qwen2.5-1.5B shape, 2 layers": (1536, 8960, 12, 2, 151936),
    "Qwen2.5-14B shape, 1 layer": (5120, 13824, 40, 8, 152064),
}
"""Hidden, inner, heads, key and value heads, vocabulary; as in models.CONFIGS."""
TINY = {"tiny shape, 2 layers": (48, 80, 6, 2, 97)}
LENGTHS = (1, 15, 16, 17, 70, 130)


def measure(ctx: Context, found: Found) -> None:
    if importlib.util.find_spec("transformers") is None:
        found["transformers"] = {"absent": "transformers is not installed", "right": None}
        return
    import transformers

    transformers.utils.logging.disable_progress_bar()
    for name, shape in (TINY if ctx.dry else SHAPES).items():
        for dtype in (torch.float32,) if ctx.device.type == "cpu" else (torch.float32, torch.bfloat16):
            label = f"{name}, {str(dtype).removeprefix('torch.')}"
            _try(
                ctx,
                found,
                label,
                lambda s=shape, d=dtype, n=name: _random_weights(s, int(n.split()[-2]), d, ctx.device),
            )
    for name in ("tiny-draft", "tiny-target", *(() if ctx.dry else ("smollm2-135m",))):
        _try(ctx, found, name, lambda n=name: _stored(n, ctx.device))


def _try(ctx: Context, found: Found, name: str, compare: Callable[[], dict[str, Any]]) -> None:
    if name in found:
        return
    lost = ctx.begin(name)
    found[name] = _tried(compare) if lost is None else {"error": lost, "right": False}
    if found[name].get("error"):
        ctx.survived()


def _tried(compare: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return compare()
    except InputError as absent:  # smollm2-135m comes with an extra
        return {"absent": one_line(absent), "right": None}
    except Exception as error:
        return {"error": one_line(error), "right": False}


@dataclass(frozen=True, slots=True)
class _Parameters:
    """A transformers model as a checkpoint to load from."""

    tensors: dict[str, Tensor]
    where: str = "transformers"

    def names(self) -> frozenset[str]:
        return frozenset(self.tensors)

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


def _random_weights(
    shape: tuple[int, int, int, int, int], layers: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Norms of the error against transformers in fp32 (fp64 where that is the dtype): ours over theirs, below 2."""
    import transformers

    hidden, inner, heads, kv_heads, vocab = shape
    config = transformers.Qwen2Config(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=512,
        attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        oracle = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    own = config_from_hf(config.to_dict() | {"model_type": "qwen2"})
    decoder = load_decoder(own, _Parameters(oracle.state_dict()), device, dtype)
    texts = _texts(own.vocab_size)
    return _beside(decoder, oracle, texts, torch.float64 if dtype == torch.float32 else torch.float32)


@torch.inference_mode()  # a lane's buffers belong to it
def _beside(decoder: Decoder, oracle: Any, texts: list[list[int]], wide: torch.dtype) -> dict[str, Any]:
    ours, theirs = torch.cat(paged_logits(decoder, texts)), torch.cat(reference_logits(oracle, texts))
    exact = torch.cat(reference_logits(oracle.to(wide), texts))
    ratio = float((ours.to(wide) - exact).norm() / (theirs.to(wide) - exact).norm())
    return {"error_over_transformers": ratio, "right": ratio < 2.0}


def _stored(name: str, device: torch.device) -> dict[str, Any]:
    """A real model in fp32: logits, and a lane's greedy tokens and span score, which transformers computes again."""
    import transformers

    path, model = resolve(name), load_model(name, device)
    with tempfile.TemporaryDirectory() as folder:
        if path.suffix == ".gguf":  # which transformers reads with more packages only; tests/test_models_gguf.py does
            export(model, Path(folder))
            path = Path(folder)
        load: Any = transformers.AutoModelForCausalLM.from_pretrained
        oracle = load(path, dtype=torch.float32, local_files_only=True).to(device).eval()
    prompt = model.tokenizer.encode("a = 85; b = a-43; c = b*3; d?")
    tokens, score = _through_a_lane(model, prompt, device)
    logits = reference_logits(oracle, [prompt + tokens])[0]
    rows = logits[len(prompt) - 1 : -1]
    chosen = rows.gather(1, torch.tensor(tokens, device=device)[:, None])[:, 0]
    gap = float((rows.amax(1) - chosen).max())
    # The span scored is the prompt's second half, from its first token on.
    half = len(prompt) // 2
    told = logits[half - 1 : len(prompt) - 1].double().log_softmax(-1)
    wanted = -float(told.gather(1, torch.tensor(prompt[half:], device=device)[:, None]).mean())
    found = _beside(model.decoder, oracle, [prompt + tokens, *_texts(model.config.vocab_size)], torch.float64)
    right = found["right"] and gap < 1e-3 and abs(score - wanted) < 1e-3
    return found | {"greedy_gap": gap, "score": score, "score_error": abs(score - wanted), "right": right}


def _through_a_lane(model: Model, prompt: list[int], device: torch.device) -> tuple[list[int], float]:
    """24 greedy tokens behind the prompt, and the score of the prompt's second half."""
    core = LaneCore("oracle", model, kv_tokens=512, page_size=16, max_batch_tokens=64, device=device)
    tokens: list[int] = []
    scores: list[float] = []
    errors: list[BaseException] = []

    def note(_: Any, error: BaseException | None) -> None:
        errors.extend([error] if error is not None else [])

    def scored(result: Any, error: BaseException | None) -> None:
        note(result, error)
        if error is None:
            scores.append(result.score)

    half = len(prompt) // 2
    core.open(0, tuple(prompt[:half]))
    core.command(0, Append(tuple(prompt[half:]), True, note))
    core.command(0, Verdict(None, scored))
    greedy = SamplingParams(temperature=0.0, ignore_eos=True)
    core.command(0, Decode(24, greedy, 8, lambda chunk: tokens.extend(chunk.tokens), note))
    while core.step(lambda request, result: None):
        pass
    if errors or len(tokens) != 24:
        raise errors[0] if errors else AttsError(f"{len(tokens)} of 24 tokens came")
    return tokens, scores[0]


def _texts(vocab: int) -> list[list[int]]:
    rng = random.Random(1)
    return [[rng.randrange(vocab) for _ in range(n)] for n in LENGTHS]


def lines(found: Found) -> list[Line]:
    told = []
    for name, cell in found.items():
        if cell["right"] is None:
            told.append((name, "left out", cell["absent"]))
        else:
            ratio = cell.get("error_over_transformers")
            beside = cell.get("error") or f"error {ratio:.2f} times that of transformers"
            told.append((name, "right" if cell["right"] else "wrong", beside))
    return told
