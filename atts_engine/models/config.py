"""Shape and constants of a decoder-only model, read from a Hugging Face config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atts_engine.errors import InputError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How the rotary frequencies are stretched beyond the trained context.

    kind: "linear" (all frequencies divided by `factor`), "llama3" (low frequencies divided by `factor`, high
    ones kept, a linear blend between; Llama 3.1), or "divisors" (one divisor per frequency, as GGUF stores
    them; `divisors` has D/2 of them).
    """

    kind: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 0
    divisors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes in elements; `rope_scaling` None means plain RoPE; `max_positions` is the longest sequence in
    tokens."""

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_positions: int
    tie_embeddings: bool
    eos_token_ids: tuple[int, ...]
    qkv_bias: bool
    qk_norm: bool

    def __post_init__(self) -> None:
        for field in (
            "vocab_size",
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "intermediate_size",
            "max_positions",
        ):
            if getattr(self, field) < 1:
                raise InputError(f"model config: {field} must be 1 or more, not {getattr(self, field)}")
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"model config: {self.num_heads} heads cannot share {self.num_kv_heads} key/value heads evenly"
            )
        if self.head_dim % 2:
            raise InputError(f"model config: head_dim must be even for rotary embeddings, not {self.head_dim}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; InputError if it is missing, unreadable or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def ids_of(value: object) -> tuple[int, ...]:
    """Token ids of an `eos_token_id` entry: null, one id, or a list of ids."""
    if value is None:
        return ()
    if isinstance(value, int):
        return (value,)
    if isinstance(value, list) and all(isinstance(item, int) for item in value):
        return tuple(value)
    raise InputError(f"eos_token_id must be an integer or a list of integers, not {value!r}")


def config_from_hf(raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """Build a ModelConfig from the keys of a Hugging Face config.json.

    Reads `rope_theta` + `rope_scaling` (transformers 4) and `rope_parameters` (transformers 5). Optional keys
    default as in transformers. Raises InputError naming what this decoder does not compute.
    """
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise InputError(f"{where}: model_type {family!r} is not supported; supported are {', '.join(FAMILIES)}")
    _refuse_unsupported(raw, str(family), where)
    hidden, heads = _integer(raw, "hidden_size", where), _integer(raw, "num_attention_heads", where)
    if raw.get("head_dim") is not None:
        head_dim = _integer(raw, "head_dim", where)
    else:
        head_dim = 128 if family == "qwen3" else hidden // max(heads, 1)
    theta, scaling = _rope(raw, where)
    return ModelConfig(
        family=str(family),
        vocab_size=_integer(raw, "vocab_size", where),
        hidden_size=hidden,
        num_layers=_integer(raw, "num_hidden_layers", where),
        num_heads=heads,
        num_kv_heads=heads if raw.get("num_key_value_heads") is None else _integer(raw, "num_key_value_heads", where),
        head_dim=head_dim,
        intermediate_size=_integer(raw, "intermediate_size", where),
        rms_norm_eps=_number(raw, "rms_norm_eps", where, default=1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        max_positions=_integer(raw, "max_position_embeddings", where),
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        eos_token_ids=tuple(sorted(set(ids_of(raw.get("eos_token_id"))))),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
    )


def _refuse_unsupported(raw: Mapping[str, Any], family: str, where: str) -> None:
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise InputError(f"{where}: hidden_act {raw['hidden_act']!r} is not supported, only 'silu'")
    for key in ("attention_bias", "mlp_bias"):
        if raw.get(key):
            raise InputError(f"{where}: {key} is not supported for model_type {family!r}")
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise InputError(
            f"{where}: checkpoints quantised with {method!r} are not supported; use a GGUF file or the "
            "unquantised model"
        )
    if float(raw.get("partial_rotary_factor") or 1.0) != 1.0:
        raise InputError(f"{where}: partial_rotary_factor {raw['partial_rotary_factor']} is not supported")
    window = raw.get("sliding_window")
    # Qwen keeps a window in its config and switches it off by a flag; Mistral uses it wherever it is set.
    used = window is not None and (raw.get("use_sliding_window", False) if family.startswith("qwen") else True)
    if "layer_types" in raw and all(kind == "full_attention" for kind in raw["layer_types"]):
        used = False
    if used and window < raw.get("max_position_embeddings", 0):
        raise InputError(f"{where}: sliding-window attention (sliding_window {window}) is not supported")


def _rope(raw: Mapping[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    parameters = raw.get("rope_parameters")
    if parameters is None:
        parameters = {**(raw.get("rope_scaling") or {}), "rope_theta": raw.get("rope_theta", 10000.0)}
    if not isinstance(parameters, dict):
        raise InputError(f"{where}: rope_parameters must be an object, not {parameters!r}")
    theta = _number(parameters, "rope_theta", where, default=10000.0)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", factor=_number(parameters, "factor", where))
    if kind == "llama3":
        return theta, RopeScaling(
            "llama3",
            factor=_number(parameters, "factor", where),
            low_freq_factor=_number(parameters, "low_freq_factor", where),
            high_freq_factor=_number(parameters, "high_freq_factor", where),
            original_max_positions=_integer(parameters, "original_max_position_embeddings", where),
        )
    raise InputError(f"{where}: RoPE scaling {kind!r} is not supported; supported are 'default', 'linear', 'llama3'")


def _integer(raw: Mapping[str, Any], key: str, where: str) -> int:
    value = raw.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"{where}: {key} must be an integer, not {value!r}")
    return value


def _number(raw: Mapping[str, Any], key: str, where: str, default: float | None = None) -> float:
    value = raw.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise InputError(f"{where}: {key} must be a number, not {value!r}")
    return float(value)
