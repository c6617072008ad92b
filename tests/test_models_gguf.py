"""GGUF files: SmolLM2-135M against transformers' own reader, and files written by the gguf package."""

from __future__ import annotations

import dataclasses
import random
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers

from atts_engine.errors import InputError
from atts_engine.models import Model, load_model, resolve
from atts_engine.models.gguf_file import GGUFFile
from tests.models_oracle import paged_logits, reference_logits
from tests.test_models_oracle import CASES, save, sequences, worst

TEXTS = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May.",
    "Let $f(x) = \\frac{3x-2}{x-2}$. What is $f(-2) + f(-1) + f(0)$? Answer: \\boxed{\\frac{14}{3}}. " * 2,
)
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
QUANTS = gguf.GGMLQuantizationType
Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def smollm2() -> Model:
    return load_model("smollm2-135m")


def test_smollm2_logits_equal_transformers(smollm2: Model) -> None:
    # In float64: transformers in fp32 is itself 1e-4 away from that.
    oracle = transformers_smollm2().double()
    texts = [smollm2.tokenizer.encode(text) for text in TEXTS]
    expected = reference_logits(oracle, texts)
    assert worst(paged_logits(smollm2.decoder, texts), expected) < 1e-4
    assert worst(paged_logits(smollm2.decoder, texts, chunks=random.Random(1)), expected) < 1e-4


def transformers_smollm2() -> torch.nn.Module:
    """transformers' Llama with the file's tensors, by the definition of llama.cpp's row order: row 2i + half of a head
    of q or k is row i + half * D/2 of the "rotate_half" convention."""
    file = GGUFFile(resolve("smollm2-135m"))
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    state = {}
    for name in model.state_dict():
        stem, _, kind = name.rpartition(".")
        layer, inner = (stem.split(".")[2], ".".join(stem.split(".")[3:])) if ".layers." in stem else ("", stem)
        stored = GGUF_NAMES["model.embed_tokens" if stem == "lm_head" else inner]
        tensor = torch.tensor(file.dequantised((f"blk.{layer}." if layer else "") + f"{stored}.{kind}"))
        if stored in ("attn_q", "attn_k"):
            rows = torch.arange(len(tensor))
            head, place = rows // 64, rows % 64
            moved = torch.empty_like(tensor)
            moved[head * 64 + place // 2 + place % 2 * 32] = tensor
            tensor = moved
        state[name] = tensor
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


def test_smollm2_config(smollm2: Model) -> None:
    assert smollm2.config.tie_embeddings and smollm2.config.num_layers == 30
    assert smollm2.config.eos_token_ids == smollm2.tokenizer.eos_token_ids == (2,)
    assert smollm2.decoder.lm_head is smollm2.decoder.weights.embed


def gguf_tensors(model: torch.nn.Module, case: str) -> Tensors:
    """The model's tensors as llama.cpp's convert_hf_to_gguf names and orders them."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        stem, _, kind = name.rpartition(".")
        layer, inner = (stem.split(".")[2], ".".join(stem.split(".")[3:])) if ".layers." in stem else ("", stem)
        weight = tensor.numpy()
        if case.startswith("llama") and inner in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = model.config.num_attention_heads if "q_proj" in inner else model.config.num_key_value_heads
            shape = (heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
            weight = weight.reshape(shape).swapaxes(1, 2).reshape(weight.shape)
        if not (stem == "lm_head" and model.config.tie_word_embeddings):
            tensors[(f"blk.{layer}." if layer else "") + f"{GGUF_NAMES[inner]}.{kind}"] = weight
    return tensors


def write(
    path: Path,
    config: transformers.PreTrainedConfig,
    tensors: Tensors,
    kind: QUANTS = QUANTS.F32,
    arch: str | None = None,
    **over: object,
) -> None:
    """A GGUF file with a byte-level vocabulary and no merges; over: metadata to replace (None: to leave out)."""
    arch = arch or config.model_type
    metadata: dict[str, object] = {
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.key_length": getattr(config, "head_dim", None)
        or config.hidden_size // config.num_attention_heads,
        f"{arch}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{arch}.rope.freq_base": config.rope_parameters["rope_theta"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": ["<eos>", *"abcdefghijklmnopqrstuvwxyz"],
        "tokenizer.ggml.token_type": [3] + [1] * 26,
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 0,
    }
    metadata["tokenizer.ggml.tokens"].append("ab")
    metadata["tokenizer.ggml.token_type"].append(1)
    metadata.update(over)
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    for name, tensor in tensors.items():
        packed = tensor.ndim == 2 and kind != QUANTS.F32
        writer.add_tensor(
            name, gguf.quantize(tensor, kind) if packed else tensor, raw_dtype=kind if packed else QUANTS.F32
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("case", ["llama", "llama-tied", "qwen2", "qwen2-tied", "qwen3", "qwen3-tied"])
def test_written_file_equals_transformers(case: str, tmp_path: Path) -> None:
    oracle = save(CASES[case], tmp_path / "hf")
    write(tmp_path / "m.gguf", oracle.config, gguf_tensors(oracle, case))
    model, folder = load_model(str(tmp_path / "m.gguf")), load_model(str(tmp_path / "hf"))
    assert dataclasses.replace(model.config, eos_token_ids=(), rms_norm_eps=0) == dataclasses.replace(
        folder.config, eos_token_ids=(), rms_norm_eps=0
    )
    text = sequences(1)
    assert worst(paged_logits(model.decoder, text), reference_logits(oracle, text)) < 1e-4


@pytest.mark.parametrize("kind", [QUANTS.F16, QUANTS.BF16, QUANTS.Q4_0, QUANTS.Q4_1, QUANTS.Q8_0])
def test_quantised_weights(kind: QUANTS, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        **{**CASES["llama"].to_dict(), "hidden_size": 96, "intermediate_size": 64, "head_dim": 16}
    )
    oracle = save(config, tmp_path / "hf")
    tensors = gguf_tensors(oracle, "llama")
    write(tmp_path / "m.gguf", config, tensors, kind)
    rounded = {n: gguf.dequantize(gguf.quantize(t, kind), kind) if t.ndim == 2 else t for n, t in tensors.items()}
    write(tmp_path / "rounded.gguf", config, rounded)
    ours, theirs = (load_model(str(tmp_path / name)).decoder for name in ("m.gguf", "rounded.gguf"))
    assert any(not np.array_equal(rounded[name], tensors[name]) for name in tensors)
    assert worst(paged_logits(ours, sequences(2)), paged_logits(theirs, sequences(2))) == 0.0


def test_rope_divisors_are_llama3_scaling(tmp_path: Path) -> None:
    case = "llama-llama3-rope"
    oracle = save(CASES[case], tmp_path / "hf")
    tensors = gguf_tensors(oracle, case)
    head_dim, theta = oracle.config.head_dim, oracle.config.rope_parameters["rope_theta"]
    plain = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    tensors["rope_freqs.weight"] = (plain / oracle.model.rotary_emb.inv_freq).numpy()
    write(tmp_path / "m.gguf", oracle.config, tensors)
    model = load_model(str(tmp_path / "m.gguf"))
    assert worst(paged_logits(model.decoder, sequences(3)), reference_logits(oracle, sequences(3))) < 1e-4


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ({"general.architecture": "gemma3"}, "gemma3"),
        ({"tokenizer.ggml.model": "llama"}, "'llama'"),
        ({"tokenizer.ggml.pre": "tekken"}, "tekken"),
        ({"tokenizer.ggml.merges": None}, "merges"),
        ({"tokenizer.ggml.merges": ["a zz"]}, "merges"),
        ({"tokenizer.ggml.token_type": [1]}, "token types"),
        ({"llama.block_count": None}, "llama.block_count"),
        ({"llama.block_count": 4}, "model.layers.3"),
        ({"llama.block_count": 2}, "model.layers.2"),
        ({"llama.feed_forward_length": 64}, "mlp.gate_proj.weight has shape [80, 48]"),
        ({"llama.expert_count": 8}, "mixture-of-experts"),
        ({"llama.attention.sliding_window": 16}, "sliding-window"),
        ({"llama.rope.scaling.type": "yarn"}, "yarn"),
        ({"llama.rope.dimension_count": 4}, "part of a head"),
        ({"split.count": 3}, "split GGUF"),
    ],
)
def test_refused(over: dict[str, object], said: str, tmp_path: Path) -> None:
    oracle = save(CASES["llama"], tmp_path / "hf")
    tensors = gguf_tensors(oracle, "llama")
    over = dict(over)
    arch = str(over.pop("general.architecture", "llama"))
    write(tmp_path / "m.gguf", oracle.config, tensors, arch=arch, **over)
    with pytest.raises(InputError) as error:
        load_model(str(tmp_path / "m.gguf"))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_damaged_files(tmp_path: Path) -> None:
    oracle = save(CASES["llama"], tmp_path / "hf")
    path = tmp_path / "m.gguf"
    write(path, oracle.config, gguf_tensors(oracle, "llama"))
    whole = path.read_bytes()
    cuts = random.Random(0)
    for size in [0, 3, 4, 10, len(whole) - 4000, *(cuts.randrange(24, len(whole) - 4000) for _ in range(40))]:
        path.write_bytes(whole[:size])
        with pytest.raises(InputError):
            load_model(str(path))
    path.write_bytes(b"GGUF" + struct.pack("<I", 1) + whole[8:])
    with pytest.raises(InputError, match="version 1"):
        load_model(str(path))
    path.write_bytes(b"PK\x03\x04" + whole[4:])
    with pytest.raises(InputError, match="not a GGUF file"):
        load_model(str(path))
