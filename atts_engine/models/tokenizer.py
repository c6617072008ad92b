"""Text and token ids of one model: encoding, decoding, chat prompts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from atts_engine.errors import InputError
from atts_engine.models.chat_template import ChatTemplate
from atts_engine.models.config import read_json
from atts_engine.models.detokenizer import (
    ByteLevelDetokenizer,
    ByteLevelVocabulary,
    Detokenizer,
    WindowDetokenizer,
    byte_alphabet,
)
from atts_engine.models.encoder import EncodingRules, StableEncoder

# Decoders under which a token's text follows from the token and the one before it; others cannot be streamed
# exactly.
_STREAMABLE = {"ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip"}


class Tokenizer:
    """A `tokenizers` tokenizer with its chat template.

    backend: the tokenizer; eos_token_ids: ids that end a text; chat_template: Jinja source or None;
    special_tokens: the template's variables (`bos_token`, `eos_token`, ...); add_bos: whether a plain prompt
    starts with `bos_token`, None to do as the backend's post-processor does.

    special_ids: of the special tokens; added_tokens: texts that are one token wherever they stand, special or not, by
    their ids.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_token_ids: Sequence[int] = (),
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
        add_bos: bool | None = None,
    ) -> None:
        # A saved truncation or padding would change prompts without a word.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.eos_token_ids = tuple(eos_token_ids)
        self._special_tokens = dict(special_tokens or {})
        self._template_source = chat_template
        self._template = ChatTemplate(chat_template, self._special_tokens) if chat_template is not None else None
        self._add_bos = add_bos
        self._tokens = {i: token for token, i in backend.get_vocab(with_added_tokens=True).items()}
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        kinds = _decoder_kinds(backend)
        strange = sorted(kinds - _STREAMABLE)
        if strange or not kinds:
            raise InputError(
                f"tokenizer decoder {strange[0] if strange else None!r} is not supported; supported are "
                f"{sorted(_STREAMABLE)}"
            )
        self.added_tokens = tuple(token.content for _, token in sorted(added.items()))
        self._byte_level = ByteLevelVocabulary(self._tokens, self.special_ids) if "ByteLevel" in kinds else None
        self._byte_ids = (
            frozenset(i for i, t in self._tokens.items() if _is_byte(t)) if "ByteFallback" in kinds else frozenset()
        )
        self._missing_bytes = _missing_bytes(self._tokens) if self._byte_level else frozenset()
        self._unknown_id = _unknown_id(backend)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self._tokens) + 1

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    @cached_property
    def fingerprint(self) -> str:
        """sha256 hex over what decides the text of ids: the token of every id, which are special, the
        decoder."""
        decoder = "ByteLevel" if self._byte_level else json.loads(self._backend.decoder.__getstate__())
        content = [sorted(self._tokens.items()), sorted(self.special_ids), decoder]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8")).hexdigest()

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, from which `tokenizer_from_folder` makes it again."""
        self._backend.save(str(folder / "tokenizer.json"))
        config = {**self._special_tokens, "chat_template": self._template_source}
        text = json.dumps({k: v for k, v in config.items() if v is not None}, indent=1)
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        """Ids of a text, nothing added around it; a special token written out in the text becomes its id.

        Raises InputError naming the first character that the vocabulary cannot spell.
        """
        return self._encode(text, around=False)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of all ids at once; bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special)

    def bytes_of(self, token_id: int) -> bytes:
        """What one token adds to a text, as bytes of UTF-8: perhaps a part of a character alone. Special tokens stand
        for their names."""
        if self._byte_level is not None:
            return self._byte_level.bytes_of(token_id)
        if token_id in self._byte_ids:
            return bytes([int(self._tokens[token_id][3:5], 16)])
        # The first token of a text may lose its leading space.
        once, twice = (self.decode([token_id] * n, skip_special=False) for n in (1, 2))
        return twice[len(once) :].encode("utf-8")

    def detokenizer(self, skip_special: bool = True) -> Detokenizer:
        """A fresh stream: `push(ids) -> str`, `flush() -> str`."""
        if self._byte_level is not None:
            return ByteLevelDetokenizer(self._byte_level, skip_special)
        kept = self._tokens.keys() - self.special_ids if skip_special else self._tokens.keys()
        return WindowDetokenizer(self, frozenset(kept), self._byte_ids)

    @cached_property
    def encoding_rules(self) -> EncodingRules:
        """What a `StableEncoder` of this tokenizer goes by."""
        return EncodingRules.of(self._backend, self._missing_bytes, self._unknown_id)

    def encoder(self) -> StableEncoder:
        """A fresh stream: `push(text) -> ids` that later text cannot change, `flush() -> ids`.

        Raises `InputError` for a tokenizer without boundaries to rely on."""
        return StableEncoder(self.encoding_rules)

    @property
    def eos_token_id(self) -> int | None:
        """The id that ends a text of this tokenizer's own: its `eos_token`, else the first of `eos_token_ids`."""
        named = self._backend.token_to_id(self._special_tokens.get("eos_token", ""))
        return named if named is not None else next(iter(self.eos_token_ids), None)

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Ids of `[{"role": ..., "content": ...}, ...]` up to where the answer begins; messages may have `tool_calls`
        and `tool_call_id` too, where the template has a place for them.

        Without a template: the contents, a blank line after each, started as the tokenizer starts a text.
        Raises InputError where the template refuses the messages or a character cannot be spelled.
        """
        if not messages or any("role" not in m or "content" not in m for m in messages):
            raise InputError('a chat prompt needs one message or more, each with "role" and "content"')
        if any("tool_calls" in m or "tool_call_id" in m for m in messages) and not (
            self._template is not None and self._template.tells_tools
        ):
            raise InputError("the model's chat template has no place for tool calls; leave them out of the messages")
        if self._template is not None:
            return self._encode(self._template.render(messages), around=False)
        text = "".join(message["content"] + "\n\n" for message in messages)
        if self._add_bos is None:
            return self._encode(text, around=True)
        bos = self._special_tokens.get("bos_token", "") if self._add_bos else ""
        return self._encode(bos + text, around=False)

    def _encode(self, text: str, around: bool) -> list[int]:
        if self._missing_bytes:
            # The backend drops what it cannot spell without a word.
            for character in text:
                if not self._missing_bytes.isdisjoint(character.encode("utf-8", "surrogatepass")):
                    raise InputError(
                        f"the tokenizer cannot spell {character!r} (U+{ord(character):04X}); take it out of the prompt"
                    )
        try:
            encoding = self._backend.encode(text, add_special_tokens=around)
        except (TypeError, UnicodeEncodeError) as error:
            raise InputError(f"the text is not valid Unicode: {error}") from error
        if self._unknown_id is not None and self._unknown_id in encoding.ids:
            unknown = self._tokens[self._unknown_id]
            for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
                if token_id == self._unknown_id and text[start:end] != unknown:
                    raise InputError(f"the tokenizer has no token for {text[start:end]!r}; take it out of the prompt")
        return encoding.ids


def tokenizer_from_folder(folder: Path, eos_token_ids: Sequence[int]) -> Tokenizer:
    """tokenizer.json with the template and special tokens of tokenizer_config.json (and chat_template.jinja).

    eos_token_ids: those of the model's configs; the tokenizer's own `eos_token` joins them.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(
            f"{path} is missing; save the model's tokenizer in the `tokenizers` format (a fast tokenizer) "
            "beside its weights"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises plain Exception
        raise InputError(f"{path} cannot be read: {error}") from error
    raw = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    special = {
        key: text for key in ("bos_token", "eos_token", "pad_token", "unk_token") if (text := _content(raw.get(key)))
    }
    eos = {*eos_token_ids, backend.token_to_id(special["eos_token"])} if "eos_token" in special else set(eos_token_ids)
    return Tokenizer(
        backend,
        eos_token_ids=sorted(i for i in eos if i is not None),
        chat_template=_chat_template(folder, raw.get("chat_template")),
        special_tokens=special,
    )


def _content(value: object) -> str | None:
    """Text of a special token, written as a string or as an AddedToken."""
    return value.get("content") if isinstance(value, dict) else value if isinstance(value, str) else None


def _chat_template(folder: Path, value: object) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list):
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        if isinstance(named.get("default"), str):
            return named["default"]
    raise InputError(
        f"{folder / 'tokenizer_config.json'}: chat_template must be a text or a list with one named 'default'"
    )


def _decoder_kinds(backend: tokenizers.Tokenizer) -> set[str]:
    if backend.decoder is None:
        return set()
    state = json.loads(backend.decoder.__getstate__())
    return {part["type"] for part in state.get("decoders", [state])}


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _missing_bytes(tokens: Mapping[int, str]) -> frozenset[int]:
    """Bytes without a token of their own."""
    present = set(tokens.values())
    return frozenset(byte for character, byte in byte_alphabet().items() if character not in present)


def _unknown_id(backend: tokenizers.Tokenizer) -> int | None:
    unknown = getattr(backend.model, "unk_token", None)
    return backend.token_to_id(unknown) if unknown is not None else None
