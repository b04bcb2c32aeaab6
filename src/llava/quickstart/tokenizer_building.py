"""Build the quickstart's tokenizer: a Llama-style BPE of some 1,200 tokens, made from a word list.

Any text can be typed: what is not in the vocabulary falls back to bytes. Every word of the drawn world is one token,
and so is every number 0.00 to 1.00 with two decimals, after a space and after a bracket; a box is nine tokens.

Merges grow a word letter by letter from its start (`▁c`, `▁ci`, ... `▁circle`), so at every place at most one merge
applies and the outcome does not depend on their order except in one thing: merges that begin with `▁` come first.
Greedy merging by rank (Hugging Face) and by score = -rank (SentencePiece, llama.cpp) therefore agree, and no merge
crosses a word or a punctuation mark.
"""

from __future__ import annotations

import json
import string
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

SPACE = "▁"
SPECIALS = ("<unk>", "<s>", "</s>")
MODEL_MAX_LENGTH = 1024
# the drawn world's own words, in questions, answers and texts of scenes (a test holds the list against the wordings)
_WORLD = """
circle square triangle star cross circles squares triangles stars crosses
red green blue yellow orange purple black small large top bottom left right center yes no above below higher lower
is there a an the in picture can you see does show do image photo anything object objects shape shapes thing things
look what color colour of which have tell me big size how many are count number where part position to or on side box
bounding give its locate with coordinates at name describe briefly short caption this detail detailed description
everything and it answer letter choices option's from given directly
"""
# words that people type when they ask freely
_COMMON = """
please that these those any some one two three four other both not if so more than near who why was be will
should i you're it's what's there's he she for by as out up down over middle find say list like thanks
hello hi ok white gray pink dark light
"""
# words that begin a question: after a line break they have no space before them
_FIRST = "Is Can Does Do What Which Tell How Count Where In On Give Locate Name Describe There Are A The Answer"
# and sentences inside a line, or a question after another's answer
WORLD_WORDS, COMMON_WORDS, FIRST_WORDS = (tuple(text.split()) for text in (_WORLD, _COMMON, _FIRST))
SENTENCE_WORDS = (*FIRST_WORDS, "Choices", "An")
TEMPLATE_WORDS = ("USER", "ASSISTANT")
_VOCABULARY_MULTIPLE = 64


def build_tokenizer() -> Tokenizer:
    """The tokenizer itself; the vocabulary is filled to a multiple of 64 with spare tokens."""
    merges = _list_merges()
    singles = [SPACE, *string.ascii_letters, *string.digits, *string.punctuation]
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    tokens = list(dict.fromkeys([*SPECIALS, *bytes_, *(first + second for first, second in merges), *singles]))
    for spare in range(-len(tokens) % _VOCABULARY_MULTIPLE):
        tokens.append(f"<spare_{spare}>")
    tokenizer = Tokenizer(
        BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIALS])
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def save_tokenizer(folder: Path) -> None:
    """Write tokenizer.json and the configuration that transformers' AutoTokenizer opens it with."""
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "legacy": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MODEL_MAX_LENGTH,
        "padding_side": "right",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")


def list_numbers() -> list[str]:
    """0.00, 0.01 ... 1.00."""
    return [f"{value / 100:.2f}" for value in range(101)]


def _list_merges() -> list[tuple[str, str]]:
    """Every merge in rank order: words after a space, numbers after a space, then both without one."""
    numbers = list_numbers()
    spaced = [*WORLD_WORDS, *COMMON_WORDS, *SENTENCE_WORDS, *TEMPLATE_WORDS, *string.ascii_letters, *string.digits]
    marks = ["[", "<", "(", '"', "'"]
    grown = [SPACE + word for word in (*spaced, *numbers, *marks)] + [*FIRST_WORDS, *TEMPLATE_WORDS, *numbers]
    merges: dict[tuple[str, str], None] = {}
    for word in grown:
        for end in range(1, len(word)):
            merges.setdefault((word[:end], word[end]))
    return list(merges)
