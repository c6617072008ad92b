"""Tokenizers against llama.cpp and transformers, chat prompts, and text that arrives in pieces."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from atts_engine.errors import InputError
from atts_engine.models import Tokenizer, resolve
from atts_engine.models.gguf_file import GGUFFile
from atts_engine.models.gguf_tokenizer import tokenizer_from_gguf
from atts_engine.models.tokenizer import tokenizer_from_folder

# What llama.cpp (pre-tokenizer "smollm") makes of these texts; digits stand alone, unlike in GPT-2.
LLAMA_CPP = {
    "In 2024, 12345+678 = 13023; don't  we're\n\n\n x^{2}": (
        "788 216 34 32 34 36 28 216 33 34 35 36 37 27 38 39 40 446 216 33 35 32 "
        "34 35 43 1326 982 216 392 2316 16506 1792 21990 34 109"
    ),
    "日本語 ½ ²³ Ⅷ é ñ": "23274 115 40993 179 120 248 216 16738 216 19133 39050 216 173 223 117 26411 5549 126",
    "a  b   c\t\td \n e": "81 216 278 256 265 197 197 84 3717 297",
    "<|im_start|>user\nhi<|im_end|>": "1 4093 198 6004 2",
    "𝔸 😀👍🏽 \u200d": "23159 238 133 40303 218 10813 235 231 10813 233 138 459 231",
    "x\r\ny 's 'S IT'S": "104 201 198 105 637 99 637 67 9627 23 67",
    "  lead ١٢ trail  ": "216 1022 216 164 111 164 112 11231 256",
}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
MATH = st.text("0123456789+-*/=^_{}()\\ \n\t.,abcxyzABC'éπ√∑½²日😀", max_size=80)
MESSAGES = (
    [{"role": "user", "content": "What is 2 + 2?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "π?\n\n"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c <|im_end|> d"},
    ],
)


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return tokenizer_from_gguf(GGUFFile(resolve("smollm2-135m")))


@pytest.fixture(scope="module")
def hf_smollm2() -> transformers.PreTrainedTokenizerBase:
    """transformers' own byte-level BPE over the file's vocabulary, with the file's template."""
    metadata = GGUFFile(resolve("smollm2-135m")).metadata
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    tokenizer = transformers.GPT2Tokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]],
    )
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [t for t, kind in zip(tokens, types, strict=True) if kind == 3]}
    )
    tokenizer.chat_template = metadata["tokenizer.chat_template"]
    return tokenizer


def with_decoder(pieces: list[str], decoder: decoders.Decoder, special: tuple[str, ...] = ()) -> Tokenizer:
    """A vocabulary of just these pieces, under a decoder."""
    backend = tokenizers.Tokenizer(models.WordLevel({p: i for i, p in enumerate(pieces)}, unk_token="<unk>"))
    backend.decoder = decoder
    backend.add_special_tokens(list(special))
    return Tokenizer(backend)


def sentencepiece() -> Tokenizer:
    """As Llama 2 and Mistral decode: a space is U+2581, single bytes are the last resort."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁▁", "▁the", "a", "ing", "é", "日本", "▁é", "."]
    decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return with_decoder(pieces, decoder, ("<s>", "</s>"))


def cuts(rng: random.Random, ids: list[int]) -> Iterator[list[int]]:
    at = 0
    while at < len(ids):
        size = rng.choice([0, 1, 1, 2, 3, 64])
        yield ids[at : at + size]
        at += size


def test_smollm2_is_llama_cpp(smollm2: Tokenizer) -> None:
    for text, written in LLAMA_CPP.items():
        ids = [int(i) for i in written.split()]
        assert smollm2.encode(text) == ids
        assert smollm2.decode(ids, skip_special=False) == text


def test_smollm2_is_llama_cpp_on_problems(smollm2: Tokenizer, shared: Path) -> None:
    llama_cpp = pytest.importorskip(
        "llama_cpp", reason="llama-cpp-python is not installed; the frozen texts stand for it"
    )
    oracle = llama_cpp.Llama(str(resolve("smollm2-135m")), vocab_only=True, verbose=False)
    for name in ("aime24", "amc23", "math500"):
        for line in (shared / "data" / "problems" / f"{name}.jsonl").read_text().splitlines()[:40]:
            text = json.loads(line)["problem"]
            ids = smollm2.encode(text)
            assert ids == oracle.tokenize(text.encode(), add_bos=False, special=True)
            assert smollm2.decode(ids) == text


@given(text=TEXT | MATH)
def test_smollm2_is_transformers(
    text: str, smollm2: Tokenizer, hf_smollm2: transformers.PreTrainedTokenizerBase
) -> None:
    # GPT-2's pre-tokenizer keeps runs of numbers together; llama.cpp is the oracle for those.
    text = "".join(" " if c.isnumeric() else c for c in text)
    try:
        ids = smollm2.encode(text)
    except InputError:
        assert "".join(hf_smollm2.decode(hf_smollm2.encode(text, add_special_tokens=False))) != text
        return
    assert ids == hf_smollm2.encode(text, add_special_tokens=False)
    assert smollm2.decode(ids) == text


@pytest.mark.parametrize("messages", MESSAGES)
def test_smollm2_chat_prompt(
    messages: list[dict[str, str]], smollm2: Tokenizer, hf_smollm2: transformers.PreTrainedTokenizerBase
) -> None:
    text = hf_smollm2.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert smollm2.decode(smollm2.chat_prompt(messages), skip_special=False) == text
    assert smollm2.chat_prompt(messages) == smollm2.encode(text)
    assert smollm2.chat_prompt(messages)[0] in smollm2.special_ids


@pytest.mark.parametrize("name", ["tiny-draft", "tiny-target"])
def test_built_in_tokenizer_is_transformers(name: str) -> None:
    ours = tokenizer_from_folder(resolve(name), ())
    theirs = transformers.AutoTokenizer.from_pretrained(resolve(name), local_files_only=True)
    messages = [{"role": "user", "content": "a = 85; b = a-43; c = b+11; c?"}]
    prompt = theirs.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert ours.chat_prompt(messages) == prompt
    text = "b = a-43 = 85-43 = 42\n\nWait, c = b+11 = 42+11 = 53\n\n\\boxed{53}"
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert ours.decode(ours.encode(text)) == text
    assert ours.eos_token_ids == (theirs.eos_token_id,)
    with pytest.raises(InputError, match="no token for 'z'"):
        ours.chat_prompt([{"role": "user", "content": "z = 85; z?"}])


def test_the_pair_shares_a_fingerprint(smollm2: Tokenizer) -> None:
    draft, target = (tokenizer_from_folder(resolve(name), ()) for name in ("tiny-draft", "tiny-target"))
    assert draft.fingerprint == target.fingerprint != smollm2.fingerprint


@given(data=st.data(), seed=st.integers(0, 2**32))
def test_byte_level_stream(data: st.DataObject, seed: int, smollm2: Tokenizer) -> None:
    token = st.integers(0, smollm2.vocab_size - 1)
    written = (TEXT | MATH).filter(lambda t: not smollm2._missing_bytes & set(t.encode())).map(smollm2.encode)
    ids = data.draw(st.lists(token, max_size=40) | written)
    check_stream(smollm2, ids, seed)


@given(data=st.data(), seed=st.integers(0, 2**32))
def test_byte_fallback_stream(data: st.DataObject, seed: int) -> None:
    tokenizer = _SENTENCEPIECE
    word = st.sampled_from([1, 2, *range(259, 268)]).map(lambda i: [i])
    spelled = st.sampled_from("é日😀a").map(lambda c: [3 + byte for byte in c.encode()])
    ids = data.draw(st.lists(word | spelled | st.lists(st.integers(3, 258), max_size=3), max_size=20))
    check_stream(tokenizer, [i for part in ids for i in part], seed)


_SENTENCEPIECE = sentencepiece()


def check_stream(tokenizer: Tokenizer, ids: list[int], seed: int) -> None:
    """Pieces join to the whole, nothing that was given out changes, and no piece ends within a character."""
    for skip_special in (True, False):
        whole = tokenizer.decode(ids, skip_special)
        stream, given_out, fed = tokenizer.detokenizer(skip_special), "", []
        for piece in cuts(random.Random(seed), ids):
            fed += piece
            given_out += stream.push(piece)
            assert whole.startswith(given_out)
            assert tokenizer.decode(fed, skip_special).startswith(given_out)
        assert given_out + stream.flush() == whole


def test_an_unfinished_character_waits(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("😀")
    assert len(ids) > 1
    stream = smollm2.detokenizer()
    assert [stream.push([i]) for i in ids] == [""] * (len(ids) - 1) + ["😀"]
    assert stream.flush() == ""
    assert stream.push(ids[:-1]) == "" and stream.flush() == "\ufffd"


def test_a_token_has_bytes_of_its_own(smollm2: Tokenizer) -> None:
    for text in ("a 😀 é\n 日本", " the<|im_end|>"):
        parts = [smollm2.bytes_of(i) for i in smollm2.encode(text)]
        assert b"".join(parts) == text.encode()
    assert [len(smollm2.bytes_of(i)) for i in smollm2.encode("😀")] < [4]
    pieces = sentencepiece()
    ids = [pieces._backend.token_to_id(t) for t in ("<0xF0>", "<0x9F>", "▁the", "▁", "é", "</s>")]
    assert [pieces.bytes_of(i) for i in ids] == [b"\xf0", b"\x9f", b" the", b" ", "é".encode(), b"</s>"]


def test_characters_without_a_token(smollm2: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"U\+0004"):
        smollm2.encode("a\x04b")
    with pytest.raises(InputError, match=r"U\+40000"):
        smollm2.chat_prompt([{"role": "user", "content": "\U00040000"}])
    with pytest.raises(InputError, match="not valid Unicode|cannot spell"):
        smollm2.encode("\ud800")


def test_llama3_and_qwen2_splits_are_those_of_transformers() -> None:
    oracle = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    from atts_engine.models.gguf_tokenizer import _SPLITS

    for name, pattern in _SPLITS.items():
        theirs = oracle.GGUF_PRE_TOKENIZER_SPLITS[name]
        ours = pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
        split = pre_tokenizers.Split(tokenizers.Regex(theirs), behavior="isolated")
        for text in (*LLAMA_CPP, "12345 I'LL we'Ve\r\n\n  x  \n", "a1b22c333 .. ?!\n"):
            assert ours.pre_tokenize_str(text) == split.pre_tokenize_str(text)


def chat(template: str, **special: str) -> Tokenizer:
    backend = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2, "\n\n": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("a|b|\n\n|."), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(["<s>"])
    return Tokenizer(backend, chat_template=template or None, special_tokens=special, add_bos=True)


def test_chat_templates() -> None:
    user = [{"role": "user", "content": "ab"}]
    assert chat("{{ bos_token }}{{ messages[0].content }}", bos_token="<s>").chat_prompt(user) == [4, 1, 2]
    generation = "{% generation %}{% for m in messages %}{{ m.content }}{% break %}{% endfor %}{% endgeneration %}"
    assert chat(generation).chat_prompt(user * 2) == [1, 2]
    assert chat("", bos_token="<s>").chat_prompt(user) == [4, 1, 2, 3]
    for template, said in (
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ nothing.here }}", "nothing"),
        ("{{ messages[0].__class__.__mro__ }}", "unsafe"),
        ("{{ strftime_now('%Y') }}", "strftime_now"),
    ):
        with pytest.raises(InputError, match=said):
            chat(template).chat_prompt(user)
    with pytest.raises(InputError, match="not valid Jinja"):
        chat("{% for %}")
    for messages in ([], [{"role": "user"}]):
        with pytest.raises(InputError, match='"role" and "content"'):
            chat("").chat_prompt(messages)
    called = [*user, {"role": "assistant", "content": "", "tool_calls": [{"function": {"arguments": {"x": "b"}}}]}]
    told = "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.arguments.x }}{% endfor %}{% endfor %}"
    assert chat(told).chat_prompt(called) == [2]
    for template in ("", "{{ messages[0].content }}"):
        with pytest.raises(InputError, match="no place for tool calls"):
            chat(template).chat_prompt(called)
    with pytest.raises(InputError, match="no token for 'c'"):
        chat("").chat_prompt([{"role": "user", "content": "abc"}])


@pytest.mark.parametrize("decoder", [decoders.WordPiece(), decoders.CTC(), None])
def test_decoders_that_cannot_be_streamed(decoder: decoders.Decoder | None) -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    if decoder is not None:
        backend.decoder = decoder
    with pytest.raises(InputError, match="decoder"):
        Tokenizer(backend)


def test_saved_truncation_and_padding_are_off(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(resolve("tiny-target") / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=100)
    backend.save(str(tmp_path / "tokenizer.json"))
    plain = tokenizer_from_folder(resolve("tiny-target"), ())
    text = "a = 85; b = a-43"
    assert tokenizer_from_folder(tmp_path, ()).encode(text) == plain.encode(text)


def test_chat_template_files(tmp_path: Path) -> None:
    source = resolve("tiny-target") / "tokenizer.json"
    (tmp_path / "tokenizer.json").write_bytes(source.read_bytes())
    config = tmp_path / "tokenizer_config.json"
    user = [{"role": "user", "content": "a"}]

    def prompt() -> str:
        tokenizer = tokenizer_from_folder(tmp_path, ())
        return tokenizer.decode(tokenizer.chat_prompt(user), skip_special=False)

    assert prompt() == "a\n\n"
    named = [{"name": "tool_use", "template": "c"}, {"name": "default", "template": "b"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert prompt() == "b"
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}c")
    assert prompt() == "ac"
    (tmp_path / "chat_template.jinja").unlink()
    config.write_text(json.dumps({"chat_template": named[:1]}))
    with pytest.raises(InputError, match="default"):
        prompt()
