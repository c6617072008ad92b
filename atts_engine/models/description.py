"""All of a model but its weights, which a server may have in our place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from atts_engine.models.config import ids_of, read_json
from atts_engine.models.fingerprint import fingerprint
from atts_engine.models.gguf_file import GGUFFile
from atts_engine.models.gguf_tokenizer import tokenizer_from_gguf
from atts_engine.models.safetensors_folder import has_weights, weight_files
from atts_engine.models.tokenizer import Tokenizer, tokenizer_from_folder


@dataclass(frozen=True, slots=True)
class Description:
    """vocab_size: ids that the model can be given; eos_token_ids: that end a text, of the tokenizer and of the model's
    configuration. fingerprint: as of `Model`; None where the weights are not here."""

    tokenizer: Tokenizer
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    fingerprint: str | None


def describe(path: Path) -> Description:
    """Of a Hugging Face folder, which needs no more than a tokenizer, or of a .gguf file; any architecture.
    `InputError` for what cannot be read."""
    if not path.is_dir():
        tokenizer = tokenizer_from_gguf(GGUFFile(path))
        return Description(tokenizer, tokenizer.vocab_size, tokenizer.eos_token_ids, fingerprint([path]))
    config, generation = (
        read_json(file) if (file := path / name).is_file() else {} for name in ("config.json", "generation_config.json")
    )
    eos = {*ids_of(config.get("eos_token_id")), *ids_of(generation.get("eos_token_id"))}
    tokenizer = tokenizer_from_folder(path, sorted(eos))
    vocab_size = config.get("vocab_size")
    return Description(
        tokenizer,
        vocab_size if isinstance(vocab_size, int) else tokenizer.vocab_size,
        tokenizer.eos_token_ids,
        folder_fingerprint(path) if config and has_weights(path) else None,
    )


def folder_fingerprint(folder: Path) -> str:
    """Of a model's configuration and weights."""
    return fingerprint([folder / "config.json", *weight_files(folder)])
