"""The decoder against transformers on the same weights: every family, through the paged cache."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers

from atts_engine.evaluation import registers
from atts_engine.models import load_model, resolve
from tests.models_oracle import paged_logits, reference_logits

TOLERANCE = 1e-4
VOCAB = 97
LENGTHS = (1, 15, 16, 17, 33, 70, 130)
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "attn_implementation": "eager",
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 50000.0, "factor": 3.0}
CASES = {
    "llama": transformers.LlamaConfig(**SIZES),
    "llama-tied": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama-llama3-rope": transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "llama-linear-rope": transformers.LlamaConfig(**SIZES, rope_parameters=LINEAR),
    "llama-wide-heads": transformers.LlamaConfig(**SIZES, head_dim=32),
    "mistral": transformers.MistralConfig(**SIZES, sliding_window=None),
    "qwen2": transformers.Qwen2Config(**SIZES),
    "qwen2-tied": transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=16),
    "qwen3-tied": transformers.Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
}


def sequences(seed: int, vocab: int = VOCAB, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(vocab) for _ in range(n)] for n in lengths]


def save(config: transformers.PreTrainedConfig, folder: Path, **options: object) -> torch.nn.Module:
    """A random model with every parameter away from its initial value (norms and biases too), and a tokenizer."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder, **options)
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0")
    backend = tokenizers.Tokenizer(words)
    backend.decoder = tokenizers.decoders.Fuse()
    backend.save(str(folder / "tokenizer.json"))
    return model


def worst(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    oracle = save(CASES[case], tmp_path)
    decoder = load_model(str(tmp_path)).decoder
    texts = sequences(1)
    expected = reference_logits(oracle, texts)
    assert float(expected[-1].std()) > 0.1
    whole = paged_logits(decoder, texts)
    assert worst(whole, expected) < TOLERANCE
    pieces = paged_logits(decoder, texts, chunks=random.Random(2))
    assert worst(pieces, expected) < TOLERANCE
    other_page = paged_logits(decoder, texts, page=5, chunks=random.Random(3))
    assert worst(other_page, expected) < TOLERANCE


@pytest.mark.parametrize("case", ["llama-llama3-rope", "qwen2", "qwen3"])
def test_bits_do_not_depend_on_the_batch(case: str, tmp_path: Path) -> None:
    save(CASES[case], tmp_path)
    decoder = load_model(str(tmp_path)).decoder
    texts = sequences(4)
    whole = paged_logits(decoder, texts)
    pieces = paged_logits(decoder, texts, chunks=random.Random(5))
    alone = [paged_logits(decoder, [text])[0] for text in texts]
    for a, b, c in zip(whole, pieces, alone, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_shards_load_as_one_file(tmp_path: Path) -> None:
    save(CASES["llama"], tmp_path / "sharded", max_shard_size="40KB")
    save(CASES["llama"], tmp_path / "single")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    text = sequences(6)
    sharded, single = load_model(str(tmp_path / "sharded")), load_model(str(tmp_path / "single"))
    assert worst(paged_logits(sharded.decoder, text), paged_logits(single.decoder, text)) == 0.0


@pytest.mark.parametrize("case", ["llama", "llama-llama3-rope", "llama-linear-rope"])
def test_config_keys_of_transformers_4(case: str, tmp_path: Path) -> None:
    save(CASES[case], tmp_path)
    new = load_model(str(tmp_path)).config
    raw = json.loads((tmp_path / "config.json").read_text())
    scaling = raw.pop("rope_parameters")
    raw["rope_theta"] = scaling.pop("rope_theta")
    kind = scaling.pop("rope_type")
    raw["rope_scaling"] = None if kind == "default" else {**scaling, "type": kind}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert load_model(str(tmp_path)).config == new


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_follows_fp32(dtype: torch.dtype, tmp_path: Path) -> None:
    oracle = save(CASES["llama"], tmp_path)
    decoder = load_model(str(tmp_path), dtype=dtype).decoder
    assert decoder.dtype == dtype and decoder.lm_head.dtype == dtype
    text = sequences(7, lengths=(40,))
    ours, theirs = paged_logits(decoder, text)[0].float(), reference_logits(oracle.to(dtype), text)[0].float()
    exact = reference_logits(oracle.float(), text)[0]
    # As far from the exact logits as transformers is in the same dtype, within a factor of two.
    assert float((ours - exact).norm()) < 2 * float((theirs - exact).norm())


@pytest.mark.parametrize("name", ["tiny-draft", "tiny-target"])
def test_built_in_pair(name: str) -> None:
    model = load_model(name)
    oracle, exact = (
        transformers.AutoModelForCausalLM.from_pretrained(resolve(name), dtype=dtype, local_files_only=True).eval()
        for dtype in (torch.float32, torch.float64)
    )
    encode, prompt = model.tokenizer.encode, model.tokenizer.chat_prompt
    problems = [problem.problem for problem in registers.heldout(30, seed=0)]
    texts = [prompt([{"role": "user", "content": p}]) + encode(registers.solution(p)) for p in problems]
    expected, truth = (torch.cat(reference_logits(model, texts)) for model in (oracle, exact))
    following = torch.tensor([token for text in texts for token in (*text[1:], 0)])[:, None]
    for chunks in (None, random.Random(9)):
        ours = torch.cat(paged_logits(model.decoder, texts, chunks=chunks))
        # A few logits in ten thousand lie where fp32 itself, transformers' too, is 1e-4 away from fp64 and more.
        error, usual = (ours - truth).abs(), (expected - truth).abs()
        assert float(error.max()) < max(TOLERANCE, 1.3 * float(usual.max()))
        assert float(error.square().mean().sqrt()) < 1.3 * float(usual.square().mean().sqrt()) < TOLERANCE / 10
        ours, theirs = (rows.log_softmax(-1).gather(1, following) for rows in (ours, expected))
        assert float((ours - theirs).abs().max()) < TOLERANCE

    # Text that was never trained on drives the activations so high that fp32 itself is off by more than the
    # tolerance: there the decoder has to be as near to fp64 as transformers is in fp32.
    noise = sequences(8, model.config.vocab_size, (1, 17, 100, 200))
    truth = torch.cat(reference_logits(exact, noise))
    ours, theirs = torch.cat(paged_logits(model.decoder, noise)), torch.cat(reference_logits(oracle, noise))
    assert float((ours - truth).norm()) < 2 * float((theirs - truth).norm())


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["llama-llama3-rope", "qwen2", "qwen3"])
def test_gpu_follows_transformers(case: str, tmp_path: Path) -> None:
    oracle = save(CASES[case], tmp_path)
    decoder = load_model(str(tmp_path), device="cuda").decoder
    texts = sequences(10)
    ours = [rows.cpu() for rows in paged_logits(decoder, texts, chunks=random.Random(11))]
    assert worst(ours, reference_logits(oracle, texts)) < 1e-2
