"""Text that arrives in pieces is encoded as the whole text is, and no id is given out too early."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from atts_engine.errors import InputError
from atts_engine.models import Tokenizer, resolve
from atts_engine.models.encoder import StableEncoder
from atts_engine.models.gguf_file import GGUFFile
from atts_engine.models.gguf_tokenizer import _SPLITS, tokenizer_from_gguf
from atts_engine.models.regex_reach import regex_reach
from atts_engine.models.tokenizer import tokenizer_from_folder

CORPUS = [
    "The cat's mat isn't where it'll be; we've 12345 cats, they're 678 and I'd say 90.\n\nSo x = 3 + 4 = 7.\n  \n",
    "def f(x):\n    return x  # note\n\n\nWait, é and ünï, 日本語 text 😀👍!!\n\n"
    "Don't \\boxed{42}. ...  ===\t\tend\r\n",
    "aaaa bbb ab abab   the the then there  \n \n  \n they'llama ¿qué? <think> no </think>",
] * 4
GPT_4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = r"[!-/:-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level(*splits: str, nfc: bool = False, added: tuple[str, ...] = (), gpt2: bool = False) -> Tokenizer:
    """A small byte-level BPE behind these patterns."""
    backend = tokenizers.Tokenizer(models.BPE())
    if nfc:
        backend.normalizer = normalizers.NFC()
    steps = [pre_tokenizers.Split(tokenizers.Regex(p), behavior="isolated") for p in splits]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=gpt2)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<eos>"],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([tokenizers.AddedToken(t, special=False, normalized=False) for t in added])
    return Tokenizer(backend, eos_token_ids=[0])


def sentencepiece(metaspace: bool) -> Tokenizer:
    """BPE over the whole text with a dummy prefix, as Llama 2; or behind Metaspace, as later conversions."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    special = ["<unk>", "<s>", "</s>"]
    singles = [f"<0x{byte:02X}>" for byte in range(256)]
    backend.normalizer = None if metaspace else normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    # Byte tokens are ordinary entries of the vocabulary, as in converted SentencePiece models.
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special + singles, show_progress=False, limit_alphabet=60
    )
    backend.train_from_iterator(CORPUS, trainer)
    if not metaspace:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = None
    return Tokenizer(backend, eos_token_ids=[2])


MAKE: dict[str, Callable[[], Tokenizer]] = {
    "tiny": lambda: tokenizer_from_folder(resolve("tiny-target"), ()),
    "smollm2": lambda: tokenizer_from_gguf(GGUFFile(resolve("smollm2-135m"))),
    "gpt2": lambda: byte_level(gpt2=True),
    "llama3": lambda: byte_level(_SPLITS["llama-bpe"], added=("<think>", "</think>")),
    "qwen2": lambda: byte_level(_SPLITS["qwen2"], nfc=True, added=("<think>", "</think>")),
    "gpt4o": lambda: byte_level(GPT_4O),
    "deepseek": lambda: byte_level(r"\p{N}{1,3}", DEEPSEEK),
    "bytes": byte_level,
    "sentencepiece": lambda: sentencepiece(False),
    "metaspace": lambda: sentencepiece(True),
}
_MADE: dict[str, Tokenizer] = {}


def made(name: str) -> Tokenizer:
    if name not in _MADE:
        _MADE[name] = MAKE[name]()
    return _MADE[name]


# Where boundaries move: contractions, white space before anything, digits, marks that compose, added tokens cut apart.
PARTS = st.sampled_from(
    [
        *"abceglLrsStTvV '’`1234567 90\n\r\t.,!?=<>/\\{}éßñ日本😀👍🏽",
        *(
            "\u0301",
            "\u0323",
            "\u1161",
            "\u1100",
            "\u11a8",
            "\u00a0",
            "\u200d",
            "  ",
            "\n\n",
            "'ll",
            "'re",
            "<think>",
            "</th",
        ),
        *("ink>", "the", " cat", "12345", "===", "aaaa", " x = 3"),
    ]
)
TEXT = st.lists(PARTS, max_size=40).map("".join) | st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
TINY = st.lists(
    st.sampled_from([*"0123456789abcdefghij+-*?} \n.,:;=()/{!%", " = ", "; ", "Q: ", "Wait, ", "\\boxed{"]), max_size=40
)


def whole(tokenizer: Tokenizer, text: str) -> list[int]:
    """The oracle: the whole text at once, in mid-text where the start of a text is special."""
    rules = tokenizer.encoding_rules
    lead = rules.lead(text)
    ids = rules.backend.encode(lead + text, add_special_tokens=False).ids
    return ids[len(rules.backend.encode(lead, add_special_tokens=False).ids) :]


def check(tokenizer: Tokenizer, text: str, seed: int) -> None:
    rng, encoder, ids, at = random.Random(seed), StableEncoder(tokenizer.encoding_rules), [], 0
    expected = whole(tokenizer, text)
    while at < len(text):
        size = rng.choice([1, 1, 2, 3, 7, 40])
        ids += encoder.push(text[at : at + size])
        at += size
        assert ids == expected[: len(ids)]
    assert ids + encoder.flush() == expected
    assert encoder.waiting == "" and encoder.flush() == []


@pytest.mark.parametrize("name", [n for n in MAKE if n != "tiny"])
@settings(max_examples=150, deadline=None)
@given(text=TEXT, seed=st.integers(0, 2**32))
def test_pieces_are_encoded_as_the_whole_text(name: str, text: str, seed: int) -> None:
    tokenizer = made(name)
    missing = tokenizer.encoding_rules.missing_bytes
    check(tokenizer, "".join(c for c in text if missing.isdisjoint(c.encode())), seed)


@settings(max_examples=150, deadline=None)
@given(text=TINY.map("".join), seed=st.integers(0, 2**32))
def test_pieces_of_the_built_in_language(text: str, seed: int) -> None:
    if text.count("\\") == text.count("\\boxed{"):
        check(made("tiny"), text, seed)


@settings(max_examples=150, deadline=None)
@given(text=TEXT, more=TEXT, name=st.sampled_from([n for n in MAKE if n not in ("tiny", "smollm2")]))
def test_what_is_given_out_holds_whatever_follows(text: str, more: str, name: str) -> None:
    tokenizer = made(name)
    given_out = StableEncoder(tokenizer.encoding_rules).push(text)
    assert whole(tokenizer, text + more)[: len(given_out)] == given_out
    assert whole(tokenizer, text)[: len(given_out)] == given_out


@pytest.mark.parametrize("name", list(MAKE))
def test_little_text_is_held_back(name: str) -> None:
    text = "a = 85; b = 43; c = 42; " * 8 if name == "tiny" else "So the cat is 12 and it is there. " * 8
    encoder = StableEncoder(made(name).encoding_rules)
    # Where nothing splits the text, only character pairs that no token holds are boundaries.
    bound = 24 if name not in ("bytes", "sentencepiece") else 60
    for character in text:
        encoder.push(character)
        assert len(encoder.waiting) <= bound


def test_two_pieces_back_can_change() -> None:
    """`'` and `l` are two pieces of GPT-2's pattern until the second `l` makes them one."""
    tokenizer = made("gpt2")
    encoder = StableEncoder(tokenizer.encoding_rules)
    ids = encoder.push("we'l")
    assert encoder.waiting == "we'l" or tokenizer.decode(ids) == "we"
    ids += encoder.push("l go on from here") + encoder.flush()
    assert ids == whole(tokenizer, "we'll go on from here")


def test_special_tokens_written_out_are_plain_text() -> None:
    tokenizer = made("smollm2")
    encoder = StableEncoder(tokenizer.encoding_rules)
    ids = encoder.push("no <|im_end|> of it ") + encoder.flush()
    assert not tokenizer.special_ids & set(ids)
    assert tokenizer.decode(ids) == "no <|im_end|> of it "


def test_added_tokens_that_are_not_special_are_found_in_pieces() -> None:
    tokenizer = made("llama3")
    encoder = StableEncoder(tokenizer.encoding_rules)
    ids = [i for c in "so <think>no</think>." for i in encoder.push(c)] + encoder.flush()
    assert tokenizer._backend.token_to_id("<think>") in ids and tokenizer._backend.token_to_id("</think>") in ids


def test_a_copy_goes_its_own_way() -> None:
    encoder = StableEncoder(made("gpt2").encoding_rules)
    encoder.push("the cat is ")
    other = encoder.copy()
    assert other.push("here now") + other.flush() != encoder.push("gone") + encoder.flush()


def test_text_that_cannot_be_spelled() -> None:
    for name, text, said in (("tiny", "a = z; b = 2", "no token"), ("smollm2", "a \x04 b and more of it", r"U\+0004")):
        encoder = StableEncoder(made(name).encoding_rules)
        with pytest.raises(InputError, match=said):
            encoder.push(text)
            encoder.flush()
    # Not before it is certain: `\` alone has no token, `\boxed{` has.
    encoder = StableEncoder(made("tiny").encoding_rules)
    assert encoder.push("\\boxe") == []
    assert len(encoder.push("d{5}") + encoder.flush()) == 3


def test_a_character_that_a_backend_drops_is_an_error() -> None:
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    backend.decoder = decoders.Fuse()
    encoder = StableEncoder(Tokenizer(backend).encoding_rules)
    with pytest.raises(InputError, match="'é'"):
        encoder.push("aéb")
        encoder.flush()


def test_normalizers_without_boundaries_are_refused() -> None:
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    backend.normalizer, backend.decoder = normalizers.Lowercase(), decoders.Fuse()
    with pytest.raises(InputError, match="Lowercase"):
        _ = Tokenizer(backend).encoding_rules


def test_a_segmentation_that_the_rules_do_not_bound_is_seen() -> None:
    """`a+b|.` gives a run back however long it is."""
    backend = tokenizers.Tokenizer(
        models.WordLevel({"<unk>": 0, "a": 1, "aaaaaaaaaaaaab": 2, "c": 3}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("a+b|."), behavior="isolated")
    backend.decoder = decoders.Fuse()
    encoder = StableEncoder(Tokenizer(backend).encoding_rules)
    encoder.push("a" * 13)
    with pytest.raises(InputError, match="depends on what follows"):
        encoder.push("b" + "c" * 9)


@pytest.mark.parametrize(
    ("pattern", "reach"),
    [
        ("a", 1), ("abc|de", 3), (r"\s+(?!\S)|\s+", 2), (r"\p{N}{1,3}", 3), (r"(?i:'s|'ll)x", 4),
        (r"[^\r\n\]a]?\p{L}+", 2),
        (r"\\boxed\{|Wait,\ ", 7), ("a{4}", 4), ("(ab){2,}", 4), (r"[a-z&&[^b]]c", 2), (r"x*+y|(?<name>zzz)", 3),
    ],
)  # fmt: skip
def test_reach_of_a_pattern(pattern: str, reach: int) -> None:
    assert regex_reach(pattern) == reach
