"""From tokens to what is shown: nothing is taken back, and the pieces joined are the answer."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llava.inference.sampling import TokenLogprobs
from llava.inference.service import TokenEvent
from llava.serve.words import Piece, Words

END = 0


def decode(ids: list[int]) -> str:
    """Bytes as tokens, as a tokenizer with byte fallback decodes them."""
    return bytes(token for token in ids if token != END).decode(errors="replace")


def say(text: bytes, *, stops: tuple[str, ...] = (), group: int = 1, logprobs: bool = False) -> list[Piece]:
    words = Words(decode, stops, (END,), index=0)
    pieces = []
    for at in range(0, len(text), group):
        ids = tuple(text[at : at + group])
        values = tuple(TokenLogprobs(token, -1.0, ((token, -1.0), (65, -float("inf")))) for token in ids)
        pieces.append(words.take(TokenEvent(ids, values if logprobs else ())))
        if pieces[-1].finish_reason is not None:
            return pieces
    return [*pieces, words.end("stop")]


@given(st.text(alphabet="ab \n\t漢😀", max_size=20), st.integers(1, 5))
def test_the_pieces_joined_are_the_text_without_the_space_around_it(text: str, group: int) -> None:
    pieces = say(text.encode(), group=group)
    assert "".join(piece.text for piece in pieces) == text.strip()
    assert [piece.finish_reason for piece in pieces][-1] == "stop"


@given(st.text(alphabet="abc ", max_size=20), st.sampled_from(["a", "bc", "c a", "abca"]), st.integers(1, 4))
def test_a_stop_string_cuts_wherever_tokens_end(text: str, stop: str, group: int) -> None:
    pieces = say(text.encode(), stops=(stop,), group=group)
    assert "".join(piece.text for piece in pieces) == text.partition(stop)[0].strip()


def test_every_token_that_is_shown_has_its_log_probability_once() -> None:
    pieces = say("  né ? ".encode() + bytes([END]), logprobs=True)
    entries = [entry for piece in pieces for entry in piece.logprobs]
    assert len(entries) == len("  né ? ".encode()), "one a token, the stop token left out"
    halves = [entry.token.utf8 for entry in entries][3:5]
    assert halves[0] is None, "half a character has no bytes of its own"
    assert entries[0].top[1].logprob == -9999.0


def test_log_probabilities_stop_where_the_words_do() -> None:
    pieces = say(b"one STOP two", stops=("STOP",), group=3, logprobs=True)
    assert "".join(entry.token.text for piece in pieces for entry in piece.logprobs) == "one "


def test_a_piece_without_news_is_false() -> None:
    assert not Piece(0, "")
    assert Piece(0, "a")
    assert Piece(0, "", finish_reason="stop")
