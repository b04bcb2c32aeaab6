from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava.inference.detokenize import StreamDetokenizer


def decode_bytes(ids: list[int]) -> str:
    """Each id is a byte: the hardest tokenizer there is."""
    return bytes(ids).decode("utf-8", errors="replace")


def decode_words(ids: list[int]) -> str:
    """Words with a space before each, the first one's dropped, as sentencepiece does."""
    return "".join(" " + WORDS[i] for i in ids)[1:]


WORDS = ["red", "circle", "###", "USER", ":", ""]


def stream(detokenizer: StreamDetokenizer, ids: list[int]) -> list[str]:
    return [*(detokenizer.push(i) for i in ids), detokenizer.finish()]


def test_a_character_of_several_bytes_is_shown_when_it_is_whole() -> None:
    pieces = stream(StreamDetokenizer(decode_bytes), list("é€🙂".encode()))
    assert pieces == ["", "é", "", "", "€", "", "", "", "🙂", ""]


def test_words_keep_their_spaces() -> None:
    assert stream(StreamDetokenizer(decode_words), [0, 1, 0]) == ["red", " circle", " red", ""]


@given(st.text())
def test_the_pieces_together_are_the_text(text: str) -> None:
    detokenizer = StreamDetokenizer(decode_bytes)
    assert "".join(stream(detokenizer, list(text.encode()))) == text == detokenizer.text


@given(text=st.text(alphabet="ab#€", max_size=30), stops=st.lists(st.text(alphabet="ab#€", min_size=1, max_size=4)))
def test_the_text_is_cut_at_the_stop_string_that_is_complete_first(text: str, stops: list[str]) -> None:
    detokenizer = StreamDetokenizer(decode_bytes, stops)
    shown = "".join(stream(detokenizer, list(text.encode())))
    complete = [end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    if complete:
        text = text[: complete[0]]
        text = min((text[: text.index(stop)] for stop in stops if stop in text), key=len)
    assert shown == text
    assert detokenizer.stopped == bool(complete)


def test_a_stop_string_spread_over_tokens_never_shows() -> None:
    detokenizer = StreamDetokenizer(decode_bytes, ["###"])
    assert stream(detokenizer, list(b"a##b###c")) == ["a", "", "", "##b", "", "", "", "", ""]
    assert detokenizer.stopped


def test_the_start_of_a_stop_string_is_shown_when_nothing_follows() -> None:
    assert stream(StreamDetokenizer(decode_bytes, ["###"]), list(b"a#")) == ["a", "", "#"]


def test_nothing_is_shown_after_a_stop() -> None:
    detokenizer = StreamDetokenizer(decode_words, [" ###"])
    assert stream(detokenizer, [0, 2, 1, 1]) == ["red", "", "", "", ""]


def test_bytes_that_are_no_character_are_not_held_for_ever() -> None:
    detokenizer = StreamDetokenizer(decode_bytes)
    shown = "".join(detokenizer.push(0xFF) for _ in range(20))
    assert len(shown) >= 8


@pytest.mark.parametrize("ids", [[], [5], [5, 5]])
def test_an_empty_answer_is_empty(ids: list[int]) -> None:
    assert "".join(stream(StreamDetokenizer(decode_words), ids)).strip() == ""
