"""The vocabulary of the built-in pair and the Hugging Face tokenizer files that hold it."""

from __future__ import annotations

import json
import re
from pathlib import Path

SPECIALS = ["<pad>", "<bos>", "<eos>", "<unk>"]
# Longest first: the split regex tries them in this order.
PIECES = ["\\boxed{", "Wait, ", "Q: ", " = ", "; ", "\n\n", *"0123456789", *"abcdefghij", *"+-*?}"]
# Punctuation that no training text holds, so that near-task prompts do not become <unk>; fills the vocabulary up to 48.
SPARE = [*" \n.,:;=()/{!%"]
TOKENS = [*SPECIALS, *PIECES, *SPARE]
ID = {token: i for i, token in enumerate(TOKENS)}

PAD, BOS, EOS, UNK = range(4)
BLANK, WAIT, BOX, CLOSE, QUESTION = ID["\n\n"], ID["Wait, "], ID["\\boxed{"], ID["}"], ID["Q: "]
EQUALS, SEMICOLON, ASK = ID[" = "], ID["; "], ID["?"]

CHAT_TEMPLATE = (
    "{%- for message in messages -%}{%- if message['role'] == 'user' -%}"
    "{{ bos_token + 'Q: ' + message['content'] + '\\n\\n' }}"
    "{%- elif message['role'] == 'assistant' -%}{{ message['content'] + eos_token }}{%- endif -%}{%- endfor -%}"
)


def decode(ids: list[int]) -> str:
    """Text of token ids, special tokens left out."""
    return "".join(TOKENS[i] for i in ids if i >= len(SPECIALS))


def encode(text: str) -> list[int]:
    """Token ids of a text without special tokens; what no token covers becomes <unk>."""
    parts = re.findall("|".join(map(re.escape, [*PIECES, *SPARE])) + "|.", text)
    return [ID.get(part, UNK) for part in parts]


def write_tokenizer(folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(vocab=ID, unk_token="<unk>"))
    # The last alternative isolates each unknown character, so that one does not swallow its neighbours.
    pattern = "|".join(map(re.escape, [*PIECES, *SPARE])) + "|."
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIALS])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
