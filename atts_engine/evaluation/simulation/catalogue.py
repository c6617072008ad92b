"""Models and devices by name. A model is its shape alone: config.json of the Hugging Face repository beside it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from atts_engine.errors import InputError
from atts_engine.evaluation.simulation.cost import Device
from atts_engine.models import ModelConfig
from atts_engine.models.config import config_from_hf, read_json

_QWEN_1_5B = ModelConfig(
    family="qwen2", vocab_size=151936, hidden_size=1536, num_layers=28, num_heads=12, num_kv_heads=2, head_dim=128,
    intermediate_size=8960, rms_norm_eps=1e-6, rope_theta=1e6, rope_scaling=None, max_positions=32768,
    tie_embeddings=True, eos_token_ids=(151645,), qkv_bias=True, qk_norm=False,
)  # fmt: skip
_QWEN_7B = replace(
    _QWEN_1_5B, vocab_size=152064, hidden_size=3584, num_heads=28, num_kv_heads=4, intermediate_size=18944,
    tie_embeddings=False,
)  # fmt: skip
_QWEN_14B = replace(
    _QWEN_7B, hidden_size=5120, num_layers=48, num_heads=40, num_kv_heads=8, intermediate_size=13824
)  # fmt: skip
_QWEN_32B = replace(_QWEN_14B, num_layers=64, intermediate_size=27648)
_QWEN_72B = replace(_QWEN_14B, hidden_size=8192, num_layers=80, num_heads=64, intermediate_size=29568)
_LLAMA_8B = ModelConfig(
    family="llama", vocab_size=128256, hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128,
    intermediate_size=14336, rms_norm_eps=1e-5, rope_theta=5e5, rope_scaling=None, max_positions=131072,
    tie_embeddings=False, eos_token_ids=(128001,), qkv_bias=False, qk_norm=False,
)  # fmt: skip
_LLAMA_70B = replace(_LLAMA_8B, hidden_size=8192, num_layers=80, num_heads=64, intermediate_size=28672)

MODELS: dict[str, ModelConfig] = {
    "qwen2.5-1.5b": _QWEN_1_5B,  # Qwen/Qwen2.5-1.5B-Instruct
    "qwen2.5-7b": _QWEN_7B,  # Qwen/Qwen2.5-7B-Instruct
    "qwen2.5-14b": _QWEN_14B,  # Qwen/Qwen2.5-14B-Instruct
    "qwen2.5-32b": _QWEN_32B,  # Qwen/Qwen2.5-32B-Instruct
    "qwen2.5-72b": _QWEN_72B,  # Qwen/Qwen2.5-72B-Instruct
    "qwq-32b": _QWEN_32B,  # Qwen/QwQ-32B
    "llama-3.1-8b": _LLAMA_8B,  # meta-llama/Llama-3.1-8B-Instruct
    "llama-3.1-70b": _LLAMA_70B,  # meta-llama/Llama-3.1-70B-Instruct
    # The R1 distillations keep the shapes of their bases, but none of them ties its embeddings.
    "r1-distill-qwen-1.5b": replace(_QWEN_1_5B, tie_embeddings=False),  # deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B
    "r1-distill-qwen-7b": _QWEN_7B,  # deepseek-ai/DeepSeek-R1-Distill-Qwen-7B
    "r1-distill-qwen-14b": _QWEN_14B,  # deepseek-ai/DeepSeek-R1-Distill-Qwen-14B
    "r1-distill-qwen-32b": _QWEN_32B,  # deepseek-ai/DeepSeek-R1-Distill-Qwen-32B
    "r1-distill-llama-8b": _LLAMA_8B,  # deepseek-ai/DeepSeek-R1-Distill-Llama-8B
    "r1-distill-llama-70b": _LLAMA_70B,  # deepseek-ai/DeepSeek-R1-Distill-Llama-70B
}

# Data sheets of NVIDIA. bf16 is dense, half of what they state with sparsity; links are halved to one direction.
DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device("h100", 989.4e12, 3.35e12, 80e9, 450e9, "NVIDIA H100 Tensor Core GPU data sheet, SXM5"),
        Device("h200", 989.4e12, 4.8e12, 141e9, 450e9, "NVIDIA H200 Tensor Core GPU data sheet, SXM"),
        Device("a100", 312e12, 2.039e12, 80e9, 300e9, "NVIDIA A100 Tensor Core GPU data sheet, 80GB SXM4"),
        Device("b200", 2250e12, 8e12, 180e9, 900e9, "NVIDIA HGX B200 specifications, one of 8 GPUs"),
        # No NVLink: 64 GB/s of PCIe 4.0 x16 in both directions together.
        Device("l40s", 362.05e12, 864e9, 48e9, 32e9, "NVIDIA L40S data sheet"),
    )
}
_DEVICE_FIELDS = ("flop_s", "bytes_s", "memory_bytes", "link_bytes_s")


def model_named(name: str) -> ModelConfig:
    """The shape of a catalogue's model, or of a folder with a config.json. `InputError` for neither."""
    if name.lower() in MODELS:
        return MODELS[name.lower()]
    folder = Path(name)
    if folder.is_dir():
        return config_from_hf(read_json(folder / "config.json"), str(folder / "config.json"))
    raise InputError(f"no model {name!r}: name a folder with a config.json, or one of {', '.join(MODELS)}")


def device_named(name: str) -> Device:
    """A device of the catalogue, or of a JSON file with the fields of `Device`. `InputError` for neither."""
    if name.lower() in DEVICES:
        return DEVICES[name.lower()]
    if not name.endswith(".json"):
        raise InputError(f"no device {name!r}: name a .json file, or one of {', '.join(DEVICES)}")
    raw = read_json(Path(name))
    values = {}
    for field in _DEVICE_FIELDS:
        value = raw.get(field)
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise InputError(f"{name}: {field} must be a number above 0, not {value!r}")
        values[field] = float(value)
    return Device(str(raw.get("name", Path(name).stem)), source=str(raw.get("source", name)), **values)
