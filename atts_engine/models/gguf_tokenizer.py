"""The byte-level BPE tokenizer that a GGUF file carries in its metadata."""

from __future__ import annotations

from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from atts_engine.errors import InputError
from atts_engine.models.gguf_file import GGUFFile
from atts_engine.models.tokenizer import Tokenizer

_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # llama.cpp's token types
# The regular expressions of the models' own tokenizer.json; {digits} is how many digits make a piece.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {"llama-bpe": _SPLIT.format(digits="{1,3}"), "qwen2": _SPLIT.format(digits="")}


def tokenizer_from_gguf(file: GGUFFile) -> Tokenizer:
    """Vocabulary, merges, special tokens and chat template. InputError for a tokenizer of another kind, by
    its name."""
    metadata = file.metadata
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2":
        raise InputError(f"{file.path}: tokenizer of kind {kind!r} is not supported, only 'gpt2' (byte-level BPE)")
    tokens, merges = _list(file, "tokenizer.ggml.tokens"), _list(file, "tokenizer.ggml.merges")
    types = _list(file, "tokenizer.ggml.token_type")
    if len(types) != len(tokens):
        raise InputError(f"{file.path}: {len(tokens)} tokens but {len(types)} token types")
    vocab = {token: i for i, (token, t) in enumerate(zip(tokens, types, strict=True)) if t != _UNUSED}
    try:
        backend = tokenizers.Tokenizer(
            models.BPE(vocab=vocab, merges=[_merge(m) for m in merges], ignore_merges=pre == "llama-bpe")
        )
    except Exception as error:  # the Rust side raises plain Exception
        raise InputError(f"{file.path}: the tokenizer's merges do not fit its tokens: {error}") from error
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _pre_tokenizer(pre, file)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [_added(t, special=True) for t, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    )
    backend.add_tokens(
        [_added(t, special=False) for t, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED]
    )
    eos_keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    return Tokenizer(
        backend,
        eos_token_ids=sorted({metadata[key] for key in eos_keys if key in metadata}),
        chat_template=metadata.get("tokenizer.chat_template"),
        special_tokens=_special_tokens(file, tokens),
        add_bos=metadata.get("tokenizer.ggml.add_bos_token", False),
    )


def _pre_tokenizer(pre: str | None, file: GGUFFile) -> pre_tokenizers.PreTokenizer:
    if pre == "smollm":
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    if pre not in _SPLITS:
        known = ", ".join(("smollm", *_SPLITS))
        raise InputError(f"{file.path}: pre-tokenizer {pre!r} is not supported; supported are {known}")
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_SPLITS[pre]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _list(file: GGUFFile, key: str) -> list[Any]:
    value = file.metadata.get(key)
    if not isinstance(value, list):
        raise InputError(f"{file.path}: metadata {key} is missing")
    return value


def _merge(text: str) -> tuple[str, str]:
    left, _, right = text.partition(" ")
    return left, right


def _added(token: str, special: bool) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(token, special=special, normalized=False)


def _special_tokens(file: GGUFFile, tokens: list[str]) -> dict[str, str]:
    named = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    ids = {key: file.metadata.get(f"tokenizer.ggml.{name}_token_id") for key, name in named.items()}
    return {key: tokens[i] for key, i in ids.items() if isinstance(i, int) and 0 <= i < len(tokens)}
