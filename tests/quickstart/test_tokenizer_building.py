"""The quickstart's tokenizer: any text, one token a world word, one token a number, and no surprises elsewhere."""

from __future__ import annotations

import random
import re
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from llava.data.scene_turns import ask_many
from llava.data.scenes import draw_scene
from llava.quickstart.scene_text import write_scene
from llava.quickstart.tokenizer_building import SPACE, WORLD_WORDS, build_tokenizer, list_numbers, save_tokenizer

TOKENIZER = build_tokenizer()


def encode(text: str) -> list[str]:
    return TOKENIZER.encode(text, add_special_tokens=False).tokens  # type: ignore[no-any-return]


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_any_text_comes_back(text: str) -> None:
    # "</s>" typed is a special token here; the processor keeps user text from becoming one
    text = re.sub(r"</?s>|<unk>", "", text).replace(SPACE, "")
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text
    assert 0 not in ids


def test_every_world_word_and_every_number_is_one_token_with_and_without_a_space() -> None:
    assert all(encode(word) == [SPACE + word] for word in WORLD_WORDS)
    for number in list_numbers():
        assert encode(number) == [SPACE + number]
        assert encode(f"[{number}")[1:] == [number]


def test_a_box_is_nine_tokens() -> None:
    assert encode("[0.10, 0.05, 1.00, 0.99]") == [
        "▁[", "0.10", ",", "▁0.05", ",", "▁1.00", ",", "▁0.99", "]",
    ]  # fmt: skip


def test_every_question_answer_and_scene_is_one_token_a_word() -> None:
    rng = random.Random(0)
    for _ in range(150):
        scene = draw_scene(rng)
        texts = [write_scene(scene, form) for form in ("names", "places", "boxes", "bare_boxes")]
        texts += [f"\n{turn.question} ASSISTANT: {turn.answer}" for turn in ask_many(scene, 12, rng)]
        for text in texts:
            pieces = re.findall(r"\d\.\d\d|[A-Za-z']+|[^\sA-Za-z'.]|\.|\n", text)
            assert [token.removeprefix(SPACE) for token in encode(text) if token != SPACE] == [
                "<0x0A>" if piece == "\n" else piece for piece in pieces
            ]


def test_unknown_words_fall_to_letters_and_bytes_without_touching_their_neighbours() -> None:
    assert encode("red zèbre 7.5") == ["▁red", "▁z", "<0xC3>", "<0xA8>", "b", "r", "e", "▁7", ".", "5"]


def test_the_vocabulary_is_small_and_a_multiple_of_64() -> None:
    size = TOKENIZER.get_vocab_size()
    assert size % 64 == 0
    assert size <= 1280
    assert [TOKENIZER.id_to_token(number) for number in (0, 1, 2, 3)] == ["<unk>", "<s>", "</s>", "<0x00>"]


@pytest.mark.parametrize(
    "text", ["USER: Is there a red circle in 0.12, [0.34, 1.00]?\nIs the Crossing 10.05 squarer", ""]
)
def test_greedy_merging_by_score_gives_the_same_tokens(text: str) -> None:
    """SentencePiece and llama.cpp merge the pair whose joint token scores highest; a token's score is minus its id."""
    vocabulary = TOKENIZER.get_vocab()
    symbols = [char if char in vocabulary else None for char in SPACE + text.replace(" ", SPACE)] if text else []
    pieces = [symbol or "<0x0A>" for symbol in symbols]
    while True:
        pairs = [(vocabulary[a + b], place) for place, (a, b) in enumerate(pairwise(pieces))
                 if a + b in vocabulary]  # fmt: skip
        if not pairs:
            break
        _, place = min(pairs)
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
    assert pieces == encode(text)


def test_transformers_opens_it_and_gives_the_same_ids(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    opened = AutoTokenizer.from_pretrained(tmp_path)
    direct = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("USER: What is this?\nA zebra's häus ASSISTANT: [0.10, 0.20]</s>USER: hi", "\nIs there", "a"):
        assert opened(text).input_ids == direct.encode(text).ids
    assert opened("red").input_ids[0] == opened.bos_token_id == 1
    assert opened.eos_token_id == 2
